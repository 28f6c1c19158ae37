"""Curves of a run, also of one that is half written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.conftest import Served
from vista.explore.run_curves import MAX_POINTS, RunCurves
from vista.runs.run_summary import RunSummary


def write_run(folder: Path, rows: list[dict[str, object]], end: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
    return folder


ROWS: list[dict[str, object]] = [
    {"step": 1, "epoch": 0, "loss": 3.0},
    {"step": 2, "epoch": 0, "loss": 2.0, "next": None},
    {"step": 2, "epoch": 1, "validation": {"ndcg@10": 0.1}, "is_best": True},
    {"step": 3, "epoch": 1, "loss": 1.0},
    {"step": 4, "epoch": 2, "validation": {"ndcg@10": 0.05}, "is_best": False},
]


def test_a_finished_run(served: Served) -> None:
    run = RunCurves.of(Path(served.config.run_dir))
    assert run.problems == [] and run.summary.state == "finished" and run.epochs == 2
    assert run.summary == RunSummary.of(Path(served.config.run_dir), served.config.run_dir)
    assert "ndcg@10" in run.names("validation")
    assert run.best_step is not None and run.best_step <= run.last_step


def test_a_run_that_is_half_written(tmp_path: Path) -> None:
    run = RunCurves.of(write_run(tmp_path / "run", ROWS, end='{"step": 5, "lo'))
    assert [(row["step"], row["value"]) for row in run.training] == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert run.last_step == 4 and run.best_step == 2 and run.epochs == 2
    missing, torn = run.problems
    assert missing == "half written: run.json is missing; config.yaml is missing"
    assert torn.startswith("line 6 of metrics.jsonl is incomplete")
    more = write_run(tmp_path / "torn", ROWS[:1], end='[]\n{"step": 2}\n{"step": 3}\n')
    assert "nor are the 2 lines after it" in RunCurves.of(more).problems[1]


def test_an_empty_run(tmp_path: Path) -> None:
    empty = RunCurves.of(write_run(tmp_path / "empty", []))
    assert empty.summary.state == "half written" and empty.training == [] and empty.epochs == 0


def test_a_run_that_was_killed(served: Served, tmp_path: Path) -> None:
    run = Path(shutil.copytree(served.config.run_dir, tmp_path / "killed"))
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(facts | {"state": "running", "ended": None}))
    killed = RunCurves.of(run)
    assert killed.summary.state == "stopped" and killed.problems == ["stopped: its process was killed"]
    assert killed.validation


def test_long_curves_are_thinned_and_keep_their_end(tmp_path: Path) -> None:
    run = RunCurves.of(write_run(tmp_path / "run", [{"step": n, "epoch": 0, "loss": float(n)} for n in range(1, 5001)]))
    steps = [row["step"] for row in run.training]
    assert len(steps) == MAX_POINTS and steps[-1] == 5000 and steps == sorted(steps)


def test_runs_of_one_name_in_two_folders_are_two_curves(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"step": 1, "epoch": 0, "loss": 3.0}]
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    runs = [RunCurves.of(write_run(tmp_path / folder / "seed-1", rows)) for folder in ("a", "b")]
    names = [run.summary.name for run in runs]
    assert [run.curve("training", "loss") for run in runs] == [
        [{"run": name, "step": 1, "value": 3.0}] for name in names
    ]
    assert names[0] != names[1]
