"""Tables of results in both forms, and files that are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vista.errors import DataError
from vista.explore.result_tables import ResultTable, read_table, result_files

DOCS = Path(__file__).parents[2] / "docs" / "results"


def test_rows_are_means_over_seeds_and_the_last_measurement_counts(tmp_path: Path) -> None:
    rows = [
        {"table": "t", "data": "t", "model": "a", "seed": 1, "metrics": {"auc": 0.1, "ne": 0.5}},
        {"table": "t", "data": "t", "model": "a", "seed": 2, "metrics": {"auc": 0.3, "ne": None}},
        {"table": "t", "data": "other", "model": "a", "seed": 1, "metrics": {"auc": 0.9}},
        {"table": "t", "data": "t", "model": "a", "seed": 1, "metrics": {"auc": 0.2, "ne": 0.7, "empty": None}},
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = read_table(tmp_path / "t.jsonl")
    assert table.name == "t" and table.metrics == ["auc", "ne"]
    first, second = table.rows
    assert (first["model"], first["seeds"], first["ne"]) == ("a", 2, 0.7) and first["auc"] == pytest.approx(0.25)
    assert (second["model"], second["ne"]) == ("a (other)", None)
    assert table.values("ne") == [{"model": "a", "value": 0.7}]


@pytest.mark.parametrize(
    ("metric", "best_first", "title"),
    [
        ("ne/click", ["low", "one", "high"], "ne/click (lower is better)"),
        ("validation ne/click", ["low", "one", "high"], "validation ne/click (lower is better)"),
        ("calibration/click", ["one", "low", "high"], "calibration/click (best at 1)"),
        ("auc/click", ["high", "one", "low"], "auc/click (higher is better)"),
        ("request ms", ["high", "one", "low"], "request ms"),
    ],
)
def test_the_best_value_is_on_top(metric: str, best_first: list[str], title: str) -> None:
    rows = [{"model": model, metric: value} for model, value in (("low", 0.7), ("high", 1.4), ("one", 1.1))]
    values = ResultTable("t", rows, [metric]).values(metric)
    assert [row["model"] for row in values] == best_first
    pytest.importorskip("altair", reason="the extra `explore` is not installed")
    from vista.explore.charts import metric_chart

    axes = metric_chart(values, metric).to_dict()["layer"][0]["encoding"]
    assert axes["y"]["sort"] == best_first and axes["x"]["title"] == title


def test_an_evaluation_is_a_table_of_one_row(tmp_path: Path) -> None:
    report = {"model": "runs/mine/best", "split": "test", "metrics": {"ndcg@10": 0.25}, "num_cases": 3}
    (tmp_path / "mine.json").write_text(json.dumps(report, indent=2))
    assert read_table(tmp_path / "mine.json").rows == [{"model": "runs/mine/best", "seeds": 1, "ndcg@10": 0.25}]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", '{"metrics": {}}\n{"metrics"', "line 2: is not JSON"),
        ("a.jsonl", "[]\n", "line 1: has no metrics"),
        ("a.json", '{"settings": 1}', "line 1: has no metrics"),
        ("a.json", b"\xff\xfe", "cannot be read"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, name: str, content: str | bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=reason):
        read_table(tmp_path / name)


def test_files_of_results_are_listed(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.json", "b.md"):
        (tmp_path / name).write_text('{"model": "a", "metrics": {}}')
    (tmp_path / "bench.jsonl").write_text('{"bench": "store", "value": 1}')
    assert [path.name for path in result_files(tmp_path)] == ["a.json", "b.jsonl"]
    assert result_files(tmp_path / "missing") == []


@pytest.mark.parametrize("file", result_files(DOCS), ids=lambda path: path.stem)
def test_the_projects_own_tables_can_be_shown(file: Path) -> None:
    table = read_table(file)
    assert table.rows and table.metrics and all(table.values(metric) for metric in table.metrics)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that nobody can read, as of Linux")
def test_a_file_that_cannot_be_read_is_listed_and_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").symlink_to("/proc/self/mem")
    assert result_files(tmp_path) == [tmp_path / "a.json"]
    with pytest.raises(DataError, match=r"a\.json: cannot be read .*results="):
        read_table(tmp_path / "a.json")
