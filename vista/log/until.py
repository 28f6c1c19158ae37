"""The key `until` of the configuration: a time, or a number of newest events, up to which events are visible."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from vista.errors import ConfigError

_HELD_OUT = {1: "leave-last-out", 2: "leave-last-two-out"}


@dataclass(frozen=True, slots=True)
class Until:
    """A moment up to which events are visible.

    before: events strictly before this time (ms) are visible, or None for all; held_out: newest of these hidden of each
    user, where there is no time only of users with at least MIN_EVENTS events.
    """

    held_out: int = 0
    before: int | None = None

    def __str__(self) -> str:
        if self.before is not None:
            return f"{self.before}-less-{self.held_out}" if self.held_out else str(self.before)
        return _HELD_OUT.get(self.held_out, f"leave-last-{self.held_out}-out") if self.held_out else "all"


def parse_time(text: str | int) -> int:
    """Milliseconds since 1970 of an ISO 8601 date or time (UTC unless it names an offset) or of an integer (ms).

    Raises:
        ConfigError: if it is neither.
    """
    if isinstance(text, int):
        return text
    if re.fullmatch(r"(19|20)\d\d(0[1-9]|1[0-2])?", text.strip()):  # as milliseconds the first minutes of 1970
        raise ConfigError(f"time {text!r}: is a year or a month; write its first day, such as 2024-05-01")
    if re.fullmatch(r"[+-]?\d+", text.strip()) and not re.fullmatch(r"\d{8}", text.strip()):
        return int(text)
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise ConfigError(
            f"time {text!r}: write an ISO date or time (2024-05-01, 2024-05-01T12:00:00Z) or ms"
        ) from None
    moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)


def parse_until(text: str | int | None) -> Until:
    """Read `until`: None or "all", "leave-last-out", "leave-last-N-out", an ISO time (UTC), or milliseconds; a time can
    be followed by "-less-N", which hides the newest N of a user's events before it.

    Raises:
        ConfigError: if it is none of these.
    """
    if text is None or text == "all":
        return Until()
    if isinstance(text, int):
        return Until(before=text)
    if named := re.fullmatch(r"leave-last-(?:(\d+)-|(two)-)?out", text):
        number, two = named.groups()
        held_out = 2 if two else int(number or 1)
        if held_out:
            return Until(held_out=held_out)
    in_time = re.fullmatch(r"(.*?)(?:-less-(\d+))?", text, re.DOTALL)
    assert in_time is not None  # whatever the text is
    moment, hidden = in_time.groups()
    try:
        return Until(int(hidden or 0), parse_time(moment))
    except ConfigError:
        raise ConfigError(
            f"until={text!r}: write all, leave-last-out, leave-last-N-out, an ISO date (2024-05-01) or time, ms, or "
            "TIME-less-N"
        ) from None
