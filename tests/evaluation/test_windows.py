"""Which items follow a question, and metrics over these labels: by hand, as properties, against loops. Evaluation
over windows against a plain loop, leakage, and the files; and a gap before the labels."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import Served, model_config, small_config
from tests.evaluation.conftest import evaluated
from vista.arrays import Float32s, Int
from vista.config import DataConfig, EvaluateConfig, SourceColumns
from vista.config.checks import Codec, Split, Target, to_dict
from vista.errors import ConfigError, LeakageError
from vista.evaluation.cases import WindowCases, cases_digest, window_cases
from vista.evaluation.comparison import PerUserMetrics
from vista.evaluation.evaluate import EvaluationReport, evaluate, evaluate_model, evaluate_scorer
from vista.evaluation.protocol import (
    COLD,
    KINDS,
    measure_next_items,
    measure_windows,
    split_windows,
    window_metric,
    window_metrics,
)
from vista.log.event_log import EventLog
from vista.log.histories import DAY_MS
from vista.log.splits import part_counts, split_until, visible_counts
from vista.model.baselines.sequence_models import SequenceModel
from vista.model.inference import item_vectors
from vista.model.vista_model import VistaModel
from vista.refresh import RefreshOptions, refresh
from vista.scorer import Scorer
from vista.training.log_schema import schema_of
from vista.training.trainer import Trainer, train

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


ASKED: dict[str, Any] = {"target": Target.window, "horizon_events": [3, 8], "min_seen": 5, "min_after": 2, "top_k": [4]}


def plain_precision(
    log: EventLog, seen: np.ndarray, end: np.ndarray, scores: dict[int, Float32s], horizon: int
) -> dict[str, list[float]]:
    """Precision@4 of all, returning, new, and cold items, one user and one list at a time; scores by log row."""
    values: dict[str, list[float]] = {"": [], ":returns": [], ":new": [], ":cold": []}
    visible = {item for user, count in enumerate(seen) for item in log.slice(user, 0, count).item.tolist()}
    cold = set(range(log.num_items)) - visible
    for user, own in scores.items():
        history = log.slice(user).item.tolist()
        had, window = set(history[: seen[user]]), set(history[seen[user] : min(seen[user] + horizon, end[user])])
        every = set(range(log.num_items))
        for kind, listed in (("", every), (":returns", had), (":new", every - had), (":cold", cold)):
            labels = [item for item in window if item in listed]
            best = sorted(listed, key=lambda item: -own[item])[:4]
            values[kind].append(sum(item in labels for item in best) / 4 if labels else float("nan"))
    return values


def assert_same(evaluation: EvaluationReport, want: dict[str, list[float]], window: str) -> None:
    assert evaluation.per_user is not None
    for kind, values in want.items():
        if kind == ":cold" and np.isnan(values).all():
            assert f"precision@4:cold/{window}" not in evaluation.metrics
            continue
        np.testing.assert_allclose(evaluation.per_user.values[f"precision@4{kind}/{window}"], values, atol=1e-9)
        mean = evaluation.metrics[f"precision@4{kind}/{window}"]
        assert mean == pytest.approx(np.nanmean(values))


@pytest.mark.parametrize("split", ["test", "validation"])
def test_a_store_against_a_loop(
    served_tasks: Served, tmp_path: Path, split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a split in time, every question is asked when the labels begin, not when the next event happens."""
    log, data = served_tasks.log, served_tasks.config.data
    until = split_until(data, split)
    seen = visible_counts(log, until)
    end = visible_counts(log, split_until(data, "test")) if split == "validation" else log.lengths
    refresh(served_tasks.model, log, tmp_path / "store", until=until, options=RefreshOptions(codec=Codec.float32))
    times: list[int] = []
    whole = Scorer.catalog_scores

    def noted(scorer: Scorer, users: Any, *, tail: Any = None, now: Any = None) -> Float32s:
        times.extend(now.tolist())
        return whole(scorer, users, tail=tail, now=now)

    with Scorer.open(served_tasks.model, tmp_path / "store") as scorer:
        users = np.flatnonzero((seen >= 5) & (end - seen >= 2))
        ids = log.users.ids(users)
        catalog = scorer.item_vectors()[0]
        assert catalog.tolist() == log.items.ids(np.arange(log.num_items)).tolist()
        scored = scorer.predict(ids, catalog, now=until.before)["next"]
        monkeypatch.setattr(Scorer, "catalog_scores", noted)
        monkeypatch.setattr("vista.evaluation.protocol.USERS_PER_BATCH", 5)
        evaluation = evaluate_scorer(scorer, log, EvaluateConfig(**ASKED, split=split))
    assert set(times) == {until.before} and evaluation.num_cases == len(users) == len(times) > 5
    for horizon in (3, 8):
        want = plain_precision(log, seen, end, dict(zip(users.tolist(), scored, strict=True)), horizon)
        assert_same(evaluation, want, f"{horizon}-events")


