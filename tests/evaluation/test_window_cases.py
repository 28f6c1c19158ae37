"""Which items follow a question: by hand, and as properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vista.evaluation.cases_digest import cases_digest
from vista.evaluation.window_cases import WindowCases, window_cases
from vista.log.event_log import EventLog
from vista.log.gaps import DAY_MS
from vista.log.splits import visible_counts

EVENTS = {
    # user: (item, day)
    1: [(10, 1), (11, 2), (10, 3), (12, 4), (12, 5), (11, 6), (13, 20), (10, 21)],
    2: [(10, 1), (10, 4), (10, 4), (11, 4), (12, 30)],
    3: [(13, 1)],
}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> EventLog:
    rows = [(user, item, day * DAY_MS) for user, events in EVENTS.items() for item, day in events]
    columns = dict(zip(("user", "item", "timestamp"), map(list, zip(*rows, strict=True)), strict=True))
    return EventLog.from_frame(columns, tmp_path_factory.mktemp("windows") / "log", time_unit="ms")


def labels(log: EventLog, cases: WindowCases) -> dict[int, list[tuple[int, bool]]]:
    """{user id: [(item id, whether it is new)]}."""
    items = log.items.ids(cases.item).tolist()
    return {
        user: list(zip(items[low:high], cases.is_new[low:high].tolist(), strict=True))
        for user, low, high in zip(
            log.users.ids(cases.user).tolist(), cases.offsets[:-1], cases.offsets[1:], strict=True
        )
    }


def ask(log: EventLog, seen: str | int, end: str | int | None = None, **changes: float) -> WindowCases:
    stop = None if end is None else visible_counts(log, end)
    arguments = {"min_seen": 1, "min_after": 1, **changes}
    return window_cases(log, visible_counts(log, seen), stop, **arguments)  # type: ignore[arg-type]


def test_the_next_events_by_hand(log: EventLog) -> None:
    """Labels are distinct; an item of the window's earlier events is still new."""
    cases = ask(log, 4 * DAY_MS, horizon_events=4)
    assert labels(log, cases) == {1: [(11, False), (12, True), (13, True)], 2: [(10, False), (11, True), (12, True)]}
    assert cases.seen.tolist() == [3, 1] and cases.now is None


def test_some_users_are_drawn_the_same_ones_every_time(event_log: EventLog) -> None:
    everyone = ask(event_log, "leave-last-out", horizon_events=3)
    few, again = (ask(event_log, "leave-last-out", horizon_events=3, max_users=4) for _ in range(2))
    assert few.user.tolist() == again.user.tolist() and few.item.tolist() == again.item.tolist()
    assert len(few) == 4 < len(everyone) and (np.diff(few.user) > 0).all()
    asked = labels(event_log, everyone)
    assert labels(event_log, few) == {user: asked[user] for user in event_log.users.ids(few.user).tolist()}


def test_the_next_days_by_hand(log: EventLog) -> None:
    """The event at the question's time is in the window; the one at its end is not."""
    question = 4 * DAY_MS
    cases = ask(log, question, horizon_days=2, now=question)
    assert labels(log, cases) == {1: [(12, True)], 2: [(10, False), (11, True)]}
    assert cases.now is not None and cases.now.tolist() == [question, question]
    # Without a time, the window begins at the newest event before the question, here of days 3 and 1.
    assert labels(log, ask(log, question, horizon_days=2)) == {1: [(12, True)], 2: []}
    assert labels(log, ask(log, question, horizon_days=3.5)) == {
        1: [(11, False), (12, True)],
        2: [(10, False), (11, True)],
    }


def test_windows_stop_at_the_test_labels(log: EventLog) -> None:
    """In validation, the window is as long as the events before the test labels allow."""
    cases = ask(log, 4 * DAY_MS, 6 * DAY_MS, horizon_events=50)
    assert labels(log, cases) == {1: [(12, True)], 2: [(10, False), (11, True)]}
    assert labels(log, ask(log, 4 * DAY_MS, 4 * DAY_MS, horizon_events=50)) == {}


def test_users_with_few_events_are_not_asked(log: EventLog) -> None:
    assert log.users.ids(ask(log, 4 * DAY_MS, horizon_events=1, min_seen=2).user).tolist() == [1]
    # `min_after` counts all events after the question, also beyond the window.
    assert log.users.ids(ask(log, 4 * DAY_MS, horizon_events=1, min_after=5).user).tolist() == [1]
    assert len(ask(log, 4 * DAY_MS, horizon_events=1, min_after=6)) == 0


def test_a_window_has_one_length(log: EventLog) -> None:
    for wrong in ({}, {"horizon_events": 3, "horizon_days": 1.0}):
        with pytest.raises(ValueError, match="set exactly one of them above 0"):
            ask(log, 4 * DAY_MS, **wrong)  # type: ignore[arg-type]


def test_parts_are_the_same_cases(log: EventLog) -> None:
    cases = ask(log, 4 * DAY_MS, horizon_events=4, now=4 * DAY_MS)
    joined = labels(log, cases.part(slice(0, 1))) | labels(log, cases.part(slice(1, 2)))
    assert joined == labels(log, cases)
    assert len(cases.part(slice(1, 1))) == 0 and cases.part(slice(1, 2)).now is not None


def test_the_digest_tells_questions_apart(log: EventLog) -> None:
    def digest(cases: WindowCases) -> str:
        return cases_digest(log, cases.user, cases.item, cases.seen, cases.now, cases.offsets)

    base = ask(log, 4 * DAY_MS, horizon_events=4)
    assert digest(base) == digest(ask(log, 4 * DAY_MS, horizon_events=4))
    others = [
        ask(log, 4 * DAY_MS, horizon_events=2),
        ask(log, 5 * DAY_MS, horizon_events=4),
        ask(log, 4 * DAY_MS, horizon_events=4, now=4 * DAY_MS),
        base.part(slice(0, 1)),
    ]
    assert len({digest(base), *map(digest, others)}) == 5


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 30), st.integers(1, 40), st.sampled_from([0, 3]), st.integers(1, 9))
def test_the_window_never_contains_a_visible_event(
    event_log: EventLog, seen: int, horizon: int, days: int, min_seen: int
) -> None:
    """Against a loop over events: exactly the items between the question and the horizon, new if not among the seen."""
    visible = np.minimum(event_log.lengths, seen)
    length = {"horizon_days": float(days)} if days else {"horizon_events": horizon}
    cases = window_cases(event_log, visible, None, min_seen=min_seen, min_after=1, **length)  # type: ignore[arg-type]
    asked = {}
    for user in range(event_log.num_users):
        history, cut = event_log.slice(user), int(visible[user])
        if cut < min_seen or len(history.item) == cut:
            continue
        within = range(cut, min(cut + horizon, len(history.item)))
        if days:
            last = history.timestamp[cut - 1] + days * DAY_MS
            within = range(cut, cut + int((history.timestamp[cut:] < last).sum()))
        had = set(history.item[:cut].tolist())
        asked[user] = [(item, item not in had) for item in sorted({int(history.item[index]) for index in within})]
    found = {
        user: list(zip(cases.item[low:high].tolist(), cases.is_new[low:high].tolist(), strict=True))
        for user, low, high in zip(cases.user.tolist(), cases.offsets[:-1], cases.offsets[1:], strict=True)
    }
    assert found == asked
