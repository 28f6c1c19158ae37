"""The configuration key `until`: which events are visible, by time or by how many of the newest ones are hidden."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal

from vista.errors import ConfigError, shown

MAX_MS = 10**18 - 1
"""Numbers have at most 18 digits, so that all arithmetic with them fits int64."""
_HELD_OUT = {1: "leave-last-out", 2: "leave-last-two-out"}


@dataclass(frozen=True, slots=True)
class Until:
    """Which events are visible.

    before: only events strictly before this time (ms); None for all. held_share: share in [0, 1) of each user's newest
    events that is hidden, rounded up to whole events; 0 with a time. held_out: number of newest events of the rest that
    are hidden, per user. Without a time, nothing is hidden from users with fewer than MIN_EVENTS events.
    """

    held_out: int = 0
    before: int | None = None
    held_share: float = 0.0

    def __str__(self) -> str:
        if self.before is None and not self.held_share:
            return _HELD_OUT.get(self.held_out, f"leave-last-{self.held_out}-out") if self.held_out else "all"
        rest = f"leave-last-{_percent(self.held_share)}-percent-out" if self.before is None else str(self.before)
        return f"{rest}-less-{self.held_out}" if self.held_out else rest


def _percent(share: float) -> str:
    """A share in percent, with all its digits: 0.1 -> "10", 0.125 -> "12.5"."""
    return f"{Decimal(repr(share)).scaleb(2).normalize():f}"


def parse_time(text: str | int) -> int:
    """Convert an ISO 8601 date or time (UTC unless it has an offset), or an integer (ms), to milliseconds since 1970.

    Raises:
        ConfigError: if `text` is neither.
    """
    if isinstance(text, int):
        if abs(text) > MAX_MS:
            raise ConfigError(f"time {shown(text)}: has more than 18 digits; write milliseconds since 1970")
        return text
    if re.fullmatch(
        r"(19|20)\d\d(0[1-9]|1[0-2])?", text.strip()
    ):  # as milliseconds, these would be the first minutes of 1970
        raise ConfigError(f"time {shown(text)}: is a year or a month; write a full date, such as 2024-05-01")
    if re.fullmatch(r"[+-]?[0-9]{1,18}", text.strip()) and not re.fullmatch(r"[0-9]{8}", text.strip()):
        return int(text)
    try:
        if re.fullmatch(r"[0-9]{19,}", text.strip()):  # fromisoformat takes the ninth digit for a separator
            raise ValueError
        time = datetime.fromisoformat(text.strip())
    except ValueError:
        raise ConfigError(
            f"time {shown(text)}: write an ISO date or time (2024-05-01, 2024-05-01T12:00:00Z) or milliseconds "
            "of at most 18 digits"
        ) from None
    time = time.replace(tzinfo=UTC) if time.tzinfo is None else time
    return (time - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)


def parse_until(text: str | int | None) -> Until:
    """Parse `until`: None or "all", "leave-last-[N-]out", "leave-last-P-percent-out", an ISO time (UTC), or ms.

    A time or a percentage may be followed by "-less-N", which also hides each user's newest N events before it.

    Raises:
        ConfigError: if `text` has another form.
    """
    if text is None or text == "all":
        return Until()
    if isinstance(text, int):
        return Until(before=parse_time(text))
    if named := re.fullmatch(r"leave-last-(?:([0-9]{1,18})-|(two)-)?out", text):
        number, two = named.groups()
        held_out = 2 if two else int(number or 1)
        if held_out:
            return Until(held_out=held_out)
    if shared := re.fullmatch(r"leave-last-([0-9]{1,2}(?:\.[0-9]{1,20})?)-percent-out(?:-less-([0-9]{1,18}))?", text):
        share = float(Decimal(shared[1]).scaleb(-2))
        if 0 < share < 1:
            return Until(int(shared[2] or 0), held_share=share)
    in_time = re.fullmatch(r"(.*?)(?:-less-([0-9]{1,18}))?", text, re.DOTALL)
    assert in_time is not None  # the pattern matches any text
    time, hidden = in_time.groups()
    try:
        return Until(int(hidden or 0), parse_time(time))
    except ConfigError:
        raise ConfigError(
            f"until={shown(text)}: write all, leave-last-out, leave-last-N-out, leave-last-P-percent-out, an ISO date "
            "(2024-05-01) or time, milliseconds, or TIME-less-N"
        ) from None
