"""Warm starts with a frozen summarizer: stores stay valid, and new items train."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import small_config
from tests.training.test_training_with_event_features import event_frame, log_of
from tests.training.warm_logs import FROZEN, NEW_ITEMS, Run, begun, more_events, warm_config
from vista.config import EvaluateConfig
from vista.config.choices import Codec, InitFreeze
from vista.evaluation.evaluate import evaluate_scorer
from vista.log.event_log import EventLog
from vista.log.splits import split_until
from vista.model.vista_model import STAGE1_WEIGHTS, VistaModel
from vista.refresh import RefreshOptions, refresh
from vista.scorer import Scorer
from vista.store import StoreReader
from vista.training.trainer import train
from vista.training.validation import Validation


@pytest.fixture(scope="module")
def later(grown_log: EventLog, earlier: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on the grown log with a frozen summarizer, and its model."""
    config = warm_config(earlier[0], grown_log, tmp_path_factory.mktemp("frozen") / "run", **FROZEN)
    return config, train(config, grown_log)


def digest_of(model: VistaModel, log: EventLog, store: Path) -> tuple[bytes, str]:
    """What a full refresh writes: the summarizer's id, and the digest of all records."""
    refresh(model, log, store, options=RefreshOptions(codec=Codec.float32), created_at=0)
    with StoreReader.open(store, summarizer_id=model.summarizer_id()) as reader:
        return model.summarizer_id(), reader.manifest.records_digest


def test_only_stage_2_and_new_items_train(earlier: Run, later: Run, grown_log: EventLog) -> None:
    base, model = earlier[1], later[1]
    assert model.summarizer_id() == base.summarizer_id()
    before, after = base.state_dict(), model.state_dict()
    count = 1 + base.num_trained_items
    assert torch.equal(after["item_table"][:count], before["item_table"])
    _, made = begun(replace(later[0], run_dir=f"{later[0].run_dir}-again"), grown_log)
    start = made.model.state_dict()
    assert (after["item_table"][count:] != start["item_table"][count:]).any(1).all()
    for name in before.keys() - {"item_table", "item_popularity"}:
        is_kept = name.startswith((*STAGE1_WEIGHTS, "decoder."))
        assert torch.equal(after[name], before[name]) == is_kept, name


def test_stores_stay_valid_and_exact(
    earlier: Run,
    later: Run,
    grown_log: EventLog,
    tmp_path: Path,
) -> None:
    """On a log with events of the new items, both models write the same records, bit for bit."""
    assert digest_of(later[1], grown_log, tmp_path / "new") == digest_of(earlier[1], grown_log, tmp_path / "old")
    folders = [Path(config.run_dir) / "best" for config in (earlier[0], later[0])]
    users = grown_log.users.ids(np.arange(grown_log.num_users)).tolist()
    scores = []
    for store in ("old", "new"):
        with Scorer.open(folders[1], tmp_path / store) as scorer:
            scores.append(scorer.score(users, NEW_ITEMS))
    np.testing.assert_array_equal(scores[0], scores[1])
    assert len(np.unique(scores[0])) == scores[0].size, "new items have scores of their own"


def test_stores_stay_exact_with_features_of_events(tmp_path: Path) -> None:
    """Values that only the grown log has are missing to both models."""
    log = log_of(event_frame(), tmp_path / "log")
    config = small_config(log, tmp_path / "first", optim__epochs=1, optim__learning_rate=2e-2)
    base = train(config, log)
    later = event_frame(seed=1) | more_events()
    later["surface"] = ["car" if place % 3 == 0 else name for place, name in enumerate(later["surface"])]
    grown = log_of(later, tmp_path / "log", append=True)
    model = train(warm_config(config, grown, tmp_path / "second", **FROZEN), grown)
    assert len(model.items) > len(base.items) and "car" in grown.event_features["surface"].ids(range(4)).tolist()  # type: ignore[union-attr]
    assert digest_of(model, grown, tmp_path / "new") == digest_of(base, grown, tmp_path / "old")


def test_validation_is_what_the_scorer_reaches(
    earlier: Run,
    later: Run,
    grown_log: EventLog,
    tmp_path: Path,
) -> None:
    config, model = later
    until = split_until(config.data, "validation")
    refresh(earlier[1], grown_log, tmp_path / "store", until=until, options=RefreshOptions(codec=Codec.float32))
    asked = EvaluateConfig(split="validation", top_k=[10], progress=False)
    with Scorer.open(Path(config.run_dir) / "best", tmp_path / "store") as scorer:
        served = evaluate_scorer(scorer, grown_log, asked).metrics
    measured = Validation(grown_log, model.rows_of(grown_log.items), config)(model)
    assert measured["ndcg@10"] == pytest.approx(served["ndcg@10"], abs=1e-6)


def test_histories_show_new_items_as_unknown_and_labels_do_not(
    earlier: Run, grown_log: EventLog, tmp_path: Path
) -> None:
    config, base = earlier
    _, made = begun(warm_config(config, grown_log, tmp_path, **FROZEN), grown_log)
    seen = 0
    for index in range(made.source.num_batches(0)):
        batch = made.source.batch(0, index)
        rows, anchors = batch.rows, batch.anchors
        is_new = rows[batch.events.item] > base.num_trained_items
        assert batch.events.hidden is not None and torch.equal(batch.events.hidden, is_new)
        assert anchors is not None and anchors.counters is not None
        counted = anchors.counters.item
        assert not (rows[counted[counted >= 0]] > base.num_trained_items).any()
        label = anchors.next_item
        seen += int((rows[label[label >= 0]] > base.num_trained_items).sum())
    assert seen > 5


def test_a_second_start_continues_new_items(
    earlier: Run,
    later: Run,
    grown_log: EventLog,
    tmp_path: Path,
) -> None:
    config, model = later
    frozen, made = begun(warm_config(config, grown_log, tmp_path / "frozen", **FROZEN), grown_log)
    assert torch.equal(made.model.item_table, model.item_table) and not len(frozen.new_rows)
    assert made.model.num_trained_items == earlier[1].num_trained_items
    _, made = begun(warm_config(config, grown_log, tmp_path / "all", init_freeze=InitFreeze.none), grown_log)
    assert torch.equal(made.model.item_table, model.item_table)
    assert made.model.num_trained_items == len(model.items)
