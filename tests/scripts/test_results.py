"""Result files, their Markdown tables and plots, and the records of machine and commit."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vista
from scripts.experiments import row_origin
from scripts.experiments.results import append_result, hardware, main, markdown_table, read_lines, read_results
from scripts.experiments.row_origin import RowOrigin, train_noted
from tests.conftest import small_config
from vista.errors import DataError
from vista.log.event_log import EventLog
from vista_kernels.processor import processor

MACHINE = {"cpu": "Test CPU", "cores": 2, "torch": "2.13.0", "gpu": None}


def row(**changes: Any) -> dict[str, Any]:
    return {
        "table": "ml-1m",
        "data": "ml-1m",
        "model": "vista K=16",
        "seed": 1,
        "metrics": {"hr@10": 0.3, "ndcg@10": 0.16},
        "command": "vista evaluate seed=1",
        "config": {"model": {"dim": 64}},
        "commit": "abc1234",
        "hardware": MACHINE,
        "seconds": 12.5,
    } | changes


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "docs" / "results" / "ml-1m.jsonl"
    rows = [row(), row(seed=2, metrics={"auc": None, "ne": 0.9}), row(model="line\u2028 and ünïcode", seconds=3)]
    rows.append(row(seed=3, completed="2026-11-27"))
    for each in rows:
        append_result(path, each)
    assert read_results(path) == rows
    assert path.read_bytes().count(b"\n") == 4


def test_a_line_cut_by_a_crash_is_closed_and_then_named(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    append_result(path, row())
    path.write_bytes(path.read_bytes() + b'{"table": "ml-')
    append_result(path, row(seed=2))
    with pytest.raises(DataError, match=r"t\.jsonl, line 2: is not JSON .*remove the line"):
        read_results(path)
    lines = path.read_text().split("\n")
    path.write_text("\n".join([lines[0], "", lines[2], ""]))
    assert [each["seed"] for each in read_results(path)] == [1, 2]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"extra": 1}, r"unknown keys \['extra'\]"),
    ({"seed": "1"}, "seed is a str; give a value of type int"),
    ({"metrics": {}}, "metrics is empty"),
    ({"metrics": {"auc": math.nan}}, r"metrics\['auc'\] is nan"),
    ({"metrics": {"auc": "0.5"}}, r"metrics\['auc'\] is '0.5'"),
    ({"seconds": -1.0}, "seconds must be"),
    ({"completed": "last week"}, "completed must be a date"),
    ({"errors": {"hr@10": math.nan}}, r"errors\['hr@10'\] is nan"),
    ({"model": ""}, "model must be one line"),
    ({"config": {"x": math.nan}}, "cannot be written as JSON"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[message for _, message in BAD])
def test_a_bad_row_is_refused_and_nothing_is_written(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        append_result(tmp_path / "t.jsonl", row(**changes))
    assert not (tmp_path / "t.jsonl").exists()


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    incomplete = row()
    del incomplete["commit"]
    with pytest.raises(DataError, match=r"missing keys \['commit'\]"):
        append_result(tmp_path / "t.jsonl", incomplete)
    (tmp_path / "t.jsonl").write_text(json.dumps(row()) + "\n" + json.dumps(incomplete) + "\n")
    with pytest.raises(DataError, match=r"line 2: result: missing keys \['commit'\]"):
        read_results(tmp_path / "t.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        read_results(tmp_path / "absent.jsonl")
    (tmp_path / "t.jsonl").write_bytes(b"[1]\n")
    with pytest.raises(DataError, match="line 1: is not a JSON object"):
        read_results(tmp_path / "t.jsonl")
    (tmp_path / "t.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(DataError, match="line 1: is not JSON"):
        read_results(tmp_path / "t.jsonl")


def test_the_table_shows_mean_and_spread_over_seeds() -> None:
    rows = [
        row(metrics={"ndcg@10": 0.9}),  # replaced by the later run of the same seed
        row(metrics={"ndcg@10": 0.10, "hr@10": 0.2}, seconds=10),
        row(metrics={"ndcg@10": 0.20, "hr@10": 0.2}, seed=2, seconds=20),
        row(metrics={"ndcg@10": 0.30, "hr@10": None}, seed=3, seconds=30),
        row(model="a|b", metrics={"auc": 0.5}),
        row(table="other", data="simulated", metrics={"auc": 0.75}),
    ]
    text = markdown_table(rows)
    first, second = text.split("# other")
    lines = first.splitlines()
    assert lines[0] == "# ml-1m"
    assert lines[2] == "| data | model | seeds | ndcg@10 | hr@10 | auc | seconds |"
    assert lines[4] == "| ml-1m | vista K=16 | 3 | 0.2000 ± 0.1000 | 0.2000 ± 0.0000 | – | 20 |"
    assert lines[5] == "| ml-1m | a\\|b | 1 | – | – | 0.5000 | 12 |"
    assert first.count("`vista evaluate seed=1` (seed 1 2 3; commit abc1234; Test CPU, 2 cores, torch 2.13.0)") == 1
    assert "0.9" not in first
    assert "| simulated | vista K=16 | 1 | 0.7500 |" in second
    assert markdown_table([]) == ""


def test_the_command_prints_a_table_without_torch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    append_result(tmp_path / "t.jsonl", row())
    assert main([str(tmp_path / "t.jsonl")]) == 0
    assert capsys.readouterr().out == markdown_table([row()])
    assert main([str(tmp_path / "absent.jsonl")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    code = "import sys, scripts.experiments.results as r; r.main([sys.argv[1]]); assert 'torch' not in sys.modules"
    folder = Path(vista.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "t.jsonl")], check=True, cwd=folder)


def test_hardware_fits_a_row_and_matches_this_process() -> None:
    machine = hardware()
    assert json.loads(json.dumps(machine)) == machine
    assert machine["cpu"] and machine["cores"] >= 1 and machine["memory_gib"] > 0 and machine["threads"] >= 1
    assert machine["numpy"] == np.__version__
    assert machine["processor"] == processor().name


def test_seeds_of_another_configuration_are_another_mean() -> None:
    """A mean covers the seeds that share the configuration of the newest row."""
    old = [row(seed=seed, metrics={"hr@10": 0.1}) for seed in (1, 2)]
    table = markdown_table([*old, row(seed=3, metrics={"hr@10": 0.4}, config={"model": {"dim": 64}, "seed": 3})])
    assert "| ml-1m | vista K=16 | 3 | 0.2000 ± 0.1732 |" in table
    for config in ({"model": {"dim": 32}}, {"model": {"dim": 64, "new": 1}}, {}):
        table = markdown_table([*old, row(seed=3, metrics={"hr@10": 0.4}, config=config)])
        assert "| ml-1m | vista K=16 | 1 | 0.4000 |" in table and "seed 3;" in table


REPOSITORY = Path(__file__).parents[2]
RESULTS = REPOSITORY / "docs" / "results"
COMMIT = re.compile(r"[0-9a-f]{7,40}(\+dirty)?")


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def commits_to_refuse(rows: Sequence[Mapping[str, Any]], known: Collection[str]) -> list[str]:
    """What rows say of their commits, unless each commit is known and its files were unchanged."""
    named = [str(row["commit"]) for row in rows if row.get("repetitions") != 0]
    return [
        commits
        for commits in dict.fromkeys(named)
        if not (found := [*COMMIT.finditer(commits)])
        or any(each[1] or not any(other.startswith(each[0]) for other in known) for each in found)
    ]


def test_rows_of_lost_or_changed_commits_are_found() -> None:
    known = ["abc1234567", "def5678901"]
    good = [{"commit": "abc1234"}, {"commit": "def56789 (trained at abc1234, abc12345)"}, {"repetitions": 0}]
    assert commits_to_refuse(good, known) == []
    bad = ["abc1234+dirty", "1234567", "abc1234 (trained at 1234567)", "abc1234 (trained at def5678+dirty)", "unknown"]
    assert commits_to_refuse([{"commit": each} for each in bad], known) == bad


@pytest.mark.skipif(not (REPOSITORY / ".git").exists(), reason="not a checkout")
@pytest.mark.skipif(
    (REPOSITORY / ".git" / "shallow").exists(),
    reason="not all commits are here, as in the clones of most CI services; run `git fetch --unshallow`",
)
def test_all_rows_were_measured_at_commits_of_this_repository() -> None:
    """Measure a row that is refused again, or delete it and say so in the research log."""
    known = git("rev-list", "HEAD").split()
    files = sorted(RESULTS.glob("*.jsonl"))
    refused = {path.name: commits_to_refuse([row for _, row in read_lines(path)], known) for path in files}
    assert len(files) > 30 and {name: commits for name, commits in refused.items() if commits} == {}


def result_tables() -> list[Path]:
    """The committed files of results; benchmarks, faults, and nightly tests have other keys."""
    return [path for path in RESULTS.glob("*.jsonl") if not path.name.startswith(("bench_", "faults", "nightly"))]


def test_the_committed_markdown_matches_the_committed_rows() -> None:
    tables = result_tables()
    assert tables
    for path in tables:
        assert path.with_suffix(".md").read_text() == markdown_table(read_results(path)), path.name


FIRST_MACHINE: dict[str, Any] = {"cpu": "First CPU", "gpu": None, "cores": 2, "threads": 1, "torch": "2.13.0"}


@pytest.mark.research
@pytest.mark.parametrize(("profile", "precision"), [("float32", "float32"), ("bfloat16", "bfloat16")])
def test_who_trained_and_who_measures(
    profile: str,
    precision: str,
    event_log: EventLog,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    force_processor: Callable[[str], None],
) -> None:
    force_processor(profile)

    def now(commit: str, cpu: str) -> None:
        monkeypatch.setattr(row_origin, "source_commit", lambda: commit)
        monkeypatch.setattr(row_origin, "hardware", lambda: FIRST_MACHINE | {"cpu": cpu})

    config = small_config(event_log, tmp_path / "run", optim__epochs=1)
    now("aaa", "First CPU")
    train_noted(config, event_log, tmp_path)
    fields = RowOrigin.read({"test": tmp_path}).fields()
    assert fields["commit"] == "aaa" and fields["hardware"] == FIRST_MACHINE | {"precision": precision}
    assert fields["seconds"] > 0 and RowOrigin.read({"test": tmp_path}).validation.keys() == {"hr@10", "ndcg@10"}
    ((seconds, value),) = RowOrigin.read({"test": tmp_path}).curve
    assert 0 < seconds <= fields["seconds"] + 0.1
    assert value == RowOrigin.read({"test": tmp_path}).validation["ndcg@10"]
    assert RowOrigin.read({"validation": tmp_path, "test": tmp_path}).curve == ()  # two models
    now("bbb", "Second CPU")
    train_noted(config, event_log, tmp_path)  # the run is done: nothing is trained
    fields = RowOrigin.read({"test": tmp_path}).fields()
    assert fields["commit"] == "bbb (trained at aaa)" and fields["hardware"]["cpu"] == "First CPU"
    assert fields["hardware"]["elsewhere"] == ["Second CPU, 2 cores, torch 2.13.0"]
