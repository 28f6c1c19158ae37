"""Configuration of `vista prepare`: source tables and the EventLog made from them."""

from __future__ import annotations

from dataclasses import dataclass, field

from vista.config.checks import check_types, require
from vista.config.choices import IdType, OnBadRows
from vista.config.event_filter_config import EventFilterConfig
from vista.config.item_table_config import ItemTableConfig
from vista.config.max_values import MAX_VALUES, check_max_values
from vista.config.source_columns import SourceColumns
from vista.config.user_table_config import UserTableConfig


@dataclass(kw_only=True, slots=True)
class SourceConfig(SourceColumns):
    """Files of one table and the names of their columns."""

    kind: str = "table"
    """Format of the files: table (Parquet, CSV, or TSV with the columns named below), a known format (recbole, npz,
    simulated), a public data set (ml-1m, ml-latest-small, ml-100k, complete-journey, amazon-reviews-2023,
    kuairand, yambda, longctr, t-ecd), or auto, which recognizes these by their file names."""
    paths: list[str] = field(default_factory=list)
    """Files or folders to read. Several files are read in the order of their names."""
    timestamp: str | None = None
    """Column of times. null for a table without times, whose events are in input order."""
    time_unit: str | None = None
    """Unit of numeric times (s, ms, us, or ns), or iso for ISO 8601 text. null for Parquet columns of dates and
    times."""
    separator: str = ","
    """Character that separates the columns of text files, such as ';' or tab."""
    user_ids: IdType = IdType.auto
    """Type of user ids: int or str. auto uses the column's type, or in text files the first value."""
    item_ids: IdType = IdType.auto
    """Type of item ids: int or str. auto uses the column's type, or in text files the first value."""
    categories: list[str] = field(default_factory=list)
    """Columns of features with one value per row, such as a device or a domain: text, integers, or booleans, each with
    at most `max_values` values. A value may be missing. Only feature columns named here or in numbers are read."""
    numbers: list[str] = field(default_factory=list)
    """Columns of features that are numbers, such as a dwell time or the price paid. A number may be missing, but must
    not be infinite."""
    max_values: int = MAX_VALUES
    """Maximum number of values of a category of this table. Raise it for categories that the model hashes
    (`model.hashed_features`). `vista prepare` holds all values of one category in memory."""

    def __post_init__(self) -> None:
        SourceColumns.__post_init__(self)
        check_max_values(self.max_values, "max_values")
        features = [*self.categories, *self.numbers]
        single = [self.user, self.item, self.timestamp, self.action, self.rating, self.sequence]
        others = [*single, *self.labels, *self.probabilities]
        twice = sorted({name for name in features if features.count(name) > 1 or name in others})
        require(
            not twice,
            "categories, numbers",
            f"list {', '.join(map(repr, twice))} twice, or list a column that already has another role; name each "
            "column once",
        )


@dataclass(kw_only=True, slots=True)
class PrepareConfig:
    """Ingest of source tables into an EventLog."""

    out: str = "data/log"
    """Folder of the EventLog to make, or with `append` to extend."""
    events: SourceConfig = field(default_factory=SourceConfig)
    """Files of events."""
    impressions: SourceConfig | None = None
    """Files of impressions with labels; null for those of the data set of the events, or for none."""
    items: ItemTableConfig | None = None
    """Files of item features; null for those that a public data set has next to its events, or for none."""
    users: UserTableConfig | None = None
    """Files of user features; null for those that a public data set has next to its events, or for none."""
    filter: EventFilterConfig = field(default_factory=EventFilterConfig)
    """Which events of the files are kept."""
    append: bool = False
    """Add a segment to an existing log: events, features, or both. Files of events or impressions that the log already
    contains are refused. New features of an item or a user replace its older ones."""
    on_bad_rows: OnBadRows = OnBadRows.error
    """What happens to invalid rows: raise writes nothing and reports the first; quarantine sets them aside in
    quarantine.csv."""
    progress: bool = True
    """Show progress bars."""

    def __post_init__(self) -> None:
        check_types(self)
        require(
            not (self.append and self.filter.counts),
            "filter",
            "min_item_events and min_user_events would count the events of the new files alone; prepare all files "
            "together without append, or leave these out",
        )
