"""`vista runs` and `vista runs compare`, on the folders of real runs."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.conftest import Served, small_config
from vista.cli.main import main
from vista.config.checks import RunOrder
from vista.errors import ConfigError, NonFiniteLossError
from vista.log.event_log import EventLog
from vista.runs.run_list import RunComparison, RunList, RunSummary, best_places, thinned
from vista.training.run_folder import log_file
from vista.training.trainer import train_model


@pytest.fixture(scope="module")
def trained(event_log: EventLog, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three runs: two that finished, and one that failed."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (1, 2):
        train_model(small_config(event_log, folder / f"seed-{seed}", seed=seed), event_log)
    with pytest.raises(NonFiniteLossError):
        train_model(small_config(event_log, folder / "deep" / "failed", optim__learning_rate=1e38), event_log)
    return folder


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "runs")


def rows_of(run: Path) -> list[dict[str, float]]:
    return [row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "validation" in row]


def test_a_run_is_what_its_files_say(runs: Path) -> None:
    run = RunSummary.of(runs / "seed-1", "seed-1")
    validated = rows_of(runs / "seed-1")
    best = max(validated, key=lambda row: row["validation"]["ndcg@10"])  # type: ignore[index]
    assert (run.state, run.reason, run.metric, run.epoch) == ("finished", None, "ndcg@10", best["epoch"])
    assert run.validation == best["validation"] and run.seconds == validated[-1]["seconds"]
    assert run.parameters is not None and f"parameters | {run.parameters:,}" in (
        runs / "seed-1" / "best" / "README.md"
    ).read_text().replace("| parameters", "parameters")
    assert run.settings["seed"] == 1 and run.settings["optim.learning_rate"] == 5e-3 and run.commit
    assert run.test == {}


def test_the_list_shows_the_best_first_and_names_failures(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["runs", f"folder={runs}", f"out={runs}/list.json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "state", "ndcg@10", "epoch", "test", "seconds", "parameters", "commit"]
    values = {name: RunSummary.of(runs / name, name).best or 0 for name in ("seed-1", "seed-2")}
    best, second = sorted(values, key=lambda name: -values[name])
    assert [line.split()[0] for line in lines[1:4]] == [best, second, "deep/failed"]
    assert lines[1].split()[1:3] == ["finished", f"{values[best]:.4f}"] and lines[3].split()[1] == "failed"
    assert lines[4].startswith("deep/failed: failed: NonFiniteLossError: ")
    listed = json.loads((runs / "list.json").read_text())
    assert [run["best"] for run in listed] == [values[best], values[second], None]
    assert main(["runs", f"folder={runs}", "sort=name", "metric=hr@10"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[2] == "hr@10" and [line.split()[0] for line in lines[2:4]] == ["seed-1", "seed-2"]


def test_every_order_lists_all_runs(runs: Path) -> None:
    os.utime(runs / "seed-1" / "run.json")
    for order in RunOrder:
        assert len(RunList.of(runs, order).runs) == 3
    assert RunList.of(runs, RunOrder.newest).runs[0].name == "seed-1"


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (lambda run: (run / "run.json").unlink(), "run.json is missing"),
        (lambda run: (run / "run.json").write_text('{"state": "fin'), "run.json cannot be read"),
        (lambda run: (run / "run.json").write_text('{"state": "finished"}'), "the field 'reason' is missing"),
        (lambda run: (run / "config.yaml").write_text("model: [1"), "config.yaml cannot be read"),
        (lambda run: (run / "config.yaml").write_text('{"step": 1, "\\ud800": 1}'), "config.yaml cannot be read"),
        (lambda run: (run / "config.yaml").unlink(), "config.yaml is missing"),
        (lambda run: (run / "metrics.jsonl").unlink(), "metrics.jsonl is missing"),
        (lambda run: shutil.rmtree(run / "best"), "best/ is missing"),
    ],
)
def test_a_half_written_run_is_listed_with_what_is_missing(
    runs: Path, capsys: pytest.CaptureFixture[str], break_it: object, reason: str
) -> None:
    break_it(runs / "seed-1")  # type: ignore[operator]
    assert main(["runs", f"folder={runs}"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "seed-1: half written: " in printed and reason in printed
    assert main(["runs", "compare", f"runs=[{runs}/seed-1,{runs}/seed-2]"]) == 0


def test_metrics_end_where_a_crash_cut_them_off(runs: Path) -> None:
    path = runs / "seed-1" / "metrics.jsonl"
    first = rows_of(runs / "seed-1")[0]
    path.write_text(json.dumps(first) + '\n{"step": 7, "valid')
    run = RunSummary.of(runs / "seed-1", "seed-1")
    assert (run.state, run.epoch, run.validation) == ("finished", 1, first["validation"])


def test_a_run_is_running_while_its_process_holds_the_lock(runs: Path) -> None:
    facts = json.loads((runs / "seed-1" / "run.json").read_text())
    (runs / "seed-1" / "run.json").write_text(json.dumps(facts | {"state": "running", "ended": None}))
    killed = RunSummary.of(runs / "seed-1", "seed-1")
    assert (killed.state, killed.reason) == ("stopped", "its process was killed")
    with log_file(runs / "seed-1" / "train.log"):
        assert RunSummary.of(runs / "seed-1", "seed-1").state == "running"
        with (
            pytest.raises(ConfigError, match=r"seed-1: another process is training here"),
            log_file(runs / "seed-1" / "train.log"),
        ):
            pass


def test_an_evaluation_in_the_folder_of_a_run_is_its_test(
    served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(served.config.run_dir, tmp_path / "runs" / "mine")
    words = [f"data={served.log.path}", f"model={run}/best", f"store={served.test_store}", f"out={run}/test.json"]
    assert main(["evaluate", *words, "top_k=[10]", "device=cpu"]) == 0
    capsys.readouterr()
    measured = json.loads((run / "test.json").read_text())["metrics"]
    assert RunSummary.of(run, "mine").test == measured
    assert main(["runs", f"folder={tmp_path}/runs"]) == 0
    assert f"{measured['ndcg@10']:.4f}" in capsys.readouterr().out


def test_a_comparison_shows_what_differs_and_marks_the_best(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "compare", f"runs=[{runs}/seed-1,{runs}/seed-2]", f"out={runs}/both.json"]) == 0
    printed = capsys.readouterr().out
    lines = {line.rsplit(maxsplit=2)[0].strip(): line.split()[-2:] for line in printed.splitlines() if line.strip()}
    assert lines["setting"] == ["seed-1", "seed-2"] and lines["seed"] == ["1", "2"]
    values = [RunSummary.of(runs / name, name).best or 0 for name in ("seed-1", "seed-2")]
    marks = ["*" if value == max(values) and len(set(values)) == 2 else "" for value in values]
    shown = [f"{value:.4f}{mark}" for value, mark in zip(values, marks, strict=True)]
    assert lines["validation ndcg@10"] == shown
    both = json.loads((runs / "both.json").read_text())
    assert both["settings"] == {"seed": [1, 2]} and both["metrics"]["validation ndcg@10"] == values
    differences = RunComparison.of([str(runs / "seed-1"), str(runs / "deep" / "failed")]).differences()
    assert differences == {"optim.learning_rate": [5e-3, 1e38]}


def test_smaller_is_better_for_some_metrics() -> None:
    assert best_places("ne/click", [0.9, 0.8, None]) == [False, True, False]
    assert best_places("calibration/click", [0.7, 1.1]) == [False, True]
    assert best_places("ndcg@10/50-events", [0.2, 0.3]) == [False, True]
    assert best_places("ndcg@10", [0.2, 0.2]) == [False, False]
    assert best_places("gini@10", [0.2, 0.3]) == [False, False]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["runs", "folder=nowhere"], "folder=nowhere: is not a folder"),
        (["runs", "folder={runs}", "metric=auc"], "metric=auc: no run has it; use one of hr@10, ndcg@10"),
        (["runs", "folder={runs}", "sort=worst"], "sort: expected best|name|newest|seconds|parameters, got worst"),
        (["runs", "compare", "runs=[{runs}/seed-1]"], "name two or more run folders"),
        (["runs", "compare", "runs=[{runs}/seed-1,{runs}]"], "is not a run folder"),
    ],
)
def test_a_wrong_name_is_one_line(runs: Path, capsys: pytest.CaptureFixture[str], words: list[str], part: str) -> None:
    assert main([word.format(runs=runs) for word in words]) == 2
    line = capsys.readouterr().err
    assert part in line and line.count("\n") == 1


def test_a_folder_without_runs_is_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other").mkdir()
    assert main(["runs", f"folder={tmp_path}"]) == 0
    assert capsys.readouterr().out.startswith(f"no runs in {tmp_path}")


@pytest.mark.parametrize("count", [0, 1, 399, 400, 401, 100_003])
def test_both_ends_of_a_thinned_curve_stay(count: int) -> None:
    kept = thinned(range(count), 400)
    assert len(kept) == min(count, 400) and kept == sorted(set(kept))
    assert kept[:1] + kept[-1:] == ([0, count - 1] if count else [])


def test_points_of_a_thinned_curve_are_chosen_evenly() -> None:
    assert thinned(range(9), 5) == [0, 2, 4, 6, 8]
