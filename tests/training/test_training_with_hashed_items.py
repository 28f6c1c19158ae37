"""Item IDs in one hashed table, with features of items: those without training events are their features alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.training.test_training_with_features import feature_config, feature_frame
from tests.training.warm_logs import COLUMNS, NEW_ITEMS, Run, begun, grow, kept_ids, warm_config
from vista.config import EvaluateConfig
from vista.config.choices import Architecture, Codec
from vista.evaluation.evaluate import evaluate_scorer
from vista.log.event_log import EventLog
from vista.log.item_features import ItemFeatures
from vista.log.splits import split_until
from vista.model.added_items import with_items
from vista.model.vista_model import VistaModel
from vista.refresh import RefreshOptions, refresh
from vista.scorer import Scorer
from vista.training.trainer import train, train_model
from vista.training.validation import Validation

HASHED = {"model__embedding_rows": 24, "model__embedding_hashes": 2}
SILENT = 777
"""An item that has features, but no events."""


@pytest.fixture(scope="module")
def log(feature_log: EventLog, tmp_path_factory: pytest.TempPathFactory) -> EventLog:
    """The log of other warm starts, with an item whose only event is held out."""
    events = feature_log.gather(np.arange(feature_log.num_users))
    user = np.repeat(np.arange(feature_log.num_users), events.lengths)
    longest = int(events.lengths.argmax())
    item = feature_log.items.ids(events.item)
    item[events.offsets[longest + 1] - 1] = SILENT
    frame = {
        "user": feature_log.users.ids(user),
        "item": item,
        "timestamp": np.asarray(events.timestamp),
        "action": np.array(feature_log.actions)[events.action],
        "rating": np.asarray(events.rating),
        "dwell": np.linspace(0, 1, len(item)),
    }
    return EventLog.from_frame(
        frame,
        tmp_path_factory.mktemp("hashed-items") / "log",
        time_unit="ms",
        columns=COLUMNS,
        items=feature_frame(np.unique(item)),
        numbers=["dwell"],
    )


@pytest.fixture(scope="module")
def run(log: EventLog, tmp_path_factory: pytest.TempPathFactory) -> Run:
    config = feature_config(log, tmp_path_factory.mktemp("run"), **HASHED)
    model = train(config, log)
    assert isinstance(model, VistaModel)
    return config, model


@pytest.mark.parametrize("architecture", [Architecture.vista, Architecture.sasrec])
def test_items_without_training_events_are_their_features(
    log: EventLog, tmp_path: Path, architecture: Architecture
) -> None:
    limit = 0 if architecture is Architecture.vista else 8
    changes = {"model__architecture": architecture, "model__history_limit": limit, "optim__epochs": 1}
    model = train_model(feature_config(log, tmp_path / "run", **HASHED, **changes), log)
    rows = torch.arange(1 + len(model.items))
    silent = int(model.item_rows([SILENT])[0])
    assert model.id_mask is not None and torch.nonzero(model.id_mask == 0).flatten().tolist() == [silent]
    with torch.no_grad():
        ids, vectors = model.id_vectors(rows), model.item_vectors(rows)
        assert not ids[[0, silent]].any() and ids[1:].any(1).sum() == len(model.items) - 1
        assert model.features is not None and vectors[silent].any()
        torch.testing.assert_close(vectors, ids + model.features(rows))
    assert model.encoder.features is not None and model.encoder.features.values.any(), "features of events train too"


def test_a_scorer_serves_what_was_validated(log: EventLog, run: Run, tmp_path: Path) -> None:
    config, model = run
    loaded = VistaModel.from_pretrained(Path(config.run_dir) / "best")
    assert loaded.id_mask is not None and model.id_mask is not None and torch.equal(loaded.id_mask, model.id_mask)
    assert loaded.summarizer_id() == model.summarizer_id()
    until = split_until(config.data, "validation")
    refresh(loaded, log, tmp_path / "store", until=until, options=RefreshOptions(codec=Codec.float32))
    asked = EvaluateConfig(split="validation", top_k=[10], progress=False)
    with Scorer.open(loaded, tmp_path / "store") as scorer:
        served = evaluate_scorer(scorer, log, asked).metrics
    found = Validation(log, model.rows_of(log.items), config)(loaded)
    assert found["ndcg@10"] == pytest.approx(served["ndcg@10"], abs=1e-6)
    loaded.id_mask.fill_(1.0)
    assert loaded.summarizer_id() != model.summarizer_id()


def test_added_items_are_their_features(log: EventLog, run: Run) -> None:
    _, model = run
    features = log.item_features
    assert features is not None
    grown = with_items(model, [1001, 1002], ItemFeatures(dict(features.select(np.array([3, 7])).columns)))
    old, new = torch.arange(1 + len(model.items)), torch.from_numpy(grown.item_rows([1001, 1002]))
    with torch.no_grad():
        assert torch.equal(grown.item_vectors(old), model.item_vectors(old))
        assert not grown.id_vectors(new).any() and grown.item_vectors(new).any(1).all()
    assert grown.item_table.shape == model.item_table.shape and grown.summarizer_id() == model.summarizer_id()


def test_a_warm_start_gives_items_with_events_an_id(log: EventLog, run: Run, tmp_path: Path) -> None:
    config, base = run
    grown = grow(log.path, tmp_path / "log")
    _, made = begun(warm_config(config, grown, tmp_path / "run"), grown)
    model, ids = made.model, kept_ids(base)
    assert base.id_mask is not None and model.id_mask is not None
    with torch.no_grad():
        known = ids != SILENT
        rows, old = (torch.from_numpy(one.item_rows(ids[known])) for one in (model, base))
        assert torch.equal(model.id_vectors(rows), base.id_vectors(old))
        assert (model.id_mask[torch.from_numpy(model.item_rows([SILENT, *NEW_ITEMS]))] == 1).all(), (
            "until events are counted"
        )
    trained = train(made.config, grown)
    assert trained.id_mask is not None
    counts = made.source.frequency[: 1 + len(trained.items)]
    new = trained.item_rows([SILENT, *NEW_ITEMS])
    assert trained.id_mask[torch.from_numpy(new)].tolist() == [float(counts[row] > 0) for row in new]
    assert {0.0, 1.0} == set(trained.id_mask[torch.from_numpy(new)].tolist())
