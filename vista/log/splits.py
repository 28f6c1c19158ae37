"""Which events of each user are visible: leave-last-out splits and splits in time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vista.config import DataConfig
from vista.config.choices import Split
from vista.errors import ConfigError
from vista.log.event_log import EventLog
from vista.log.until import Until, parse_time, parse_until

MIN_EVENTS = 3
"""Users with fewer events are neither validation nor test users: leave-last-out hides nothing of them."""


def visible_counts(log: EventLog, until: Until | str | int | None) -> NDArray[np.int64]:
    """How many leading events of each user are visible.

    leave-last-out hides a user's last event, leave-last-N-out the last N; users with fewer than MIN_EVENTS events
    are neither validation nor test users, so nothing of them is hidden. A time hides what happened at it or later, a
    time less N also the last N events before it.

    Returns:
        int64 [num_users].

    Raises:
        ConfigError: for a time in a log without times.
    """
    limit = until if isinstance(until, Until) else parse_until(until)
    if limit.before is not None:
        if not log.has_time:
            raise ConfigError(f"until={limit.before}: {log.path} has no times; use leave-last-out")
        return np.maximum(log.counts_before(limit.before) - limit.held_out, 0)
    lengths = log.lengths
    return np.where(lengths >= MIN_EVENTS, np.maximum(lengths - limit.held_out, 0), lengths)


def split_until(data: DataConfig, part: str) -> Until:
    """What may be seen before the labels of a part of a split begin.

    Args:
        data: the split: leave-last-out, or in time.
        part: "train" (what training sees), "validation" or "test" (what summaries may have seen of their labels' past).

    Raises:
        ConfigError: if the test begins before the validation: training would see its labels.
    """
    if data.split is Split.time:
        assert data.validation_from is not None and data.test_from is not None  # DataConfig has checked
        validation, test = parse_time(data.validation_from), parse_time(data.test_from)
        if test < validation:
            raise ConfigError(f"data.test_from={data.test_from}: lies before validation_from={data.validation_from}")
        return Until(before=test if part == "test" else validation)
    return Until(held_out=1 if part == "test" else 2)
