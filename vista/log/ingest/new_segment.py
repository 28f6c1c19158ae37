"""The segment that one run of ingest writes: its manifest and its warnings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vista.log.gaps import YEAR_1971_MS
from vista.log.ingest.existing_log import ExistingLog
from vista.log.ingest.parts import Part
from vista.log.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True, slots=True)
class NewSegment:
    """What one run of ingest writes into a segment.

    before: the log without it; parts: by table, "events", "impressions", "items", and "users"; users, items, actions,
    tasks: of the log with this segment; time_range_ms: oldest and newest time of the events, None in a log without
    times.
    """

    number: int
    before: ExistingLog
    parts: Mapping[str, Sequence[Part]]
    users: Vocabulary
    items: Vocabulary
    actions: list[str]
    tasks: list[str]
    time_range_ms: tuple[int | None, int | None]

    @classmethod
    def without_events(cls, before: ExistingLog, parts: Mapping[str, Sequence[Part]]) -> NewSegment:
        """A segment that adds only features to a log."""
        return cls(
            number=before.last_segment + 1,
            before=before,
            parts=parts,
            users=before.users,
            items=before.items,
            actions=before.actions,
            tasks=before.tasks,
            time_range_ms=(None, None),
        )

    def num_rows(self, table: str) -> int:
        """Good rows of a table; 0 without the table."""
        return sum(part.num_rows for part in self.parts.get(table, ()))

    @property
    def num_bad(self) -> int:
        """Number of bad rows in all tables."""
        return sum(part.num_bad for parts in self.parts.values() for part in parts)

    def manifest(
        self, active_users: Mapping[str, int], row_features: Mapping[str, list[dict[str, str]]]
    ) -> dict[str, Any]:
        """The manifest's entries (segment.py) of a segment with events, except for features of items and users.

        Args:
            active_users: by table, the number of users with rows.
            row_features: by table, the names and kinds of the features of its rows.
        """
        has_time = self.time_range_ms != (None, None)
        return {
            "first_segment": self.number,
            "last_segment": self.number,
            "num_users": len(self.users),
            "num_items": len(self.items),
            "id_types": {"users": self.users.kind, "items": self.items.kind},
            "actions": self.actions,
            "tasks": self.tasks,
            "has_time": has_time,
            "timestamp": "milliseconds since 1970-01-01 UTC" if has_time else "ordinal of the event in its history",
            "has_rating": "rating" in self.parts["events"][0].source.columns,
            "counts": {
                table: {"rows": self.num_rows(table), "users": active_users.get(table, 0)}
                for table in ("events", "impressions")
            },
            "event_features": row_features["events"],
            "request_features": row_features.get("impressions", []),
            "deletions": 0,
            "offsets": [],
        }

    def sources(self) -> list[dict[str, Any]]:
        """The manifest's entries of all sources."""
        return [
            {
                "table": table,
                "name": part.source.name,
                "bytes": part.source.size,
                "sha256": part.source.digest,
                "rows": part.num_rows,
                "bad_rows": part.num_bad,
            }
            for table, parts in self.parts.items()
            for part in parts
        ]

    def warnings(self) -> list[str]:
        """What is allowed, but is probably a mistake or needs another step."""
        warnings = []
        newest = self.time_range_ms[1]
        if newest is not None and newest < YEAR_1971_MS:
            warnings.append(
                "all times are before 1971; check events.time_unit, in case seconds were read as milliseconds"
            )
        new_actions = self.actions[len(self.before.actions) :]
        if self.before.segments and new_actions:
            warnings.append(
                f"the log has the new actions {', '.join(new_actions)}; models that use actions do not know them, so "
                "retrain these models before the next refresh"
            )
        return warnings