def test_items_without_events_before_the_part(tmp_path: Path) -> None:
    """They are ranked among themselves, and only if someone has one of them afterwards."""
    before, after = [0, 1, 2] * 4, [0, 7, 8, 1]
    frame = {
        "user": [1] * 16 + [2] * 16,
        "item": [*before, *after, *before, *after[::-1]],
        "timestamp": [*range(16)] * 2,
    }
    log = EventLog.from_frame(pl.DataFrame(frame), tmp_path / "log", time_unit="s")
    data = DataConfig(split=Split.share, test_share=0.25, validation_share=0.25)
    config = EvaluateConfig(**ASKED | {"horizon_events": [2], "top_k": [1]})
    column = log.items.rows([7])[0]

    def scores(cases: WindowCases) -> np.ndarray:
        return np.where(np.arange(log.num_items) == column, 1.0, 2.0 + np.arange(log.num_items))[None].repeat(2, 0)

    report, per_user = measure_windows(log, data, np.arange(log.num_items), config, scores)
    # The first user has 7, the second one has 8, and 8 is ranked first.
    np.testing.assert_array_equal(per_user.values["precision@1:cold/2-events"], [0.0, 1.0])
    assert "cold" in str(report).splitlines()[0]
    unknown = np.where(np.arange(log.num_items) == column, -1, np.arange(log.num_items))
    _, per_user = measure_windows(log, data, unknown, config, scores)
    np.testing.assert_array_equal(per_user.values["recall@1:cold/2-events"], [0.0, 1.0])
    _, validation = measure_windows(log, data, unknown, dataclasses.replace(config, split="validation"), scores)
    assert not any(name.partition("/")[0].endswith(":cold") for name in validation.values)


def test_days(served_tasks: Served) -> None:
    """The items of the first days after the question; others than the next events."""
    log, until = served_tasks.log, split_until(served_tasks.config.data, "test")
    assert until.before is not None
    with Scorer.open(served_tasks.model, served_tasks.test_store) as scorer:
        config = EvaluateConfig(**ASKED, horizon_days=5)
        evaluation = evaluate_scorer(scorer, log, config)
    assert {name.rpartition("/")[2] for name in evaluation.metrics} == {"5-days"}
    assert evaluation.per_user is not None
    seen, late = log.counts_before(until.before), log.counts_before(until.before + 5 * DAY_MS)
    users = log.users.rows(evaluation.per_user.users.tolist())
    has_labels = ~np.isnan(evaluation.per_user.values["precision@4/5-days"])
    assert has_labels.tolist() == (late > seen)[users].tolist() and has_labels.any()


