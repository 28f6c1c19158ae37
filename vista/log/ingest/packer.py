"""Second half of ingest: parts on disk become a segment's packed, sorted `.npy` columns.

This works out of core: users are split into buckets of at most `bucket_events` rows, and buckets are sorted one at a
time. The order of rows is total (user, time, sequence, input order), so threads, chunks, and buckets never change a
byte. Memory holds the distinct ids of the new parts with their rows, and one bucket, about 150 bytes per row and 12
per feature of it. A user with more rows than that is a bucket by itself.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vista.installation import require_module
from vista.log.ingest.columns import TableColumns
from vista.log.ingest.distinct_ids import USER_ROW
from vista.log.ingest.new_row_features import NewRowFeatures
from vista.log.ingest.parts import ORDER, Part
from vista.log.ingest.stage_times import StageTimes
from vista.log.row_features import rows_that_fit
from vista.log.segment_writer import TableWriter

if TYPE_CHECKING:
    import polars as pl
else:
    pl = require_module("polars", "data")

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
