"""Impressions that are made from events, with labels from later events or ratings; and events made from impressions.

An impression that is made from an event has its time, so that what comes before it excludes the event itself. They are
made from blocks of whole users, which bound the memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vista.config import FromEventsConfig
from vista.config.log_config import PASSIVE
from vista.errors import ConfigError, DataError, shown
from vista.installation import require_module
from vista.log.histories import DAY_MS
from vista.log.ingest.packer import ITEM_ROW, USER_ROW, impression_columns
from vista.log.ingest.rows import ORDER, PROBLEM, VALUE, Part, values_file
from vista.log.ingest.sources import Source, tasks_of
from vista.log.segment_files import IMPRESSIONS
from vista.log.segment_writer import SegmentWriter, TableWriter

if TYPE_CHECKING:
    import polars as pl
else:
    pl = require_module("polars", "data")


def check_labels(config: FromEventsConfig, events: Sequence[Source], tasks: Sequence[str]) -> None:
    """Refuse events without what the labels are made from, and labels that are not those of the log.

    Args:
        events: the sources of events.
        tasks: the labels that the log has so far.

    Raises:
        ConfigError: naming the key.
        DataError: if the log has other labels.
    """
    keys = "impressions.from_events"
    if not events:
        raise ConfigError(f"{keys}: there are no events to make impressions from; name their files")
    needed = {"timestamp": keys}
    if config.actions or config.again_action is not None:
        needed["action"] = f"{keys}.{'actions' if config.actions else 'again_action'}"
    if config.min_rating is not None:
        needed["rating"] = f"{keys}.min_rating"
    for column, key in needed.items():
        if column not in events[0].columns:
            raise ConfigError(f"{key}: {events[0].path} has no {column}s; name their column with events.{column}=...")
    if tasks and config.tasks != tasks:
        raise DataError(
            f"{events[0].path}: the log has the labels {tasks}, but {keys} makes {config.tasks}; make the same labels, "
            "or none"
        )


def _check_actions(config: FromEventsConfig, events: Source, actions: Sequence[str]) -> None:
    """Refuse actions that no event has. Raises DataError naming the key, and the actions of the events."""
    again = [] if config.again_action is None else [config.again_action]
    for key, names in (("actions", config.actions), ("again_action", again)):
        for name in names:
            if name not in actions:
                raise DataError(
                    f"{events.path}: no event has the action {shown(name)} of impressions.from_events.{key}; name some "
                    f"of its actions: {', '.join(actions)}"
                )


def make_impressions(block: pl.DataFrame, config: FromEventsConfig, end_ms: int) -> pl.DataFrame:
    """The impressions of a block of events.

    Args:
        block: all events of some users, sorted by user and time.
        end_ms: time of the last event of the log.

    Returns:
        A row per event of `config.actions`, in their order: USER_ROW, ITEM_ROW, timestamp, and uint8 labels, which are
        null where `again_days` ends after `end_ms`.
    """
    keys = [USER_ROW, ITEM_ROW, "timestamp"]
    shown_events = block.filter(pl.col("action").is_in(config.actions)) if config.actions else block
    labels = []
    if config.again_days is not None:
        later = block if config.again_action is None else block.filter(pl.col("action") == config.again_action)
        # The first of these events that is strictly later; `later` is sorted by time within each user and item.
        shown_events = shown_events.join_asof(
            later.select(*keys, next=pl.col("timestamp")),
            on="timestamp",
            by=keys[:2],
            strategy="forward",
            allow_exact_matches=False,
            check_sortedness=False,
        )
        within = round(config.again_days * DAY_MS)
        is_again = (pl.col("next") - pl.col("timestamp") <= within).fill_null(False)
        labels.append(pl.when(pl.col("timestamp") + within <= end_ms).then(is_again).alias("label:again"))
    if config.min_rating is not None:
        labels.append((pl.col("rating") >= pl.lit(config.min_rating, pl.Float32)).alias("label:liked"))
    return shown_events.select(*keys, *(label.cast(pl.UInt8) for label in labels))


class MadeImpressions:
    """The impressions of a segment: `add` takes its events block by block, `write` writes the table.

    Args:
        config: which events become impressions, and their labels.
        events: one of the sources of events, which have the `actions`; DataError if they lack one of `config`.
        end_ms: time of the last event.
        scratch: folder for the impressions before they are counted.
    """

    def __init__(
        self, config: FromEventsConfig, events: Source, actions: Sequence[str], end_ms: int, scratch: Path
    ) -> None:
        _check_actions(config, events, actions)
        self._config, self._events, self._end_ms = config, events, end_ms
        self._scratch = scratch
        self._blocks: list[Path] = []
        self.num_rows = 0
        """Impressions with a known label; the others are left out."""
        self._num_events = 0
        self._known = dict.fromkeys(config.tasks, 0)
        self._positive = dict.fromkeys(config.tasks, 0)

    def add(self, block: pl.DataFrame) -> None:
        """Make the impressions of the next block of events."""
        made = make_impressions(block, self._config, self._end_ms)
        labels = [pl.col(f"label:{task}") for task in self._config.tasks]
        self._num_events += made.height
        made = made.filter(pl.any_horizontal(label.is_not_null() for label in labels))
        for task in self._config.tasks:
            self._known[task] += made[f"label:{task}"].count()
            self._positive[task] += int(made[f"label:{task}"].cast(pl.Int64).sum())
        if made.height:
            self._blocks.append(self._scratch / f"made-{len(self._blocks):06d}.arrow")
            made.write_ipc(self._blocks[-1])
        self.num_rows += made.height

    def write(self, writer: SegmentWriter) -> int:
        """Write the table; returns the number of users with impressions. Raises ConfigError if no label is known."""
        if not self.num_rows:
            raise ConfigError(
                f"impressions.from_events.again_days={self._config.again_days:g}: the log ends less than so many days "
                "after its first event, so no label is known; set fewer days"
            )
        types, columns_of = impression_columns(self._events, self._config.tasks)
        table = TableWriter(writer, IMPRESSIONS.prefix or "", self.num_rows, types)
        for file in self._blocks:
            block = pl.read_ipc(file)
            table.append(block[USER_ROW].to_numpy(), columns_of(block))
        return table.close()

    def lines(self) -> list[str]:
        """A line per label for the report, and what was left out."""
        lines = [
            f"label {task}: {known:,} impressions made from events, {self._positive[task]:,} of them positive"
            for task, known in self._known.items()
        ]
        unknown = self._num_events - self._known.get("again", self._num_events)
        if unknown:
            left_out = "are masked in these impressions" if self._config.min_rating is not None else "are left out"
            lines.append(
                f"{unknown:,} labels again {left_out}: their {self._config.again_days:g} days end after the last event"
            )
        return lines


def check_as_events(task: str, sources: Mapping[str, Sequence[Source]]) -> None:
    """Refuse sources, by table, whose impressions cannot become events by the label `task`. Raises ConfigError."""
    key = "impressions.as_events"
    if "events" not in sources or "impressions" not in sources:
        raise ConfigError(f"{key}={task}: needs files of events and of impressions; name both")
    made_from = sources["impressions"][0]
    if task not in (offered := tasks_of(made_from)):
        raise ConfigError(f"{key}={task}: {made_from.path} has only the labels: {', '.join(offered)}")
    path, columns = sources["events"][0].path, sources["events"][0].columns
    if "action" not in columns:
        raise ConfigError(f"{key}: the events of {path} have no actions; name their column with events.action=...")
    if "rating" in columns:
        raise ConfigError(f"{key}: impressions have no ratings, but events do; leave these out with events.rating=null")


def events_of_impressions(impressions: Sequence[Part], events: Sequence[Part], task: str) -> list[Part]:
    """The impressions whose label is known, as parts of events. Raises ConfigError without impressions."""
    if not impressions:
        raise ConfigError(f"impressions.as_events={task}: the filter leaves no impression; lower filter.min_*")
    source, label, made = events[0].source, pl.col(f"label:{task}"), []
    own = {
        **{name: pl.col(name) for name in ("user", "item", "timestamp")},
        "action": pl.when(label == 1).then(pl.lit(task)).otherwise(pl.lit(PASSIVE + task)),
        ORDER: pl.col(ORDER) + len(events) * 2**32,  # after events of the same time
        PROBLEM: pl.lit(0, pl.UInt16),
    }
    schema = pl.scan_ipc(events[0].file).collect_schema()
    columns = [own.get(name, pl.lit(None, dtype)).alias(name) for name, dtype in schema.items()]
    for part in impressions:
        file = part.file.with_name(f"events-of-{part.file.name}")
        part.good().filter(label.is_not_null()).select(columns).sink_ipc(file, maintain_order=False)
        for column in source.columns:
            if column.startswith("category:"):
                pl.DataFrame({VALUE: pl.Series([], dtype=pl.String)}).write_ipc(values_file(file, source, column))
        num_rows = pl.scan_ipc(file).select(pl.len()).collect(engine="streaming").item()
        identity = {name: getattr(part.source, name) for name in ("path", "name", "digest", "size")}
        made.append(Part(replace(source, **identity), file, num_rows, 0))
    return made
