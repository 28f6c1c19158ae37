"""Second half of ingest: parts on disk become a segment's packed, sorted `.npy` columns.

This works out of core: users are split into buckets of at most `bucket_events` rows, and buckets are sorted one at a
time. The order of rows is total (user, time, sequence, input order), so threads, chunks, and buckets never change a
byte. Memory holds the distinct ids of the new parts with their rows, and one bucket, about 150 bytes per row and 12
per feature of it. A user with more rows than that is a bucket by itself.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from vista.config import EventFilterConfig
from vista.errors import ConfigError, DataError, shown
from vista.installation import require_module
from vista.log.histories import rows_that_fit
from vista.log.ingest.new_features import NewRowFeatures
from vista.log.ingest.rows import ORDER, PROBLEM, Part
from vista.log.ingest.sources import Source
from vista.log.segment_files import EVENT_COLUMNS, IMPRESSION_COLUMNS
from vista.log.segment_writer import TableWriter
from vista.log.vocabulary import Vocabulary

if TYPE_CHECKING:
    import polars as pl
else:
    pl = require_module("polars", "data")


class StageTimes(dict[str, float]):
    """Seconds per stage; `lap` adds the time since the previous lap."""

    def __init__(self) -> None:
        super().__init__(dict.fromkeys(("open", "read", "vocabularies", "sort", "write", "sync"), 0.0))
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Add the seconds since the previous lap, or since the start, to `stage`."""
        now = time.perf_counter()
        self[stage] += now - self._last
        self._last = now


USER_ROW, ITEM_ROW = "user_row", "item_row"
"""Names of the columns of vocabulary rows."""


@dataclass(frozen=True, slots=True)
class DistinctIds:
    """Every user and item of a table once.

    users: columns `user` and `len`, the number of the user's rows; items: column `item`.
    """

    users: pl.DataFrame
    items: pl.DataFrame

    @classmethod
    def of(cls, parts: Sequence[Part]) -> DistinctIds:
        """The ids of a table's parts."""
        everything = pl.concat([part.good().select("user", "item") for part in parts])
        users, items = pl.collect_all(
            [everything.group_by("user").len(), everything.select(pl.col("item").unique())], engine="streaming"
        )
        return cls(users, items)

    def user_rows(self, vocabulary: Vocabulary) -> pl.DataFrame:
        """Columns `user`, `len` and `user_row` (int64)."""
        return self.users.join(_rows(vocabulary, self.users["user"], USER_ROW, np.int64), on="user")

    def item_rows(self, vocabulary: Vocabulary) -> pl.DataFrame:
        """Columns `item` and `item_row` (int32)."""
        return _rows(vocabulary, self.items["item"], ITEM_ROW, np.int32)


def _rows(vocabulary: Vocabulary, ids: pl.Series, name: str, dtype: type[np.integer]) -> pl.DataFrame:
    rows = vocabulary.rows(ids.to_numpy() if vocabulary.kind == "int" else ids.to_list())
    return pl.DataFrame({ids.name: ids, name: rows.astype(dtype)})


def extended(vocabulary: Vocabulary, ids_of_tables: Sequence[pl.Series]) -> Vocabulary:
    """The vocabulary with the ids of any number of tables."""
    if not ids_of_tables:
        return vocabulary
    ids = pl.concat(ids_of_tables, how="vertical").unique() if len(ids_of_tables) > 1 else ids_of_tables[0]
    return vocabulary.extended(ids.to_numpy() if vocabulary.kind == "int" else ids.to_list())


NO_ACTION = "event"
"""Name of the action if the source has none."""
MAX_ACTIONS = 256


@dataclass(frozen=True, slots=True)
class TableColumns:
    """The columns of a packed table, and how they are made.

    types: name to (dtype, shape of one row), as TableWriter takes them; of_block: from a sorted block of parsed rows to
    these columns.
    """

    types: Mapping[str, tuple[DTypeLike, tuple[int, ...]]]
    of_block: Callable[[pl.DataFrame], Mapping[str, NDArray[Any]]]


