"""Features of events and impressions, over the segments of a log. NumPy only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from vista.errors import LogFormatError
from vista.log.packed_table import PackedTable
from vista.log.row_features import ColumnValues
from vista.log.segment import Segment
from vista.log.segment_manifest import REMEDY
from vista.log.vocabulary import Vocabulary

_NewValues = Mapping[str, list[Vocabulary] | None]
"""By name of a column, in the order in which the segments first have it: what each adds to a category."""


def with_row_features(segments: Sequence[Segment]) -> list[Segment]:
    """The segments with all columns of the log in each. Those that a segment lacks are missing in all of its rows.

    Args:
        segments: oldest first.

    Raises:
        LogFormatError: if a column is not of one kind.
    """
    of_events, of_requests = _event_columns(segments), _request_columns(segments)
    return [
        replace(
            segment,
            events=_completed(segment.events, of_events),
            impressions=None if segment.impressions is None else _completed(segment.impressions, of_requests),
        )
        for segment in segments
    ]


def event_values(segments: Sequence[Segment]) -> ColumnValues:
    """The values of the columns of all events: those that the segments add, end to end. Codes are their rows."""
    return _concatenated(_event_columns(segments))


def request_values(segments: Sequence[Segment]) -> ColumnValues:
    """The values of the columns of all impressions, likewise."""
    return _concatenated(_request_columns(segments))


def _event_columns(segments: Sequence[Segment]) -> _NewValues:
    return _declared(segments, lambda segment: segment.event_values, "events")


def _request_columns(segments: Sequence[Segment]) -> _NewValues:
    return _declared(segments, lambda segment: segment.request_values, "impressions")


def _declared(segments: Sequence[Segment], values_of: Callable[[Segment], ColumnValues], table: str) -> _NewValues:
    declared: dict[str, list[Vocabulary] | None] = {}
    for segment in segments:
        for name, values in values_of(segment).items():
            added = declared.setdefault(name, None if values is None else [])
            if (added is None) != (values is None):
                kinds = ("category", "number") if values is None else ("number", "category")
                raise LogFormatError(
                    f"{segment.path}: column {name!r} of the {table} is a {kinds[1]}, but in an earlier segment it is "
                    f"a {kinds[0]}; {REMEDY}"
                )
            if added is not None and values is not None:
                added.append(values)
    return declared


def _concatenated(columns: _NewValues) -> ColumnValues:
    return {name: None if added is None else Vocabulary.concatenated(added) for name, added in columns.items()}


def _completed(table: PackedTable, columns: _NewValues) -> PackedTable:
    """The table with all of these columns. Those that it lacks take no memory."""
    num_rows = table.num_rows + table.num_deleted
    features = {
        name: table.features[name]
        if name in table.features
        else np.broadcast_to(np.float32(np.nan) if added is None else np.int8(-1), num_rows)
        for name, added in columns.items()
    }
    return replace(table, features=features)
