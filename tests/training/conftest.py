"""Logs for warm starts, and the run that these start from. Tests must not change them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import small_config, small_frame
from tests.training.worlds import COLUMNS, Run, features, grow, more_events, part
from vista.config import EvaluateConfig, TrainConfig
from vista.config.checks import Codec
from vista.evaluation.evaluate import evaluate_scorer
from vista.log.event_log import EventLog
from vista.log.splits import split_until
from vista.model.vista_model import VistaModel
from vista.refresh import RefreshOptions, refresh
from vista.scorer import Scorer
from vista.training import checkpoint
from vista.training.trainer import train
from vista.training.validation import Validation


@pytest.fixture(scope="session")
def feature_log(tmp_path_factory: pytest.TempPathFactory) -> EventLog:
    """The small log with features of its items."""
    frame, path = small_frame(), tmp_path_factory.mktemp("warm") / "log"
    items = features(np.unique(frame["item"]))
    return EventLog.from_frame(frame, path, time_unit="ms", columns=COLUMNS, items=items)


@pytest.fixture(scope="session")
def grown_log(feature_log: EventLog, tmp_path_factory: pytest.TempPathFactory) -> EventLog:
    """The log, and what has happened since."""
    return grow(feature_log.path, tmp_path_factory.mktemp("grown") / "log")


@pytest.fixture(scope="session")
def reordered_log(tmp_path_factory: pytest.TempPathFactory) -> EventLog:
    """A log of the same items, a few excepted, and more: its rows, actions, and features have another order."""
    frame, path = small_frame(), tmp_path_factory.mktemp("other") / "log"
    likes = (frame["user"] >= 108) & (frame["action"] == "like") & (frame["item"] < 350)
    table = features(np.unique(frame["item"][likes])[::-1])
    mixed = {name: table[name] for name in ("item", "text", "price", "tags", "brand")} | {
        "color": ["red"] * len(table["item"])
    }
    first = EventLog.from_frame(part(frame, likes), path, time_unit="ms", columns=COLUMNS, items=mixed)
    later = more_events()
    later["action"] = np.where(np.arange(len(later["item"])) % 9 == 0, "buy", later["action"])
    later["item"] = np.where(later["item"] == 390, 0, later["item"])
    rest = features(np.setdiff1d(later["item"], first.items.ids(np.arange(first.num_items))))
    rest["color"] = ["blue"] * len(rest["item"])
    return EventLog.from_frame(later, path, time_unit="ms", columns=COLUMNS, items=rest, append=True)


@pytest.fixture(scope="session")
def earlier(feature_log: EventLog, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The earlier run, and its model."""
    config = small_config(
        feature_log,
        tmp_path_factory.mktemp("earlier") / "run",
        optim__learning_rate=2e-2,
        optim__window_weight=0.5,
        model__counter_keys=["item"],
        model__num_counters=5,
        model__pooled_dim=16,
        optim__validate_every=0,  # the last epoch, not the best, which may be epoch 0
    )
    return config, train(config, feature_log)


@contextmanager
def copies_of_run(to: Path) -> Iterator[list[tuple[int, Path]]]:
    """Copies of the run folder, as (step, folder), after each checkpoint that is saved in the block."""
    save, copies = checkpoint.save_checkpoint, list[tuple[int, Path]]()

    def save_and_copy(folder: Path, step: int, *rest: Any) -> None:
        save(folder, step, *rest)
        copies.append((step, shutil.copytree(folder.parent, to / f"killed-{len(copies)}")))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save_checkpoint", save_and_copy)
        yield copies


def assert_served_as_validated(
    config: TrainConfig, model: VistaModel, log: EventLog, store: Path, *, summarizer: VistaModel | None = None
) -> None:
    """A finished run reaches in validation what the exported model reaches from a store of the same events.

    Args:
        store: where the store is made.
        summarizer: writes the store; None for the exported model.
    """
    best, until = Path(config.run_dir) / "best", split_until(config.data, "validation")
    loaded = VistaModel.from_pretrained(best)
    assert loaded.summarizer_id() == model.summarizer_id()
    refresh(summarizer or loaded, log, store, until=until, options=RefreshOptions(codec=Codec.float32))
    with Scorer.open(best, store) as scorer:
        asked = EvaluateConfig(split="validation", top_k=[10])
        served = evaluate_scorer(scorer, log, asked).metrics
    measured = Validation(log, model.rows_of(log.items), config)(model)
    assert measured["ndcg@10"] > 0
    for name, value in measured.items():
        # Means of float32 probabilities differ by their rounding, and ranks not at all.
        rounding = 1e-5 if name.startswith(("ne/", "calibration/")) else 1e-6
        assert served[name] == pytest.approx(value, abs=rounding), name