@pytest.mark.parametrize("split", ["test", "validation"])
def test_days_that_the_log_does_not_span_are_refused(served_tasks: Served, split: str) -> None:
    log, data = served_tasks.log, served_tasks.config.data
    begin, test = (split_until(data, part).before for part in (split, "test"))
    newest = log.time_range()
    assert begin is not None and test is not None and newest is not None
    days = ((newest[1] if split == "test" else test) - begin) / DAY_MS
    split_windows(log, data, EvaluateConfig(**ASKED, split=split, horizon_days=days * 1.1))
    what = rf"{log.path} ends" if split == "test" else r"data\.test_from comes"
    with pytest.raises(ConfigError, match=rf"^horizon_days=.*: {what} {days:.1f} days after the question"):
        split_windows(log, data, EvaluateConfig(**ASKED, split=split, horizon_days=days * 1.12))


def test_a_baseline_against_a_loop(event_log: EventLog, tmp_path: Path) -> None:
    """It reads the raw history before the question. A split by share has no time of the question."""
    config = small_config(
        event_log, tmp_path / "run", data__split=Split.share, data__test_share=0.2, data__validation_share=0.1
    )
    config.model = model_config("sasrec", **(to_dict(config.model) | {"history_limit": 9}))
    model = Trainer(config, event_log).model.eval()
    assert isinstance(model, SequenceModel)
    evaluation = evaluate_model(model, event_log, EvaluateConfig(**ASKED))
    seen = visible_counts(event_log, "leave-last-20-percent-out")
    users = np.flatnonzero((seen >= 5) & (event_log.lengths - seen >= 2))
    rows, items, scores = model.rows_of(event_log.items), item_vectors(model), {}
    assert rows.tolist() == list(range(1, event_log.num_items + 1))
    for user in users.tolist():
        history = event_log.gather(np.array([user]), seen[[user]])
        history = dataclasses.replace(history, item=rows[history.item].astype(np.int32))
        scores[user] = (items @ model.user_vectors(history, None)[0]).numpy()
    assert evaluation.num_cases == len(users) > 3
    for horizon in (3, 8):
        assert_same(
            evaluation, plain_precision(event_log, seen, event_log.lengths, scores, horizon), f"{horizon}-events"
        )


