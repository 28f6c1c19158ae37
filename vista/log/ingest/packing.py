"""Second half of ingest: parts on disk become a segment's packed, sorted `.npy` columns.

Out of core: users are cut into buckets of at most `bucket_events` rows, which are sorted one after another. The order
of rows is total (user, time, sequence, input order), so neither threads nor chunks nor buckets change a byte. Held in
memory: the distinct ids of the new parts with their rows, and one bucket, some 150 bytes a row; a user with more rows
than a bucket makes a bucket of its own.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from vista.log.ingest.parts import ORDER, Part
from vista.log.ingest.prepare_report import Stages
from vista.log.polars_extra import pl
from vista.log.segment_writer import TableWriter
from vista.log.vocabulary import Vocabulary

BUCKET_EVENTS = 1 << 22
"""Rows of a bucket, at most."""
USER_ROW, ITEM_ROW, BUCKET = "user_row", "item_row", "bucket"


def distinct(parts: Sequence[Part]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """(users with their number of rows, items): columns `user`, `len`; `item`."""
    everything = pl.concat([part.good().select("user", "item") for part in parts])
    users, items = pl.collect_all(
        [everything.group_by("user").len(), everything.select(pl.col("item").unique())], engine="streaming"
    )
    return users, items


def extended(vocabulary: Vocabulary, frames: Sequence[pl.Series]) -> Vocabulary:
    """The vocabulary with the ids of several series."""
    ids = pl.concat(frames, how="vertical").unique() if len(frames) > 1 else frames[0]
    return vocabulary.extended(ids.to_numpy() if vocabulary.kind == "int" else ids.to_list())


def rows_of(vocabulary: Vocabulary, ids: pl.Series, name: str) -> pl.DataFrame:
    """Columns `ids.name` and `name`: each id with its row (int64 users, int32 items)."""
    rows = vocabulary.rows(ids.to_numpy() if vocabulary.kind == "int" else ids.to_list())
    return pl.DataFrame({ids.name: ids, name: rows.astype(np.int32 if name == ITEM_ROW else np.int64)})


def pack(
    parts: Sequence[Part],
    users: pl.DataFrame,
    items: pl.DataFrame,
    target: Path,
    scratch: Path,
    columns: Mapping[str, tuple[DTypeLike, tuple[int, ...]]],
    values: Callable[[pl.DataFrame], Mapping[str, NDArray[Any]]],
    *,
    bucket_events: int = BUCKET_EVENTS,
    stages: Stages,
    written: Callable[[int], object] = lambda rows: None,
) -> int:
    """Write one packed table.

    Args:
        parts: of one table.
        users: `user`, `user_row`, `len` of every user of these parts; items: `item`, `item_row`.
        target: folder of the table.
        scratch: folder for buckets.
        columns: what to write, see TableWriter.
        values: from a sorted bucket to those columns.
        stages: where times are booked.
        written: called with the number of rows of each bucket written.

    Returns:
        The number of users.
    """
    users = users.sort(USER_ROW)
    bucket = _buckets(users["len"].to_numpy(), bucket_events)
    num_rows = sum(part.num_rows for part in parts)
    writer = TableWriter(target, num_rows, columns)
    keys = users.select("user", USER_ROW, pl.Series(BUCKET, bucket))
    joined = (
        pl.concat([part.good() for part in parts])
        .join(keys.lazy(), on="user", how="inner", maintain_order="none")
        .join(items.lazy(), on="item", how="inner", maintain_order="none")
        .drop("user", "item")
    )
    for frame in _in_buckets(joined, int(bucket[-1]) + 1, scratch):
        block = _sorted(frame)
        stages.lap("sort")
        writer.append(block[USER_ROW].to_numpy(), values(block))
        stages.lap("write")
        written(block.height)
    return writer.close()


def _sorted(rows: pl.DataFrame) -> pl.DataFrame:
    """By user, time, sequence and input order, as far as there are such columns."""
    by = [name for name in (USER_ROW, "timestamp", "sequence", ORDER) if name in rows.columns]
    if "timestamp" not in by:
        return rows.sort(by)
    user, moment = rows[USER_ROW], rows["timestamp"]
    first_user, first, span = _least(user), _least(moment), _greatest(moment) - _least(moment) + 1
    if (_greatest(user) - first_user + 1) * span >= 2**63:
        return rows.sort(by)
    key = (pl.col(USER_ROW) - first_user) * span + (
        pl.col("timestamp") - first
    )  # one key instead of two: twice as fast
    return rows.with_columns(key.alias("key")).sort("key", *by[2:]).drop("key")


def _least(values: pl.Series) -> int:
    return int(values.to_numpy().min())


def _greatest(values: pl.Series) -> int:
    return int(values.to_numpy().max())


def _buckets(counts: NDArray[np.integer], limit: int) -> NDArray[np.int32]:
    """Bucket of each user: consecutive users with at most `limit` rows together, or one user with more."""
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
