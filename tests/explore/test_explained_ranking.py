"""Rankings are those of the scorer, parts add up to the score, and events that are added change them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import Served, serve, small_config
from tests.explore.conftest import places_of
from vista.explore.rankings import (
    changes,
    common_task,
    compare_rankings,
    compare_users,
    compared,
    earlier_generations,
    explained_ranking,
    ordinal,
    request_time,
    tail_of_events,
    what_if,
)
from vista.explore.workspace import Workspace, open_page_scorer, record_of
from vista.log.event_log import EventLog
from vista.log.histories import NO_TIMESTAMP
from vista.refresh import refresh
from vista.scorer import Ranking, Scorer

USER = 104


@pytest.mark.parametrize("task", ["click", "next"])
def test_parts_add_up_to_the_score(task_workspace: Workspace, task: str) -> None:
    places = task_workspace.places
    with open_page_scorer(str(places.model), places.store, None, task=task) as scorer:
        user = scorer.store.keys().__next__()
        now = request_time(user, scorer)
        ranking = explained_ranking(task_workspace, scorer, user, top_k=5, now=now)
        assert ranking is not None
        expected = scorer.rank(user, top_k=5, now=now)
    assert ranking.items == expected.items.tolist() and np.array_equal(ranking.scores, expected.scores)
    total = np.sum([*ranking.parts.values()], axis=0)
    scores = 1 / (1 + np.exp(-total)) if task == "click" else total
    assert ranking.is_probability == (task == "click")
    np.testing.assert_allclose(scores, ranking.scores, atol=1e-4)
    assert "summary" in ranking.parts and "counters" not in ranking.parts and "state" not in ranking.parts
    for place in range(5):
        assert np.isclose(
            sum(row["share"] for row in ranking.tokens(place)), ranking.parts["summary"][place], atol=1e-4
        )
        events = ranking.tail_events(place)
        assert np.isclose(sum(row["share"] for row in events), ranking.parts["tail"][place], atol=1e-4)
        assert [row["age"] for row in events] == list(range(1, len(events) + 1))
    assert [row["rank"] for row in ranking.rows()] == [1, 2, 3, 4, 5]


def test_the_reason_names_the_largest_part(workspace: Workspace) -> None:
    assert workspace.scorer is not None
    now = request_time(USER, workspace.scorer)
    ranking = explained_ranking(workspace, workspace.scorer, USER, top_k=4, now=now)
    assert ranking is not None
    reason = ranking.reason(0)
    largest = max(ranking.parts, key=lambda part: abs(float(ranking.parts[part][0])))
    assert reason.startswith(f"**Item {ranking.items[0]}** has rank 1.") and f"largest parts are {largest} " in reason
    assert "Compared with the mean of the other 3 items" in reason
    means = {part: float(shares[1:].mean()) for part, shares in ranking.parts.items()}
    differs = max(means, key=lambda part: abs(float(ranking.parts[part][0]) - means[part]))
    assert reason.endswith(f"is in the {differs}: it {compared(float(ranking.parts[differs][0]), means[differs])}.")
    one = explained_ranking(workspace, workspace.scorer, USER, top_k=1, now=now)
    assert one is not None and "Compared" not in one.reason(0)
    token = int(np.abs(ranking.explanation.summary[0]).argmax()) + 1
    assert "summary" not in reason.split("Compared")[0] or f"tokens {token} and" in reason
    shares = ranking.explanation.tail[0]
    event = int(np.abs(shares).argmax())
    said = f"(largest: item {ranking.tail_names[event]}, the {ordinal(len(shares) - event)} newest event, "
    assert "tail" not in reason.split("Compared")[0] or f"{said}{shares[event]:+.2f})" in reason


def test_a_user_without_a_record_is_ranked_as_an_empty_history(workspace: Workspace) -> None:
    assert workspace.scorer is not None
    now = request_time(999_999, workspace.scorer)
    ranking = explained_ranking(workspace, workspace.scorer, 999_999, top_k=3, now=now)
    assert ranking is not None and ranking.tail_events(0) == [] and len(ranking.items) == 3


def test_the_time_of_a_request_is_after_the_newest_event(workspace: Workspace) -> None:
    assert workspace.scorer is not None and workspace.log is not None
    newest = int(workspace.log[USER].timestamp[-1])
    assert request_time(USER, workspace.scorer) == newest + 3_600_000
    assert request_time(USER, workspace.scorer, current=5) == newest
    assert request_time(USER, workspace.scorer, current=newest + 7) == newest + 7


def test_added_events_change_the_ranking_as_a_tail_does(workspace: Workspace) -> None:
    scorer = workspace.scorer
    assert scorer is not None
    now = request_time(USER, scorer)
    assert now is not None
    changed = what_if(workspace, scorer, USER, [(200, 0), (50, 1)], now=now, top_k=5)
    tail = tail_of_events([(200, 0), (50, 1)], now, 0)
    assert tail.times.tolist() == [now - 120_000, now - 60_000] and tail.offsets.tolist() == [0, 2]
    after = scorer.rank(USER, top_k=5, now=now, tail=tail)
    assert [row["item"] for row in changed.rows[:5]] == list(map(str, after.items.tolist()))
    before = scorer.rank(USER, top_k=40, now=now).items.tolist()
    for row in changed.rows:
        assert row["before"] == before.index(int(row["item"])) + 1 and row["change"] == row["before"] - row["after"]
    assert changed.num_changed == len(set(after.items.tolist()) - set(before[:5]))
    assert len(changed.rows) == 5 + changed.num_changed


def test_an_event_is_added_for_a_user_without_a_record(workspace: Workspace) -> None:
    scorer = workspace.scorer
    assert scorer is not None
    clock = time.time_ns() // 1_000_000
    now = request_time(999_999, scorer)
    assert now is not None and clock <= now < clock + 60_000
    changed = what_if(workspace, scorer, 999_999, [(200, 0)], now=now, top_k=5)
    after = scorer.rank(999_999, top_k=5, now=now, tail=tail_of_events([(200, 0)], now, NO_TIMESTAMP))
    assert [row["item"] for row in changed.rows[:5]] == list(map(str, after.items.tolist()))
    assert after.scores.tolist() != scorer.rank(999_999, top_k=5, now=now).scores.tolist()


def test_added_events_are_the_newest_in_a_log_without_times(order_log: EventLog, tmp_path: Path) -> None:
    opened = Workspace.open(places_of(serve(order_log, small_config(order_log, tmp_path / "run"), tmp_path)))
    assert opened.scorer is not None
    with opened.scorer as scorer:
        user = f"u{USER}"
        assert request_time(user, scorer) is None
        stored = record_of(scorer, user)
        assert stored.tail.times.tolist() == list(range(34, 40))
        for events in ([("i200", 0)], [("i200", 0), ("i50", 0)]):
            changed = what_if(opened, scorer, user, events, now=None, top_k=5)
            added = tail_of_events(events, None, int(stored.last_event_ts[0]))
            assert added.times.tolist() == [40, 41][: len(events)]
            after = scorer.rank(user, top_k=5, tail=added)
            assert [row["score after"] for row in changed.rows[:5]] == after.scores.tolist()
            assert scorer.explain(user, after.items, tail=added).tail_items[-len(events) :] == [i for i, _ in events]
        nobody = what_if(opened, scorer, "u9", [("i200", 0)], now=None, top_k=5)
        assert [row["score before"] for row in nobody.rows] != [row["score after"] for row in nobody.rows]


def ranking_of(*items: int) -> Ranking:
    return Ranking(np.array(items), -np.arange(len(items), dtype=np.float32), 0, len(items))


def test_changes_in_words(workspace: Workspace) -> None:
    same = changes(workspace, ranking_of(10, 20, 30), ranking_of(10, 20, 30), 2)
    assert same.summary(2) == "The order of the best 2 items stays the same." and same.num_changed == 0
    moved = changes(workspace, ranking_of(10, 20, 30), ranking_of(30, 10, 20), 2)
    assert [(row["item"], row["change"]) for row in moved.rows] == [("30", 2), ("10", -1), ("20", -1)]
    assert moved.summary(2) == "**1 of the best 2** items are new. Item 30 is first now and had rank 3 before."
    fresh = changes(workspace, ranking_of(10, 20), ranking_of(40, 10), 2)
    assert fresh.rows[0]["before"] is None and fresh.rows[0]["change"] is None and fresh.num_changed == 1
    assert "Item 40 is first now and was beyond rank 1,000 before." in fresh.summary(2)
    other = changes(workspace, ranking_of(10, 20, 30, 40), ranking_of(10, 40, 20, 30), 3)
    assert other.summary(3) == "**1 of the best 3** items are new. Item 40 moves up most, from rank 4 to 2."


def test_two_stores_of_one_model(workspace: Workspace, served: Served) -> None:
    a = workspace.scorer
    assert a is not None
    with open_page_scorer(str(served.model_dir), str(served.test_store), None) as b:
        itself = compare_rankings(workspace, a, a, USER, top_k=5)
        assert itself.shared == 5 and all(row["A in B"] == row["B in A"] == row["rank"] for row in itself.rows)
        compared = compare_rankings(workspace, a, b, USER, top_k=5)
        now = request_time(USER, a, b)
        one, two = (scorer.rank(USER, top_k=5, now=now).items.tolist() for scorer in (a, b))
        assert [row["A"] for row in compared.rows] == list(map(str, one)) and compared.shared == len({*one} & {*two})
        assert itself.num_events[0] == itself.num_events[1] == compared.num_events[0] > compared.num_events[1]
        users = compare_users(a, b, [USER, 103], top_k=5)
        assert users.overlap[0] == compared.shared / 5 and 0 <= users.same_first <= 1
        assert common_task(a, b) == "next"


def test_two_stores_are_asked_at_the_same_time(
    workspace: Workspace, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    rank = Scorer.rank
    monkeypatch.setattr(
        Scorer, "rank", lambda *words, now, **named: asked.append(now) or rank(*words, now=now, **named)
    )
    a = workspace.scorer
    assert a is not None
    with open_page_scorer(str(served.model_dir), str(served.test_store), None) as b:
        assert request_time(USER, b) != request_time(USER, a), "the store before the test labels lacks the newest event"
        compare_rankings(workspace, b, a, USER, top_k=5)
        compare_users(b, a, [USER], top_k=5)
    assert asked == [request_time(USER, a)] * 4


def test_an_earlier_generation_can_be_compared(served: Served, tmp_path: Any) -> None:
    for until in ("leave-last-2-out", "all"):
        refresh(served.model, served.log, tmp_path / "store", until=until)
    with open_page_scorer(str(served.model_dir), str(tmp_path / "store"), None) as a:
        assert a.store.generation == 2 and earlier_generations(a) == [1]
        with open_page_scorer(str(served.model_dir), str(tmp_path / "store"), None, generation=1) as b:
            counts = [int(scorer.store.get_many([USER]).event_count[0]) for scorer in (a, b)]
    assert counts == [40, 38]


@pytest.mark.parametrize(
    ("own", "other", "text"),
    [
        (-0.06, -0.19, "lowers this score by 0.06, less than it lowers others (0.19)"),
        (-0.3, -0.19, "lowers this score by 0.30, more than it lowers others (0.19)"),
        (0.5, 0.25, "raises this score by 0.50, more than it raises others (0.25)"),
        (0.1, 0.25, "raises this score by 0.10, less than it raises others (0.25)"),
        (-0.1, 0.25, "lowers this score by 0.10 and raises others by 0.25"),
        (0.1, -0.25, "raises this score by 0.10 and lowers others by 0.25"),
    ],
)
def test_a_part_is_compared_with_that_of_other_items(own: float, other: float, text: str) -> None:
    assert compared(own, other) == text


def test_items_that_were_all_beyond_the_listed_ranks_are_new(workspace: Workspace) -> None:
    changed = changes(workspace, ranking_of(10, 20), ranking_of(30, 40), 2)
    assert changed.num_changed == 2 and all(row["change"] is None for row in changed.rows)
    assert changed.summary(2) == (
        "**2 of the best 2** items are new. Item 30 is first now and was beyond rank 1,000 before."
    )
