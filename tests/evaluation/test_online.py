"""Policies that play against a simulated world, through the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import small_config
from vista.cli.main import main
from vista.config import PrepareConfig, SimulateConfig, SimulateOnlineConfig, SourceConfig
from vista.config.checks import OnlinePolicy, Split, WorldName
from vista.errors import ConfigError, DataError
from vista.evaluation.online import OnlineReport, simulate_online
from vista.log.event_log import EventLog
from vista.log.ingest.prepare import prepare
from vista.simulation.simulate import generate, simulate
from vista.simulation.streams import period_of, split_times
from vista.training.trainer import train


def simulated(folder: Path, world: WorldName = WorldName.share, **changes: float) -> SimulateConfig:
    config = SimulateConfig(
        out=str(folder / "source"),
        world=world,
        num_users=60,
        events_per_user=300,
        num_items=120,
        num_topics=12,
        episode_events=40,
        impressions_per_user=20,
        **changes,  # type: ignore[arg-type]
    )
    simulate(config)
    return config


def played(folder: Path, policy: list[OnlinePolicy], **changes: object) -> OnlineReport:
    asked = {"source": str(folder / "source"), "out": str(folder / "online.jsonl"), "rounds": 3, "list_size": 5}
    return simulate_online(SimulateOnlineConfig(policy=policy, **(asked | changes)))  # type: ignore[arg-type]


UNTRAINED = [OnlinePolicy.popular, OnlinePolicy.random, OnlinePolicy.oracle]


@pytest.mark.parametrize("world", [WorldName.share, WorldName.positions, WorldName.drift])
def test_the_oracle_has_no_regret_and_no_policy_is_ahead_of_it(tmp_path: Path, world: WorldName) -> None:
    simulated(tmp_path, world)
    report = played(tmp_path, UNTRAINED, rounds=4)
    by_policy = {name.value: [one for one in report.rounds if one.policy == name.value] for name in UNTRAINED}
    clicks = {name: np.mean([one.clicks for one in rounds]) for name, rounds in by_policy.items()}
    assert {one.regret for one in by_policy["oracle"]} == {0.0}
    for name in ("popular", "random"):
        assert all(one.regret > 5 * one.regret_error for one in by_policy[name])
        # 60 lists per round, with up to 5 clicks: their standard error is below 0.15.
        assert clicks[name] < clicks["oracle"] - 0.3
    assert all(one.coverage < 0.1 for one in by_policy["popular"])
    assert all(one.coverage > 0.8 and one.diversity > 0.8 for one in by_policy["random"])
    lines = [json.loads(line) for line in (tmp_path / "online.jsonl").read_text().splitlines()]
    assert [line["regret"] for line in lines] == [one.regret for one in report.rounds]
    assert "clicks/list" in str(report)


def trained(folder: Path, config: SimulateConfig) -> str:
    """A model of the simulation's log."""
    source = SourceConfig(kind="simulated", paths=[config.out])
    prepare(PrepareConfig(out=str(folder / "log"), events=source))
    log = EventLog.open(folder / "log")
    validation_from, test_from = (str(time) for time in split_times(config))
    times = {"data__split": Split.time, "data__validation_from": validation_from, "data__test_from": test_from}
    train(small_config(log, folder / "run", data__tokens_per_batch=2000, optim__epochs=1, **times), log)
    return str(folder / "run" / "best")


def test_a_served_model_plays_with_fresh_summaries(tmp_path: Path) -> None:
    model = trained(tmp_path, simulated(tmp_path, new_items=0.1))
    report = played(tmp_path, [OnlinePolicy.random, OnlinePolicy.model], model=model, new_users=0.2)
    rounds = [one for one in report.rounds if one.policy == "model"]
    assert [one.round for one in rounds] == [0, 1, 2] and rounds[0].num_users < rounds[-1].num_users
    again = played(tmp_path, [OnlinePolicy.model], model=model, new_users=0.2)
    assert list(again.rounds) == rounds and "could not show" not in str(again)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "online.jsonl", "run", "source"]


def test_items_that_the_model_does_not_know_are_not_shown_but_counted(tmp_path: Path) -> None:
    model = trained(tmp_path / "old", simulated(tmp_path / "old"))  # of items 1 to 120
    later = SimulateConfig(
        out=str(tmp_path / "source"), num_users=20, events_per_user=100, num_items=150, num_topics=12, new_items=0.5
    )
    simulate(later)
    report = played(tmp_path, [OnlinePolicy.model, OnlinePolicy.random], model=model, list_size=40)
    catalog = generate(later).catalog
    for one in report.rounds:
        exist = np.flatnonzero(catalog.birth <= period_of(later, np.array([one.time]))[0])
        unknown = (exist >= 120).sum()
        assert one.num_unknown == (unknown if one.policy == "model" else 0) and 0 < unknown < 30
        assert one.policy == "random" or one.coverage <= 1 - unknown / len(exist)
    most = max(one.num_unknown for one in report.rounds)
    assert f"the model could not show up to {most} items" in str(report)
    simulate(replace(later, num_items=1500))
    with pytest.raises(ConfigError, match=r"list_size: must be at most \d+, the items of the source that the model"):
        played(tmp_path, [OnlinePolicy.model], model=model, list_size=121)


def test_lists_change_what_users_click_later(tmp_path: Path) -> None:
    """With satiation, the oracle has to change topics after the first round, and even so gets fewer clicks."""
    simulated(tmp_path)
    plain, tired = (
        played(tmp_path, [OnlinePolicy.oracle], satiation=satiation, follow_events=0).rounds for satiation in (0.0, 3.0)
    )
    assert plain[0] == tired[0]
    for before, after in zip(plain[1:], tired[1:], strict=True):
        assert after.clicks < before.clicks and after.diversity > 2 * before.diversity and after.regret == 0


def test_the_command_and_its_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    simulated(tmp_path)
    words = ["simulate", "online", f"source={tmp_path}/source", f"out={tmp_path}/o.jsonl", "rounds=1", "list_size=3"]
    assert main([*words, "policy=[oracle]"]) == 0
    assert "0.000" in capsys.readouterr().out and len((tmp_path / "o.jsonl").read_text().splitlines()) == 1
    with pytest.raises(DataError, match=r"nothing/simulation\.json: is not a simulation .*vista simulate out="):
        played(tmp_path, UNTRAINED, source=str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match=r"list_size: must be at most 120, the items of"):
        played(tmp_path, UNTRAINED, list_size=121)
    with pytest.raises(ConfigError, match=r"policy: name one or more policies, each once"):
        played(tmp_path, [OnlinePolicy.oracle] * 2)
