"""Second half of ingest: parts on disk become a segment's packed, sorted `.npy` columns.

This works out of core: users are split into buckets of at most `bucket_events` rows, and buckets are sorted one at a
time. The order of rows is total (user, time, sequence, input order), so threads, chunks, and buckets never change a
byte. Memory holds the distinct ids of the new parts with their rows, and one bucket, about 150 bytes per row and 12
per feature of it. A user with more rows than that is a bucket by itself.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

from vista.arrays import Int
from vista.config import EventFilterConfig
from vista.errors import ConfigError, DataError, shown
from vista.installation import require_module
from vista.log.histories import RowArrays, token_groups
from vista.log.ingest.rows import ORDER, PROBLEM, Part
from vista.log.ingest.sources import Source
from vista.log.segment_files import EVENT_COLUMNS, IMPRESSION_COLUMNS
from vista.log.vocabulary import Vocabulary

if TYPE_CHECKING:
    import polars as pl
else:
    pl = require_module("polars", "data")


USER_ROW, ITEM_ROW = "user_row", "item_row"
"""Names of the columns of vocabulary rows."""


DistinctIds: TypeAlias = tuple[pl.DataFrame, pl.DataFrame]
"""Every user of a table, with columns `user` and `len`, the number of rows; and every item, in a column `item`."""


def distinct_ids(parts: Sequence[Part]) -> DistinctIds:
    """The ids of a table's parts."""
    rows = pl.concat([part.good().select("user", "item") for part in parts])
    users, items = pl.collect_all(
        [rows.group_by("user").len(), rows.select(pl.col("item").unique())], engine="streaming"
    )
    return users, items


def _given(ids: pl.Series, vocabulary: Vocabulary) -> Any:
    return ids.to_numpy() if vocabulary.kind == "int" else ids.to_list()


def extended(vocabulary: Vocabulary, ids_of_tables: Sequence[pl.Series]) -> Vocabulary:
    """The vocabulary with the ids of any number of tables."""
    if not ids_of_tables:
        return vocabulary
    ids = pl.concat(ids_of_tables, how="vertical").unique() if len(ids_of_tables) > 1 else ids_of_tables[0]
    return vocabulary.extended(_given(ids, vocabulary))


NO_ACTION = "event"
"""Name of the action if the source has none."""
MAX_ACTIONS = 256


ColumnTypes: TypeAlias = Mapping[str, tuple[DTypeLike, tuple[int, ...]]]
"""By name of a column: dtype, and shape of one row, as TableWriter takes them."""


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
    source: Source, actions: Sequence[str], next_ordinals: Callable[[], Int]
) -> tuple[ColumnTypes, Callable[[pl.DataFrame], RowArrays]]:
    """The columns of the events, and the function that makes them from a sorted block of rows.

    Args:
        source: one of the table's sources; all have the same columns.
        actions: names by code.
        next_ordinals: returns int64 [old users], the first ordinal of each one's new events; called only if the source
            has no times.
    """
    ordinals = np.empty(0, np.int64) if "timestamp" in source.columns else next_ordinals()
    names = [name for name in EVENT_COLUMNS if name != "rating" or "rating" in source.columns]
    code = {name: number for number, name in enumerate(actions)}

    def of_block(block: pl.DataFrame) -> RowArrays:
        out: dict[str, NDArray[Any]] = {"item": block[ITEM_ROW].to_numpy()}
        out |= {name: block[name].to_numpy() for name in ("timestamp", "rating") if name in block.columns}
        if "action" in block.columns:
            out["action"] = block["action"].replace_strict(code, return_dtype=pl.UInt8).to_numpy()
        else:
            out["action"] = np.full(block.height, code[NO_ACTION], np.uint8)
        if "timestamp" not in out:
            out["timestamp"] = _ordinals(block[USER_ROW].to_numpy(), ordinals)
        return out

    return {name: (EVENT_COLUMNS[name], ()) for name in names}, of_block


def _ordinals(user_rows: Int, following: Int) -> Int:
    """Ordinal of each event in its user's history, which continues at `following` (0 for a new user)."""
    starts = np.flatnonzero(np.diff(user_rows, prepend=-1))
    users = user_rows[starts]
    held = np.zeros(len(users), np.int64)
    held[users < len(following)] = following[users[users < len(following)]]
    return np.arange(len(user_rows)) - np.repeat(starts - held, np.diff(starts, append=len(user_rows)))


def impression_columns(source: Source, tasks: Sequence[str]) -> tuple[ColumnTypes, Callable[[pl.DataFrame], RowArrays]]:
    """As `event_columns` for impressions. An unknown label is 0 with mask 0; an unknown probability is NaN."""
    has_probability = any(name.startswith("probability:") for name in source.columns)
    names = [name for name in IMPRESSION_COLUMNS if name != "probability" or has_probability]

    def of_block(block: pl.DataFrame) -> RowArrays:
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
    return {name: (IMPRESSION_COLUMNS[name], (len(tasks),) if name in wide else ()) for name in names}, of_block


