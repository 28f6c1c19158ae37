"""Tables of the simulation's worlds have what can be reached at best from part of a history."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.experiments import reproduce
from scripts.experiments.results import read_results
from scripts.experiments.tables import TABLES
from scripts.experiments.tables.table import Table
from scripts.experiments.tables.table_row import ORACLE, TableRow
from scripts.experiments.tables.world_tables import WORLDS
from vista.config.choices import WorldName

pytestmark = pytest.mark.research


def test_reference_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {name: TableRow(1, untrained=name) for name in ("last 32", "pooled")} | ORACLE
    size = {"world": "returns", "num_users": 60, "events_per_user": 1500}
    monkeypatch.setitem(TABLES, "tiny", Table("simulation", "tiny", rows, (), size))
    assert reproduce.main(["tiny", "--work", str(tmp_path / "work"), "--results", str(tmp_path), "--threads", "1"]) == 0
    lines = {line["model"]: line for line in read_results(tmp_path / "tiny.jsonl")}
    auc = {name: line["metrics"]["auc/click"] for name, line in lines.items()}
    assert list(auc) == list(rows) and auc["oracle"] > max(auc["last 32"], auc["pooled"]) + 0.02
    assert lines["pooled"]["config"]["simulation"] == size


def test_every_world_but_share_has_a_table() -> None:
    assert {*WORLDS} == {world.value for world in WorldName} - {"share"}
