"""Configuration of `vista compare`."""

from __future__ import annotations

from dataclasses import dataclass, field

from vista.config.checks import check_types


@dataclass(kw_only=True, slots=True)
class CompareConfig:
    """A paired test between two models that were evaluated on the same users."""

    a: list[str] = field(default_factory=list)
    """Files that `vista evaluate` wrote as `out`: the first model, with one file per seed. The metrics of each user are
    read from <file>.npz, and averaged over the seeds."""
    b: list[str] = field(default_factory=list)
    """The same of the second model. Differences are those of b minus a."""

    def __post_init__(self) -> None:
        check_types(self)
