"""Every experiment on a public data set, from files in the form of the set to a trained model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.log.conftest import PARSER
from tests.log.ingest.public.samples import ITEMS, SAMPLES, USERS
from vista.config import PrepareConfig, TrainConfig
from vista.config.checks import Split
from vista.config.composition import compose_config, options_of
from vista.log.event_log import EventLog
from vista.log.ingest.prepare import prepare
from vista.log.splits import part_counts, part_times
from vista.training.trainer import train

SIMULATED = {"demo", "demo-log", "simulation"}
"""Experiments on logs that vista makes, or on any MovieLens set."""
TINY = (
    *("model.dim=8", "model.num_heads=2", "model.num_seeds=2", "model.num_layers=1", "model.num_target_layers=1"),
    *("model.tail_len=4", "model.decay=none", "model.decay_horizons=[]"),
    *("data.label_spacing=4", "data.tokens_per_batch=4096", "data.num_negatives=8"),
    *("optim.epochs=1", "optim.warmup_steps=1", "device=cpu", "num_threads=1"),
)
"""One small step."""
FEW = ("filter.min_item_events=5", "filter.min_user_events=5")
"""In place of the counts of a published filter, which the sample cannot reach."""


def test_every_public_experiment_has_a_sample() -> None:
    assert set(SAMPLES) == set(options_of("experiment")) - SIMULATED
    assert set(options_of("set")) <= set(SAMPLES)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "kuairand" else pytest.mark.nightly) for name in SAMPLES]
)
def test_prepare_and_train(tmp_path: Path, name: str) -> None:
    folder, out = tmp_path / "files", tmp_path / "log"
    folder.mkdir()
    SAMPLES[name](folder)
    chosen = [f"set={name}"] if name in options_of("set") else ["events.kind=auto"]
    few = FEW if name == "kuairand" else ()
    words = [*chosen, *few, f"events.paths=['{folder}']", f"out='{out}'"]
    report = prepare(compose_config(PrepareConfig, words), parser=PARSER)
    assert report.num_events >= 100 and (report.kept != "") == (name in ("kuairand", "yambda"))
    places = [f"data.path='{out}'", f"run_dir='{tmp_path / 'run'}'"]
    config = compose_config(TrainConfig, [f"experiment={name}", *places, *TINY])
    log = EventLog.open(out)
    if config.data.split is Split.time:
        for part in ("validation", "test"):
            _, first, end = part_counts(log, config.data, part)
            begin, stop = part_times(config.data, part)
            assert (end > first).any(), f"no label in {part}"
            if log.impressions is not None:
                shown = np.asarray(log.impressions.timestamp)
                assert ((shown >= (begin or 0)) & (shown < (stop or 1 << 62))).any(), f"no impression in {part}"
    model = train(config, log)
    assert model.schema.tasks == {"assist17": ["correct"], "bought-again": ["again"]}.get(name, [])
    assert len(model.items) <= 2 * len(ITEMS) and log.num_users == len(USERS)
    assert (tmp_path / "run" / "best").is_dir()
