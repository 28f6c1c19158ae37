"""How deletion rows take effect on the segments before them. NumPy only.

A forgotten event is removed from every earlier segment, however often it occurs there. An erased user loses all events,
impressions, and features in earlier segments. Rows that are added again in the same or a later segment count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from vista.arrays import Int
from vista.log.event_keys import EventKeys, equal_events, forgotten_events
from vista.log.feature_owner import USERS
from vista.log.histories import ranges
from vista.log.packed_table import PackedTable
from vista.log.segment import Segment


def obey_deletions(segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """The segments, oldest first, without the rows that later segments delete. Reads only the affected users.

    Raises:
        LogFormatError: if there are deletions, and the ids, offsets, deletions, or user features of a segment are
            damaged.
    """
    if not any(segment.num_deletions for segment in segments[1:]):
        return tuple(segments)
    for segment in segments:
        segment.files.verify(large=False)
    left = []
    forgotten: list[EventKeys] = []
    erased = np.empty(0, np.int64)
    for segment in reversed(segments):
        gone = [equal_events(segment.events, keys)[1] for keys in forgotten]
        events = segment.events.without(np.unique(np.concatenate([_rows_of(segment.events, erased), *gone])))
        impressions = segment.impressions
        if impressions is not None:
            impressions = impressions.without(_rows_of(impressions, erased))
        features = segment.user_features
        if features is not None and np.isin(features.rows, erased).any():
            segment.files.verify_features(USERS)
            features.check_order(segment.path)
            features = features.without(erased)
        left.append(replace(segment, events=events, impressions=impressions, user_features=features))
        forgotten += [forgotten_events(segment)] if segment.forgotten is not None else []
        erased = np.union1d(erased, segment.erased)
    return tuple(reversed(left))


def _rows_of(table: PackedTable, users: Int) -> Int:
    return ranges(*table.locate(users))
