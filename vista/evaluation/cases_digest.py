"""Identity of the cases of an evaluation, so that two evaluations are compared only on the same cases."""

from __future__ import annotations

import hashlib

from vista.arrays import Int
from vista.log.event_log import EventLog


def cases_digest(log: EventLog, user: Int, item: Int, *numbers: Int | None) -> str:
    """SHA-256 of the ids of users and labels, and of other numbers: equal for copies of one log."""
    digest = hashlib.sha256()
    for ids in (log.users.ids(user).tolist(), log.items.ids(item).tolist()):
        digest.update(f"{len(ids)}\0{chr(0).join(map(str, ids))}".encode())
    for each in numbers:
        digest.update(b"none" if each is None else each.astype("<i8").tobytes())
    return digest.hexdigest()
