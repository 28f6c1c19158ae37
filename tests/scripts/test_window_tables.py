"""Tables of windows: small ones are run on validation and test, and their rows are compared user by user."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scripts.experiments import by_activity, reproduce
from scripts.experiments.popularity_afterwards import PopularityAfterwards
from scripts.experiments.results import changed_settings, read_results
from scripts.experiments.row_measurement import SIMULATED, WINDOW_METRICS
from scripts.experiments.table_run import part_configs, recorded_config
from scripts.experiments.tables import TABLES
from scripts.experiments.tables.table import Table
from scripts.experiments.tables.table_row import K0, TableRow
from scripts.experiments.tables.window_tables import COUNTED, WITHOUT
from vista.evaluation.baselines.all_baselines import counting_baselines, trained_baselines
from vista.log.splits import split_until

pytestmark = pytest.mark.research
SMALL = (
    *("optim.epochs=1", "optim.warmup_steps=2", "optim.validate_every=0", "optim.tasks=[click]"),
    *("model.dim=16", "data.windows_per_chunk=8"),
)
TINY = Table(
    "simulation",
    "tiny",
    {
        "vista": TableRow(1),
        "tail-only": TableRow(1, K0),
        "sasrec": TableRow(1, ("model=sasrec",), trial=True),
        "transitions": TableRow(1, untrained="transitions"),
    },
    SMALL,
    {"num_users": 24, "events_per_user": 200},
    windows=True,
    pairs=(("vista", "tail-only"), ("vista", "sasrec"), ("vista", "transitions")),
)


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setitem(TABLES, "tiny", TINY)
    return ["tiny", "--work", str(tmp_path / "work"), "--results", str(tmp_path), "--threads", "1"]


def lines_of(tmp_path: Path) -> list[dict[str, Any]]:
    return read_results(tmp_path / "tiny.jsonl")


def test_rows_are_measured_on_both_parts_and_compared_by_user(tmp_path: Path, words: list[str]) -> None:
    """A trial is not measured on test, and not compared. A second seed is averaged per user with the first."""
    assert reproduce.main(words) == 0
    vista, tail_only, trial, baseline, paired, against_baseline = lines_of(tmp_path)
    validation = {f"validation {name}" for name in WINDOW_METRICS}
    assert vista["metrics"].keys() == {*WINDOW_METRICS, *validation}
    assert vista["errors"].keys() == {*WINDOW_METRICS, *validation}
    assert trial["metrics"].keys() == validation and trial["errors"].keys() == validation
    assert (paired["model"], paired["seed"], paired["seeds"]) == ("vista − tail-only", 1, [1])
    assert paired["command"].endswith("tiny --rows vista tail-only --seeds 1 --threads 1")
    name = "precision@10/50-events"
    assert paired["metrics"][name] == pytest.approx(vista["metrics"][name] - tail_only["metrics"][name])
    assert against_baseline["metrics"][name] == pytest.approx(vista["metrics"][name] - baseline["metrics"][name])
    assert against_baseline["seeds"] == [1] and baseline["seed"] == 0
    assert 0 < paired["errors"][name] < vista["errors"][name] + tail_only["errors"][name]
    assert vista["seconds"] > 0
    page = (tmp_path / "tiny.md").read_text()
    assert "# tiny, paired differences" in page and "| tiny | vista − tail-only | 1 |" in page
    assert reproduce.main(words) == 0 and len(lines_of(tmp_path)) == 6

    assert reproduce.main([*words, "--seeds", "2", "--rows", "vista", "tail-only"]) == 0
    first, second = lines_of(tmp_path)[6:8]
    both = lines_of(tmp_path)[8]
    assert both["seeds"] == [1, 2] and len(lines_of(tmp_path)) == 10
    mean = (vista["metrics"][name] - tail_only["metrics"][name] + first["metrics"][name] - second["metrics"][name]) / 2
    assert both["metrics"][name] == pytest.approx(mean)
    page = (tmp_path / "tiny.md").read_text()
    assert page.count("| vista − tail-only |") == 1 and "| tiny | vista − tail-only | 2 |" in page


def test_differences_by_activity_add_up_to_the_paired_difference(
    tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ["vista", "tail-only"]
    assert reproduce.main([*words, "--rows", *rows]) == 0
    paired = lines_of(tmp_path)[-1]["metrics"]
    capsys.readouterr()
    assert by_activity.main(["tiny", *rows, "--work", str(tmp_path / "work")]) == 0
    header, _, *groups = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()
    )
    assert len(groups) == by_activity.NUM_GROUPS
    column = header.index("precision@10/50-events")
    total = sum(int(group[1]) * float(group[column].split()[0]) for group in groups)
    assert total / sum(int(group[1]) for group in groups) == pytest.approx(paired[header[column]], abs=1e-4)
    assert by_activity.main(["tiny", *rows, "--seeds", "2", "--work", str(tmp_path / "work")]) == 1
    assert "measure the row 'vista' with `reproduce` first" in capsys.readouterr().err


def test_each_part_has_a_model_that_is_trained_until_its_labels(tmp_path: Path, words: list[str]) -> None:
    """A trial has none for the test."""
    assert reproduce.main([*words, "--rows", "vista", "sasrec"]) == 0
    vista, sasrec = lines_of(tmp_path)
    resolved = vista["resolved"]
    assert resolved.keys() == {"validation", "test"} and sasrec["resolved"].keys() == {"validation"}
    validation, test = (resolved[part]["data"] for part in ("validation", "test"))
    assert validation["validation_from"] < validation["test_from"]
    assert test == validation | {"validation_from": validation["test_from"]}
    planned = vista["config"]["optim"] | {"warmup_steps": 2, "next_weight": 1.0, "window_weight": 0.0}
    assert planned == resolved["test"]["optim"] == resolved["validation"]["optim"]
    runs = {path.relative_to(tmp_path).parts[-3] for path in tmp_path.rglob("run/config.yaml")}
    assert runs == {"validation", "test"} and str(tmp_path) not in json.dumps([vista, sasrec])


@pytest.mark.parametrize("name", ["returns-cj", "returns-dev", "window-cj", "window-dev"])
def test_models_for_the_test_are_trained_until_the_test(name: str) -> None:
    for row in TABLES[name].rows.values():
        configs = part_configs(TABLES[name], row)
        assert ("test" in configs) != row.trial
        for part, config in configs.items():
            assert split_until(config.data, "train") == split_until(configs["validation"].data, part)
            assert config.optim == configs["validation"].optim and config.model == configs["validation"].model


@pytest.mark.parametrize("name", ["newcomer-cj", "newcomer-dev"])
def test_a_newcomer_has_one_model_whose_epoch_validation_chooses(name: str) -> None:
    ((part, config),) = part_configs(TABLES[name], TABLES[name].rows["vista"]).items()
    assert part == "test" and config.optim.validate_every == 1
    assert split_until(config.data, "train") != split_until(config.data, "test")


@pytest.mark.parametrize("name", [name for name, table in TABLES.items() if table.windows])
def test_pairs_are_rows_that_are_measured_on_test(name: str) -> None:
    rows = TABLES[name].rows
    assert all(not rows[row].trial for pair in TABLES[name].pairs for row in pair)
    assert len(set(TABLES[name].pairs)) == len(TABLES[name].pairs)


@pytest.mark.parametrize("name", ["window-cj", "window-dev"])
def test_models_with_counters_are_compared_with_every_baseline(name: str) -> None:
    baselines = {row for row, values in TABLES[name].rows.items() if values.untrained}
    assert baselines == TABLES[f"returns-{name.removeprefix('window-')}"].rows.keys()
    for row in COUNTED:
        assert {other for first, other in TABLES[name].pairs if first == row} >= baselines


@pytest.mark.parametrize("name", ["window-cj", "window-dev"])
def test_one_setting_tells_a_row_from_the_row_without_counters(name: str) -> None:
    with_counters, without = (
        recorded_config(TABLES[name], TABLES[name].rows[row]) for row in ("vista, counters", WITHOUT)
    )
    assert [change.split()[0] for change in changed_settings(with_counters, without)] == [
        "model.counters",
        "model.counted_dropout",  # not recorded without counters
    ]


@pytest.mark.parametrize("name", TABLES)
def test_baselines_are_known(name: str) -> None:
    known = counting_baselines(has_time=True, horizon_events=50, has_features=True)
    known += [PopularityAfterwards(), *trained_baselines(horizon_events=50, at_one_time=True)]
    named = {row.untrained for row in TABLES[name].rows.values()} - {"", "oracle", *SIMULATED}
    assert named <= {baseline.name for baseline in known}
