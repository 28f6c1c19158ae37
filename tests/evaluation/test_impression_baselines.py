"""Baselines for labels of impressions: what they learn, and that they do not read what is held out."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from vista.config import DataConfig, SourceColumns
from vista.config.choices import Split
from vista.evaluation.cases import impression_cases
from vista.evaluation.impression_baselines import impression_baselines
from vista.log.event_log import EventLog

NUM_USERS, NUM_EVENTS = 60, 60
START = 1_700_000_000_000
DATA = DataConfig(split=Split.time, validation_from=str(START + 3_500_000), test_from=str(START + 4_000_000))


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> EventLog:
    """Users have events of one of two halves of 20 items each, and click on items of their half only."""
    return make_log(tmp_path_factory.mktemp("halves") / "log", seed=0)


def make_log(folder: Path, seed: int) -> EventLog:
    rng = np.random.default_rng(seed)
    user = np.repeat(np.arange(NUM_USERS), NUM_EVENTS)
    half = user % 2
    time = START + 50_000 * np.tile(np.arange(NUM_EVENTS), NUM_USERS)
    shown = rng.integers(0, 40, len(user))
    click = (shown // 20 == half) & (rng.random(len(user)) < 0.9)
    return EventLog.from_frame(
        {"user": user, "item": 20 * half + rng.integers(0, 20, len(user)), "timestamp": time},
        folder,
        time_unit="ms",
        impressions={"user": user, "item": shown, "timestamp": time + 2_000_000, "click": click.astype(int)},
        columns=SourceColumns(labels=["click"]),
    )


def test_they_learn_what_they_can_know(log: EventLog) -> None:
    cases = impression_cases(log, START + 4_000_000, None)
    found = impression_baselines(log, DATA, cases)
    assert list(found) == ["item rate", "counters", "pooled vectors"]
    aucs = {name: roc_auc_score(cases.label[:, 0], values[:, 0]) for name, values in found.items()}
    assert all(
        values.shape == cases.label.shape and (values > 0).all() and (values < 1).all() for values in found.values()
    )
    assert 0.4 < aucs["item rate"] < 0.6, "every item is clicked by one half of the users"
    assert aucs["counters"] > 0.85 and aucs["pooled vectors"] > 0.9


def test_held_out_labels_change_nothing(log: EventLog) -> None:
    cases = impression_cases(log, START + 4_000_000, None)
    other = dataclasses.replace(cases, label=1 - cases.label)
    one, two = (impression_baselines(log, DATA, each) for each in (cases, other))
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_nothing_is_fitted_without_earlier_labels(log: EventLog) -> None:
    early = dataclasses.replace(DATA, validation_from=str(START + 1000), test_from=str(START + 1000))
    cases = impression_cases(log, START + 1000, None)
    assert impression_baselines(log, early, cases) == {}
