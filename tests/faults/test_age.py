"""Records that are older than an age limit, or dated in the future, are misses for scorers with the limit."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from tests.faults.harness import Trial, promise
from tests.faults.nursery import Nursery, Say
from vista.log.event_log import EventLog
from vista.model.vista_model import VistaModel
from vista.refresh import refresh
from vista.scorer import Scorer
from vista.store.stored_batch import CLOCK_SKEW_MS

MAX_AGE_S = 3600


def served(say: Say, log: str, model_dir: str, store: str, shift_ms: int) -> list[bool]:
    """Refresh with a shifted clock, then score with an age limit; returns which of three users got scores."""
    model = VistaModel.from_pretrained(model_dir)
    refresh(model, EventLog.open(log), store, created_at=time.time_ns() // 1_000_000 + shift_ms)
    with Scorer.open(model, store, on_missing="nan") as scorer:
        assert np.isfinite(scorer.score([100, 101, 102], [0])).all()
    with Scorer.open(model, store, on_missing="nan", max_age_s=MAX_AGE_S) as scorer:
        return [bool(scored) for scored in np.isfinite(scorer.score([100, 101, 102], [0]))[:, 0]]


@promise(
    "TTL",
    fault="a record that is about a second older, or younger, than the limit, or from the future",
    full=200,
    short=4,
)
def test_age(trial: Trial, nursery: Nursery, event_log: EventLog, model_dir: Path) -> None:
    edge, what = trial.random.choice([(-1000 * MAX_AGE_S, "old"), (CLOCK_SKEW_MS, "from the future")])
    # Records age during the refresh and the scoring, which can take most of a minute.
    inside = trial.random.random() < 0.5
    margin_ms = trial.random.randint(60_000, 70_000) if inside else trial.random.randint(1, 1_000)
    if what == "old":
        shift = edge + margin_ms if inside else edge - margin_ms
    else:
        shift = edge - 1 if inside else edge + trial.random.randint(60_000, 10**12)
    scored = nursery.call(served, event_log.path, model_dir, trial.folder / "store", shift)
    assert scored == [inside] * 3, (what, shift, scored)
    trial.count(f"{what}: {'served' if inside else 'not served'}")
