"""What ingest needs to know about the log that it extends. It does not use EventLog, which builds on ingest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.log.deleted_rows import obey_deletions
from vista.log.merged_row_features import event_values, request_values
from vista.log.row_features import ColumnValues
from vista.log.segment import Segment, read_segments, read_vocabularies
from vista.log.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class ExistingLog:
    """The log before an ingest; a new log has no segments and no ids.

    segments: oldest first, without the rows that later ones delete; users, items: vocabularies of all segments.
    """

    segments: Sequence[Segment]
    users: Vocabulary
    items: Vocabulary

    @classmethod
    def open(cls, path: Path) -> ExistingLog:
        """Open the log in a folder.

        Raises:
            LogFormatError: if it is missing or damaged.
        """
        segments = read_segments(path)
        for segment in segments:
            segment.files.verify(large=False)  # A damaged id would be added to the log as a new one.
        return cls(obey_deletions(segments), *read_vocabularies(segments))

    @classmethod
    def empty(cls, kinds: Mapping[str, str]) -> ExistingLog:
        """A log without segments, with ids of the given `kinds` ("int" or "str", of "user" and "item")."""
        return cls((), Vocabulary.empty(kinds["user"]), Vocabulary.empty(kinds["item"]))

    @property
    def manifests(self) -> list[dict[str, Any]]:
        """The segments' manifests, oldest first."""
        return [segment.manifest for segment in self.segments]

    @property
    def last_segment(self) -> int:
        """Number of the newest segment; 0 without segments."""
        return self.segments[-1].last if self.segments else 0

    @property
    def actions(self) -> list[str]:
        """Names of the actions by code."""
        return list(self.manifests[-1]["actions"]) if self.segments else []

    @property
    def tasks(self) -> list[str]:
        """Names of the impressions' labels; empty without impressions."""
        return list(self.manifests[-1]["tasks"]) if self.segments else []

    def row_values(self, table: str) -> ColumnValues:
        """The columns of features of "events" or "impressions", with the values of each category."""
        return event_values(self.segments) if table == "events" else request_values(self.segments)

    def next_ordinals(self) -> NDArray[np.int64]:
        """In a log without times: one more than the last ordinal of each user, int64 [num_users]."""
        following = np.zeros(len(self.users), np.int64)
        for events in (segment.events for segment in self.segments):
            has = np.flatnonzero(np.diff(events.offsets))
            last = events.columns["timestamp"][events.places(events.offsets[has + 1] - 1)]
            following[events.users[has]] = np.maximum(following[events.users[has]], last + 1)
        return following
