"""Finds users by their id or its beginning, without handing all ids to the browser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int
from vista.errors import ConfigError
from vista.log.event_log import EventLog
from vista.log.vocabulary import Vocabulary, ids_of_words
from vista.scorer import Scorer

HEAVY_SHARE = 0.01
"""Users with the most events, from whom a user is drawn as the first one to show."""


class UserSearch:
    """The users of a log, or of a store if there is no log."""

    def __init__(self, users: Vocabulary, lengths: Int | None = None) -> None:
        """Search `users`; lengths int64 [N] are their numbers of events, None if they are unknown."""
        self.users, self.lengths = users, lengths

    @classmethod
    def of(cls, log: EventLog | None, scorer: Scorer | None) -> UserSearch:
        """The users of the log; without a log, those who have a record, whose ids are read once."""
        if log is not None:
            return cls(log.users, log.lengths)
        ids: list[Any] = [] if scorer is None else list(scorer.store.keys())
        return cls(Vocabulary.from_ids(ids) if ids else Vocabulary.empty("int"))

    def __len__(self) -> int:
        return len(self.users) - self.users.num_blank

    def exact(self, text: str) -> int | str | None:
        """The id that a text names, whether a user has it or not; None if ids are integers and this is none."""
        try:
            (user,) = ids_of_words([text.strip()], "user", self.users.kind)
        except ConfigError:  # the text is the beginning of no integer
            return None
        return user if text.strip() else None

    def matches(self, text: str, limit: int = 20) -> list[int | str]:
        """At most `limit` users whose id begins with a text, the exact one first; the shortest ids of integers."""
        text = text.strip()
        if not text or not len(self.users):
            return []
        rows = _int_rows(self.users, text) if self.users.kind == "int" else _str_rows(self.users, text)
        rows = rows[self.users.has_ids(rows)]
        if self.users.kind == "int":
            found: list[int | str] = np.sort(self.users.ids(rows))[:limit].tolist()
            return found
        exact = self.users.rows([text])
        rows = np.concatenate([exact[exact >= 0], rows[rows != exact[0]]])
        return list(self.users.ids(rows[:limit]).tolist())

    def sample(self, count: int) -> Int:
        """Rows int64 [at most count] of random users, ascending, the same ones at every call."""
        rows = np.arange(len(self.users))
        rows = rows[self.users.has_ids(rows)]
        if len(rows) > count:
            rows = np.sort(np.random.default_rng(0).choice(rows, count, replace=False))
        return rows

    def heavy_user(self, rng: np.random.Generator) -> int | str | None:
        """A random one of the users with the most events; of all users if lengths are unknown; None without users."""
        rows = np.arange(len(self.users))
        if self.lengths is not None:
            count = max(int(HEAVY_SHARE * len(rows)), min(10, len(rows)))
            rows = np.argpartition(-self.lengths, max(count - 1, 0))[:count] if len(rows) else rows
        rows = rows[self.users.has_ids(rows)]
        if not len(rows):
            return None
        (user,) = self.users.ids([rng.choice(rows)]).tolist()
        return str(user) if self.users.kind == "str" else int(user)


def ids_with_prefix(vocabulary: Vocabulary, text: str, limit: int = 20) -> Sequence[int | str]:
    """At most `limit` ids that begin with a text, such as items."""
    return UserSearch(vocabulary).matches(text, limit)


def _int_rows(users: Vocabulary, text: str) -> NDArray[np.int64]:
    """Rows of the integer ids whose decimal digits begin with a text."""
    digits = text.removeprefix("-")
    is_padded = digits[:1] == "0" and text != "0"  # No id is written as -0 or 07.
    if not digits.isdecimal() or not digits.isascii() or is_padded or len(digits) > 19:
        return np.zeros(0, np.int64)
    ids, sign, low = users.arrays()["ids"], -1 if text.startswith("-") else 1, int(digits)
    found = np.zeros(len(ids), np.bool_)
    for power in range(20 - len(digits)):
        first, last = low * 10**power, (low + 1) * 10**power - 1
        if first >= 1 << 63 or (low == 0 and power):
            break
        last = min(last, (1 << 63) - 1)
        found |= (ids >= first) & (ids <= last) if sign > 0 else (ids <= -first) & (ids >= -last)
    return np.flatnonzero(found)


def _str_rows(users: Vocabulary, text: str) -> NDArray[np.int64]:
    """Rows of the ids whose UTF-8 bytes begin with those of a text."""
    arrays, wanted = users.arrays(), text.encode("utf-8", "replace")
    content, offsets = arrays["ids"], arrays["offsets"]
    rows = np.flatnonzero(np.diff(offsets) >= len(wanted))
    for place, byte in enumerate(wanted):
        rows = rows[content[offsets[rows] + place] == byte]
    return rows
