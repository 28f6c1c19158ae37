"""Configuration of `vista prepare`: source tables and the EventLog made from them."""

from __future__ import annotations

from dataclasses import dataclass, field

from vista.config.checks import check_types
from vista.config.choices import (
    IdType,
    OnBadRows,
)


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """Where a table's columns are; one `kind` of a known data set, or `table` with names."""

    kind: str = "table"
    """auto (by what lies at the path) | table | ml-1m | ml-latest-small | ml-100k | recbole | npz | simulated"""
    paths: list[str] = field(default_factory=list)
    """Files (Parquet, CSV, or the data set's own); several are read in the order of their names."""
    user: str = "user"
    """Column of user ids, integers or strings."""
    item: str = "item"
    """Column of item ids, integers or strings."""
    timestamp: str | None = None
    """Null for a table without times: input order counts then."""
    time_unit: str | None = None
    """s | ms | us | ns | iso, of numbers and text; a Parquet column of dates and times needs none."""
    action: str | None = None
    """Column of action names, such as click or buy."""
    rating: str | None = None
    """Column of ratings, which are numbers."""
    sequence: str | None = None
    """Column that orders equal timestamps; input order without it."""
    separator: str = ","
    """Of CSV files."""
    user_ids: IdType = IdType.auto
    """What user ids are; auto follows the column's type, and in text files the first value."""
    item_ids: IdType = IdType.auto
    """The same of item ids."""
    labels: list[str] = field(default_factory=list)
    """Impressions: one 0/1/empty column a task."""
    probabilities: list[str] = field(default_factory=list)
    """Impressions of a simulation: the true probability of each label, in the order of `labels`."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(kw_only=True, slots=True)
class PrepareConfig:
    """Ingest of source tables into an EventLog."""

    out: str = "data/log"
    """Folder that receives the EventLog."""
    events: SourceConfig = field(default_factory=SourceConfig)
    impressions: SourceConfig | None = None
    append: bool = False
    """Add a segment to an existing log; a source that it holds already is refused."""
    on_bad_rows: OnBadRows = OnBadRows.error
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        check_types(self)