def actions_of(parts: Sequence[Part], known: Sequence[str]) -> list[str]:
    """Action names by code: the known names, then new ones in sorted order."""
    used = {NO_ACTION}
    if "action" in parts[0].source.columns:
        names = pl.concat([part.good().select("action") for part in parts])
        used = set(names.unique().head(100 * MAX_ACTIONS).collect(engine="streaming")["action"].to_list())
    actions = [*known, *sorted(used - set(known))]
    if len(actions) > MAX_ACTIONS:
        column = parts[0].source.columns["action"]
        raise DataError(
            f"{parts[0].source.path}: with column {column!r} the log would have {len(actions)} actions, but at most "
            f"{MAX_ACTIONS} are possible; check that it is the right column, or merge rare actions"
        )
    return actions


def time_range(parts: Sequence[Part]) -> tuple[int | None, int | None]:
    """Oldest and newest timestamp (ms) of the parts; (None, None) without times."""
    if "timestamp" not in parts[0].source.columns:
        return None, None
    times = pl.concat([part.good().select("timestamp") for part in parts])
    low, high = times.select(low=pl.col("timestamp").min(), high=pl.col("timestamp").max()).collect().row(0)
    return low, high


def event_columns(
    source: Source, actions: Sequence[str], next_ordinals: Callable[[], NDArray[np.int64]]
) -> TableColumns:
    """Columns of the events.

    Args:
        source: one of the table's sources; all have the same columns.
        actions: names by code.
        next_ordinals: returns int64 [old users], the first ordinal of each one's new events; called only if the source
            has no times.
    """
    ordinals = np.empty(0, np.int64) if "timestamp" in source.columns else next_ordinals()
    names = [name for name in EVENT_COLUMNS if name != "rating" or "rating" in source.columns]
    code = {name: number for number, name in enumerate(actions)}

    def of_block(block: pl.DataFrame) -> Mapping[str, NDArray[Any]]:
        out: dict[str, NDArray[Any]] = {"item": block[ITEM_ROW].to_numpy()}
        out |= {name: block[name].to_numpy() for name in ("timestamp", "rating") if name in block.columns}
        if "action" in block.columns:
            out["action"] = block["action"].replace_strict(code, return_dtype=pl.UInt8).to_numpy()
        else:
            out["action"] = np.full(block.height, code[NO_ACTION], np.uint8)
        if "timestamp" not in out:
            out["timestamp"] = _ordinals(block[USER_ROW].to_numpy(), ordinals)
        return out

    return TableColumns({name: (EVENT_COLUMNS[name], ()) for name in names}, of_block)


def _ordinals(user_rows: NDArray[np.int64], following: NDArray[np.int64]) -> NDArray[np.int64]:
    """Ordinal of each event in its user's history, which continues at `following` (0 for a new user)."""
    starts = np.flatnonzero(np.diff(user_rows, prepend=-1))
    users = user_rows[starts]
    held = np.zeros(len(users), np.int64)
    held[users < len(following)] = following[users[users < len(following)]]
    return np.arange(len(user_rows)) - np.repeat(starts - held, np.diff(starts, append=len(user_rows)))


def impression_columns(source: Source, tasks: Sequence[str]) -> TableColumns:
    """Columns of the impressions. An unknown label is 0 with mask 0; an unknown probability is NaN."""
    has_probability = any(name.startswith("probability:") for name in source.columns)
    names = [name for name in IMPRESSION_COLUMNS if name != "probability" or has_probability]

    def of_block(block: pl.DataFrame) -> Mapping[str, NDArray[Any]]:
        labels = [block[f"label:{task}"] for task in tasks]
        out = {
            "item": block[ITEM_ROW].to_numpy(),
            "timestamp": block["timestamp"].to_numpy(),
            "label": np.stack([label.fill_null(0).to_numpy() for label in labels], axis=1),
            "mask": np.stack([label.is_not_null().to_numpy() for label in labels], axis=1).astype(np.uint8),
        }
        if has_probability:
            columns = [block[f"probability:{task}"].fill_null(np.nan).to_numpy() for task in tasks]
            out["probability"] = np.stack(columns, axis=1)
        return out

    wide = ("label", "mask", "probability")
    types = {name: (IMPRESSION_COLUMNS[name], (len(tasks),) if name in wide else ()) for name in names}
    return TableColumns(types, of_block)


BUCKET_EVENTS = 1 << 22
"""Default maximum number of rows without features in a bucket."""
SORTED_ROW_BYTES = 150
"""Memory of a row without features while it is sorted and written."""
BUCKET = "bucket"


