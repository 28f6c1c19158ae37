"""Killed training runs, in one process and in several ranks, resume to the same bits."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import small_config
from tests.faults import preload
from tests.faults.harness import LOSES_NOTHING, Trial, compare, compare_events, promise
from tests.faults.nursery import Nursery, Say
from vista.config.checks import Precision
from vista.examples.batch import Batch
from vista.log.event_log import EventLog
from vista.training.checkpoint import latest_checkpoint, load_checkpoint
from vista.training.trainer import Trainer, train

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
    state["run"]["progress"].pop("seconds")
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


@promise("Trainer resume", fault="kill -9, also during a save", full=50, short=1, shares={"during a save": 0.20})
def test_trainer_resume(trial: Trial, traced: Nursery, event_log: EventLog, uninterrupted: dict[str, Any]) -> None:
    run_dir = trial.folder.resolve() / "run"
    for turn in range(trial.random.choice([1, 1, 2])):
        in_save = (trial.number + turn) % 2
        child = traced.start(
            train_alone, event_log.path, run_dir, trial.random.randint(1, MOST_CALLS) if in_save else 0
        )
        if not in_save:
            assert child.hear() == "trains", child.raised
            time.sleep(trial.random.uniform(0, MOST_SECONDS))
            child.kill()
        child.end()
        assert child.exit_code in (0, -9), child.raised
        trial.count("after the end" if child.exit_code == 0 else "during a save" if in_save else "at any moment")
    traced.call(train_alone, event_log.path, run_dir)
    results = result(run_dir)
    assert results.keys() == uninterrupted.keys()
    for name, value in results.items():
        assert value == uninterrupted[name], f"{name} differs"


NUM_RANKS = 2
CHECKPOINT_EVERY = 4
STEP, CALL = "at a step", "within a save"


def train_job(say: Say, log: str, run_dir: str, how: str = "", rank: int = 0, number: int = 0) -> list[int]:
    """Start or resume a run in two ranks.

    Args:
        how: STEP or CALL, to kill a rank; empty to kill none.
        rank: which one dies.
        number: of the step that it does not begin, or of the system call that it does not make in its saves.

    Returns:
        System calls in the saves of each rank.
    """
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    job = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=NUM_RANKS,
        run_id="job",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="fork",
        monitor_interval=0.02,
    )
    calls = elastic_launch(job, train_rank)(log, run_dir, how, rank, number)  # in the order in which ranks end
    return [calls[each] for each in range(NUM_RANKS)]


def train_rank(log: str, run_dir: str, how: str, rank: int, number: int) -> int:
    """What each rank runs."""
    is_victim, step = os.environ["RANK"] == str(rank), Trainer._step
    preload.watch(f"{run_dir}/checkpoints")
    at = number if how == CALL and is_victim else 0
    preload.die_at(at)

    def step_or_die(trainer: Trainer, batch: Batch, share_done: float) -> dict[str, float]:
        if how == STEP and is_victim and trainer.progress.step == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(trainer, batch, share_done)

    setattr(Trainer, "_step", step_or_die)  # noqa: B010
    opened = EventLog.open(log)
    changes: dict[str, Any] = {"optim__epochs": 4, "optim__validate_every": 8, "checkpoint_every": CHECKPOINT_EVERY}
    train(small_config(opened, run_dir, precision=Precision.float32, **changes), opened, metrics_every=1)
    return preload.calls_since(at)


@pytest.fixture(scope="module")
def unkilled(
    event_log: EventLog, traced: Nursery, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], int]:
    """The results of a run that nobody kills, and the system calls in its saves."""
    for module in ("torch._dynamo", "torch.distributed.launcher.api", __name__):
        traced.imports(module)
    run_dir = tmp_path_factory.mktemp("unkilled").resolve() / "run"
    calls = traced.call(train_job, event_log.path, run_dir)
    assert calls[1] == 0, "only rank 0 saves"
    return result(run_dir), calls[0]


def losses(results: dict[str, Any]) -> Counter[tuple[int, float]]:
    """(step, loss) of each step."""
    return Counter((row["step"], row["loss"]) for row in results["metrics"] if "loss" in row)


@promise(
    LOSES_NOTHING,
    fault="beyond one machine, kill -9 of a rank of a torchrun job, at a step or within a save",
    full=40,
    short=1,
    judged=True,
    shares={STEP: 0.2, CALL: 0.2},
)
def test_killed_rank(trial: Trial, traced: Nursery, event_log: EventLog, unkilled: tuple[dict[str, Any], int]) -> None:
    run_dir, (expected, num_calls) = trial.folder.resolve() / "run", unkilled
    num_steps, saved = len(losses(expected)), 0
    for _ in range(trial.random.choice([1, 1, 2, 3])):
        if saved == num_steps:
            break
        how = trial.random.choice([STEP, CALL])
        if how == STEP:
            point = [trial.random.randrange(NUM_RANKS), trial.random.randrange(saved, num_steps)]
        else:
            point = [0, trial.random.randint(1, max(1, num_calls * (num_steps - saved) // num_steps))]
        child = traced.start(train_job, event_log.path, run_dir, how, *point).end()
        if child.exit_code == 0:
            assert saved, "the first kill did not strike"
            trial.count("after the end")
            break
        assert "ChildFailedError" in child.raised and "Signal 9 (SIGKILL)" in child.raised, child.raised
        trial.count(how)
        newest = latest_checkpoint(run_dir / "checkpoints")
        found = 0 if newest is None else int(newest.name.rpartition("-")[2])
        least = point[1] // CHECKPOINT_EVERY * CHECKPOINT_EVERY if how == STEP else saved
        assert found >= least, f"the checkpoint at step {least} is lost; the newest one is at step {found}"
        saved = found
    traced.call(train_job, event_log.path, run_dir)
    results = result(run_dir)
    compare_events(trial, losses(results), losses(expected))
    compare(trial, results, expected)
