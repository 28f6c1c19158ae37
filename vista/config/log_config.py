"""Configurations of `vista prepare`, `log …`, `watch` (its stream), and `simulate`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from datetime import datetime
from typing import ClassVar

from vista.config.checks import (
    MAX_DAYS,
    MAX_THREADS,
    MAX_VALUES,
    Checked,
    IdType,
    NamesUsers,
    OnBadRows,
    Seeded,
    StreamStart,
    UsesLog,
    WorldName,
    check_max_values,
    check_types,
    require,
    require_counts,
    require_finite,
    require_share,
)
from vista.errors import ConfigError

PASSIVE = "no_"
"""Prefix of the action of events that were made from impressions whose label is 0, as in no_click."""
AGAIN = "again"
"""The label of `impressions.from_events.again_days`, which is known only so many days after the event."""
POSITION, PROPENSITY = "position", "propensity"
"""Names of numbers of impressions that no model reads: the place in the list that was shown, from 1, and the
probability that the user looked at it. `optim.examined_tasks` corrects labels by them."""


@dataclass(kw_only=True, slots=True)
class EventFilterConfig:
    """Which events of the source files become events of the log, as published protocols choose them."""

    actions: list[str] = field(default_factory=list)
    """Actions whose events are kept. Empty keeps all."""
    min_item_events: int = 1
    """Minimum number of events per item. Rarer items are dropped with their events and impressions, repeatedly, until
    this and min_user_events both hold."""
    min_user_events: int = 1
    """Minimum number of events per user. Users with fewer are dropped with their events and impressions."""

    def __post_init__(self) -> None:
        check_types(self, "filter.")
        require_counts(self, "filter.", ("min_item_events", "min_user_events"))

    @property
    def counts(self) -> bool:
        """Whether it counts the events of items or users."""
        return self.min_item_events > 1 or self.min_user_events > 1


@dataclass(kw_only=True)
class ReadsRows(Checked):
    """A command that appends rows to a log."""

    __slots__ = ()
    on_bad_rows: OnBadRows = OnBadRows.error
    """What happens to invalid rows: raise writes nothing and reports the first; quarantine sets them aside in
    quarantine.csv. With raise, a watch refuses the file and continues with the others, but an invalid message ends
    it."""


@dataclass(kw_only=True)
class ItemIds(Checked):
    """A table with a row per item, event, or impression."""

    __slots__ = ()
    item: str = "item"
    """Column of item ids, integers or text."""


@dataclass(kw_only=True)
class UserIds(Checked):
    """A table with a row per user, event, or impression."""

    __slots__ = ()
    user: str = "user"
    """Column of user ids, integers or text."""


@dataclass(kw_only=True)
class TimeUnit(Checked):
    """A table with times."""

    __slots__ = ()
    time_unit: str | None = None
    """Unit of numeric times (s, ms, us, or ns), or iso for ISO 8601 text. null for Parquet columns of dates and
    times, and for text whose format is in time_format or is to be inferred."""
    time_format: str | None = None
    """strptime format of times that are text, such as '%m/%d/%Y %H:%M'. They are in UTC unless the format has an offset
    (%z). null infers a common format from all values of the column."""

    def __post_init__(self) -> None:
        Checked.__post_init__(self)
        unit, form = self.time_unit, self.time_format
        require(unit is None or "%" not in unit, "time_unit", f"{unit!r} is a format; set it as time_format instead")
        require(unit is None or form is None, "time_format", "text in a format has no time_unit; set one of the two")
        require(form is None or "%" in form, "time_format", f"must be a strptime format such as %d/%m/%Y, got {form!r}")

    @property
    def time_form(self) -> str | None:
        """What times are: a unit, iso, a strptime format, or None if this follows from the column."""
        return self.time_format or self.time_unit


@dataclass(kw_only=True)
class TableFiles(Checked):
    """Files of one table."""

    __slots__ = ()
    paths: list[str] = field(default_factory=list)
    """Files, or folders of files. Together they are one table; files are read in the order of their names."""
    separator: str = ","
    """Character that separates the columns of text files, such as ';' or tab."""
    max_values: int = MAX_VALUES
    """Maximum number of values of a category of this table. Raise it for categories that the model hashes
    (`model.hashed_features`). `vista prepare` holds all values of one category in memory."""


@dataclass(kw_only=True, slots=True)
class FeatureTableConfig(TableFiles):
    """Files of a table with one row per item or user, and which of its columns are features.

    If no column is named, every column is read and its type decides: text and booleans are categories, and floats are
    numbers. In Parquet files, integer columns are then refused, because they could be categories or numbers; in CSV and
    TSV files, so are columns of only numbers. Otherwise only the named columns are read.
    """

    table: ClassVar[str]
    """Key of the table in the configuration: items | users."""

    categories: list[str] | None = None
    """Columns of categories: text, integers, or booleans, each with at most `max_values` values. Of items, also lists
    of these."""
    numbers: list[str] | None = None
    """Columns of numbers, such as a price. A number may be missing, but must not be infinite."""

    def __post_init__(self) -> None:
        check_types(self)
        check_max_values(self.max_values, f"{self.table}.max_values")
        named = [self.id_column, *(column for columns in self.named.values() for column in columns or ())]
        twice = sorted({name for name in named if named.count(name) > 1})
        require(not twice, self.table, f"names the column {', '.join(map(repr, twice))} twice; name each column once")

    @property
    def id_column(self) -> str:
        """The column of ids."""
        raise NotImplementedError

    @property
    def named(self) -> dict[str, list[str] | None]:
        """The columns that are named, by the key that names them."""
        return {"categories": self.categories, "numbers": self.numbers}

    @property
    def is_inferred(self) -> bool:
        """Whether the types of the columns decide which features they are."""
        return all(columns is None for columns in self.named.values())


@dataclass(kw_only=True, slots=True)
class ItemTableConfig(ItemIds, FeatureTableConfig):
    """Files of a table with one row per item, and which of its columns are features.

    Items that the log does not contain are left out. If no column is named, lists of text are categories too, and lists
    of floats are vectors.
    """

    table: ClassVar[str] = "items"

    vectors: list[str] | None = None
    """Columns of vectors, such as embeddings: lists of numbers, all of one length. In a text file, the numbers are
    separated by spaces or commas."""
    value_separator: str | None = None
    """Text that separates the values of a category, such as '|' in Comedy|Drama. null reads one value."""

    def __post_init__(self) -> None:
        FeatureTableConfig.__post_init__(self)
        require(self.value_separator != "", "items.value_separator", "must not be empty; use null for one value")

    @property
    def id_column(self) -> str:
        return self.item

    @property
    def named(self) -> dict[str, list[str] | None]:
        return {"categories": self.categories, "numbers": self.numbers, "vectors": self.vectors}


@dataclass(kw_only=True, slots=True)
class SourceColumns(ItemIds, UserIds):
    """Names of the columns of events, and of impressions."""

    timestamp: str | None = "timestamp"
    """Column of times. null for a table without times, whose events are in input order."""
    action: str | None = None
    """Column of action names, such as click or buy. null if there is only one action."""
    rating: str | None = None
    """Column of ratings, finite numbers. null reads no ratings."""
    sequence: str | None = None
    """Column of integers that orders events with equal timestamps. null orders them as in the input."""
    labels: list[str] = field(default_factory=list)
    """For impressions: the columns of labels, one per task, with the values 0, 1, or empty if unknown."""
    probabilities: list[str] = field(default_factory=list)
    """For simulated impressions: the columns of true label probabilities, in the order of `labels`. Empty reads
    none."""


@dataclass(kw_only=True, slots=True)
class UserTableConfig(UserIds, FeatureTableConfig):
    """Files of a table with one row per user, and which of its columns are features.

    Users that the log does not contain are left out.
    """

    table: ClassVar[str] = "users"

    @property
    def id_column(self) -> str:
        return self.user


@dataclass(kw_only=True, slots=True)
class SourceConfig(TimeUnit, TableFiles, SourceColumns):
    """Files of one table and the names of their columns."""

    kind: str = "table"
    """Format of the files: table is Parquet, CSV, or TSV with the columns named below. npz and simulated are known
    formats. Public data sets are ml-1m, ml-latest-small, ml-100k, complete-journey, amazon-reviews-2023, kuairand,
    yambda, and assist17. auto recognizes all of these by their file names."""
    timestamp: str | None = None
    """Column of times. null for a table without times, whose events are in input order."""
    ids: IdType = IdType.auto
    """Type of the ids of users and of items: int or str. auto uses each column's type, or in text files its first
    value."""
    categories: list[str] = field(default_factory=list)
    """Columns of features with one value per row, such as a device or a domain: text, integers, or booleans, each with
    at most `max_values` values. A value may be missing. Only feature columns named here or in numbers are read."""
    numbers: list[str] = field(default_factory=list)
    """Columns of features that are numbers, such as a dwell time or the price paid. A number may be missing, but must
    not be infinite."""

    def __post_init__(self) -> None:
        TimeUnit.__post_init__(self)
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
class FromEventsConfig(Checked):
    """Impressions made from the events of a log that has none: one per event, at its time, with the labels set here.

    So what the model sees of the user is strictly before the event.
    """

    actions: list[str] = field(default_factory=list)
    """Actions whose events become impressions. Empty takes all events."""
    again_days: float | None = None
    """Number of days after an event in which another one of the user with the item makes the label `again` 1, otherwise
    0. The label is unknown where these days end after the last event of the log. null makes no such label."""
    again_action: str | None = None
    """Action that the later event of `again` must have, such as buy. null counts any."""
    min_rating: float | None = None
    """Makes the label `liked`: 1 if the rating of the event is at least this, otherwise 0. null makes no such label."""

    def __post_init__(self) -> None:
        check_types(self)
        key = "impressions.from_events"
        require(bool(self.tasks), key, "makes no label; set again_days or min_rating")
        is_number = self.min_rating is None or math.isfinite(self.min_rating)
        require(is_number, f"{key}.min_rating", f"must be finite, got {self.min_rating}")
        if self.again_days is not None:
            in_range = 0 < self.again_days <= MAX_DAYS
            require(in_range, f"{key}.again_days", f"must be above 0 and at most {MAX_DAYS:,}, got {self.again_days}")
        require(self.again_action is None or self.again_days is not None, f"{key}.again_action", "needs again_days")

    @property
    def tasks(self) -> list[str]:
        """Names of the labels."""
        return [name for name, value in ((AGAIN, self.again_days), ("liked", self.min_rating)) if value is not None]


@dataclass(kw_only=True, slots=True)
class ImpressionsConfig(SourceConfig):
    """Files of impressions and the names of their columns, or how impressions are made from events."""

    from_events: FromEventsConfig | None = None
    """Labels of impressions that are made from the events, in place of files of impressions."""
    as_events: str | None = None
    """A label that is known right after the impression, such as click. Each impression with this label also becomes an
    event of its user, with the action click or no_click. So models read the labels of earlier impressions. Events with
    the action no_click are part of the history, but no next item to predict. Leave out events that tell the same
    clicks. null makes no events. Later files of impressions are read as those before."""

    def __post_init__(self) -> None:
        SourceConfig.__post_init__(self)
        of_files = self.as_events is None or self.from_events is None
        require(of_files, "impressions.as_events", "makes events of impressions in files; leave from_events out")
        require(self.as_events != AGAIN, "impressions.as_events", f"{AGAIN} is known only later; name another label")
        both = self.from_events is not None and self.paths
        require(not both, "impressions.from_events", "makes the impressions; leave impressions.paths out")

    def files(self) -> SourceConfig:
        """The files of impressions."""
        return SourceConfig(**{name: getattr(self, name) for name in SourceConfig.__dataclass_fields__})


@dataclass(kw_only=True, slots=True)
class PrepareConfig(ReadsRows):
    """Ingest of source tables into an EventLog."""

    out: str = "data/log"
    """Folder of the EventLog to make, or with `append` to extend."""
    files: list[str] = field(default_factory=list)
    """Files of events whose columns are guessed and printed, or folders of public data sets. These are the words of the
    command without a key, as in `vista prepare events.csv`. Keys of `events` that are set are not guessed."""
    events: SourceConfig = field(default_factory=SourceConfig)
    """Files of events."""
    impressions: ImpressionsConfig | None = None
    """Impressions with labels, from files or made from the events; null for those of the data set of the events, or for
    none."""
    items: ItemTableConfig | None = None
    """Files of item features; null for those that a public data set has next to its events, or for none."""
    users: UserTableConfig | None = None
    """Files of user features; null for those that a public data set has next to its events, or for none."""
    filter: EventFilterConfig = field(default_factory=EventFilterConfig)
    """Which events of the files are kept."""
    append: bool = False
    """Add a segment to an existing log: events, features, or both. Files of events are read with the settings of
    earlier files, except for the keys of `events` that you set. Files of events or impressions that the log already
    contains are refused. New features of an item or a user replace its older ones."""

    def __post_init__(self) -> None:
        check_types(self)
        both = self.files and self.events.paths
        require(not both, "files", "names files of events, and so does events.paths; set one of the two")
        require(
            not (self.append and self.filter.counts),
            "filter",
            "min_item_events and min_user_events would count the events of the new files alone; prepare all files "
            "together without append, or leave these out",
        )
        made = self.impressions.from_events if self.impressions is not None else None
        require(
            not (self.append and made is not None and made.again_days is not None),
            "impressions.from_events.again_days",
            "looks from each event to later ones, which append adds; prepare all files together without append",
        )


@dataclass(kw_only=True, slots=True)
class LogForgetConfig(TimeUnit, UsesLog):
    """Deletion of single events from an EventLog."""

    events: str = "deletions.csv"
    """CSV or Parquet file with the columns user, item, timestamp, and optionally action. Each row names one event."""


@dataclass(kw_only=True, slots=True)
class LogEraseConfig(NamesUsers, UsesLog):
    """Deletion of users from an EventLog."""


@dataclass(kw_only=True, slots=True)
class LogCompactConfig(UsesLog):
    """Compaction of an EventLog's segments into one, without deleted rows."""


