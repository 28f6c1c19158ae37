"""Training runs with the window loss, alone and with the loss of the next item."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import small_config
from vista.config.choices import Architecture
from vista.log.event_log import EventLog
from vista.training.trainer import Trainer, train_model


def losses(run_dir: Path, name: str) -> list[float]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


@pytest.mark.parametrize(
    ("architecture", "next_weight"),
    [
        ("vista", 0.2),
        ("sasrec", 0.0),
        *(pytest.param(name, 0.2, marks=pytest.mark.research) for name in ("hstu", "fuxi_linear")),
    ],
)
def test_a_run_learns_windows(event_log: EventLog, tmp_path: Path, architecture: str, next_weight: float) -> None:
    config = small_config(
        event_log,
        tmp_path / "run",
        model__architecture=Architecture(architecture),
        model__history_limit=0 if architecture == "vista" else 30,
        optim__window_weight=1.0,
        optim__next_weight=next_weight,
        optim__epochs=6,
    )
    model = train_model(config, event_log, metrics_every=1)
    assert model.has_retrieval, "the window loss trains it too"
    window = losses(tmp_path / "run", "window")
    assert np.mean(window[-5:]) < 0.95 * np.mean(window[:5])
    assert bool(losses(tmp_path / "run", "next")) == (next_weight > 0)


def test_models_that_only_rank_have_no_anchors(impression_log: EventLog, tmp_path: Path) -> None:
    config = small_config(
        impression_log, tmp_path / "run", model__architecture=Architecture.twin, optim__window_weight=1.0
    )
    trainer = Trainer(config, impression_log)
    assert trainer.source.batch(0, 0).anchors is None
    assert not trainer.model.has_retrieval
