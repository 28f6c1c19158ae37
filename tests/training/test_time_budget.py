"""A run with optim.minutes: how many steps fit, and that a resumed run ends at the same step with the same bits."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import small_config
from tests.training.test_trainer import assert_same_result, metrics
from vista.config import OptimConfig
from vista.errors import ConfigError
from vista.log.event_log import EventLog
from vista.training import run_state, trainer
from vista.training.checkpoint import latest_checkpoint, load_checkpoint
from vista.training.progress import Progress
from vista.training.time_budget import RESERVE, SKIPPED_STEPS, TIMED_STEPS, TimeBudget
from vista.training.trainer import train

PLANNED_AT = SKIPPED_STEPS + TIMED_STEPS


def test_steps_share_the_time_with_validations() -> None:
    budget = TimeBudget(2.0)
    enough = [budget.add(seconds) for seconds in [9.0] * SKIPPED_STEPS + [0.1] * TIMED_STEPS]
    assert enough == [False] * (PLANNED_AT - 1) + [True]
    assert budget.seconds_per_step == pytest.approx(0.1)
    left = 120 * (1 - RESERVE)
    assert budget.steps_left(20, 0, 1) == int((left - 20) / 0.1)
    # The validation after 50 steps takes as long as 10 more steps, and the last one comes on top.
    assert budget.steps_left(20, 1.0, 50) == int((left - 20 - 1) / (0.1 + 1 / 50))
    assert budget.steps_left(200, 1.0, 50) == 0


def test_minutes_are_positive() -> None:
    with pytest.raises(ConfigError, match=r"optim\.minutes: must be positive and finite, got 0"):
        OptimConfig(minutes=0)


@pytest.mark.parametrize(("epochs", "fits"), [(None, 40), (100, 40), (3, 30)])
def test_epochs_limit_the_steps(epochs: int | None, fits: int) -> None:
    budget = TimeBudget(1.0)
    for _ in range(PLANNED_AT):
        budget.add(0.1)
    spent = 60 * (1 - RESERVE) - 15 * 0.1 - 1e-9  # time for 15 more steps
    progress = Progress(step=PLANNED_AT, seconds=spent)
    assert budget.planned_steps(progress, 0.0, 10, OptimConfig(minutes=1, epochs=epochs)) == fits


def test_a_timed_run_resumes_bit_identically(
    event_log: EventLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, killed = run_state.save_checkpoint, []

    def copied(folder: Path, step: int, *rest: Any) -> None:
        save(folder, step, *rest)
        killed.append((step, shutil.copytree(folder.parent, tmp_path / f"killed-{len(killed)}")))

    changes = {"optim__epochs": None, "optim__minutes": 1.0, "data__unknown_share": 0.2, "checkpoint_every": 7}
    whole = tmp_path / "whole"
    with monkeypatch.context() as patch:
        patch.setattr(run_state, "save_checkpoint", copied)
        patch.setattr(TimeBudget, "steps_left", lambda *_: 13)  # only here: a resumed run must not plan again
        train(small_config(event_log, whole, **changes), event_log, metrics_every=1)
    last = load_checkpoint(latest_checkpoint(whole / "checkpoints"))[1]["run"]["progress"]  # type: ignore[arg-type]
    assert last["step"] == last["planned_steps"] == PLANNED_AT + 13
    rates = [row["learning_rate"] for row in metrics(whole) if "learning_rate" in row]
    assert len(rates) == last["step"] and rates[-1] < 0.05 * max(rates)
    text = (whole / "train.log").read_text()
    assert f"{last['step']} steps, " in text and "only about 38 steps, of which 4 are warm-up" in text

    for step in (PLANNED_AT, PLANNED_AT + 3, last["step"]):
        run_dir = next(folder for at, folder in killed if at == step)
        train(small_config(event_log, run_dir, **changes), event_log, metrics_every=1)
        assert_same_result(run_dir, whole)


def test_the_time_counts_from_the_beginning(event_log: EventLog, tmp_path: Path) -> None:
    config = small_config(event_log, tmp_path, optim__epochs=1)
    made = trainer.Trainer(config, event_log, began=time.perf_counter() - 100)
    made._count_seconds()
    assert 100 < made.progress.seconds < 200


def test_a_budget_that_is_spent_ends_the_run_after_the_timed_steps(event_log: EventLog, tmp_path: Path) -> None:
    config = small_config(event_log, tmp_path, optim__epochs=None, optim__minutes=1e-4)
    train(config, event_log)
    (validated,) = [row for row in metrics(tmp_path) if "validation" in row and row["step"] == PLANNED_AT]
    assert validated["is_best"] in (True, False) and (tmp_path / "best" / "README.md").is_file()


def test_a_run_with_both_ends_after_its_epochs(event_log: EventLog, tmp_path: Path) -> None:
    config = small_config(event_log, tmp_path, optim__epochs=4, optim__minutes=10.0, data__tokens_per_batch=32)
    train(config, event_log, metrics_every=1)
    last = load_checkpoint(latest_checkpoint(tmp_path / "checkpoints"))[1]["run"]["progress"]  # type: ignore[arg-type]
    assert last["epoch"] == 4 and last["step"] == last["planned_steps"] > PLANNED_AT
    rates = [row["learning_rate"] for row in metrics(tmp_path) if "learning_rate" in row]
    assert rates[-1] < 0.05 * max(rates)
