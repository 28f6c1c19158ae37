"""DIN, SIM and TWIN from a log to metrics, with the shared trainer and evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import model_config
from vista.config import DataConfig, EvaluateConfig, OptimConfig, SourceColumns, TrainConfig
from vista.config.checks import Precision, Split
from vista.evaluation.evaluate import evaluate_model
from vista.examples.batch_source import BatchSource, ModelReads
from vista.log.event_log import EventLog
from vista.model.baselines.candidate_models import CandidateModel
from vista.training.trainer import train_model

NUM_USERS, NUM_EVENTS, NUM_SHOWN, GROUPS, PER_GROUP = 150, 40, 60, 8, 4


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> EventLog:
    """Users like two groups of items, and say so in the older half of their events; then come items of no group.

    Of what they are shown afterwards they click nine in ten of these groups, and one in ten of the others.
    """
    rng = np.random.default_rng(0)
    likes = rng.permuted(np.tile(np.arange(GROUPS), (NUM_USERS, 1)), axis=1)[:, :2]
    half = NUM_EVENTS // 2
    old = likes[np.arange(NUM_USERS)[:, None], rng.integers(0, 2, (NUM_USERS, half))] * PER_GROUP
    old += rng.integers(0, PER_GROUP, old.shape)
    new = GROUPS * PER_GROUP + rng.integers(0, 20, (NUM_USERS, half))
    shown = rng.integers(0, GROUPS * PER_GROUP, (NUM_USERS, NUM_SHOWN))
    liked = (shown[..., None] // PER_GROUP == likes[:, None]).any(-1)
    clicked = rng.random(liked.shape) < np.where(liked, 0.9, 0.1)

    def columns(item: np.ndarray, first: int) -> dict[str, Any]:
        user = np.repeat(np.arange(NUM_USERS), item.shape[1])
        return {"user": user, "item": item.ravel(), "timestamp": np.tile(first + np.arange(item.shape[1]), NUM_USERS)}

    return EventLog.from_frame(
        columns(np.concatenate([old, new], 1), 10_000_000),
        tmp_path_factory.mktemp("groups") / "log",
        time_unit="s",
        impressions={**columns(shown, 10_000_000 + NUM_EVENTS), "click": clicked.ravel().astype(int)},
        columns=SourceColumns(labels=["click"]),
    )


def config_of(log: EventLog, run_dir: Path, name: str, **model: Any) -> TrainConfig:
    first = (10_000_000 + NUM_EVENTS) * 1000
    return TrainConfig(
        model=model_config(name, dim=16, num_heads=2, tail_len=8, dropout=0.1, **model),
        data=DataConfig(
            path=str(log.path),
            split=Split.time,
            validation_from=str(first + 40_000),
            test_from=str(first + 45_000),
            tokens_per_batch=512,
            label_spacing=8,
            num_negatives=8,
        ),
        optim=OptimConfig(epochs=10, warmup_steps=10, learning_rate=1e-2, validate_every=5),
        run_dir=str(run_dir),
        device="cpu",
        precision=Precision.float32,
        num_threads=1,
    )


@pytest.mark.research
@pytest.mark.parametrize(
    ("name", "limit", "learns"),
    [("din", NUM_EVENTS, True), ("din", NUM_EVENTS // 2, False), ("sim", 0, True), ("twin", 0, True)],
)
def test_a_baseline_learns_from_the_events_that_it_reads(
    log: EventLog, tmp_path: Path, name: str, limit: int, learns: bool
) -> None:
    model = train_model(config_of(log, tmp_path / "run", name, history_limit=limit), log)
    assert isinstance(model, CandidateModel)
    evaluation = evaluate_model(model, log, EvaluateConfig())
    assert evaluation.num_cases == NUM_USERS * 15 and not any(
        key.startswith(("hr@", "ndcg@")) for key in evaluation.metrics
    )
    if learns:
        assert evaluation.metrics["auc/click"] > 0.7
    else:
        assert evaluation.metrics["auc/click"] < 0.62


@pytest.mark.parametrize(("name", "longest"), [("sasrec", 11), ("din", NUM_EVENTS)])
def test_chunks_may_be_longer_than_history_limit(log: EventLog, tmp_path: Path, name: str, longest: int) -> None:
    config = config_of(log, tmp_path, name, history_limit=10)
    source = BatchSource(log, ModelReads(np.arange(log.num_items) + 1), config)
    lengths = [int(source.batch(0, index).events.offsets.diff().max()) for index in range(source.num_batches(0))]
    assert max(lengths) == longest
