"""A training run with counters: where its heads start, how fast they learn, and what validation scores."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import small_config
from vista.config import TrainConfig
from vista.config.choices import Architecture
from vista.counters.counter_table import CounterTable
from vista.examples.batch_source import MEASURED_BATCHES
from vista.log.event_log import EventLog
from vista.log.splits import split_until, visible_counts
from vista.model import inference
from vista.model.baselines.sequence_model import SequenceModel
from vista.model.padded_tail import pad_tail
from vista.model.ranking_model import RankingModel
from vista.model.vista_model import VistaModel
from vista.training.metrics_writer import MetricsWriter
from vista.training.trainer import Trainer
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
    made = Trainer(counting_config(event_log, tmp_path), event_log)
    with MetricsWriter(tmp_path, tensorboard=False) as metrics:
        made._start(metrics)

    labels, returns, counted, anchors = 0, 0, 0, 0
    for index in range(min(made.source.num_batches(0), MEASURED_BATCHES)):
        batch = made.source.batch(0, index)
        assert batch.anchors is not None and batch.anchors.counters is not None
        for label, slots in zip(batch.anchors.item.tolist(), batch.anchors.counters.item.tolist(), strict=True):
            own, had = {item for item in label if item >= 0}, {item for item in slots if item >= 0}
            labels, returns, counted, anchors = (
                labels + len(own),
                returns + len(own & had),
                counted + len(had),
                anchors + 1,
            )
    share = (returns + 1) / (labels + 2)
    head = made.model.counted
    assert head is not None and 0.02 < share < 0.9
    bias = math.log(share / (1 - share)) + math.log(event_log.num_items / (counted / anchors))
    assert float(head.gate.bias.detach()) == pytest.approx(bias)

    visible = visible_counts(event_log, split_until(made.config.data, "train"))
    seen = np.concatenate([np.asarray(event_log.slice(u, 0, int(n)).item) for u, n in enumerate(visible)])
    frequency = np.maximum(np.bincount(seen, minlength=event_log.num_items), 1)
    expected = (np.log(frequency) - np.log(frequency).mean()) / np.log(frequency).std()
    np.testing.assert_allclose(made.model.item_popularity[1:], expected, rtol=1e-5, atol=1e-5)

    rate = made.optimizers.schedule(10, 0.5)
    rates = {id(p): group["lr"] for group in made.optimizers.dense.param_groups for p in group["params"]}
    for name, parameter in made.model.named_parameters():
        if name != "item_table":
            factor = 3.0 if name.startswith(("counted.", "popularity.")) else 1.0
            assert rates[id(parameter)] == pytest.approx(rate * factor), name


def next_scores(model: RankingModel, log: EventLog, user: int, covered: int, seen: int, now: np.ndarray) -> np.ndarray:
    """Scores [V] of all items after `seen` events, of which the record covers the first `covered`."""
    rows, spec = model.rows_of(log.items), model.counter_spec
    assert spec is not None

    def part(start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        events = log.slice(user, start, stop)
        return rows[events.item], np.asarray(events.timestamp), np.array([0, stop - start])

    codes = CounterTable.of(spec, *part(0, covered)).top(5).codes().advanced(now, *part(covered, seen))
    if isinstance(model, SequenceModel):
        start = max(seen - model.config.history_limit, 0)
        events = log.slice(user, start, seen)
        users = model.user_vectors(type(events)(rows[events.item], *events_but_item(events)), now)
    else:
        assert isinstance(model, VistaModel)
        start = max(seen - model.config.tail_len, 0)
        events = log.slice(user, start, seen)
        tail = pad_tail(
            model,
            rows[events.item],
            np.asarray(events.timestamp),
            np.asarray(events.action),
            np.array([0, seen - start]),
        )
        context = inference.request_context(model, torch.zeros(1, 0, model.config.dim), tail)
        users = inference.user_vectors(model, context, inference.request_gap(model, now, tail))
    scores = inference.catalog_scores(model, users, inference.item_vectors(model), codes, np.array([seen]))
    return scores[0].numpy()


def events_but_item(events: Any) -> tuple[Any, ...]:
    return events.timestamp, events.action, events.rating, events.offsets


@pytest.mark.parametrize("name", ["vista", "hstu"])
def test_validation_scores_counted_items(event_log: EventLog, tmp_path: Path, name: str) -> None:
    """The record covers the events before the validation part. The raw history of a baseline covers all."""
    limits = {"model__architecture": Architecture(name), "model__history_limit": 8 if name == "hstu" else 0}
    config = counting_config(event_log, tmp_path, **limits)
    made = Trainer(config, event_log)
    model = made.run()
    validation = Validation(event_log, model.rows_of(event_log.items), config)
    measured = validation(model)

    cut, rows = visible_counts(event_log, split_until(config.data, "validation")), model.rows_of(event_log.items)
    cases = validation._next
    assert cases is not None
    gains = []
    for user, seen, item in zip(cases.user.tolist(), cases.seen.tolist(), cases.item.tolist(), strict=True):
        now = np.asarray(event_log.slice(user, seen, seen + 1).timestamp)
        scores = next_scores(model, event_log, user, seen if name == "hstu" else int(cut[user]), seen, now)
        rank = int((scores > scores[rows[item] - 1]).sum())
        gains.append(1 / math.log2(rank + 2) if rank < 10 else 0.0)
    assert measured["ndcg@10"] == pytest.approx(np.mean(gains), rel=1e-4)
