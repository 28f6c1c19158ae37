"""Random histories, references for their counters, and the comparison of tables."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from vista.arrays import Int
from vista.counters.counter_spec import CounterSpec
from vista.counters.counter_table import CounterTable
from vista.counters.user_counters import UserCounters
from vista.log.histories import Histories

DAY = 86_400_000
SPECS = [
    CounterSpec(),
    CounterSpec(days=(1 / 24, 90.0), events=(1.0, 32.0)),
    CounterSpec(days=(), events=(200.0,), has_time=False),
    CounterSpec(days=(), events=()),
]
Events = list[tuple[int, int]]
"""Keys and times of one user's events."""
GAPS = st.sampled_from([0, 1, 60_000, DAY, 40 * DAY, 3_000 * DAY])


@st.composite
def histories(draw: st.DrawFn, max_users: int = 4, max_events: int = 30) -> list[Events]:
    """Events of 1 to `max_users` users, oldest first; keys from 0 (unknown) to 5."""
    users = []
    for _ in range(draw(st.integers(1, max_users))):
        keys = draw(st.lists(st.integers(0, 5), max_size=max_events))
        gaps = draw(st.lists(GAPS | st.integers(0, 10 * DAY), min_size=len(keys), max_size=len(keys)))
        start = draw(st.integers(-(10**12), 2 * 10**12))
        users.append(list(zip(keys, (start + np.cumsum(gaps, dtype=np.int64)).tolist(), strict=True)))
    return users


def packed(users: list[Events]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys, times, and offsets of all users end to end."""
    flat = np.array([event for user in users for event in user], np.int64).reshape(-1, 2)
    return flat[:, 0], flat[:, 1], np.cumsum([0, *map(len, users)])


def counted_by_loop(spec: CounterSpec, events: Events) -> dict[int, list[float]]:
    """Count, sums by the definition, and age of each key, as of the newest event."""
    counted = {}
    now, num_events = (events[-1][1] if events else 0), len(events)
    for key in {key for key, _ in events} - {0}:
        past = [(time, position) for position, (other, time) in enumerate(events) if other == key]
        later = [num_events - 1 - position for _, position in past]
        elapsed = [now - time for time, _ in past]
        sums = [sum(np.exp(-ms / (days * DAY)) for ms in elapsed) for days in spec.days]
        sums += [sum(np.exp(-n / tau) for n in later) for tau in spec.events]
        counted[key] = [len(past), *sums, elapsed[-1] / 1_000 if spec.has_time else later[-1]]
    return counted


def counters_of_request(
    spec: CounterSpec, history: Histories, *, covered: int, first: int, seen: int, now: Int | None
) -> UserCounters:
    """Counters of a request on one history, as a store and a scorer make them.

    A record holds those of the first `covered` events. The request adds the events from `first` to `seen`.
    """

    def part(start: int, stop: int) -> tuple[Int, Int, Int]:
        events = history.slice(0, start, stop)
        return events.item.astype(np.int64), np.asarray(events.timestamp), np.array([0, stop - start])

    record = CounterTable.of(spec, *part(0, covered)).top(spec.keys[0]).codes()
    return UserCounters(record.advanced(now, *part(first, seen)), np.array([covered + seen - first]))


def assert_identical(one: CounterTable, other: CounterTable) -> None:
    """Require that both tables hold the same bits."""
    for name in ("offsets", "clock", "num_events"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    for name in one.rows.__slots__:
        np.testing.assert_array_equal(getattr(one.rows, name), getattr(other.rows, name), err_msg=name)