BUCKET_EVENTS = 1 << 22
"""Default maximum number of rows without features in a bucket."""
SORTED_ROW_BYTES = 150
"""Memory of a row without features while it is sorted and written."""
_BUCKET = "bucket"


def sorted_blocks(
    parts: Sequence[pl.LazyFrame],
    ids: DistinctIds,
    vocabularies: tuple[Vocabulary, Vocabulary],
    bucket_rows: int,
    scratch: Path,
) -> Iterator[pl.DataFrame]:
    """Rows sorted by user, time, sequence, and input order, as far as these columns exist, in blocks of whole users.

    Args:
        parts: the rows, with `user` and `item`, in place of which the blocks have USER_ROW and ITEM_ROW.
        ids: those of the rows.
        vocabularies: of users and items, with these ids.
        bucket_rows: rows of a block, unless one user has more.
        scratch: folder for the blocks, if there are several.
    """
    (users, items), (known_users, known_items) = ids, vocabularies
    users = users.with_columns(pl.Series(USER_ROW, known_users.rows(_given(users["user"], known_users)))).sort(USER_ROW)
    item_rows = known_items.rows(_given(items["item"], known_items)).astype(np.int32)
    bucket = np.zeros(len(users), np.int32)
    for number, block in enumerate(token_groups(users["len"].to_numpy().astype(np.int64), bucket_rows)):
        bucket[block] = number
    joined = (
        pl.concat(parts)
        .join(
            users.select("user", USER_ROW, pl.Series(_BUCKET, bucket)).lazy(),
            on="user",
            how="inner",
            maintain_order="none",
        )
        .join(items.with_columns(pl.Series(ITEM_ROW, item_rows)).lazy(), on="item", how="inner", maintain_order="none")
        .drop("user", "item")
    )
    if bucket[-1] == 0:
        yield _sorted(joined.drop(_BUCKET).collect(engine="streaming"))
        return
    folder = scratch / "buckets"
    joined.sink_ipc(pl.PartitionBy(folder, key=_BUCKET, include_key=False), mkdir=True, maintain_order=False)
    for number in range(int(bucket[-1]) + 1):
        here = folder / f"{_BUCKET}={number}"
        yield _sorted(pl.scan_ipc(sorted(here.iterdir())).collect(engine="streaming"))
        shutil.rmtree(here)
    shutil.rmtree(folder)


def _sorted(rows: pl.DataFrame) -> pl.DataFrame:
    by = [name for name in (USER_ROW, "timestamp", "sequence", ORDER) if name in rows.columns]
    if "timestamp" in by:
        user, time = rows[USER_ROW].to_numpy(), rows["timestamp"].to_numpy()
        first_user, first = int(user.min()), int(time.min())
        span = int(time.max()) - first + 1
        if (int(user.max()) - first_user + 1) * span < 2**63:  # One key instead of two is twice as fast.
            key = (pl.col(USER_ROW) - first_user) * span + (pl.col("timestamp") - first)
            return rows.with_columns(key.alias("key")).sort("key", *by[2:], nulls_last=True).drop("key")
    return rows.sort(by, nulls_last=True)


Kept = Mapping[str, pl.DataFrame]
"""By "item" and "user": the ids that are left, in a column of that name; no entry if all are."""


def filtered(parts: Mapping[str, list[Part]], chosen: EventFilterConfig) -> tuple[dict[str, list[Part]], str]:
    """Leave out the events that a filter does not choose, and the impressions of items and users without events.

    Works out of core: each pass over the parts counts one kind of ids, and memory holds the ids that are left.

    The items and users that are left are those of the largest set of events in which each of them has enough. It does
    not depend on the order in which items and users are left out.

    Args:
        parts: by table. The files of events and impressions are written again.

    Returns:
        The parts with the rows that are left, and a line for the report; the same parts and "" for a filter that keeps
        everything.

    Raises:
        ConfigError: if actions are named, but the events have none.
        DataError: if no event has a named action, or none is left.
    """
    new = dict(parts)
    if "events" not in parts or not (chosen.actions or chosen.counts):
        return new, ""
    events = parts["events"]
    _check_actions(events, chosen.actions)
    kept = _largest_set(events, chosen)
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


def _filtered_rows(part: Part, actions: Sequence[str], kept: Kept) -> pl.LazyFrame:
    """The good rows of a part with these items and users, and, if there are any, these actions."""
    rows = part.good()
    if actions:
        rows = rows.filter(pl.col("action").is_in(actions))
    for column, ids in kept.items():
        rows = rows.join(ids.lazy(), on=column, how="semi")
    return rows


def _rewritten(part: Part, rows: pl.LazyFrame) -> Part:
    """The part with only these of its good rows, in its file."""
    kept = part.file.with_suffix(".kept")
    rows.with_columns(pl.lit(0, pl.UInt16).alias(PROBLEM)).sink_ipc(kept, maintain_order=False)
    num_rows = pl.scan_ipc(kept).select(pl.len()).collect(engine="streaming").item()
    kept.replace(part.file)
    return replace(part, num_rows=num_rows, is_filtered=True)


def _total(parts: Sequence[Part]) -> int:
    return sum(part.num_rows for part in parts)