@dataclass(frozen=True, kw_only=True, slots=True)
class Packer:
    """Sorts and writes the packed tables of a segment."""

    scratch: Path
    """Folder for buckets."""
    bucket_events: int
    """Rows without features that are sorted at once; it never changes the result. With features, there are fewer."""
    times: StageTimes
    """Receives the seconds of "sort" and "write"."""
    on_rows_written: Callable[[int], object]
    """Called with the number of rows of each bucket that was written."""

    def pack(
        self,
        parts: Sequence[Part],
        users: pl.DataFrame,
        items: pl.DataFrame,
        columns: TableColumns,
        writer: TableWriter,
        features: NewRowFeatures,
    ) -> int:
        """Write one packed table.

        Args:
            parts: parts of one table.
            users: columns `user`, `user_row`, and `len` (number of rows) of every user in the parts.
            items: columns `item` and `item_row` of every item in the parts.
            columns: how to make the columns of the table.
            writer: of the table.
            features: of the table.

        Returns:
            The number of users.
        """
        users = users.sort(USER_ROW)
        bucket_rows = rows_that_fit(self.bucket_events, SORTED_ROW_BYTES, features.num_columns)
        bucket = _buckets(users["len"].to_numpy(), bucket_rows)
        keys = users.select("user", USER_ROW, pl.Series(BUCKET, bucket))
        joined = (
            pl.concat([features.rows(part) for part in parts])
            .join(keys.lazy(), on="user", how="inner", maintain_order="none")
            .join(items.lazy(), on="item", how="inner", maintain_order="none")
            .drop("user", "item")
        )
        for frame in _in_buckets(joined, int(bucket[-1]) + 1, self.scratch):
            block = _sorted(frame)
            self.times.lap("sort")
            writer.append(block[USER_ROW].to_numpy(), columns.of_block(block))
            features.append(block)
            self.times.lap("write")
            self.on_rows_written(block.height)
        features.close()
        return writer.close()


def _sorted(rows: pl.DataFrame) -> pl.DataFrame:
    """Rows sorted by user, time, sequence, and input order, as far as these columns exist."""
    by = [name for name in (USER_ROW, "timestamp", "sequence", ORDER) if name in rows.columns]
    if "timestamp" not in by:
        return rows.sort(by)
    user, time = rows[USER_ROW], rows["timestamp"]
    first_user, first, span = _least(user), _least(time), _greatest(time) - _least(time) + 1
    if (_greatest(user) - first_user + 1) * span >= 2**63:
        return rows.sort(by)
    # One key instead of two is twice as fast.
    key = (pl.col(USER_ROW) - first_user) * span + (pl.col("timestamp") - first)
    return rows.with_columns(key.alias("key")).sort("key", *by[2:]).drop("key")


def _least(values: pl.Series) -> int:
    return int(values.to_numpy().min())


def _greatest(values: pl.Series) -> int:
    return int(values.to_numpy().max())


def _buckets(counts: NDArray[np.integer], limit: int) -> NDArray[np.int32]:
    """Bucket of each user: consecutive users with at most `limit` rows in total, or one user with more."""
    ends = np.cumsum(counts, dtype=np.int64)
    bucket = np.zeros(len(counts), np.int32)
    start, number = 0, 0
    while start < len(counts):
        base = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, base + limit, side="right")))
        bucket[start:stop] = number
        start, number = stop, number + 1
    return bucket


def _in_buckets(rows: pl.LazyFrame, num_buckets: int, scratch: Path) -> Iterator[pl.DataFrame]:
    if num_buckets == 1:
        yield rows.drop(BUCKET).collect(engine="streaming")
        return
    folder = scratch / "buckets"
    rows.sink_ipc(pl.PartitionBy(folder, key=BUCKET, include_key=False), mkdir=True, maintain_order=False)
    for number in range(num_buckets):
        here = folder / f"{BUCKET}={number}"
        yield pl.scan_ipc(sorted(here.iterdir())).collect(engine="streaming")
        shutil.rmtree(here)
    shutil.rmtree(folder)


Kept = Mapping[str, pl.DataFrame]
"""By "item" and "user": the ids that are left, in a column of that name; no entry if all are."""


