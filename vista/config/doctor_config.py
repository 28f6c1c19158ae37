"""Configuration of `vista doctor`."""

from __future__ import annotations

from dataclasses import dataclass

from vista.config.checks import check_types


@dataclass(kw_only=True, slots=True)
class DoctorConfig:
    """What to check in addition to this machine."""

    model: str | None = None
    """Folder of an exported model to check; null checks none."""
    store: str | None = None
    """Folder or URL of a summary store to check, and to compare with the model; null checks none."""
    data: str | None = None
    """Folder of an EventLog to check; null checks none."""
    out: str | None = None
    """JSON file for the diagnosis. An existing file is replaced. null only prints it."""

    def __post_init__(self) -> None:
        check_types(self)
