"""Which items follow a question, and metrics over these labels: by hand, as properties, against loops."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vista.arrays import Int
from vista.evaluation.cases import WindowCases, cases_digest, window_cases
from vista.evaluation.protocol import COLD, KINDS, window_metrics
from vista.log.event_log import EventLog
from vista.log.histories import DAY_MS
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


@settings(max_examples=30, deadline=None)
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


def cases_of(labels: list[list[int]], seen: list[list[int]]) -> tuple[WindowCases, tuple[Int, Int]]:
    """Cases with these labels, and the seen columns; labels that are not seen are new."""
    flat = [(item, item not in had) for own, had in zip(labels, seen, strict=True) for item in own]
    bounds = [np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64) for rows in (labels, seen)]
    item, is_new = (np.array(column) for column in zip(*flat, strict=True)) if flat else (np.zeros(0), np.zeros(0))
    user = np.arange(len(labels))
    cases = WindowCases(user, user, None, item.astype(np.int64), is_new.astype(bool), bounds[0])
    return cases, (np.array([item for had in seen for item in had], np.int64), bounds[1])


def test_by_hand() -> None:
    """Items 0 to 5 in descending order of score. Item 6 is unknown to the model."""
    cases, seen = cases_of([[0, 3, 6]], [[0, 1, 1, 4]])
    columns = np.array([0, 1, 2, 3, 4, 5, -1])
    got = window_metrics(np.array([[6, 5, 4, 3, 2, 1.0]]), cases, columns, seen, [2, 4])
    discount = 1 / np.log2(np.arange(4) + 2)
    assert {name: value[0] for name, value in got.items()} == pytest.approx(
        {
            # 0 is first and 3 is fourth of all items.
            "precision@2": 1 / 2,
            "recall@2": 1 / 2,
            "ndcg@2": 1 / discount[:2].sum(),
            "precision@4": 2 / 4,
            "recall@4": 2 / 3,
            "ndcg@4": (1 + discount[3]) / discount[:3].sum(),
            # Seen items are 0, 1, 4; the label 0 is first.
            "precision@2:returns": 1 / 2,
            "recall@2:returns": 1,
            "ndcg@2:returns": 1,
            "precision@4:returns": 1 / 4,
            "recall@4:returns": 1,
            "ndcg@4:returns": 1,
            # The others are 2, 3, 5; of the labels 3 and 6, the first is second and the other one unknown.
            "precision@2:new": 1 / 2,
            "recall@2:new": 1 / 2,
            "ndcg@2:new": discount[1] / discount[:2].sum(),
            "precision@4:new": 1 / 4,
            "recall@4:new": 1 / 2,
            "ndcg@4:new": discount[1] / discount[:2].sum(),
        }
    )


def test_a_case_without_labels_of_a_kind_is_undefined() -> None:
    cases, seen = cases_of([[0], [1], []], [[0], [], [2]])
    got = window_metrics(np.zeros((3, 3), np.float32), cases, np.arange(3), seen, [1])
    for name in ("precision@1", "recall@1", "ndcg@1"):
        assert np.isnan(got[name]).tolist() == [False, False, True]
        assert np.isnan(got[f"{name}:returns"]).tolist() == [False, True, True]
        assert np.isnan(got[f"{name}:new"]).tolist() == [True, False, True]


def test_scores_must_be_numbers() -> None:
    cases, seen = cases_of([[0], [1]], [[0], [0]])
    with pytest.raises(ValueError, match="row 1 holds NaN"):
        window_metrics(np.array([[0, 1.0], [np.nan, 1.0]]), cases, np.arange(2), seen, [1])


def test_minus_infinity_is_never_listed() -> None:
    cases, seen = cases_of([[0, 1]], [[]])
    got = window_metrics(np.array([[-np.inf, 1.0, 0.0]]), cases, np.arange(3), seen, [3])
    assert got["precision@3"].tolist() == [1 / 3]


def plain_metrics(scores: list[float], labels: list[int], shown: list[int], k: int) -> tuple[float, float, float]:
    """Precision, recall, NDCG of one list, averaged over all orders of the items, among which a sort is stable."""
    values = []
    gains = [1 / np.log2(rank + 2) for rank in range(k)]
    for order in permutations(shown):
        ranked = sorted(order, key=lambda item: -scores[item])[:k]
        hits = [gains[rank] for rank, item in enumerate(ranked) if item in labels]
        values.append((len(hits) / k, len(hits) / min(k, len(labels)), sum(hits) / sum(gains[: len(labels)])))
    precision, recall, ndcg = np.mean(values, axis=0).tolist() if values else (0.0, 0.0, 0.0)
    return precision, recall, ndcg


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_equal_to_a_loop_over_all_orders_of_ties(data: st.DataObject) -> None:
    items = st.integers(0, 4)
    num = data.draw(st.integers(1, 3))
    scores = [data.draw(st.lists(st.integers(0, 2), min_size=5, max_size=5)) for _ in range(num)]
    labels = [sorted(data.draw(st.sets(items))) for _ in range(num)]
    seen = [data.draw(st.lists(items, max_size=6)) for _ in range(num)]
    ks = data.draw(st.sampled_from([[1], [2, 4], [7, 3]]))
    cold = np.array(data.draw(st.lists(st.booleans(), min_size=5, max_size=5)))
    cases, columns = cases_of(labels, seen)
    got = window_metrics(np.array(scores, np.float32), cases, np.arange(5), columns, ks, cold)
    without = window_metrics(np.array(scores, np.float32), cases, np.arange(5), columns, ks)
    assert list(without) == [name for name in got if not name.endswith(COLD)]
    for row, had in enumerate(seen):
        lists = [range(5), [item for item in range(5) if item in had], [item for item in range(5) if item not in had]]
        lists.append(np.flatnonzero(cold).tolist())
        for kind, shown in zip(KINDS, map(list, lists), strict=True):
            wanted = [item for item in labels[row] if item in shown]
            for k in ks:
                values = [got[f"{name}@{k}{kind}"][row] for name in ("precision", "recall", "ndcg")]
                if wanted:
                    assert values == pytest.approx(plain_metrics(list(map(float, scores[row])), wanted, shown, k))
                else:
                    assert np.isnan(values).all()


@pytest.mark.parametrize("scores_per_chunk", [1, 100, 1 << 22])
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, scores_per_chunk: int) -> None:
    rng = np.random.default_rng(0)
    labels = [sorted(set(rng.integers(0, 40, 9).tolist())) for _ in range(11)]
    seen = [rng.integers(0, 40, rng.integers(0, 30)).tolist() for _ in range(11)]
    cases, columns = cases_of(labels, seen)
    scores = rng.integers(0, 9, (11, 40)).astype(np.float32)
    want = window_metrics(scores, cases, np.arange(40), columns, [3, 10])
    monkeypatch.setattr("vista.evaluation.protocol.SCORES_PER_CHUNK", scores_per_chunk)
    got = window_metrics(scores, cases, np.arange(40), columns, [3, 10])
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value)
