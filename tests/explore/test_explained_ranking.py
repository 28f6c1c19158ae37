"""Rankings are those of the scorer, parts add up to the score, and events that are added change them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import DAY, Served, serve, small_config
from tests.explore.conftest import places_of
from vista.cli.serving_commands import run_score
from vista.config import ScoreConfig, ServeConfig
from vista.explore.rankings import (
    changes,
    common_task,
    compare_rankings,
    compare_users,
    earlier_generations,
    explained_ranking,
    request_time,
    tail_of_events,
    what_if,
)
from vista.explore.workspace import Workspace, open_page_scorer, record_of
from vista.log.event_log import EventLog
from vista.log.histories import NO_TIMESTAMP
from vista.refresh import refresh
from vista.scorer import Ranking
from vista.serve.scoring_service import ScoringService

USER = 104


@pytest.mark.parametrize("days_since", [5, 400])
def test_shell_http_page_and_explanations_share_a_default_time(
    workspace: Workspace, days_since: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The current time, but at most 30 days after the user's newest event."""
    scorer, places = workspace.scorer, workspace.places
    assert scorer is not None and places.store is not None
    newest = int(record_of(scorer, USER).last_event_ts[0])
    monkeypatch.setattr("vista.scorer.request.time.time_ns", lambda: (newest + days_since * DAY) * 1_000_000)
    expected = newest + min(days_since, 30) * DAY
    ranked = scorer.rank(USER, top_k=5, now=expected)

    assert request_time(USER, scorer) == expected
    page = explained_ranking(workspace, scorer, USER, top_k=5, now=request_time(USER, scorer))
    assert page is not None and page.explanation.items == ranked.items.tolist()
    service = ScoringService(scorer, ServeConfig())
    asked = json.dumps({"user": USER, "top_k": 5}).encode()
    answer = json.loads(service.rank(asked, "application/json", 60.0).body)
    assert (answer["items"], answer["now"]) == (ranked.items.tolist(), expected)
    asked = json.dumps({"user": USER, "items": ranked.items.tolist()}).encode()
    told = json.loads(service.explain(asked, "application/json").body)
    assert told["now"] == expected
    np.testing.assert_allclose(told["value"], scorer.explain(USER, ranked.items, now=expected).value)
    np.testing.assert_allclose(scorer.explain(USER, ranked.items).value, told["value"])
    shell = ScoreConfig(model=str(places.model), store=str(places.store), users=[str(USER)], top_k=5)
    (line,) = run_score(shell).splitlines()[1:]
    pairs = ", ".join(f"{item} {score:.4f}" for item, score in zip(ranked.items, ranked.scores, strict=True))
    assert line == f"user {USER} (now {np.datetime64(expected // 60_000, 'm')}): {pairs}"


@pytest.mark.parametrize("task", ["click", "next"])
def test_shares_add_up_to_the_score(task_workspace: Workspace, task: str) -> None:
    places = task_workspace.places
    with open_page_scorer(str(places.model), places.store, None, task=task) as scorer:
        user = scorer.store.keys().__next__()
        now = request_time(user, scorer)
        ranking = explained_ranking(task_workspace, scorer, user, top_k=5, now=now)
        assert ranking is not None
        expected = scorer.rank(user, top_k=5, now=now)
    told = ranking.explanation
    assert told.items == expected.items.tolist() and np.array_equal(ranking.scores, expected.scores)
    scores = 1 / (1 + np.exp(-told.value)) if task == "click" else told.value
    assert ranking.is_probability == (task == "click")
    np.testing.assert_allclose(scores, ranking.scores, atol=1e-4)
    for place, row in enumerate(ranking.rows()):
        assert row["rank"] == place + 1 and row["score"] == ranking.scores[place]
        assert row["item"] == ranking.names[place] == str(told.items[place])
        assert sum(row[part] for part in told.shares) == pytest.approx(told.value[place] - told.mean, abs=1e-9)
        events = ranking.tail_events(place)
        assert np.isclose(sum(event["share"] for event in events), row["tail"], atol=1e-4)
        assert [event["age"] for event in events] == list(range(1, len(events) + 1))
        assert [event["item"] for event in events] == list(map(str, told.tail_items))[::-1]


def test_the_reason_is_that_of_the_scorer(workspace: Workspace) -> None:
    assert workspace.scorer is not None
    now = request_time(USER, workspace.scorer)
    ranking = explained_ranking(workspace, workspace.scorer, USER, top_k=4, now=now)
    assert ranking is not None
    told = workspace.scorer.explain(USER, ranking.explanation.items, now=now)
    above = told.value[0] - told.mean
    score = f"a score of {told.value[0]:.2f}, {above:+.2f} compared with the average item"
    assert ranking.reason(0) == f"**Item {told.items[0]}** has rank 1 and {score}: {told.why(0)}."
    assert above > 0 and told.reasons[0]


def test_a_user_without_a_record_is_ranked_as_an_empty_history(workspace: Workspace) -> None:
    assert workspace.scorer is not None
    now = request_time(999_999, workspace.scorer)
    ranking = explained_ranking(workspace, workspace.scorer, 999_999, top_k=3, now=now)
    assert ranking is not None and ranking.tail_events(0) == [] and len(ranking.names) == 3


def test_the_time_of_a_request_is_after_the_newest_event(workspace: Workspace) -> None:
    assert workspace.scorer is not None and workspace.log is not None
    newest = int(workspace.log[USER].timestamp[-1])
    assert request_time(USER, workspace.scorer) == newest + 30 * DAY


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
    listed = {*map(str, before[:5]), *map(str, after.items.tolist()), "200", "50"}  # the added items, too
    assert len(changed.rows) == len(listed) and {row["item"] for row in changed.rows} == listed


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
    assert moved.summary(2) == "**1 of the best 2** items is new. Item 30 is first now and had rank 3 before."
    fresh = changes(workspace, ranking_of(10, 20), ranking_of(40, 10), 2)
    assert fresh.rows[0]["before"] is None and fresh.rows[0]["change"] is None and fresh.num_changed == 1
    assert "Item 40 is first now and was beyond rank 1,000 before." in fresh.summary(2)
    other = changes(workspace, ranking_of(10, 20, 30, 40), ranking_of(10, 40, 20, 30), 3)
    assert other.summary(3) == "**1 of the best 3** items is new. Item 40 moves up most, from rank 4 to 2."


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


def test_an_earlier_generation_can_be_compared(served: Served, tmp_path: Any) -> None:
    for until in ("leave-last-2-out", "all"):
        refresh(served.model, served.log, tmp_path / "store", until=until)
    with open_page_scorer(str(served.model_dir), str(tmp_path / "store"), None) as a:
        assert a.store.generation == 2 and earlier_generations(a) == [1]
        with open_page_scorer(str(served.model_dir), str(tmp_path / "store"), None, generation=1) as b:
            counts = [int(scorer.store.get_many([USER]).event_count[0]) for scorer in (a, b)]
    assert counts == [40, 38]
