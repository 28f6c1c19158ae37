"""Which events of each user are visible: leave-last-out splits, splits by share, and splits by time."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING

import numpy as np

from vista.arrays import Int
from vista.config.checks import Split
from vista.errors import ConfigError, shown
from vista.log.histories import DAY_MS, MINUTE_MS, Histories, rows_that_fit, token_groups

if TYPE_CHECKING:
    from vista.config import DataConfig
    from vista.log.event_log import EventLog

MAX_MS = 10**18 - 1
"""Numbers have at most 18 digits, so that all arithmetic with them fits int64."""
_HELD_OUT = {1: "leave-last-out", 2: "leave-last-two-out"}


@dataclass(frozen=True, slots=True)
class Until:
    """Which events are visible, as the configuration key `until` says.

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
    Raises ConfigError if `text` is neither."""
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


logger = logging.getLogger(__name__)
EVENTS_PER_BLOCK = 1 << 22
"""Events of histories that are read at once, about 20 bytes of memory each without features."""
READ_EVENT_BYTES = 20
MIN_EVENTS = 3
"""Users with fewer events are not used for validation and testing, so leave-last-out hides none of their events."""


def visible_counts(log: EventLog, until: Until | str | int | None) -> Int:
    """Number of leading events of each user that are visible.

    leave-last-out hides each user's last event, leave-last-N-out the last N, and leave-last-P-percent-out the last P
    percent, rounded up. Active events count (`EventLog.active`), and passive ones after the first hidden one are hidden
    too. Users with fewer than MIN_EVENTS events are not used for validation and testing, so none of their events are
    hidden. A time hides the events at this time or later; a time less N also hides the last N events before it.

    Returns:
        int64 [num_users].

    Raises:
        ConfigError: for a time in a log without times.
    """
    limit = until if isinstance(until, Until) else parse_until(until)
    if limit.before is not None:
        if not log.has_time:
            raise ConfigError(f"until={limit.before}: {log.path} has no times; use leave-last-out instead")
        return np.maximum(log.counts_before(limit.before) - limit.held_out, 0)
    lengths = log.active.lengths
    # 1 - 0.9 is a little below 0.1: without rounding, one event of 10 would become none.
    kept = np.floor(np.round(lengths * (1 - limit.held_share), 6)).astype(np.int64) if limit.held_share else lengths
    if not (limit.held_out or limit.held_share):
        return log.lengths
    kept = log.counts_before_active(np.maximum(kept - limit.held_out, 0))
    return np.where(lengths >= MIN_EVENTS, kept, log.lengths)


def visible_blocks(
    log: EventLog, counts: Int, events: int = EVENTS_PER_BLOCK, *, features: bool = False
) -> Iterator[Histories]:
    """The first counts[u] events of every user u, some users at a time.

    Args:
        counts: int64 [num_users].
        events: most events of a block (a longer history is a block by itself).
        features: whether to read features of events; a block then has fewer events, so that it takes as much memory.

    Raises:
        ValueError: if counts has another shape.
    """
    if counts.shape != (log.num_users,):
        raise ValueError(f"counts must have one entry per user, {log.num_users} in all, got shape {counts.shape}")
    if features:
        events = rows_that_fit(events, READ_EVENT_BYTES, len(log.event_features))
    for part in token_groups(counts, events):
        yield log.gather(np.arange(part.start, part.stop), counts[part], features=features)


def random_users_counts(counts: Int, most_events: int, rng: np.random.Generator, what: str, *, least: int = 1) -> Int:
    """Visible events per user, with 0 for some random users if all have more than `most_events`.

    Args:
        counts: int64 [num_users].
        rng: chooses the users.
        what: what is done with the events, for the log line that says how many are left.
        least: users with fewer events take no part.
    """
    users = np.flatnonzero(counts >= least)
    total = int(counts[users].sum())
    if total <= most_events:
        return counts
    order = rng.permutation(users)
    chosen = order[np.cumsum(counts[order]) - counts[order] < most_events]
    left = np.zeros_like(counts)
    left[chosen] = counts[chosen]
    logger.info("%s %d of %d events: those of %d random users of %d", what, left.sum(), total, len(chosen), len(users))
    return left


def split_until(data: DataConfig, part: str) -> Until:
    """The events that are visible to a part of a split: those before its labels, and before the gap.

    Args:
        data: configuration of the split.
        part: "train" for the events that training uses, "validation" or "test" for those that summaries may cover.

    Raises:
        ConfigError: as `_label_starts`.
    """
    if data.split is Split.time:
        validation, test = _label_starts(data)
        return Until(before=(test if part == "test" else validation) - round(data.gap_minutes * MINUTE_MS))
    if data.split is Split.share:
        assert data.validation_share is not None and data.test_share is not None  # DataConfig has checked
        # In binary, 0.1 + 0.2 is not 0.3, and the text of `until` shows all digits.
        return Until(
            held_share=data.test_share if part == "test" else round(data.test_share + data.validation_share, 12)
        )
    return Until(held_out=1 if part == "test" else 2)


def _label_starts(data: DataConfig) -> tuple[int, int]:
    """When the validation and the test labels of a split by time begin (ms)."""
    assert data.validation_from is not None and data.test_from is not None  # DataConfig has checked
    validation, test = parse_time(data.validation_from), parse_time(data.test_from)
    if test < validation:
        raise ConfigError(
            f"data.test_from={data.test_from}: is before data.validation_from={data.validation_from}; set a later time"
        )
    return validation, test


def part_counts(log: EventLog, data: DataConfig, part: str) -> tuple[Int, Int, Int]:
    """Events of each user that a part ("validation" or "test") sees, before its first label, and before their end.

    The first two differ by the events of the gap. The labels of validation end where the gap before those of test
    begins.

    Returns:
        int64 [num_users] each.

    Raises:
        ConfigError: as `visible_counts` and `split_until`.
    """
    seen = first = visible_counts(log, split_until(data, part))
    begin, _ = part_times(data, part)
    if data.gap_minutes and begin is not None:
        first = log.counts_before(begin)
    end = visible_counts(log, split_until(data, "test")) if part == "validation" else log.lengths
    return seen, first, np.maximum(first, end)


def part_times(data: DataConfig, part: str) -> tuple[int | None, int | None]:
    """Begin and end (ms) of the labels of a part; None for the end of the log. Both are None in a split by counts.
    Raises ConfigError as `split_until` does."""
    if data.split is not Split.time:
        return None, None
    begin = _label_starts(data)[part == "test"]
    return begin, split_until(data, "test").before if part == "validation" else None


def refresh_times(data: DataConfig, part: str, end: int) -> Int:
    """When a store is refreshed for the impressions of a part of a split by time: int64 [P] ms, ascending.

    The first refresh is when the part's labels begin, and others follow every `data.refresh_days`.

    Args:
        end: time in ms, at which the impressions end.

    Raises:
        ConfigError: as `split_until`.
    """
    begin, _ = part_times(data, part)
    assert begin is not None
    if not data.refresh_days:
        return np.array([begin])
    return np.arange(begin, max(end, begin + 1), round(data.refresh_days * DAY_MS))


def last_refresh(data: DataConfig, part: str, timestamp: Int) -> tuple[Int, Int]:
    """The last refresh before each of some impressions of a part of a split by time.

    Args:
        timestamp: int64 [N] ms of the impressions.

    Returns:
        Index int64 [N] of the refresh, and times of all refreshes, int64 [P] ms (`refresh_times`).

    Raises:
        ConfigError: as `split_until`.
    """
    begin, _ = part_times(data, part)
    assert begin is not None
    times = refresh_times(data, part, int(timestamp.max(initial=begin)) + 1)
    return np.searchsorted(times, timestamp, side="right") - 1, times


RETURNING = 0.01
"""Least share of repeats with which users return to items, so that rankings keep seen items. Logs of movies or news,
seen once each, have hardly any."""


def repeat_share(log: EventLog, counts: Int) -> float:
    """Share of events whose item is in an earlier event of the same user; 0 without events. `counts`: int64
    [num_users], the number of leading events of each user that are read."""
    distinct = 0
    for block in visible_blocks(log, counts, EVENTS_PER_BLOCK):
        distinct += len(np.unique(block.owner * log.num_items + block.item))
    total = int(counts.sum())
    return 1 - distinct / total if total else 0.0


def leaves_out_seen(log: EventLog, data: DataConfig) -> bool:
    """`data.exclude_seen`, or if that is null, whether less than RETURNING of the training events are repeats."""
    if data.exclude_seen is not None:
        return data.exclude_seen
    share = repeat_share(log.active, log.active_counts(visible_counts(log, split_until(data, "train"))))
    exclude_seen = share < RETURNING
    logger.info("data.exclude_seen=%s: %.1f %% of the events are repeats", str(exclude_seen).lower(), 100 * share)
    return exclude_seen
