"""The cases of the protocol against plain loops, and the validation during training that uses them. Exported models
answer labeled tasks with calibrated probabilities."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import DAY, ROUNDING, START, Served, draw_counter_weights, small_config
from vista.arrays import Int
from vista.config import EvaluateConfig, SourceColumns
from vista.config.checks import Codec, Split
from vista.errors import NonFiniteLossError
from vista.evaluation.answers import ScorerAnswers
from vista.evaluation.cases import NextItemCases, impression_cases, next_item_cases, with_tasks
from vista.evaluation.evaluate import evaluate_scorer
from vista.evaluation.protocol import (
    LAST_RANK,
    case_batches,
    impression_metrics,
    rank_next_items,
    ranking_metrics,
    seen_columns,
)
from vista.log.event_log import EventLog
from vista.log.histories import Histories
from vista.log.splits import Until, split_until, visible_counts
from vista.logistic_regression import CALIBRATION_PRIOR, fit_calibration
from vista.model import inference
from vista.model.history_states import GrowingStates
from vista.model.ranking_model import RankingModel
from vista.model.vista_model import VistaModel
from vista.refresh import RefreshOptions, refresh
from vista.refresh.log_reading import item_values
from vista.scorer import Scorer
from vista.training.trainer import Trainer
from vista.training.validation import Validation, reference_scores

HOUR = 3_600_000


def hand_log(folder: Path) -> EventLog:
    """Users 1..6. Before hour 10 users 1, 4 and 6 have no events: an empty history first, in the middle and last."""
    histories = {
        1: [(11, 5), (12, 6)],
        2: [(1, 1), (2, 2), (3, 1), (11, 3)],
        3: [(1, 4), (10, 4)],
        4: [(12, 1), (13, 2)],
        5: [(1, 3), (2, 6), (9, 5), (10, 1), (11, 2)],
        6: [(20, 2)],
    }
    rows = [(user, hour, item) for user, events in histories.items() for hour, item in events]
    user, hour, item = zip(*rows, strict=True)
    times = HOUR * np.array(hour)
    return EventLog.from_frame({"user": user, "item": item, "timestamp": times}, folder / "log", time_unit="ms")


def test_next_item_cases(tmp_path: Path) -> None:
    log = hand_log(tmp_path)
    last = next_item_cases(log, visible_counts(log, "leave-last-out"))
    assert log.users.ids(last.user).tolist() == [2, 5]  # users with at least three events
    assert last.seen.tolist() == [3, 4] and log.items.ids(last.item).tolist() == [3, 2]
    two = next_item_cases(log, visible_counts(log, "leave-last-two-out"))
    assert two.seen.tolist() == [2, 3] and log.items.ids(two.item).tolist() == [1, 1]
    timed = next_item_cases(log, visible_counts(log, 10 * HOUR))
    assert log.users.ids(timed.user).tolist() == [1, 2, 3, 4, 5, 6]
    assert timed.seen.tolist() == [0, 3, 1, 0, 3, 0] and log.items.ids(timed.item).tolist() == [5, 3, 4, 1, 1, 2]
    assert next_item_cases(log, visible_counts(log, None)).user.tolist() == []


def test_the_same_users_are_drawn_every_time(event_log: EventLog) -> None:
    seen = visible_counts(event_log, "leave-last-out")
    everyone = next_item_cases(event_log, seen)
    few = next_item_cases(event_log, seen, max_users=5)
    assert len(few.user) == 5 < len(everyone.user) and set(few.user) < set(everyone.user)
    assert few.user.tolist() == sorted(few.user)
    again = next_item_cases(event_log, seen, max_users=5)
    assert [part.tolist() for part in (again.user, again.seen, again.item)] == [
        part.tolist() for part in (few.user, few.seen, few.item)
    ]


@pytest.mark.parametrize("until", ["leave-last-out", 10 * HOUR, "all"])
def test_seen_items_belong_to_their_own_user(tmp_path: Path, until: str | int) -> None:
    log = hand_log(tmp_path)
    seen = visible_counts(log, until)
    everyone = np.arange(log.num_users)
    columns = np.array([2, -1, 0, 1, -1, 3])  # two items that the model does not know
    for users in (everyone, everyone[::-1], everyone[:1], everyone[:0], np.array([5, 0, 3])):
        values, offsets = seen_columns(log, NextItemCases(users, seen[users], users, None), columns)
        expected = []
        for user in users.tolist():
            items = log.slice(user, 0, int(seen[user])).item
            expected.append([columns[item] for item in items if columns[item] >= 0])
        assert [values[a:b].tolist() for a, b in pairwise(offsets)] == expected
        assert offsets[0] == 0 and offsets[-1] == len(values)


def test_hand_computed_ranks(tmp_path: Path) -> None:
    log = hand_log(tmp_path)
    cases = next_item_cases(log, visible_counts(log, 10 * HOUR))
    # Items 1..6 score 6..1 for all users; labels are 5 3 4 1 1 2. Seen: - {1 2} {4} - {3 6 5} -.
    line = np.arange(6, 0, -1, dtype=np.float32)

    def ranks(exclude_seen: bool, columns: list[int], users_per_batch: int) -> list[int]:
        return rank_next_items(
            log,
            cases,
            np.array(columns),
            lambda batch: np.tile(line, (len(batch.user), 1)),
            case_batches(cases, log.num_items, users_per_batch),
            exclude_seen=exclude_seen,
        ).tolist()

    known = [0, 1, 2, 3, 4, 5]
    for size in (1, 2, 5, 100):
        assert ranks(False, known, size) == [4, 2, 3, 0, 0, 1]
        # Items 1 and 2, which ranked before label 3, are in user 2's history. Label 4 is in user 3's own and stays in.
        assert ranks(True, known, size) == [4, 0, 3, 0, 0, 1]
        # A label that the model does not know (item 1, of users 4 and 5) is in no list of any length.
        unknown = ranks(True, [-1, 1, 2, 3, 4, 5], size)
        assert unknown == [4, 1, 3, LAST_RANK, LAST_RANK, 1]
        assert ranking_metrics(np.array(unknown), [200])["hr@200"] == pytest.approx(4 / 6)
    values = ranking_metrics(np.array(ranks(True, known, 2)), [1, 3])
    gain = [1 / math.log2(rank + 2) for rank in range(5)]
    assert values["hr@1"] == pytest.approx(3 / 6) and values["hr@3"] == pytest.approx(4 / 6)
    assert values["ndcg@1"] == pytest.approx(3 / 6) and values["ndcg@3"] == pytest.approx((3 * gain[0] + gain[1]) / 6)


def test_impressions_see_the_events_strictly_before(tmp_path: Path) -> None:
    events = {"user": [1, 1, 1, 3], "item": [1, 2, 3, 1], "timestamp": [10, 20, 20, 5]}
    shown = {
        "user": [3, 1, 1, 1, 2, 1],
        "item": [1, 1, 2, 3, 1, 2],
        "timestamp": [6, 10, 20, 21, 20, 30],
        "click": [1, 0, 1, None, 0, 1],
        "buy": [None, 1, 0, 0, 1, 1],
    }
    log = EventLog.from_frame(
        events, tmp_path / "log", time_unit="s", impressions=shown, columns=SourceColumns(labels=["click", "buy"])
    )
    cases = impression_cases(log, 6_000, 30_000)
    named = log.users.ids(cases.user).tolist()
    assert list(zip(named, (cases.timestamp // 1000).tolist(), cases.seen.tolist(), strict=True)) == [
        (1, 10, 0),
        (1, 20, 1),
        (1, 21, 3),
        (2, 20, 0),
        (3, 6, 1),
    ]
    assert cases.mask.tolist() == [[True, True], [True, True], [False, True], [True, True], [True, False]]
    assert cases.label[cases.mask].tolist() == [0, 1, 1, 0, 0, 0, 1, 1]
    assert impression_cases(log, 6_000, None).user.tolist() == [0, 0, 0, 0, 1, 2]
    assert impression_cases(log, 99_000, None).user.tolist() == []
    few = impression_cases(log, 6_000, 30_000, max_cases=3)
    assert (
        len(few.user) == 3
        and few.timestamp.tolist() == impression_cases(log, 6_000, 30_000, max_cases=3).timestamp.tolist()
    )
    buys = with_tasks(cases, ["buy"])
    assert (buys.tasks, buys.label.shape) == (["buy"], (5, 1)) and buys.mask[:, 0].tolist() == cases.mask[:, 1].tolist()


def test_impression_metrics_against_scikit_learn(impression_log: EventLog) -> None:
    from sklearn.metrics import log_loss, roc_auc_score

    cases = impression_cases(impression_log, 0, None)
    rng = np.random.default_rng(0)
    predicted = rng.uniform(0.01, 0.99, cases.label.shape).astype(np.float32)
    values = impression_metrics(cases, predicted)
    assert len(values) == 4 * len(cases.tasks)
    for index, task in enumerate(cases.tasks):
        known = cases.mask[:, index]
        label, value, user = cases.label[known, index], predicted[known, index], cases.user[known]
        assert values[f"auc/{task}"] == pytest.approx(roc_auc_score(label, value))
        rate = np.full(len(label), label.mean())
        assert values[f"ne/{task}"] == pytest.approx(log_loss(label, value) / log_loss(label, rate), rel=1e-5)
        assert values[f"calibration/{task}"] == pytest.approx(value.astype(float).mean() / label.mean(), rel=1e-5)
        groups = [user == u for u in np.unique(user) if len(np.unique(label[user == u])) == 2]
        weights = [g.sum() for g in groups]
        by_user = [roc_auc_score(label[g], value[g]) for g in groups]
        assert values[f"gauc/{task}"] == pytest.approx(np.average(by_user, weights=weights))


def test_a_task_of_one_class_has_no_metrics(tmp_path: Path) -> None:
    events = {"user": [1, 1], "item": [1, 2], "timestamp": [1, 2]}
    shown = {"user": [1, 1], "item": [1, 2], "timestamp": [3, 4], "click": [1, 1], "buy": [0, 1]}
    log = EventLog.from_frame(
        events, tmp_path / "log", time_unit="s", impressions=shown, columns=SourceColumns(labels=["click", "buy"])
    )
    cases = impression_cases(log, 0, None)
    values = impression_metrics(cases, np.full((2, 2), 0.5, np.float32))
    assert sorted(values) == ["auc/buy", "calibration/buy", "gauc/buy", "ne/buy"]
    # Validation uses the first task with labels of both kinds.
    config = small_config(log, tmp_path, data__split=Split.time, data__validation_from="2500", data__test_from="9000")
    assert Validation(log, np.arange(2) + 1, config).metric == "ne/buy"
    config.data.validation_from = "3500"  # only the last impression: one class per task, and no next event
    assert Validation(log, np.arange(2) + 1, config).metric == ""


class TestValidation:
    def rows(self, log: EventLog) -> Any:
        return np.arange(log.num_items) + 1

    def test_metrics_of_a_split(self, served: Served, served_tasks: Served) -> None:
        next_items = Validation(served.log, self.rows(served.log), served.config)
        assert next_items.metric == "ndcg@10"
        values = next_items(served.model)
        assert sorted(values) == ["hr@10", "ndcg@10"] and 0 < values["ndcg@10"] <= values["hr@10"] <= 1
        assert next_items(served.model) == values
        tasks = Validation(served_tasks.log, self.rows(served_tasks.log), served_tasks.config)
        assert tasks.metric == "ne/click"
        assert {"ne/click", "auc/like", "ndcg@10"} <= set(tasks(served_tasks.model))

    def test_tasks_that_are_not_trained_are_not_measured(self, served_tasks: Served, tmp_path: Path) -> None:
        data = served_tasks.config.data
        config = small_config(served_tasks.log, tmp_path, data=data, optim__task_weight=0.0)
        validation = Validation(served_tasks.log, self.rows(served_tasks.log), config)
        assert validation.metric == "ndcg@10"
        assert sorted(validation(served_tasks.model)) == ["hr@10", "ndcg@10"]

    def test_better(self, served: Served, served_tasks: Served) -> None:
        high = Validation(served.log, self.rows(served.log), served.config)
        assert high.better(0.0, None) and high.better(0.2, 0.1) and not high.better(0.1, 0.1)
        low = Validation(served_tasks.log, self.rows(served_tasks.log), served_tasks.config)
        assert low.better(9.0, None) and low.better(0.1, 0.2) and not low.better(0.2, 0.2)

    def test_it_keeps_the_mode_and_the_random_state(self, served: Served) -> None:
        model = VistaModel.from_pretrained(served.model_dir)
        validation = Validation(served.log, self.rows(served.log), served.config)
        expected, state = validation(model), torch.get_rng_state()
        model.train()
        assert validation(model) == expected and model.training
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize("kind", ["served", "served_tasks"])
    def test_scores_that_are_not_finite_name_the_users(self, kind: str, request: pytest.FixtureRequest) -> None:
        given: Served = request.getfixturevalue(kind)
        model = VistaModel.from_pretrained(given.model_dir)
        with torch.no_grad():
            model.request.fill_(float("nan")) if kind == "served" else model.task_head.weight.fill_(float("inf"))  # type: ignore[union-attr]
        with pytest.raises(NonFiniteLossError, match=r"validation: the scores of users \[\d+") as caught:
            Validation(given.log, self.rows(given.log), given.config)(model)
        assert "\n" not in str(caught.value)


def test_validation_is_served_on_the_schedule_of_refreshes(served_tasks: Served, tmp_path: Path) -> None:
    """Each impression is answered by summaries, and by statistics and label rates of items, as of the last refresh."""
    log, config = served_tasks.log, served_tasks.config
    data = replace(config.data, refresh_days=8)
    of_model = replace(config.model, counter_keys=["item"], pooled_dim=4)
    config = replace(config, model=of_model, data=data, run_dir=str(tmp_path / "run"))
    model = Trainer(config, log).model.eval()
    assert isinstance(model, VistaModel)
    draw_counter_weights(model)
    begin = int(str(data.validation_from))
    known = item_values(model, log, model.rows_of(log.items), log.counts_before(begin), Until(before=begin))
    assert known is not None
    model = model.with_item_values(known.statistics, known.rates, known.tasks)
    validation = Validation(log, model.rows_of(log.items), config)
    refresh(model, log, tmp_path / "store", until=begin, options=RefreshOptions(codec=Codec.float32))
    question = EvaluateConfig(split="validation")
    with Scorer.open(model, tmp_path / "store") as scorer:
        expected = evaluate_scorer(scorer, log, question, refreshed=tmp_path).metrics
    measured = validation(model)
    assert len(validation._item_values) > 1
    for name in ("ne/click", "auc/like"):
        assert measured[name] == pytest.approx(expected[name], abs=1e-4)
    # Statistics that stay those of the model are another answer.
    stale = Validation(log, model.rows_of(log.items), config)
    stale._refreshed = lambda model, time, covered: model  # type: ignore[method-assign]
    assert stale(model)["ne/click"] != pytest.approx(expected["ne/click"], abs=1e-3)


@pytest.mark.parametrize("kind", ["served", "served_tasks"])
def test_validation_scores_as_a_store_does(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """After the events of the record (leave-last-out), and with newer events that callers pass (a split by time)."""
    given: Served = request.getfixturevalue(kind)
    log, config = given.log, given.config
    config = replace(config, model=replace(config.model, counter_keys=["item"], pooled_dim=4))
    model = Trainer(replace(config, run_dir=str(tmp_path / "run")), log).model.eval()
    assert isinstance(model, VistaModel)
    draw_counter_weights(model, statistics=False)
    validation = Validation(log, model.rows_of(log.items), config)
    until = split_until(config.data, "validation")
    refresh(model, log, tmp_path / "store", until=until, options=RefreshOptions(codec=Codec.float32))
    with Scorer.open(model, tmp_path / "store") as scorer:
        stored, raw = (
            ScorerAnswers(scorer, log, requests_per_batch=50),
            validation._answers(model, np.arange(log.num_users)),
        )
        assert raw is not None
        assert validation._ranked is not None
        scores = stored.catalog_scores(validation._ranked)
        np.testing.assert_allclose(raw.catalog_scores(validation._ranked), scores, atol=1e-3, rtol=1e-4)
        if (cases := validation._impressions) is not None:
            np.testing.assert_allclose(raw.probabilities(cases), stored.probabilities(cases), atol=1e-4)


def test_validation_summarizes_each_history_once(served_tasks: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """For next items and impressions together, and a few histories at a time."""
    log = served_tasks.log
    rows = served_tasks.model.rows_of(log.items)
    expected = Validation(log, rows, served_tasks.config)(served_tasks.model)
    summarize, summarized = inference.summarize, []

    def counted(model: VistaModel, histories: Histories) -> torch.Tensor:
        summarized.append(histories.num_users)
        return summarize(model, histories)

    def grown(states: GrowingStates, users: Int, histories: Histories) -> torch.Tensor:
        summarized.append(histories.num_users)
        return add_events(states, users, histories)

    add_events = GrowingStates.summarize
    monkeypatch.setattr(inference, "summarize", counted)
    monkeypatch.setattr(GrowingStates, "summarize", grown)
    validation = Validation(log, rows, served_tasks.config, events_per_batch=100)
    assert validation(served_tasks.model) == pytest.approx(expected, rel=1e-5)
    assert len(summarized) > 2 and sum(summarized) <= log.num_users


def test_the_scores_of_the_reference_are_those_that_are_served(served_tasks: Served) -> None:
    model, log = served_tasks.model, served_tasks.log
    users, rows = np.flatnonzero(log.lengths >= 2)[:8], np.array([0, 3, 5])
    now = np.full(len(users), START + 900 * DAY)
    found = reference_scores(model, log, model.rows_of(log.items), users, log.lengths[users], now, rows)
    with Scorer.open(served_tasks.model_dir, served_tasks.exact_store) as scorer:
        served = scorer.predict(log.users.ids(users).tolist(), model.items.ids(rows).tolist(), now=now)
    assert found.keys() == served.keys()
    for task, scores in served.items():
        np.testing.assert_allclose(found[task], scores, atol=ROUNDING)


def test_a_calibration_undoes_a_scale_and_a_shift() -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(size=200_000)
    label = (rng.random(len(true)) < 1 / (1 + np.exp(-true))).astype(np.float32)
    slope, shift = fit_calibration(2.5 * true - 1, label)
    assert (slope, shift) == pytest.approx((0.4, 0.4), abs=0.02)
    estimate = 1 / (1 + np.exp(-(slope * (2.5 * true - 1) + shift)))
    pull = CALIBRATION_PRIOR * np.array([slope - 1, shift])  # where the likelihood and the prior balance
    np.testing.assert_allclose(
        [((label - estimate) * (2.5 * true - 1)).sum(), (label - estimate).sum()], pull, atol=0.05
    )


@pytest.mark.parametrize("label", [np.zeros(0), np.zeros(4), np.ones(4), np.arange(4) % 2])
def test_few_labels_change_little(label: np.ndarray) -> None:
    slope, shift = fit_calibration(np.linspace(-3, 3, len(label)), label)
    assert 0.5 < slope < 1.5 and abs(shift) < 0.5


def test_an_order_is_never_reversed() -> None:
    logit = np.linspace(-3, 3, 1000)
    assert fit_calibration(logit, (logit < 0).astype(np.float32)) == (1.0, 0.0)


@pytest.mark.parametrize("kind", ["vista", "hstu", "sasrec", "din"])
def test_the_best_model_is_exported_with_it(served_tasks: Served, tmp_path: Path, kind: str) -> None:
    config = small_config(served_tasks.log, tmp_path, model__architecture=kind, optim__epochs=1)
    config.data = served_tasks.config.data
    made = Trainer(config, served_tasks.log)
    best = made.run()
    validation = made.validation
    assert validation is not None and validation.calibration.shape == (len(best.schema.tasks), 2)
    slope, shift = torch.from_numpy(validation.calibration).unbind(1)
    assert not torch.equal(slope, torch.ones_like(slope))
    with made.optimizers.average.applied():
        exported, layers = best.task_outputs(), made.model.task_outputs()
        for place, (of_best, own) in enumerate(zip(exported, layers, strict=True)):
            torch.testing.assert_close(of_best.weight.double(), own.weight.double() * slope[:, None])
            if place == 0:
                torch.testing.assert_close(of_best.bias.double(), own.bias.double() * slope + shift)
    assert_restored(made.model)


def assert_restored(model: RankingModel) -> None:
    before, bias = {k: value.clone() for k, value in model.state_dict().items()}, model.task_outputs()[0].bias.clone()
    with model.calibrated(np.array([[0.5, 0.1]] * len(model.schema.tasks))):
        assert not torch.equal(model.task_outputs()[0].bias, bias)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_calibration_of_labels_that_were_not_all_looked_at() -> None:
    rng = np.random.default_rng(3)
    logit, looks = rng.normal(size=200_000), rng.choice([1.0, 0.5, 0.25], 200_000)
    label = (rng.random(200_000) < looks / (1 + np.exp(-(0.6 * logit + 0.8)))).astype(np.float32)
    assert fit_calibration(logit, label, looks) == pytest.approx((0.6, 0.8), abs=0.04)
    assert fit_calibration(logit, label)[1] < 0, "labels alone would lower the shift"


def test_without_validated_labels_nothing_is_calibrated(served_tasks: Served, tmp_path: Path) -> None:
    """As in a split by counts, which does not say which impressions are held out."""
    config = small_config(served_tasks.log, tmp_path, optim__epochs=1, data__split=Split.leave_last_out)
    assert Trainer(config, served_tasks.log).run().schema.tasks


def test_what_counters_add_to_logits_of_a_baseline_is_scaled_too(served_tasks: Served, tmp_path: Path) -> None:
    changes = {"model__architecture": "sasrec", "model__counter_keys": ["item"]}
    config = small_config(served_tasks.log, tmp_path, **changes)
    config.data = served_tasks.config.data
    model: Any = Trainer(config, served_tasks.log).model
    assert model.task_outputs()[1] is model.candidate_head.network[-1]