@dataclass(kw_only=True, slots=True)
class LogVerifyConfig(UsesLog):
    """Check of an EventLog's files."""


@dataclass(kw_only=True, slots=True)
class LogStatsConfig(UsesLog):
    """Contents of an EventLog."""


_MOST_MESSAGES = 10_000_000
_MOST_SECONDS = 86_400


@dataclass(kw_only=True, slots=True)
class StreamConfig:
    """How the messages of Kafka topics are read."""

    client_file: str | None = None
    """File with settings of the Kafka client, one name=value per line, such as security.protocol, sasl.username,
    sasl.password, or ssl.ca.location, as librdkafka names them. Put passwords here; they are never printed."""
    start: StreamStart = StreamStart.oldest
    """Where to start in topics that have no messages in the log. oldest: at the oldest messages that the server still
    has. newest: at those sent after the first check. Later checks continue from the log's offsets."""
    reset_offsets: bool = False
    """Continue at the oldest message if the log's offsets do not fit the topic. Then the server has deleted the next
    messages, the topic was created again, or it is another topic. Set this for one run only, because it accepts lost
    events."""
    max_messages: int = 100_000
    """Maximum number of messages per check. They become one segment of the log. A check also stops after as many bytes
    as this many messages of 671 bytes have: 64 MiB by default."""
    max_s: float = 10.0
    """Number of seconds that a check waits for messages, and for each reply of the server."""

    def __post_init__(self) -> None:
        check_types(self, "stream.")
        require_counts(self, "stream.", ("max_messages",), most=_MOST_MESSAGES)
        require_finite(self, "stream.", ("max_s",), positive=True, most=_MOST_SECONDS)


