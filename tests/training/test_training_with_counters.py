"""A training run with counters: where its heads start, how fast they learn, and what validation scores."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import Served, draw_counter_weights, small_config
from tests.counters.counter_histories import counters_of_request
from vista.config import TrainConfig
from vista.config.choices import Architecture, ItemStart, Precision
from vista.counters.user_counters import UserCounters
from vista.evaluation.cases import NextItemCases
from vista.examples.batch import Batch
from vista.examples.batch_source import MEASURED_BATCHES
from vista.log.event_log import EventLog
from vista.log.histories import Histories
from vista.log.splits import split_until, visible_counts
from vista.model import inference
from vista.model.anchor_losses import start_counted
from vista.model.baselines.sequence_model import SequenceModel
from vista.model.padded_tail import pad_tail
from vista.model.ranking_model import RankingModel
from vista.model.target_attention import TargetContext
from vista.model.vista_model import VistaModel
from vista.refresh import refresh
from vista.scorer import Scorer
from vista.training.metrics_writer import MetricsWriter
from vista.training.trainer import Trainer, train
from vista.training.validation import Validation


def counting_config(log: EventLog, run_dir: Path, **changes: Any) -> TrainConfig:
    options = {
        "model__counters": True,
        "model__counter_keys": 5,
        "model__popularity": True,
        "model__num_seeds": 0,
        "optim__window_weight": 1.0,
        "optim__counted_rate": 3.0,
        "data__horizon_events": 5,
        "data__exclude_seen": False,
    }
    return small_config(log, run_dir, **{**options, **changes})


def test_the_heads_start_from_the_training_part_and_have_their_own_rate(event_log: EventLog, tmp_path: Path) -> None:
    config = counting_config(event_log, tmp_path, data__num_negatives=event_log.num_items)
    made = Trainer(config, event_log)
    made._start(MetricsWriter(tmp_path))

    labels, returns = 0, 0
    for index in range(min(made.source.num_batches(0), MEASURED_BATCHES)):
        batch = made.source.batch(0, index)
        assert batch.anchors is not None and batch.anchors.counters is not None
        for label, slots in zip(batch.anchors.item.tolist(), batch.anchors.counters.item.tolist(), strict=True):
            own, had = {item for item in label if item >= 0}, {item for item in slots if item >= 0}
            labels, returns = labels + len(own) * bool(had), returns + len(own & had)
    share = (returns + 1) / (labels + 2)
    assert 0.02 < share < 0.9
    assert counted_share(made.model, made.source.batch(0, 0)) == pytest.approx(share, rel=0.02)

    visible = visible_counts(event_log, split_until(made.config.data, "train"))
    seen = np.concatenate([np.asarray(event_log.slice(u, 0, int(n)).item) for u, n in enumerate(visible)])
    frequency = np.maximum(np.bincount(seen, minlength=event_log.num_items), 1)
    expected = (np.log(frequency) - np.log(frequency).mean()) / np.log(frequency).std()
    np.testing.assert_allclose(made.model.item_popularity[1:], expected, rtol=1e-5, atol=1e-5)

    rate = made.optimizers.schedule(10, 0.5, 4)
    rates = {id(p): group["lr"] for group in made.optimizers.dense.param_groups for p in group["params"]}
    for name, parameter in made.model.named_parameters():
        if name != "item_table":
            factor = 3.0 if name.startswith(("counted.", "popularity.")) else 1.0
            assert rates[id(parameter)] == pytest.approx(rate * factor), name


def test_the_gate_starts_by_the_vectors_that_training_reads(event_log: EventLog, tmp_path: Path) -> None:
    options = {"model__item_start": ItemStart.user_factors, "optim__table_rate": 0.0, "precision": Precision.float32}
    made = Trainer(counting_config(event_log, tmp_path, **options), event_log)
    made._start(MetricsWriter(tmp_path))
    batch, share = made.source.batch(0, 0), made.source.returning_share
    assert made.model.counted is not None and made._frozen_items is not None
    bias, started = made.model.counted.gate.bias, made.model.counted.gate.bias.item()
    start_counted(made.model, batch, made._frozen_items.vectors(batch), share)
    assert bias.item() == started
    start_counted(made.model, batch, made.model.item_vectors(batch.rows), share)  # of all users
    assert bias.item() != started


@pytest.mark.parametrize("asked", [True, False])
def test_the_gate_starts_by_the_first_batch_with_a_question(
    event_log: EventLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    made = Trainer(counting_config(event_log, tmp_path), event_log)
    whole = made.source.batch

    def without_questions(epoch: int, index: int) -> Batch:
        batch = whole(epoch, index)
        assert batch.anchors is not None
        return batch if asked and index else replace(batch, anchors=replace(batch.anchors, window=torch.zeros(0)))

    monkeypatch.setattr(made.source, "batch", without_questions)
    made._start(MetricsWriter(tmp_path))
    assert made.model.counted is not None and bool(made.model.counted.gate.bias) == asked


@torch.no_grad()
def counted_share(model: RankingModel, batch: Batch) -> float:
    """Mean probability that the items of users who have counters are counted items, in a softmax of the catalog."""
    assert model.counted is not None and batch.anchors is not None and batch.anchors.counters is not None
    vectors = model.item_vectors(batch.rows)
    logits = model.anchor_users(batch, vectors) @ inference.item_vectors(model).t() / model.config.softmax_temperature
    shares = []
    for logit, slots in zip(logits, batch.anchors.counters.item, strict=True):
        own = batch.rows[slots[slots >= 0]] - 1
        if len(own):
            logit[own] = model.counted.gate.bias
            shares.append(float(logit.softmax(0)[own].sum()))
    return float(np.mean(shares))


@dataclass(frozen=True)
class Asked:
    """A request after the first `seen` events of a user, of which the record covers the first `covered`."""

    model: RankingModel
    log: EventLog
    user: int
    covered: int
    seen: int
    now: np.ndarray

    def counters(self) -> UserCounters:
        keys, history = self.model.item_keys, self.newest(self.seen, self.seen)
        assert keys is not None
        first = max(self.covered, self.seen - self.model.config.tail_len)
        return counters_of_request(keys, history, covered=self.covered, first=first, seen=self.seen, now=self.now)

    def newest(self, limit: int, stop: int) -> Histories:
        """Up to `limit` events before the position `stop`, with rows of the model."""
        events = self.log.slice(self.user, max(stop - limit, 0), stop)
        return replace(events, item=self.model.rows_of(self.log.items)[events.item].astype(np.int32))

    def context(self) -> tuple[TargetContext, torch.Tensor | None]:
        assert isinstance(self.model, VistaModel)
        events = self.newest(self.model.config.tail_len, self.seen)
        tail = pad_tail(
            self.model, events.item, np.asarray(events.timestamp), np.asarray(events.action), events.offsets
        )
        summary = torch.zeros(1, 0, self.model.config.dim)
        return inference.request_context(self.model, summary, tail), inference.request_gap(self.model, self.now, tail)

    def scores(self) -> np.ndarray:
        """[V]."""
        model = self.model
        if isinstance(model, SequenceModel):
            users = model.user_vectors(self.newest(model.config.history_limit, self.seen), self.now)
        else:
            assert isinstance(model, VistaModel)
            users = inference.user_vectors(model, *self.context())
        return inference.catalog_scores(model, users, inference.item_vectors(model), self.counters())[0].numpy()

    def probabilities(self, item: int) -> np.ndarray:
        """[num_tasks] of an item, a row of the log."""
        row = self.model.rows_of(self.log.items)[[item]]
        codes = torch.from_numpy(self.counters().of_pairs(np.zeros(1, np.int64), row))[None]
        candidate = torch.from_numpy(row[None])
        if isinstance(self.model, SequenceModel):
            history = self.newest(self.model.config.history_limit, self.seen)
            logits = self.model.candidate_logits(history, candidate, self.now, codes)
        else:
            assert isinstance(self.model, VistaModel)
            logits = inference.candidate_logits(self.model, *self.context(), candidate, codes)
        return logits[0, 0].sigmoid().numpy()


@pytest.mark.parametrize("name", ["vista", "hstu"])
def test_validation_scores_counted_items(event_log: EventLog, tmp_path: Path, name: str) -> None:
    """The record covers the events before the validation part. The raw history of a baseline covers all."""
    limits = {"model__architecture": Architecture(name), "model__history_limit": 8 if name == "hstu" else 0}
    config = counting_config(event_log, tmp_path, **limits)
    model = Trainer(config, event_log).model.eval()
    assert isinstance(model, VistaModel | SequenceModel)
    draw_counter_weights(model)
    validation = Validation(event_log, model.rows_of(event_log.items), config)
    measured = validation(model)

    cut, rows = visible_counts(event_log, split_until(config.data, "validation")), model.rows_of(event_log.items)
    cases = validation._ranked
    assert isinstance(cases, NextItemCases)
    gains = []
    for user, seen, item in zip(cases.user.tolist(), cases.seen.tolist(), cases.item.tolist(), strict=True):
        now = np.asarray(event_log.slice(user, seen, seen + 1).timestamp)
        scores = Asked(model, event_log, user, seen if name == "hstu" else int(cut[user]), seen, now).scores()
        rank = int((scores > scores[rows[item] - 1]).sum())
        gains.append(1 / math.log2(rank + 2) if rank < 10 else 0.0)
    assert measured["ndcg@10"] == pytest.approx(np.mean(gains), rel=1e-4)


@pytest.mark.parametrize("name", ["vista", "hstu"])
def test_tasks_read_the_counters_of_candidates(served_tasks: Served, tmp_path: Path, name: str) -> None:
    limits = {"model__architecture": Architecture(name), "model__history_limit": 8 if name == "hstu" else 0}
    log, data = served_tasks.log, served_tasks.config.data
    config = counting_config(log, tmp_path, **limits, data=data, optim__epochs=1)
    model = Trainer(config, log).model.eval()
    assert isinstance(model, VistaModel | SequenceModel) and model.candidate_counters is not None
    assert not model.candidate_counters.added.weight.any()
    assert not model.candidate_counters.network[-1].weight.any()
    draw_counter_weights(model)
    validation = Validation(log, model.rows_of(log.items), config)
    cut, cases = visible_counts(log, split_until(data, "validation")), validation._impressions
    assert cases is not None
    predicted = validation._answers(model, np.arange(log.num_users)).probabilities(cases)
    counted = 0
    for n in range(0, len(cases.user), 3):
        user, seen = int(cases.user[n]), int(cases.seen[n])
        asked = Asked(model, log, user, seen if name == "hstu" else int(cut[user]), seen, cases.timestamp[[n]])
        np.testing.assert_allclose(predicted[n], asked.probabilities(int(cases.item[n])), rtol=1e-4, atol=1e-6)
        counted += int(model.rows_of(log.items)[cases.item[n]] in asked.counters().codes.key)
    assert counted > 3


def test_a_log_with_returns_trains_counters_without_being_asked(event_log: EventLog, tmp_path: Path) -> None:
    """From the settings that are null to scores from a store, and resumed without a change."""
    null = {f"model__{key}": None for key in ("counters", "popularity", "mean_token", "temperature")}
    config = small_config(event_log, tmp_path / "run", data__exclude_seen=None, optim__window_weight=None, **null)
    model = train(config, event_log, metrics_every=1)
    found = model.config
    assert (found.counters, found.popularity, found.mean_token, found.temperature) == (True, True, True, 0.3)
    assert '"window"' in (tmp_path / "run" / "metrics.jsonl").read_text()
    weights = (tmp_path / "run" / "best" / "model.safetensors").read_bytes()
    train(config, event_log)
    assert (tmp_path / "run" / "best" / "model.safetensors").read_bytes() == weights
    refresh(model, event_log, tmp_path / "store")
    with Scorer.open(model, tmp_path / "store") as scorer:
        users = event_log.users.ids(np.arange(3))
        _, scores, offsets = scorer.counted_items(users)
        assert np.isfinite(scores).all() and (np.diff(offsets) > 0).all()
