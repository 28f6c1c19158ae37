"""The labeled impressions that training may use. Letters: N impressions, B chunks."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int, offsets_of
from vista.config import DataConfig, TrainConfig
from vista.log.event_log import EventLog
from vista.log.gaps import gap_bucket
from vista.log.histories import token_groups
from vista.log.impressions import Impressions
from vista.log.splits import EVENTS_PER_BLOCK, split_until


@dataclass(frozen=True, slots=True)
class VisibleRows:
    """Impressions that training may see, in the log's order; int64 [N] each."""

    row: Int
    """Rows of the log's impressions."""
    user: Int
    """Rows of the log."""
    position: Int
    """Events of the user strictly before the impression."""
    before: Int
    """Time of the newest of these (ms); arbitrary if there is none."""

    def select(self, index: Int) -> VisibleRows:
        """Some of the rows."""
        return VisibleRows(self.row[index], self.user[index], self.position[index], self.before[index])


def visible_rows(log: EventLog, table: Impressions, counts: Int, data: DataConfig, since: int | None) -> VisibleRows:
    """The impressions of the training part, with or without a known label.

    Args:
        table: the log's impressions.
        counts: int64 [num_users] events of each user that training may use.
        since: leave out the impressions before this time (ms).
    """
    # An impression between the last visible event and a hidden one may show the hidden label itself.
    hides = counts < log.lengths
    until = split_until(data, "train")
    timestamp = np.asarray(table.timestamp)
    user = np.repeat(np.arange(log.num_users), np.diff(table.offsets))
    position = np.zeros(len(timestamp), np.int64)
    before = np.zeros(len(timestamp), np.int64)
    shown = np.flatnonzero(np.diff(table.offsets))
    for part in token_groups(log.lengths[shown], EVENTS_PER_BLOCK):
        users = shown[part]
        events = log.gather(users, features=False)
        begins, times_of_all = events.offsets.tolist(), np.asarray(events.timestamp)
        bounds = zip(table.offsets[users].tolist(), table.offsets[users + 1].tolist(), pairwise(begins), strict=True)
        for low, high, (begin, end) in bounds:
            times = times_of_all[begin:end]
            at = times.searchsorted(timestamp[low:high], side="left")
            position[low:high] = at
            before[low:high] = times[np.maximum(at - 1, 0)] if begin < end else timestamp[low:high]
    visible = position <= counts[user]
    if until.before is not None:
        visible &= timestamp < until.before
    else:
        visible &= (position < counts[user]) | ~hides[user]
    if since is not None:
        visible &= timestamp >= since
    kept = np.flatnonzero(visible)
    return VisibleRows(kept, user[kept], position[kept], before[kept])


@dataclass(frozen=True, slots=True)
class VisibleImpressions:
    """Impressions, sorted by user row and time."""

    user: Int
    """int64 [N] rows of the log."""
    position: Int
    """int64 [N] events of the user strictly before the impression."""
    item: Int
    """int64 [N] model item rows."""
    gap: Int
    """int64 [N] log buckets of the time since the newest event before the impression."""
    label: NDArray[np.float32]
    """[N, num_tasks]."""
    mask: NDArray[np.bool_]
    """[N, num_tasks]: True where the label is known."""
    time: Int
    """int64 [N] ms."""
    row: Int
    """int64 [N] rows of the log's impressions."""
    offsets: Int
    """int64 [num_users + 1]: user u has the impressions [offsets[u], offsets[u + 1])."""

    @classmethod
    def of(
        cls, log: EventLog, item_rows: Int, counts: Int, config: TrainConfig, tasks: list[str], since: int | None
    ) -> VisibleImpressions:
        """The impressions of the training part with a known label.

        Args:
            item_rows: int64 [log.num_items], the model row of each of the log's items.
            counts: int64 [num_users] events of each user that training may use.
            tasks: the labels that are trained.
            since: leave out the impressions before this time (ms).
        """
        table, data = log.impressions, config.data
        if table is None:
            none = np.zeros(0, np.int64)
            empty = np.zeros((0, 0), np.float32)
            return cls(none, none, none, none, empty, empty > 0, none, none, np.zeros(log.num_users + 1, np.int64))
        visible = visible_rows(log, table, counts, data, since)
        columns = [table.tasks.index(task) for task in tasks]
        mask = np.asarray(table.mask)[visible.row][:, columns].astype(np.bool_)
        kept = visible.select(np.flatnonzero(mask.any(1)))
        time = np.asarray(table.timestamp)[kept.row]
        use_time = log.has_time and config.model.use_time
        gap = np.where(kept.position > 0, gap_bucket(time - kept.before), 0) if use_time else kept.position * 0
        return cls(
            kept.user,
            kept.position,
            item_rows[table.item[kept.row]],
            gap,
            np.asarray(table.label)[kept.row][:, columns].astype(np.float32),
            mask[mask.any(1)],
            time,
            kept.row,
            offsets_of(np.bincount(kept.user, minlength=log.num_users)),
        )

    def ranges(self, user: Int, start: Int, stop: Int, first: Int) -> tuple[Int, Int]:
        """Index ranges of the impressions of chunks: positions in (start, stop], and `first` in a user's first chunk.

        So an impression between two chunks belongs to the earlier one, whose events it may see.

        Args:
            user: int64 [B] users of the chunks, which hold the events [start, stop) of these, int64 [B].
            first: int64 [B] events before a user's first chunk.
        """
        if len(self.position) == 0:
            return np.zeros(len(user), np.int64), np.zeros(len(user), np.int64)
        # (user, position) as one sorted key.
        width = int(max(self.position.max(), stop.max(initial=0))) + 2
        key = self.user * width + self.position
        low = np.searchsorted(key, user * width + np.where(start > first, start, first - 1), side="right")
        high = np.searchsorted(key, user * width + stop, side="right")
        return low, high
