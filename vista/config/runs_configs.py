"""Configurations of `vista runs` and `vista runs compare`."""

from __future__ import annotations

from dataclasses import dataclass, field

from vista.config.checks import check_types
from vista.config.choices import RunOrder


@dataclass(kw_only=True, slots=True)
class RunsConfig:
    """The list of training runs in a folder."""

    folder: str = "runs"
    """Folder that contains run folders, at most four levels deep."""
    sort: RunOrder = RunOrder.best
    """Order of the list: best (the best metric first), name, newest, seconds, or parameters."""
    metric: str | None = None
    """Validation metric of each run's best model, to list and to sort by. null uses the metric that selected it."""
    out: str | None = None
    """JSON file for the list, with all metrics of each run. An existing file is replaced. null only prints the list."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(kw_only=True, slots=True)
class RunsCompareConfig:
    """Training runs side by side."""

    runs: list[str] = field(default_factory=list)
    """Folders of two or more runs."""
    out: str | None = None
    """JSON file for the comparison. An existing file is replaced. null only prints it."""

    def __post_init__(self) -> None:
        check_types(self)
