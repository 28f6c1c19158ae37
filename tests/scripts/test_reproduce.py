"""Small tables are run, resumed, listed and stopped."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scripts.experiments import plots, reproduce
from scripts.experiments.results import changed_settings, markdown_table, read_results
from scripts.experiments.table_run import PLAN, recorded_config, train_config
from scripts.experiments.tables import TABLES
from scripts.experiments.tables.table import BOTH, COUNTING_BASELINES, K0, ORACLE, Table, TableLine, TableRow
from tests.conftest import ratings_folder
from vista.config.checks import Codec
from vista.log.splits import parse_time
from vista.model.features import Schema
from vista.model.summarizer import Stage1Config

pytestmark = pytest.mark.research
SMALL = ("optim.epochs=1", "optim.warmup_steps=2", "model.dim=16")
SIMULATION = Table(
    "simulation",
    "tiny",
    {
        "vista": TableRow(1, codecs=BOTH, tails=(4,), apart=(4,)),
        "tail-only": TableRow(1, K0),
        "last-40": TableRow(1, (*K0, "model.tail_len=40")),
        "sasrec": TableRow(1, ("model.kind=sasrec",)),
        "din": TableRow(1, ("model.kind=din",)),
        "sim-hard": TableRow(1, ("model.kind=sim", "model.search_category=topic")),
        **COUNTING_BASELINES,
        "pooled vectors": TableRow(1, untrained="pooled vectors"),
        **ORACLE,
    },
    SMALL,
    {"num_users": 24, "events_per_user": 200},
    costs=True,
)
MOVIELENS = Table("ml-100k", "ml-1m", {"vista": TableRow(3, SMALL), **COUNTING_BASELINES})


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of the command for a table "tiny" over ratings."""
    monkeypatch.setitem(TABLES, "tiny", MOVIELENS)
    monkeypatch.delenv("VISTA_DATA_DIR", raising=False)
    data = ratings_folder(tmp_path / "sets" / "ml-1m")
    folders = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
    return ["tiny", "--data", str(data), *folders, "--threads", "1"]


def lines_of(tmp_path: Path) -> dict[str, dict[str, Any]]:
    return {f"{line['model']} {line['seed']}": line for line in read_results(tmp_path / "results" / "tiny.jsonl")}


