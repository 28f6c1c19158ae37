"""Configuration of `vista completion`."""

from __future__ import annotations

from dataclasses import dataclass

from vista.config.checks import check_types
from vista.config.choices import Shell


@dataclass(kw_only=True, slots=True)
class CompletionConfig:
    """The shell that the script is for."""

    shell: Shell = Shell.bash
    """The shell; `vista completion zsh` is short for `vista completion shell=zsh`."""

    def __post_init__(self) -> None:
        check_types(self)