MAX_ROWS = 10**9
"""Most events, and most impressions. A simulation is made in memory, at up to 40 bytes per row."""


@dataclass(kw_only=True, slots=True)
class SimulateConfig(Seeded):
    """A simulated log of long histories, with impressions whose true label probabilities are known."""

    out: str = "data/simulated"
    """Folder for events.parquet, impressions.parquet, and items.parquet, which `vista prepare` reads."""
    world: WorldName = WorldName.share
    """What decides a click (docs/design/simulation.md). Only share has the tasks like and long_view."""
    num_users: int = 400
    """Number of users."""
    events_per_user: int = 4000
    """Mean number of events per user. Lengths vary around it."""
    num_items: int = 1600
    """Number of items, at least num_topics."""
    num_topics: int = 32
    """Number of latent topics, at most 256. Every item belongs to one."""
    new_items: float = 0.0
    """Share of the items that appear during the period, at random times; the others exist from the start."""
    max_interests: int = 6
    """Maximum number of slow interests per user, topics that return throughout the history; below num_topics. The
    minimum is two thirds of it."""
    episode_events: int = 450
    """Mean length of an episode, in events. A user's slow interests take turns, one per episode."""
    session_events: int = 20
    """Mean length of a session, in events."""
    impressions_per_user: int = 300
    """Number of impressions per user."""
    start: str = "2024-01-01"
    """First day of the simulated period, an ISO date or time (UTC)."""
    days: float = 730.0
    """Length of the simulated period in days. Histories fill it."""
    num_threads: int = 1
    """Number of threads. It does not change the result."""
    reference: bool = False
    """Also report the best possible AUC and NE, those of the oracle, which knows the true probabilities. Others are
    those possible from the last 2,000, 200, and 32 events, and those of the best linear function of pooled vectors.
    Takes some seconds."""

    def __post_init__(self) -> None:
        Seeded.__post_init__(self)
        counts = ("num_users", "events_per_user", "num_items", "num_topics", "episode_events", "session_events")
        require_counts(self, "", (*counts, "max_interests", "impressions_per_user"), most=MAX_ROWS)
        for key in ("events_per_user", "impressions_per_user"):
            rows = self.num_users * getattr(self, key)
            require(rows <= MAX_ROWS, "num_users", f"times {key} must be at most {MAX_ROWS:,}, got {rows:,}")
        require_counts(self, "", ("num_threads",), most=MAX_THREADS)
        require_share(self, "", ("new_items",))
        without = self.new_items == 0 or self.world != WorldName.sequence
        require(without, "new_items", "cannot be used with world=sequence, whose events need all items from the start")
        try:
            datetime.fromisoformat(self.start)
        except ValueError as error:
            raise ConfigError(f"start: {error}; write a date such as 2024-01-01") from None
        topics, items, high = self.num_topics, self.num_items, self.max_interests
        require(topics <= 256, "num_topics", f"must be at most 256, got {topics}")
        require(items >= topics, "num_items", f"must be at least num_topics={topics}, got {items}")
        require(high < topics, "max_interests", f"must be below num_topics={topics}, got {high}")
        if self.world not in (WorldName.share, WorldName.positions):
            taken = {WorldName.conjunction: 2 * high, WorldName.mixed: 2 * high + 2}.get(self.world, high)
            message = (
                f"must be at least {taken + 2} with world={self.world.value} and max_interests={high}, got {topics}"
            )
            require(topics >= taken + 2, "num_topics", message)
        fewest_days = 1 + self.events_per_user / 1e6  # room for distinct times in milliseconds
        require(
            fewest_days <= self.days <= MAX_DAYS,
            "days",
            f"must lie in [{fewest_days:g}, {MAX_DAYS}] with events_per_user={self.events_per_user}, got {self.days}",
        )

    @property
    def min_interests(self) -> int:
        """Minimum number of slow interests per user."""
        return max(1, 2 * self.max_interests // 3)
