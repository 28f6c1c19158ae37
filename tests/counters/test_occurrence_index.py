"""Training reads the same counters as a store: those of the events before a cut, advanced to the request."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.counters.counter_histories import SPECS, Events, assert_identical, histories, packed
from vista.counters.counter_spec import CounterSpec
from vista.counters.counter_table import CounterTable
from vista.counters.occurrence_index import OccurrenceIndex


@given(spec=st.sampled_from(SPECS), users=histories())
def test_equals_counting_the_events_before_every_cut(spec: CounterSpec, users: list[Events]) -> None:
    cuts = [(user, position) for user, events in enumerate(users) for position in range(len(events) + 1)]
    user, position = np.array(cuts).T
    table = OccurrenceIndex(spec, *packed(users)).table(user, position)
    assert_identical(table, CounterTable.of(spec, *packed([users[user][:position] for user, position in cuts])))


@given(
    spec=st.sampled_from(SPECS),
    users=histories(),
    num_keys=st.integers(1, 4),
    wait=st.none() | st.integers(-(10**10), 10**10),
    data=st.data(),
)
def test_training_and_serving_have_the_same_codes(
    spec: CounterSpec, users: list[Events], num_keys: int, wait: int | None, data: st.DataObject
) -> None:
    """Serving counts the first part of each history, appends more in a refresh, and advances by the tail."""
    first, cut, end = [], [], []
    for events in users:
        end.append(data.draw(st.integers(0, len(events))))
        cut.append(data.draw(st.integers(0, end[-1])))
        first.append(data.draw(st.integers(0, cut[-1])))

    def part(begin: list[int], stop: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return packed([events[a:b] for events, a, b in zip(users, begin, stop, strict=True)])

    fresh = part(cut, end)
    now = None
    if wait is not None:
        now = np.array([(events[at - 1][1] if at else 0) + wait for events, at in zip(users, end, strict=True)])
    refreshed = CounterTable.of(spec, *part([0] * len(users), first)).appended(*part(first, cut))
    served = refreshed.top(num_keys).codes().advanced(now, *fresh)
    index = OccurrenceIndex(spec, *packed(users))
    trained = index.table(np.arange(len(users)), np.array(cut)).top(num_keys).codes().advanced(now, *fresh)
    for name in ("key", "codes", "offsets", "clock"):
        np.testing.assert_array_equal(getattr(trained, name), getattr(served, name), err_msg=name)


@given(spec=st.sampled_from(SPECS), users=histories(), data=st.data())
def test_advanced_codes_are_at_most_one_level_off_the_exact_counters(
    spec: CounterSpec, users: list[Events], data: st.DataObject
) -> None:
    cut = [data.draw(st.integers(0, len(events))) for events in users]
    stored = CounterTable.of(spec, *packed([events[:at] for events, at in zip(users, cut, strict=True)])).codes()
    advanced = stored.advanced(None, *packed([events[at:] for events, at in zip(users, cut, strict=True)]))
    exact = CounterTable.of(spec, *packed(users)).codes()
    for name in ("key", "offsets", "clock"):
        np.testing.assert_array_equal(getattr(advanced, name), getattr(exact, name), err_msg=name)
    assert (np.abs(advanced.codes.astype(int) - exact.codes.astype(int)) <= 1).all()


@given(spec=st.sampled_from(SPECS), users=histories(), data=st.data())
def test_the_future_changes_nothing(spec: CounterSpec, users: list[Events], data: st.DataObject) -> None:
    position = np.array([data.draw(st.integers(0, len(events))) for events in users])
    past = [events[:end] for events, end in zip(users, position.tolist(), strict=True)]
    user = np.arange(len(users))
    assert_identical(
        OccurrenceIndex(spec, *packed(users)).table(user, position),
        OccurrenceIndex(spec, *packed(past)).table(user, position),
    )


def test_no_cuts_and_no_events() -> None:
    spec, none = CounterSpec(), np.zeros(0, np.int64)
    index = OccurrenceIndex(spec, none, none, np.array([0, 0]))
    assert index.table(none, none).offsets.tolist() == [0]
    assert index.table(np.array([0, 0]), np.array([0, 0])).offsets.tolist() == [0, 0, 0]