def filtered(parts: Mapping[str, Sequence[Part]], chosen: EventFilterConfig) -> tuple[dict[str, list[Part]], str]:
    """Leave out the events that a filter does not choose, and the impressions of items and users without events.

    Works out of core: each pass over the parts counts one kind of ids, and memory holds the ids that are left.

    The items and users that are left are those of the largest set of events in which each of them has enough. It does
    not depend on the order in which items and users are left out.

    Args:
        parts: by table. The files of events and impressions are written again next to the old ones, which are removed.

    Returns:
        The parts with the rows that are left, and a line for the report; the same parts and "" for a filter that keeps
        everything.

    Raises:
        ConfigError: if actions are named, but the events have none.
        DataError: if no event has a named action, or none is left.
    """
    if "events" not in parts or not (chosen.actions or chosen.counts):
        return {table: list(of_table) for table, of_table in parts.items()}, ""
    events = parts["events"]
    _check_actions(events, chosen.actions)
    kept = _largest_set(events, chosen)
    new = {table: list(of_table) for table, of_table in parts.items()}
    new["events"] = [_rewritten(part, _filtered_rows(part, chosen.actions, kept)) for part in events]
    if not any(part.num_rows for part in new["events"]):
        raise DataError(f"{events[0].source.path}: the filter leaves no event; lower filter.min_*")
    tables = ["events"]
    if chosen.counts and "impressions" in parts:
        new["impressions"] = [_rewritten(part, _filtered_rows(part, (), kept)) for part in parts["impressions"]]
        tables.append("impressions")
    counts = [f"{_total(new[table]):,} of {_total(parts[table]):,} {table}" for table in tables]
    if "impressions" in new and not _total(new["impressions"]):
        del new["impressions"]
    return new, f"the filter kept {' and '.join(counts)}"


def _check_actions(events: Sequence[Part], wanted: Sequence[str]) -> None:
    if not wanted:
        return
    source = events[0].source
    if "action" not in source.columns:
        raise ConfigError(
            f"filter.actions: the events of {source.path} have no actions; name their column with events.action=..., "
            "or leave this out"
        )
    names = pl.concat([part.good().select("action") for part in events]).unique()
    found = set(names.collect(engine="streaming")["action"].to_list())
    for name in wanted:
        if name not in found:
            raise DataError(
                f"{source.path}: no event has the action {shown(name)} of filter.actions; name some of its actions: "
                f"{', '.join(sorted(found))}"
            )


def _largest_set(events: Sequence[Part], chosen: EventFilterConfig) -> Kept:
    """The items and users that are left: each pass leaves out those with too few events, until all have enough."""
    least = {"item": chosen.min_item_events, "user": chosen.min_user_events}
    counted = [column for column in least if least[column] > 1]
    kept: dict[str, pl.DataFrame] = {}
    for column in cycle(counted):
        rows = pl.concat([_filtered_rows(part, chosen.actions, kept).select("user", "item") for part in events])
        enough = rows.group_by(column).len().filter(pl.col("len") >= least[column]).select(column)
        left = enough.collect(engine="streaming")
        is_stable = column in kept and len(left) == len(kept[column])
        kept[column] = left
        if is_stable or len(counted) == 1:
            break
    return kept


def _filtered_rows(part: Part, actions: Iterable[str], kept: Kept) -> pl.LazyFrame:
    """The good rows of a part with these actions, items, and users."""
    rows = part.good()
    if names := list(actions):
        rows = rows.filter(pl.col("action").is_in(names))
    for column, ids in kept.items():
        rows = rows.join(ids.lazy(), on=column, how="semi")
    return rows


def _rewritten(part: Part, rows: pl.LazyFrame) -> Part:
    """The part with only these of its good rows."""
    file = part.file.with_name(f"{part.file.stem}-kept.arrow")
    rows.with_columns(pl.lit(0, pl.UInt16).alias(PROBLEM)).sink_ipc(file, maintain_order=False)
    part.file.unlink()
    num_rows = pl.scan_ipc(file).select(pl.len()).collect(engine="streaming").item()
    return replace(part, file=file, num_rows=num_rows, is_filtered=True)


def _total(parts: Sequence[Part]) -> int:
    return sum(part.num_rows for part in parts)
