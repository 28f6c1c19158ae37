"""A run that is killed anywhere, also while it saves, ends in the same bits as one that was not."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import small_config
from tests.faults import preload
from tests.faults.harness import Trial, promise
from tests.faults.nursery import Nursery, Say
from vista.log.event_log import EventLog
from vista.training import trainer
from vista.training.checkpoint import latest_checkpoint, load_checkpoint

MOST_CALLS, MOST_SECONDS = 160, 0.8
TIMED = ("tokens_per_s", "epoch_seconds", "seconds")


def train(say: Say, log: str, run_dir: str, kill_at: int = 0) -> None:
    """One run, or the rest of it; die right before the n-th system call of all saves (0: live)."""
    if kill_at:
        preload.watch(f"{run_dir}/checkpoints")
        preload.kill_at(preload.WRITES | preload.SYNCS | preload.NAMES, kill_at, signal.SIGKILL)
    opened = EventLog.open(log)
    config = small_config(opened, run_dir, optim__epochs=2, checkpoint_every=1)
    say("trains")
    trainer.train(config, opened, metrics_every=1)


def result(run_dir: Path) -> dict[str, Any]:
    """All that a run ends in, times apart, by name."""
    newest = latest_checkpoint(run_dir / "checkpoints")
    assert newest is not None
    tensors, state = load_checkpoint(newest)
    state["run"]["progress"].pop("seconds")
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    found: dict[str, Any] = {f"checkpoint {name}": tensor for name, tensor in tensors.items()}
    found["step"], found["state"] = newest.name, state
    found["export"] = (run_dir / "best" / "model.safetensors").read_bytes()
    found["metrics"] = [{key: value for key, value in row.items() if key not in TIMED} for row in rows]
    return found


@pytest.fixture(scope="module")
def whole(
    event_log: EventLog, nursery: Nursery, traced: Nursery, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What an uninterrupted run ends in."""
    for one in (nursery, traced):
        one.imports("torch._dynamo")  # As optimizers do.
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    nursery.call(train, event_log.path, run_dir)
    return result(run_dir)


@promise("Trainer resume", fault="kill -9, also during a save", full=50, short=2, shares={"during a save": 0.20})
def test_trainer_resume(
    trial: Trial, nursery: Nursery, traced: Nursery, event_log: EventLog, whole: dict[str, Any]
) -> None:
    run_dir = trial.folder.resolve() / "run"
    for turn in range(trial.random.choice([1, 1, 2])):
        if (trial.number + turn) % 2:
            kill_at = trial.random.randint(1, MOST_CALLS)
            child = traced.start(train, event_log.path, run_dir, kill_at).end()
            trial.count("after the end" if child.exit_code == 0 else "during a save")
        else:
            child = nursery.start(train, event_log.path, run_dir)
            assert child.hear() == "trains", child.raised
            time.sleep(trial.random.uniform(0, MOST_SECONDS))
            child.kill()
            child.end()
            trial.count("after the end" if child.exit_code == 0 else "at any moment")
        assert child.exit_code in (0, -9), child.raised
    nursery.call(train, event_log.path, run_dir)
    found = result(run_dir)
    assert found.keys() == whole.keys()
    for name, value in found.items():
        same = torch.equal(value, whole[name]) if isinstance(value, torch.Tensor) else value == whole[name]
        assert same, f"{name} differs"
