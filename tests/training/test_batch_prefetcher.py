"""Batches that a thread builds while steps run: the same ones, at most two ahead, and no thread left behind."""

from __future__ import annotations

import re
import signal
import threading
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from tests.conftest import small_config
from vista.errors import DataError
from vista.examples.batch import Batch
from vista.examples.batch_source import BatchSource
from vista.log.event_log import EventLog
from vista.training.batch_prefetcher import NUM_AHEAD, BatchPrefetcher
from vista.training.trainer import Trainer, train

RICH = {"model__counters": True, "optim__window_weight": 1.0, "data__unknown_share": 0.2}
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


def test_an_error_is_raised_by_the_step_that_needs_the_batch() -> None:
    def damaged(epoch: int, index: int) -> Any:
        if index == 2:
            raise DataError("row 7 is damaged")
        return index

    with BatchPrefetcher(source_of(damaged), 0, 0) as batches:
        assert [next(batches), next(batches)] == [0, 1]
        with pytest.raises(DataError, match="row 7 is damaged") as caught:
            next(batches)
    assert "damaged" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]


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
        assert asked.wait(TIMEOUT_S)
        signal.pthread_kill(main, signal.SIGINT)
        assert go.wait(TIMEOUT_S)

    with BatchPrefetcher(source_of(build, num_batches=1), 0, 0) as batches:
        with pytest.raises(KeyboardInterrupt):
            asked.set()
            next(batches)
        go.set()
    assert num_threads() == 0


def test_the_end_of_the_run_says_how_long_steps_waited(event_log: EventLog, tmp_path: Path) -> None:
    config = small_config(event_log, tmp_path, optim__epochs=1)
    train(config, event_log)
    train(config, event_log)
    done = [
        line.partition("done: ")[2] for line in (tmp_path / "train.log").read_text().splitlines() if "done:" in line
    ]
    assert re.match(r"\d+ steps, \d+\.\d% of their time spent waiting for batches; model in", done[0])
    assert re.match(r"\d+ steps; model in", done[1])  # nothing was left to do
