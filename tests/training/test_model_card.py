"""The card of an exported model: numbers of its run, and nothing that a resumed run would write differently."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import Served, small_config
from vista.config import DataConfig, TrainConfig
from vista.config.choices import Architecture, Split
from vista.log.event_log import EventLog
from vista.model.ranking_model import RankingModel
from vista.training.model_card import model_card
from vista.training.trainer import train, train_model


def table_of(card: str, heading: str) -> dict[str, str]:
    """Cells of the table below a heading, by the first one."""
    section = card.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in section.splitlines() if "|" in line]
    return {row[0]: row[1] for row in rows[2:]}


def test_a_run_exports_its_numbers(impression_log: EventLog, tmp_path: Path) -> None:
    config = small_config(impression_log, tmp_path / "run")
    times = impression_log.time_range()
    assert times is not None
    validation_from, test_from = (int(np.quantile(times, share)) for share in (0.6, 0.8))
    data = config.data
    data.split, data.validation_from, data.test_from = Split.time, str(validation_from), str(test_from)
    model = train(config, impression_log)
    card = (tmp_path / "run" / "best" / "README.md").read_text()
    counts = table_of(card, "Training data")
    assert impression_log.impressions is not None
    assert int(counts["events"].replace(",", "")) == impression_log.num_events == impression_log.lengths.sum()
    assert int(counts["users"].replace(",", "")) == impression_log.num_users
    assert int(counts["items"].replace(",", "")) == impression_log.num_items
    assert int(counts["impressions"].replace(",", "")) == len(impression_log.impressions.item)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    best = min((row for row in rows if "validation" in row), key=lambda row: row["validation"]["ne/click"])
    assert f"Epoch {best['epoch']} was the best" in card
    assert table_of(card, "Validation") == {name: f"{value:.4f}" for name, value in best["validation"].items()}
    assert f"Labels from {validation_from} on are not trained on: those before {test_from}" in card
    made = table_of(card, "Model")
    assert made["parameters"] == f"{sum(p.numel() for p in model.parameters()):,}"
    assert made["summary tokens per user (`model.num_seeds`)"] == "3"
    assert "`click`, `like`, `long_view`" in card and "Pass the time of the request" in card


def test_the_card_knows_neither_place_nor_date(event_log: EventLog, tmp_path: Path) -> None:
    cards = []
    for name in ("one", "two"):
        train(small_config(event_log, tmp_path / name, optim__epochs=1), event_log)
        cards.append((tmp_path / name / "best" / "README.md").read_bytes())
    assert cards[0] == cards[1]
    assert str(tmp_path).encode() not in cards[0]


def test_a_model_without_validation_says_so(order_log: EventLog, tmp_path: Path) -> None:
    config = small_config(order_log, tmp_path, optim__epochs=1, optim__validate_every=0)
    train(config, order_log)
    card = (tmp_path / "best" / "README.md").read_text()
    assert "The model was not validated." in card
    assert table_of(card, "Training data")["time of events"] == "no times"
    assert "Pass the time" not in card and "new action type" not in card


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"split": Split.time, "validation_from": "2024-01-01", "test_from": "1704067200000"},
            "Labels from 1704067200000 on are not trained on: all are for the test, and none for validation.",
        ),
        (
            {"split": Split.share, "validation_share": 0.0, "test_share": 0.2},
            "The last 20 % of each user's events are held out for the test, and none for validation.",
        ),
        (
            {"split": Split.share, "validation_share": 0.1, "test_share": 0.2},
            "The last 20 % of each user's events are held out for the test, and the 10 % before them for validation.",
        ),
    ],
)
def test_the_card_says_what_is_held_out(served: Served, changes: dict[str, Any], expected: str) -> None:
    config = TrainConfig(data=DataConfig(**changes))
    assert f"\n\n{expected}\n\n" in model_card(served.model, config, served.log)


def test_a_baseline_is_called_one(event_log: EventLog, tmp_path: Path) -> None:
    config = small_config(
        event_log, tmp_path, optim__epochs=1, model__architecture=Architecture.sasrec, model__history_limit=20
    )
    train_model(config, event_log)
    card = (tmp_path / "best" / "README.md").read_text()
    assert card.startswith("# Model card: sasrec\n") and "It is a baseline" in card and "num_seeds" not in card


def test_names_of_a_log_do_not_break_a_table(
    event_log: EventLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(event_log, tmp_path, optim__epochs=1)
    model: RankingModel = train(config, event_log)
    monkeypatch.setattr(event_log, "actions", ["click", "a|b\nc"])
    card = model_card(model, config, event_log)
    assert "| actions | `click`, `a\\|b c` |\n" in card
