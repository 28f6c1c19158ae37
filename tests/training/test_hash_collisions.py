"""Collisions in hashed tables, against counts by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import small_config, small_frame
from tests.training.test_frequent_items import as_log, training_counts
from tests.training.test_training_with_features import feature_frame
from vista.log.event_log import EventLog
from vista.model.embedding_feature import EmbeddingFeature
from vista.model.hashed_vocabulary import HashedVocabulary
from vista.model.unified_embedding import hashed_rows
from vista.training.hash_collisions import HashCollisions, hash_collisions
from vista.training.trainer import Trainer


def test_counts_by_hand() -> None:
    """Values 0 and 1 share row 3. Value 3 would share row 1 with value 2, but does not occur."""
    rows, uses = np.array([[3], [3], [1], [1]]), np.array([5, 2, 3, 0])
    assert HashCollisions.of("color", rows, uses, 4) == HashCollisions("color", 4, 3, 2 / 3, 0.7)


def test_a_value_that_has_one_row_to_itself_does_not_collide() -> None:
    """Values 0 and 1 agree in one row. Value 2 reads row 2 twice, alone; value 3 reads rows of others only."""
    rows, uses = np.array([[0, 1], [0, 3], [2, 2], [1, 3]]), np.array([1, 1, 1, 1])
    assert HashCollisions.of("items", rows, uses, 5) == HashCollisions("items", 5, 4, 0.75, 0.75)
    rows[1, 1] = 4
    assert HashCollisions.of("items", rows, uses, 5) == HashCollisions("items", 5, 4, 0.25, 0.25)


def test_without_values() -> None:
    none = HashCollisions.of("color", np.zeros((2, 1), np.int64), np.zeros(2, np.int64), 4)
    assert none == HashCollisions("color", 4, 0, 0.0, 0.0)


def test_items_that_share_rows(event_log: EventLog, tmp_path: Path) -> None:
    config = small_config(event_log, tmp_path / "run", model__embedding_rows=23, model__embedding_hashes=2)
    made = Trainer(config, event_log)
    (found,) = made._collisions
    counts = training_counts(small_frame())
    ids = sorted(counts)
    rows = hashed_rows(torch.from_numpy(made.model.item_rows(ids)), EmbeddingFeature.item, 2, 23).tolist()
    readers = [{item for item, own in zip(ids, rows, strict=True) if row in own} for row in range(24)]
    shares = [item for item, own in zip(ids, rows, strict=True) if all(len(readers[row]) > 1 for row in own)]
    assert 0 < len(shares) < len(ids)
    assert (found.feature, found.num_rows, found.num_values) == ("items", 23, len(ids))
    assert found.value_share == pytest.approx(len(shares) / len(ids))
    assert found.use_share == pytest.approx(sum(counts[item] for item in shares) / sum(counts.values()))
    assert not hash_collisions(made.model, event_log, config, np.zeros(1, np.int64))[0].num_values


def test_features_of_items(tmp_path: Path) -> None:
    """Several values per item; each counts as often as its items."""
    frame = small_frame()
    items = np.unique(frame["item"])
    table = feature_frame(items)
    log = as_log(frame, tmp_path / "log", items=table)
    config = small_config(log, tmp_path / "run", model__hashed_features=["tags:4"])
    (found,) = Trainer(config, log)._collisions
    counts, uses = training_counts(frame), dict[str, int]()
    for item, tags in zip(items.tolist(), table["tags"], strict=True):
        for tag in tags:
            uses[tag] = uses.get(tag, 0) + counts[item]
    rows = HashedVocabulary(4).rows(list(uses)).tolist()
    shares = [tag for tag, row in zip(uses, rows, strict=True) if rows.count(row) > 1]
    assert (found.feature, found.num_rows, found.num_values) == ("feature tags of items", 4, len(uses))
    assert found.value_share == pytest.approx(len(shares) / len(uses))
    assert found.use_share == pytest.approx(sum(uses[tag] for tag in shares) / sum(uses.values()))
