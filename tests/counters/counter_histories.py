"""Random histories, references for their counters, and the comparison of tables."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from vista.arrays import Int, offsets_of
from vista.counters.counters import CounterSpec, CounterTable
from vista.counters.keys import ItemKeys, UserCounters
from vista.log.features import Column
from vista.log.histories import Histories
from vista.log.vocabulary import Vocabulary
from vista.model.features import FeatureSpec
from vista.model.item_feature_table import ItemFeatureTable

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


def category(name: str, codes: NDArray[np.int64]) -> tuple[list[FeatureSpec], ItemFeatureTable]:
    """How a model reads one category of its items, and the value of each item from 0 on; -1 is none."""
    size, is_known = int(codes.max()) + 1, codes >= 0
    values = Vocabulary.from_ids([f"value {value:03}" for value in range(size)])
    column = Column(codes[is_known].astype(np.int32), values, offsets_of(is_known.astype(np.int64)))
    columns = [FeatureSpec(name, "category", size)]
    return columns, ItemFeatureTable.of({name: column}, columns)


def only_items(spec: CounterSpec) -> ItemKeys:
    """Keys for a spec that counts only items."""
    return ItemKeys.of_spec(spec, 1, {})


def counters_of_request(
    keys: ItemKeys, history: Histories, *, covered: int, tail_start: int, seen: int, now: Int | None
) -> UserCounters:
    """Counters of a request on one history, as a store and a scorer make them.

    A record holds those of the first `covered` events. The request adds later ones of the tail, which holds the events
    from `tail_start` to `seen`. It does not know which event came before the tail.
    """
    first = min(max(covered, tail_start), seen)
    before = [0, *history.item.tolist()]

    def part(field: int, start: int, stop: int) -> tuple[Int, Int, Int]:
        events, previous = history.slice(0, start, stop), np.array(before[start:stop], np.int64)
        previous[:1] *= start != tail_start
        key = keys.of(events.item.astype(np.int64), np.asarray(events.timestamp), previous, events.action)[field]
        return key, np.asarray(events.timestamp), np.array([0, stop - start])

    fields = []
    for field, most in enumerate(keys.spec.keys):
        record = CounterTable.of(keys.spec, *part(field, 0, covered)).top(most).codes()
        fields.append(record.advanced(now, *part(field, first, seen)))
    num_events = np.array([covered + seen - first])
    return UserCounters(fields[0], num_events, tuple(fields[1:]), keys, np.array(before[seen : seen + 1]))


def key_by_hand(
    field: str, item: int, time_ms: int, previous: int, action: str | None, categories: dict[str, list[int]]
) -> int:
    """The key of an event in a field, from its definition.

    Args:
        time_ms: of the event.
        previous: item of the event before; 0 for none.
        action: None for a candidate.
        categories: by name, the value of each item from 1 on; 0 for none.
    """
    counted = [part.removeprefix("action:") for part in field.split("*") if part.startswith("action:")]
    if counted and action not in (None, *counted):
        return 0
    time = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=time_ms)
    values = {"item": item, "previous": previous, "month": time.month, "weekday": time.isoweekday()}
    values |= {name: codes[item] for name, codes in categories.items()}
    factors = {"item": 1_220_703_125, "previous": 1_220_703_125, "month": 12, "weekday": 7}
    factors |= {name: max(codes) for name, codes in categories.items()}
    first, *others = [part for part in field.split("*") if not part.startswith("action:")] or [""]
    key = values[first] if first else 1
    for part in others:
        product = ((key - 1) * factors[part] + values[part] - 1) % (2**31 - 1) + 1
        key = product if key and values[part] else 0
    return key


def assert_identical(one: CounterTable, other: CounterTable) -> None:
    """Require that both tables hold the same bits."""
    for name in ("offsets", "clock", "num_events"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    for name in one.rows.__slots__:
        np.testing.assert_array_equal(getattr(one.rows, name), getattr(other.rows, name), err_msg=name)
