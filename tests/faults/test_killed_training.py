"""Killed training runs resume to the same bits."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import small_config
from tests.faults import preload
from tests.faults.harness import Trial, compare, promise
from tests.faults.nursery import Nursery, Say
from vista.log.event_log import EventLog
from vista.training.checkpoint import latest_checkpoint, load_checkpoint
from vista.training.trainer import train

MOST_CALLS, MOST_SECONDS = 160, 0.8
TIMED = ("tokens_per_s", "waiting_share", "epoch_seconds", "seconds")


def train_alone(say: Say, log: str, run_dir: str, kill_at: int = 0) -> None:
    """Start or resume a run; die right before the n-th system call of all saves (0: do not die)."""
    if kill_at:
        preload.watch(f"{run_dir}/checkpoints")
        preload.die_at(kill_at)
    opened = EventLog.open(log)
    config = small_config(opened, run_dir, optim__epochs=2, checkpoint_every=1)
    say("trains")
    train(config, opened, metrics_every=1)


def result(run_dir: Path) -> dict[str, Any]:
    """The results of a run by name, without times."""
    newest = latest_checkpoint(run_dir / "checkpoints")
    assert newest is not None
    tensors, state = load_checkpoint(newest)
    for name in ("seconds", "validation_seconds"):
        del state["run"]["progress"][name]
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    results: dict[str, Any] = {f"checkpoint {name}": tensor.numpy().tobytes() for name, tensor in tensors.items()}
    results["step"], results["state"] = newest.name, state
    results["export"] = (run_dir / "best" / "model.safetensors").read_bytes()
    results["metrics"] = [{key: value for key, value in row.items() if key not in TIMED} for row in rows]
    return results


@pytest.fixture(scope="module")
def uninterrupted(event_log: EventLog, traced: Nursery, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of an uninterrupted run."""
    traced.imports("torch._dynamo")  # Optimizers import it.
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    traced.call(train_alone, event_log.path, run_dir)
    return result(run_dir)


@promise("Trainer resume", fault="kill -9, also during a save", full=40, shares={"during a save": 0.20})
def test_trainer_resume(trial: Trial, traced: Nursery, event_log: EventLog, uninterrupted: dict[str, Any]) -> None:
    run_dir = trial.folder.resolve() / "run"
    for turn in range(trial.random.choice([1, 1, 2])):
        in_save = (trial.number + turn) % 2
        kill_at = 1 + trial.point(MOST_CALLS) if in_save else 0
        child = traced.start(train_alone, event_log.path, run_dir, kill_at)
        if not in_save:
            assert child.hear() == "trains", child.raised
            time.sleep(trial.random.uniform(0, MOST_SECONDS))
            child.kill()
        child.end()
        assert child.exit_code in (0, -9), child.raised
        trial.count("after the end" if child.exit_code == 0 else "during a save" if in_save else "at any moment")
    traced.call(train_alone, event_log.path, run_dir)
    compare(trial, result(run_dir), uninterrupted)
