"""Tables of the simulation's worlds have what can be reached at best from part of a history."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from scripts.experiments import reproduce
from scripts.experiments.results import read_results
from scripts.experiments.simulated_calendar import prepare_simulation
from scripts.experiments.table_run import train_config
from scripts.experiments.tables import TABLES
from scripts.experiments.tables.table import Table
from scripts.experiments.tables.table_row import ORACLE, TableRow
from scripts.experiments.tables.world_tables import WORLDS
from tests.log.log_oracle import values_of
from vista.config import SimulateConfig
from vista.config.choices import WorldName
from vista.log.event_log import EventLog
from vista.log.until import parse_time
from vista.simulation.period import split_times

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


def test_a_log_with_a_calendar(tmp_path: Path) -> None:
    config = SimulateConfig(out=str(tmp_path / "source"), num_users=6, events_per_user=300, days=400)
    prepare_simulation(config, tmp_path / "log", calendar=True)
    log = EventLog.open(tmp_path / "log")
    seen = log.impressions
    assert seen is not None
    events = log.gather(np.arange(log.num_users))
    for values, features, times in (
        (log.event_features, events.features, events.timestamp),
        (log.request_features, seen.features, seen.timestamp),
    ):
        moments = [datetime.fromtimestamp(int(time) / 1000, UTC) for time in times]
        want = [(str(moment.timetuple().tm_yday // 28), str(moment.isoweekday())) for moment in moments]
        assert [(row["season"], row["weekday"]) for row in values_of(features, values)] == want


def test_a_longer_period_is_split_at_the_same_shares() -> None:
    table = TABLES["world-seasons-4-years"]
    assert table.simulation is not None
    data = train_config(table, table.rows["vista"]).data
    assert data.validation_from is not None and data.test_from is not None
    split = [parse_time(data.validation_from), parse_time(data.test_from)]
    assert np.abs(np.subtract(split, split_times(SimulateConfig(**table.simulation)))).max() < 86_400_000
