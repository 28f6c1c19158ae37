"""Batches of a run: parts for ranks, and those that a thread builds ahead."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.conftest import Served, small_config
from tests.training.worlds import feature_config, frames, log_of
from vista.config.checks import Architecture, Mixing, Precision
from vista.errors import DataError
from vista.examples.batch import Batch, balanced_parts, batch_part, chunk_work
from vista.examples.batch_source import NUM_AHEAD, BatchPrefetcher, BatchSource
from vista.log.event_log import EventLog
from vista.model.baselines.candidate_models import SearchModel
from vista.model.losses import LossPart, loss_names, weighted_losses
from vista.refresh import refresh
from vista.training.downstream import Downstream
from vista.training.trainer import Trainer, train
from vista.training.warm_start import training_vectors

EXACT = {
    "precision": Precision.float32,
    "data__tokens_per_batch": 128,
    "model__dropout": 0.0,
    "model__counted_dropout": 0.0,
}
"""No draws in a step: each rank makes its own."""
COUNTERS = {"model__counter_keys": ["item"], "optim__window_weight": 0.5}
MODELS: dict[str, dict[str, Any]] = {
    "vista": {},
    "bidirectional": {"model__mixing": Mixing.bidirectional},
    "counters": COUNTERS,
    "unknown items": {"data__unknown_share": 0.3},
    "hashed": {"model__embedding_rows": 30, "model__hashed_features": ["surface:2", "device:2"]},
    "sasrec": {"model__architecture": Architecture.sasrec, "model__history_limit": 9},
    "hstu": {"model__architecture": Architecture.hstu, "model__history_limit": 9, **COUNTERS},
    "fuxi_linear": {"model__architecture": Architecture.fuxi_linear, "model__history_limit": 9},
    "din": {"model__architecture": Architecture.din, "model__history_limit": 9},
    "sim": {"model__architecture": Architecture.sim},
}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> EventLog:
    return log_of(frames(), tmp_path_factory.mktemp("featured") / "log")


def losses_and_gradients(made: Trainer, parts: list[Batch]) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Of parts of a batch, combined as ranks do."""
    model, optim = made.model, made.config.optim
    model.train().zero_grad()
    losses = [model.losses(part, training_vectors(model, part), optim) for part in parts]
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


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ("vista", "counters") else pytest.mark.nightly) for name in MODELS]
)
def test_parts_have_the_losses_and_gradients_of_the_whole_batch(
    log: EventLog, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SearchModel, "top_k", 4)
    settings = {key: value for key, value in EXACT.items() if name not in ("din", "sim") or "counted" not in key}
    assert_parts_equal_the_whole(Trainer(feature_config(log, tmp_path / "run", **settings, **MODELS[name]), log))


def test_parts_of_a_batch_with_stored_summaries(served_tasks: Served, tmp_path: Path) -> None:
    log = served_tasks.log
    assert log.impressions is not None
    until = int(np.sort(np.asarray(log.impressions.timestamp))[len(log.impressions.timestamp) // 3])
    refresh(served_tasks.model, log, tmp_path / "store", until=until)
    places = {"base": str(served_tasks.model_dir), "store": str(tmp_path / "store")}
    config = small_config(log, tmp_path / "run", **EXACT, **places, data=served_tasks.config.data)
    with Downstream.open(config, log) as downstream:
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


RICH = {"model__counter_keys": ["item"], "optim__window_weight": 1.0, "data__unknown_share": 0.2}
TIMEOUT_S = 60


def source_of(build: Any, num_batches: int = 8) -> BatchSource:
    return cast(BatchSource, SimpleNamespace(num_batches=lambda epoch: num_batches, batch=build))


def num_threads() -> int:
    return sum(thread.name.startswith("vista-batches") for thread in threading.enumerate())


def assert_same(batch: Batch, other: Batch) -> None:
    tensors, others = batch.tensors(), other.tensors()
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name


@pytest.mark.parametrize("first", [0, 3])
def test_the_batches_are_those_of_the_source(event_log: EventLog, tmp_path: Path, first: int) -> None:
    config = small_config(event_log, tmp_path, data__tokens_per_batch=32, **RICH)
    made, other = (Trainer(config, event_log).source for _ in range(2))
    for epoch in (0, 1):
        with BatchPrefetcher(made, epoch, first) as batches:
            ahead = list(batches)
        assert len(ahead) == other.num_batches(epoch) - first > NUM_AHEAD
        for index, batch in enumerate(ahead, start=first):
            assert_same(batch, other.batch(epoch, index))


def test_two_batches_are_built_while_a_step_runs_and_no_more() -> None:
    built = threading.Semaphore(0)

    def build(epoch: int, index: int) -> Any:
        built.release()
        return index

    with BatchPrefetcher(source_of(build), 0, 1) as batches:
        for count in (1 + NUM_AHEAD, 1, 1):
            next(batches)
            assert all(built.acquire(timeout=TIMEOUT_S) for _ in range(count))
            assert not built.acquire(timeout=0.05)


def test_an_error_ends_the_run_after_the_steps_before_it(
    event_log: EventLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = BatchSource.batch

    def batch(source: BatchSource, epoch: int, index: int) -> Batch:
        if (epoch, index) == (0, 3):
            raise DataError("row 7 is damaged")
        return make(source, epoch, index)

    monkeypatch.setattr(BatchSource, "batch", batch)
    with pytest.raises(DataError, match="row 7 is damaged"):
        train(small_config(event_log, tmp_path), event_log, metrics_every=1)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    assert num_threads() == 0


def test_a_run_that_is_stopped_leaves_no_thread_and_builds_no_further_batch(
    event_log: EventLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, built = BatchSource.batch, []

    def batch(source: BatchSource, epoch: int, index: int) -> Batch:
        built.append(index)
        return make(source, epoch, index)

    def stopped(made: Trainer, *_: object) -> None:
        assert num_threads() == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(BatchSource, "batch", batch)
    monkeypatch.setattr(Trainer, "_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(small_config(event_log, tmp_path), event_log)
    assert num_threads() == 0
    assert built == list(range(len(built))) and len(built) <= 1 + NUM_AHEAD


def test_a_step_that_waits_can_be_interrupted() -> None:
    """Ctrl-C while the thread builds a batch that takes long."""
    asked, go, main = threading.Event(), threading.Event(), threading.get_ident()

    def build(epoch: int, index: int) -> Any:
        assert asked.wait(TIMEOUT_S) and not go.wait(
            0.2
        )  # A signal just before the main thread waits is seen after it.
        signal.pthread_kill(main, signal.SIGINT)
        assert go.wait(TIMEOUT_S)

    with BatchPrefetcher(source_of(build, num_batches=1), 0, 0) as batches:
        with pytest.raises(KeyboardInterrupt):
            asked.set()
            next(batches)
        go.set()
    assert num_threads() == 0
