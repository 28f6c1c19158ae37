"""Records of a sample of users, to judge a whole store by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vista.explore.user_search import UserSearch
from vista.log.event_log import EventLog
from vista.scorer import Scorer

SAMPLE_USERS = 500
"""Users whose records are read to show gaps."""


@dataclass(frozen=True, slots=True)
class RecordSample:
    """Records of some users, to judge the whole store by."""

    num_users: int
    without_record: int
    behind: int
    """Users whose record covers fewer events than the log has."""
    covered: list[dict[str, Any]]
    """Per user: {"events": events of the log, "covered": events of the record}; empty without a log."""


def record_sample(scorer: Scorer, log: EventLog | None, users: UserSearch) -> RecordSample:
    """Read the records of up to SAMPLE_USERS users, the same ones at every call.

    Raises:
        StoreError: a record is damaged.
    """
    rows = users.sample(SAMPLE_USERS)
    if not len(rows):
        return RecordSample(0, 0, 0, [])
    stored = scorer.store.get_many(users.users.ids(rows))
    found = stored.found
    if log is None:
        return RecordSample(len(rows), int((~found).sum()), 0, [])
    events = log.lengths[rows]
    covered = [
        {"events": int(has), "covered": int(covers)}
        for has, covers in zip(events[found], stored.event_count[found], strict=True)
    ]
    behind = int((found & (stored.event_count < events)).sum())
    return RecordSample(len(rows), int((~found).sum()), behind, covered)
