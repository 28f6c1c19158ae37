"""Parts of a batch: together they have the losses and the gradient of the whole batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from tests.conftest import Served, small_config
from vista.config import SourceColumns
from vista.config.choices import Architecture, Mixing, Precision, ReconstructionTarget, Split, Stage
from vista.examples.batch import Batch
from vista.examples.batch_part import balanced_parts, batch_part, chunk_work
from vista.log.event_log import EventLog
from vista.model.loss_part import LossPart
from vista.model.losses import loss_names, weighted_losses
from vista.refresh import refresh
from vista.training.downstream import Downstream
from vista.training.item_start import training_vectors
from vista.training.trainer import Trainer

EXACT = {"model__dropout": 0.0, "model__counted_dropout": 0.0, "model__id_dropout": 0.0}
"""No draws in a step: each rank makes its own."""
COUNTERS = {"model__counters": True, "optim__window_weight": 0.5}
MODELS: dict[str, dict[str, Any]] = {
    "vista": {"model__mean_token": True},
    "bidirectional": {"model__mixing": Mixing.bidirectional},
    "lag": {"model__tail_in_summary": False},
    "counters": COUNTERS,
    "items": {"model__reconstruction_target": ReconstructionTarget.items, "data__unknown_share": 0.3},
    "hashed": {"model__embedding_rows": 30, "model__hashed_features": ["surface:2", "device:2"]},
    "sasrec": {"model__architecture": Architecture.sasrec, "model__history_limit": 9},
    "hstu": {"model__architecture": Architecture.hstu, "model__history_limit": 9, **COUNTERS},
    "fuxi_linear": {"model__architecture": Architecture.fuxi_linear, "model__history_limit": 9},
    "din": {"model__architecture": Architecture.din, "model__history_limit": 9},
    "sim": {"model__architecture": Architecture.sim, "model__search_top_k": 4},
}


@pytest.fixture(scope="module")
def log(impression_log: EventLog, tmp_path_factory: pytest.TempPathFactory) -> EventLog:
    """The simulated log, with features of items, events, requests, and users."""
    simulated, table, rng = impression_log, impression_log.impressions, np.random.default_rng(3)
    assert table is not None
    events = simulated.gather(np.arange(simulated.num_users))
    users = simulated.users.ids(np.arange(simulated.num_users))
    items = simulated.items.ids(np.arange(simulated.num_items))

    def column(count: int) -> list[str]:
        return rng.choice(["a", "b", "c"], count).tolist()  # type: ignore[no-any-return]

    return EventLog.from_frame(
        {
            "user": np.repeat(users, events.lengths),
            "item": simulated.items.ids(events.item),
            "timestamp": np.asarray(events.timestamp),
            "surface": column(events.num_events),
        },
        tmp_path_factory.mktemp("featured") / "log",
        time_unit="ms",
        columns=SourceColumns(labels=list(table.tasks)),
        categories=["surface"],
        items={"item": items, "brand": column(len(items))},
        users={"user": users, "region": column(len(users))},
        impressions={
            "user": np.repeat(users, np.diff(table.offsets)),
            "item": simulated.items.ids(table.item),
            "timestamp": np.asarray(table.timestamp),
            "device": column(table.num_impressions),
            **{task: np.asarray(table.label)[:, index] for index, task in enumerate(table.tasks)},
        },
        request_categories=["device"],
    )


def split_of(log: EventLog) -> dict[str, Any]:
    assert log.impressions is not None
    times = np.sort(np.asarray(log.impressions.timestamp))
    starts = {"data__validation_from": 0.6, "data__test_from": 0.8}
    return {"data__split": Split.time} | {key: str(times[int(share * len(times))]) for key, share in starts.items()}


def losses_and_gradients(made: Trainer, parts: list[Batch]) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Of parts of a batch, combined as ranks do."""
    model, optim = made.model, made.config.optim
    model.train().zero_grad()
    losses = [model.losses(part, training_vectors(model, part, None), optim) for part in parts]
    total = {
        name: sum(int(each.counts[name]) for each in losses if name in each.counts)
        for name in loss_names(model.schema.tasks)
        if any(name in each.parts for each in losses)
    }
    sums = dict.fromkeys(total, 0.0)
    for each in losses:
        shares = {name: int(count) / max(total[name], 1) for name, count in each.counts.items()}
        shared = {name: LossPart(mean * shares[name], 1) for name, mean in each.parts.items()}
        for name, part in shared.items():
            sums[name] += float(part.mean.detach())
        if (objective := weighted_losses(shared, optim).total).requires_grad:
            objective.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return sums, {name: each.to_dense() if each.is_sparse else each for name, each in gradients.items()}


def assert_parts_equal_the_whole(made: Trainer) -> None:
    batch = made.source.batch(0, 0)
    expected, whole = losses_and_gradients(made, [batch])
    whole = {name: gradient.clone() for name, gradient in whole.items()}
    longest = max(gradient.norm() for gradient in whole.values())
    assert len(batch.user) > 3 and expected
    for divided in (balanced_parts(chunk_work(batch), 3), np.split(np.arange(len(batch.user)), len(batch.user))):
        assert np.array_equal(np.sort(np.concatenate(divided)), np.arange(len(batch.user)))
        found, gradients = losses_and_gradients(made, [batch_part(batch, chunks) for chunks in divided])
        assert found == pytest.approx(expected, rel=1e-5)
        assert gradients.keys() == whole.keys()
        for name, gradient in gradients.items():
            error = (gradient - whole[name]).norm()
            # The rates of FuXi-Linear multiply times of 10^5 seconds, which cancel out.
            rounding = 1e-2 if name.endswith("time_rate") else 1e-4
            assert error <= rounding * whole[name].norm() + 1e-6 * longest, (name, error)


@pytest.mark.parametrize("name", MODELS)
def test_parts_have_the_losses_and_gradients_of_the_whole_batch(log: EventLog, tmp_path: Path, name: str) -> None:
    changes = {**split_of(log), **EXACT, "precision": Precision.float32, "data__tokens_per_batch": 256, **MODELS[name]}
    assert_parts_equal_the_whole(Trainer(small_config(log, tmp_path / "run", **changes), log))


def test_parts_of_a_batch_with_stored_summaries(served_tasks: Served, tmp_path: Path) -> None:
    log = served_tasks.log
    assert log.impressions is not None
    until = int(np.sort(np.asarray(log.impressions.timestamp))[len(log.impressions.timestamp) // 3])
    refresh(served_tasks.model, log, tmp_path / "store", until=until)
    places = {"base": str(served_tasks.model_dir), "store": str(tmp_path / "store"), "stage": Stage.downstream}
    changes = {**split_of(log), **EXACT, **places, "precision": Precision.float32, "data__tokens_per_batch": 256}
    with Downstream.open(small_config(log, tmp_path / "run", **changes), log) as downstream:
        assert_parts_equal_the_whole(Trainer(downstream.config, log, downstream))


def test_histories_of_any_length_make_parts_of_about_equal_work() -> None:
    work = np.random.default_rng(0).lognormal(3, 2, 300).astype(np.int64) + 1
    assert work.max() > 1000 * work.min()
    for num_parts in (2, 4):
        parts = balanced_parts(work, num_parts)
        sums = [int(work[part].sum()) for part in parts]
        assert max(sums) <= max(1.01 * work.sum() / num_parts, work.max())
        assert all(np.array_equal(part, np.sort(part)) for part in parts)
    assert [len(part) for part in balanced_parts(np.array([5, 3]), 4)] == [1, 1, 0, 0]