def test_a_simulated_table(
    tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All kinds of rows are run; existing lines are not run again."""
    monkeypatch.setitem(TABLES, "tiny", SIMULATION)
    assert reproduce.main(words) == 0
    assert "10 of 10: oracle" in capsys.readouterr().err
    lines = lines_of(tmp_path)
    trained = [
        "vista 1",
        "vista, float32 store 1",
        "vista, tail 4 1",
        "vista, summary 4 events old, tail 4 1",
        "tail-only 1",
        "last-40 1",
        "sasrec 1",
        "din 1",
        "sim-hard 1",
    ]
    assert list(lines) == [*trained, "popularity 0", "transitions 0", "pooled vectors 0", "oracle 0"]
    assert lines["last-40 1"]["config"]["model"]["tail_len"] == 40
    assert all(0 < lines[name]["metrics"]["auc/click"] < 1 for name in trained)
    answered = [*trained, "pooled vectors 0"]
    assert lines["oracle 0"]["metrics"]["ne/click"] < min(lines[name]["metrics"]["ne/click"] for name in answered)
    assert lines["pooled vectors 0"]["metrics"].keys() == {
        f"{name}/click" for name in ("auc", "gauc", "ne", "calibration")
    }
    assert lines["pooled vectors 0"]["config"]["baseline"] == {"name": "pooled vectors"}
    assert SIMULATION.rows["vista"].served("vista")["vista, summary 4 events old, tail 4"] == TableLine(
        tail_len=4, staleness=4
    )
    quality = [
        lines[f"vista{how} 1"]["metrics"]["ne/click"] for how in ("", ", tail 4", ", summary 4 events old, tail 4")
    ]
    assert len(set(quality)) == 3
    assert lines["popularity 0"]["metrics"].keys() == {f"{name}@{k}" for name in ("hr", "ndcg") for k in (10, 50, 200)}
    assert (
        lines["vista 1"]["command"] == "python -m scripts.experiments.reproduce tiny --rows vista --seeds 1 --threads 1"
    )
    assert lines["oracle 0"]["command"] == "python -m scripts.experiments.reproduce tiny --rows oracle --threads 1"
    assert lines["vista 1"]["config"]["simulation"] == SIMULATION.simulation
    assert "ndcg@10" in lines["sasrec 1"]["metrics"] and "ndcg@10" not in lines["din 1"]["metrics"]
    costs = {name: lines[name]["metrics"] for name in ("vista 1", "sasrec 1", "din 1")}
    assert all(metrics["request ms"] > 0 for metrics in costs.values())
    assert costs["vista 1"]["refresh ms/user"] > 0 and "refresh ms/user" not in costs["din 1"]
    assert str(tmp_path) not in json.dumps(lines)
    plots.plot_lengths(tmp_path / "results", {"tiny": 200, "length-1k": 1_000}).savefig(tmp_path / "lengths.png")
    assert (tmp_path / "lengths.png").stat().st_size > 10_000
    qualities = plots.qualities_of(read_results(tmp_path / "results" / "tiny.jsonl"))
    assert {"oracle", "vista", "din", "pooled vectors"} <= qualities.keys() and qualities["din"] == costs["din 1"][
        "auc/click"
    ]
    table = tmp_path / "results" / "tiny.jsonl"
    assert table.with_suffix(".md").read_text() == markdown_table(read_results(table))
    before = table.read_bytes()
    table.with_suffix(".md").unlink()
    capsys.readouterr()
    assert reproduce.main(words) == 0 and table.read_bytes() == before
    assert capsys.readouterr().out == "tiny: all runs are done\n" and table.with_suffix(".md").exists()


def test_a_downstream_row_is_trained_over_its_base(
    tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The base is trained first if it is missing; a change of the base is a change of the row."""
    second = TableRow(1, ("optim.tasks=[like]", "optim.next_weight=0"), base="base", until="2025-01-01")
    table = replace(SIMULATION, rows={"base": TableRow(1, ("optim.tasks=[click]",)), "downstream": second})
    monkeypatch.setitem(TABLES, "tiny", table)
    assert reproduce.main([*words, "--rows", "downstream"]) == 0
    line = lines_of(tmp_path)["downstream 1"]
    assert 0 < line["metrics"]["auc/like"] < 1 and "auc/click" not in line["metrics"]
    assert line["config"]["base"]["row"] == "base" and line["config"]["base"]["optim.tasks"] == ["click"]
    assert reproduce.main([*words, "--rows", "base"]) == 0
    logs = [path.read_text() for path in (tmp_path / "work").rglob("train.log")]
    assert len(logs) == 2 and sum("resuming at step" in text for text in logs) == 1, "the base was trained once"
    capsys.readouterr()
    monkeypatch.setitem(TABLES, "tiny", replace(table, rows={**table.rows, "base": TableRow(1, ("optim.tasks=[]",))}))
    assert reproduce.main([*words, "--list"]) == 0
    printed = capsys.readouterr().out
    assert "0 of 2 runs done" in printed and "was run with another base.optim.tasks (['click'] -> [])" in printed


def test_bad_options_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce.main([*words, "--rows", "vista", "sasrek"]) == 1
    assert "--rows sasrek: tiny has no such row; choose from vista, popularity" in capsys.readouterr().err
    words[2] += "-absent"
    assert reproduce.main(words) == 1
    assert "ml-1m-absent does not exist; give the folder of ml-1m, or set VISTA_DATA_DIR" in capsys.readouterr().err
    assert reproduce.main([words[0], *words[3:]]) == 1
    assert "--data: missing; give the folder of ml-1m" in capsys.readouterr().err


@pytest.mark.parametrize("name", TABLES)
def test_every_row_can_be_composed(name: str) -> None:
    table = TABLES[name]
    configs = {}
    for row, values in table.rows.items():
        config = train_config(table, values)
        configs[row] = recorded_config(table, values)
        if values.base:
            base = train_config(table, table.rows[values.base]).model
            schema = Schema([], True, None, [])
            assert Stage1Config.of(base, schema) == Stage1Config.of(config.model, schema)
            assert base.tail_features == config.model.tail_features
            assert parse_time(values.until) < parse_time(str(config.data.validation_from))
        assert all(length < config.model.tail_len for length in values.tails)
        assert not values.tails or Codec.int8 in values.codecs, "shorter tails are served from the int8 store"
    trained = [json.dumps(config) for row, config in configs.items() if not table.rows[row].untrained]
    assert len(set(trained)) == len(trained), "two rows of the same configuration"


def test_any_setting_that_differs_is_a_change() -> None:
    now = recorded_config(SIMULATION, SIMULATION.rows["vista"])
    assert now["data"]["exclude_seen"] is False
    before = {**now, "data": now["data"] | {"exclude_seen": True}}
    assert changed_settings(before, now) == ["data.exclude_seen (True -> False)"]
    # A setting that a table or row no longer has is a change too.
    wider = {**now, "simulation": now["simulation"] | {"max_interests": 9}}
    assert changed_settings(wider, now) == ["simulation.max_interests (9 -> None)"]
    assert changed_settings({**now, "base": {"row": "vista"}}, now) == ["base.row (vista -> None)"]
    assert "simulation.num_users" in changed_settings(now, {k: v for k, v in now.items() if k != "simulation"})[0]
    assert changed_settings({**now, "seed": 1}, {**now, "seed": 2}) == []
    # Keys for what no table has would outdate the lines that were measured before these keys existed.
    assert "gap_minutes" not in now["data"]
    assert [key for key in now["model"] if key.endswith("_features")] == []
    assert "target_attention" not in recorded_config(SIMULATION, SIMULATION.rows["sasrec"])["model"]
    for name in ("din", "sim-hard", "oracle"):
        assert "exclude_seen" not in recorded_config(SIMULATION, SIMULATION.rows[name])["data"]
    assert recorded_config(SIMULATION, SIMULATION.rows["popularity"])["data"]["exclude_seen"] is False


def test_a_row_with_planned_settings_depends_on_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that sets everything does not."""
    table, newcomer = TABLES["newcomer-ml-1m-half"], TABLES["newcomer-ml-1m-half"].rows["vista"]
    before, explicit = recorded_config(table, newcomer), recorded_config(SIMULATION, SIMULATION.rows["vista"])
    monkeypatch.setitem(PLAN, "steps", 3001)
    assert changed_settings(before, recorded_config(table, newcomer)) == ["plan.steps (10000 -> 3001)"]
    assert recorded_config(SIMULATION, SIMULATION.rows["vista"]) == explicit
    assert json.loads(json.dumps(before)) == before


def test_a_fitted_baseline_depends_on_its_settings() -> None:
    """Lines without them were measured before baselines were fitted to each window. One that only counts has none."""
    rows = TABLES["returns-cj"].rows
    now = recorded_config(TABLES["returns-cj"], rows["EASE"])
    before = {key: value for key, value in now.items() if key != "baseline"}
    assert "baseline.ridges (None -> [1000.0, 200.0, 5000.0])" in changed_settings(before, now)
    assert now["baseline"]["fitted_to"] == [50, 200] and json.loads(json.dumps(now)) == now
    recorded = {name for name in rows if "baseline" in recorded_config(TABLES["returns-cj"], rows[name])}
    counted = {name for name in rows if name.startswith("own frequency")} | {"popularity", "transitions"}
    assert recorded == rows.keys() - counted - {"item neighbors"}