@pytest.fixture(scope="module")
def shared(event_log: EventLog, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """An untrained model of a split by share, a store for its test, and in other folders a stale and a too new one."""
    folder = tmp_path_factory.mktemp("shared")
    shares = {"data__split": Split.share, "data__test_share": 0.2, "data__validation_share": 0.1}
    config = small_config(event_log, folder / "run", **shares)
    model = Trainer(config, event_log).model.eval()
    assert isinstance(model, VistaModel)
    model.save_pretrained(folder / "run" / "best")
    refresh(model, event_log, folder / "store", until="leave-last-20-percent-out")
    refresh(model, event_log, folder / "stale", until="leave-last-20-percent-out-less-3")
    refresh(model, event_log, folder / "late", until="leave-last-10-percent-out")
    return Served(event_log, config, model, folder / "run" / "best", folder / "store", folder, folder)


class TestShare:
    """Leakage with a split that holds out a share of each history."""

    def test_records_cover_nothing_after_the_question(self, shared: Served) -> None:
        seen = visible_counts(shared.log, "leave-last-20-percent-out")
        with Scorer.open(shared.model, shared.store) as scorer:
            evaluation = evaluate_scorer(scorer, shared.log, EvaluateConfig(**ASKED))
            stored = scorer.store.get_many(shared.log.users.ids(np.arange(shared.log.num_users)))
            assert stored.event_count[stored.found].tolist() == seen[stored.found].tolist()
        assert evaluation.num_cases > 3

    def test_stale_summaries_with_their_tails(self, shared: Served) -> None:
        with Scorer.open(shared.model, shared.exact_store / "stale") as scorer:
            assert evaluate_scorer(scorer, shared.log, EvaluateConfig(**ASKED, staleness=3)).num_cases > 3
            with pytest.raises(ConfigError, match="begin after until=leave-last-20-percent-out; "):
                evaluate_scorer(scorer, shared.log, EvaluateConfig(**ASKED))

    @pytest.mark.parametrize("split", ["test", "validation"])
    def test_a_store_that_covers_labels_is_refused(self, shared: Served, split: str) -> None:
        remedy = {"test": "leave-last-20-percent-out", "validation": "leave-last-30-percent-out"}[split]
        with pytest.raises(
            LeakageError, match=f"until=leave-last-10-percent-out, but .* `vista refresh until={remedy}`"
        ):
            evaluated(shared.model, shared.exact_store / "late", shared.log, **ASKED, split=split)


def test_users_without_enough_events_are_an_error(served: Served) -> None:
    with pytest.raises(
        ConfigError,
        match=r"no user has min_seen=5 events until leave-last-out and min_after=2 later .*data.split=share",
    ):
        evaluated(served.model, served.test_store, served.log, **ASKED)


def test_a_log_without_times_has_no_days(served_order: Served) -> None:
    with pytest.raises(ConfigError, match="has no times; set horizon"):
        evaluated(served_order.model, served_order.store, served_order.log, **ASKED, horizon_days=2)


def test_a_model_without_a_retrieval_head_is_refused(served_tasks: Served) -> None:
    model = served_tasks.model
    asked = VistaModel(model.config, dataclasses.replace(model.schema, has_retrieval=False), model.items, model.data)
    asked.eval().load_state_dict(model.state_dict(), strict=False)
    with pytest.raises(ConfigError, match="target=window: this model's"):
        evaluated(asked, served_tasks.test_store, served_tasks.log, **ASKED)


def test_the_files_and_the_table(served_tasks: Served, tmp_path: Path) -> None:
    out = tmp_path / "metrics.json"
    config = EvaluateConfig(
        **ASKED,
        data=str(served_tasks.log.path),
        model=str(served_tasks.model_dir),
        store=str(served_tasks.test_store),
        out=str(out),
        device="cpu",
        num_threads=1,
    )
    result = evaluate(config)
    assert result.per_user is not None
    written = json.loads(out.read_text())
    assert written["target"] == "window" and written["horizon_events"] == [3, 8] and written["min_seen"] == 5
    assert written["metrics"] == result.metrics and "exclude_seen" not in written
    per_user = PerUserMetrics.load(Path(f"{out}.npz"))
    assert per_user.question == result.per_user.question
    assert per_user.users.tolist() == result.per_user.users.tolist()
    assert per_user.values.keys() == result.metrics.keys() == written["standard_errors"].keys()
    for name, values in per_user.values.items():
        np.testing.assert_array_equal(values, result.per_user.values[name])
        known = values[~np.isnan(values)]
        assert written["standard_errors"][name] == pytest.approx(known.std(ddof=1) / len(known) ** 0.5)
    lines = str(result).splitlines()
    assert [line.split() for line in lines if line.startswith("next")] == [
        ["next", events, "events", "all", "returns", "new"] for events in ("3", "8")
    ]
    mean, error = (f"{written[key]['precision@4:new/3-events']:.4f}" for key in ("metrics", "standard_errors"))
    assert lines[3].startswith("precision@4 ") and lines[3].endswith(f" {mean} ± {error}")


HOUR = 3_600_000
START = 444_444 * HOUR
VALIDATION, TEST, GAP_HOURS = START + 30 * HOUR, START + 40 * HOUR, 3
NUM_ITEMS = 12


def gap_log(path: Path, shift: int, **more: Any) -> EventLog:
    """Users with an event per hour; `shift` changes the items of the events in the gaps, and no other."""
    hours = np.arange(50)
    in_gap = ((hours >= 27) & (hours < 30)) | ((hours >= 37) & (hours < 40))
    frames = [
        (np.full(50, user), (user * hours + 3 * (hours // 7) + shift * in_gap) % NUM_ITEMS, START + hours * HOUR)
        for user in range(1, 9)
    ]
    user, item, time = (np.concatenate(column) for column in zip(*frames, strict=True))
    return EventLog.from_frame({"user": user, "item": item, "timestamp": time}, path, time_unit="ms", **more)


def gap_config(log: EventLog, run_dir: Path) -> Any:
    config = small_config(log, run_dir)
    split = {"split": Split.time, "validation_from": str(VALIDATION), "test_from": str(TEST)}
    return replace(config, data=replace(config.data, **split, gap_minutes=60.0 * GAP_HOURS))


def measured(folder: Path, shift: int) -> dict[str, float]:
    """Metrics of a trained model, of next items and of windows, in validation and test, without those of new and
    returning items: an event of the gap makes an item a returning one.
    """
    log = gap_log(folder / "log", shift)
    model = train(gap_config(log, folder / "run"), log)
    metrics = {}
    for part in ("validation", "test"):
        refresh(model, log, folder / part, until=str(split_until(model.data, part)))
        with Scorer.open(model, folder / part) as scorer:
            for target in Target:
                config = EvaluateConfig(split=part, target=target, horizon_events=[4], min_seen=1, min_after=1)
                result = evaluate_scorer(scorer, log, replace(config, top_k=[3]))
                metrics |= {f"{part}/{name}": value for name, value in result.metrics.items() if ":" not in name}
    return metrics


def test_the_items_of_the_gap_change_nothing(tmp_path: Path) -> None:
    plain, other = (measured(tmp_path / f"{shift}", shift) for shift in (0, 5))
    assert {"validation/hr@3", "test/hr@3", f"test/{window_metric('recall@3', '4 events')}"} <= set(plain)
    assert str(plain) == str(other)  # NaN is not equal to itself


@pytest.mark.parametrize(("part", "hour"), [("validation", 30), ("test", 40)])
def test_the_label_is_the_first_event_after_the_gap(tmp_path: Path, part: str, hour: int) -> None:
    log = gap_log(tmp_path / "log", 0)
    asked = []

    def score(cases: Any) -> np.ndarray:
        asked.append(cases)
        return np.zeros((len(cases), NUM_ITEMS))

    config, data = EvaluateConfig(split=part), replace(gap_config(log, tmp_path).data, exclude_seen=False)
    measure_next_items(log, data, np.arange(NUM_ITEMS), config, score)
    (cases,) = asked
    assert cases.seen.tolist() == [hour - GAP_HOURS] * 8
    assert cases.now.tolist() == [START + hour * HOUR] * 8
    assert cases.item.tolist() == [log.slice(row).item[hour] for row in range(8)]


def test_validation_stops_before_the_gap_of_the_test(tmp_path: Path) -> None:
    log = gap_log(tmp_path / "log", 0)
    seen, first, end = part_counts(log, gap_config(log, tmp_path).data, "validation")
    assert (seen[0], first[0], end[0]) == (27, 30, 37)


def test_a_store_that_covers_the_gap_is_refused(tmp_path: Path) -> None:
    log = gap_log(tmp_path / "log", 0)
    model = Trainer(gap_config(log, tmp_path / "run"), log).model.eval()
    assert isinstance(model, VistaModel)
    refresh(model, log, tmp_path / "store", until=str(TEST))
    message = rf"labels of this model begin after until={TEST - GAP_HOURS * HOUR}"
    with pytest.raises(LeakageError, match=message):
        evaluated(model, tmp_path / "store", log)


def test_impressions_are_refused(tmp_path: Path) -> None:
    shown = {"user": [1, 2], "item": [1, 2], "timestamp": [START + HOUR] * 2, "click": [0, 1]}
    log = gap_log(tmp_path / "log", 0, impressions=shown, columns=SourceColumns(labels=["click"]))
    config = gap_config(log, tmp_path)
    with pytest.raises(
        ConfigError, match=r"data\.gap_minutes=180: impressions would be scored with events from the gap"
    ):
        schema_of(log, config)
    assert schema_of(log, replace(config, optim=replace(config.optim, task_weight=0.0))).tasks == []
