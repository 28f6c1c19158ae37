"""Items that were added to a model after training: nothing else changes, and their features rank them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import sign_model
from vista.arrays import offsets_of
from vista.config import DataConfig, ModelConfig
from vista.errors import CheckpointError
from vista.log.item_features import CategoryColumn, ItemFeatures, NumberColumn, VectorColumn
from vista.log.vocabulary import Vocabulary
from vista.model.added_items import with_items
from vista.model.feature_spec import FeatureSpec
from vista.model.item_feature_table import FEATURES_FILE, ItemFeatureTable
from vista.model.schema import Schema
from vista.model.vista_model import VistaModel

NUM_ITEMS, NEW = 12, [100, 101, 250]


def drawn(count: int, seed: int) -> ItemFeatures:
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 3, count)
    codes = np.concatenate([np.sort(rng.permutation(4)[:n]) for n in counts] + [np.zeros(0)]).astype(np.int32)
    columns = {
        "brand": CategoryColumn(Vocabulary.from_ids(["a", "b", "c", "d"]), codes, offsets_of(counts)),
        "price": NumberColumn(rng.random(count).astype(np.float32)),
        "text": VectorColumn(rng.normal(size=(count, 5)).astype(np.float32)),
    }
    return ItemFeatures(columns)


@pytest.fixture(params=[False, True], ids=["plain", "popularity"])
def model(request: pytest.FixtureRequest) -> VistaModel:
    """With drawn weights."""
    torch.manual_seed(0)
    features = drawn(NUM_ITEMS, 0)
    columns = [FeatureSpec.of(name, column) for name, column in features.columns.items()]
    schema = Schema(["view"], True, None, ["click"], True, columns)
    config = ModelConfig(dim=8, num_heads=2, num_seeds=2, tail_len=4, counters=request.param, popularity=request.param)
    made = VistaModel(config, schema, Vocabulary.from_ids(np.arange(NUM_ITEMS)), DataConfig())
    made.set_item_features(ItemFeatureTable.of(features, columns))
    with torch.no_grad():
        for weight in made.features.parameters():  # type: ignore[union-attr]
            weight.normal_()
    made.set_item_frequency(np.arange(1 + NUM_ITEMS))
    return made.eval()


def test_only_the_catalog_grows(model: VistaModel) -> None:
    grown = with_items(model, NEW, drawn(len(NEW), 1))
    assert grown.items.ids(range(len(grown.items))).tolist() == [*range(NUM_ITEMS), *NEW]
    assert grown.summarizer_id() == model.summarizer_id()
    rows = torch.arange(1 + NUM_ITEMS)
    for old, new in zip(model.project_items(rows), grown.project_items(rows), strict=True):
        assert old is not None and new is not None and torch.equal(old, new)
    twice = with_items(grown, [7000], drawn(1, 2))
    assert twice.summarizer_id() == model.summarizer_id() and len(twice.items) == NUM_ITEMS + 4


def test_added_items_are_their_features(model: VistaModel) -> None:
    features = drawn(NUM_ITEMS, 0)
    grown = with_items(model, NEW, features.select(np.array([4, 0, 11])))
    added = grown.item_vectors(torch.arange(3) + 1 + NUM_ITEMS)
    assert model.features is not None
    assert torch.equal(added, model.features(torch.tensor([5, 1, 12])))
    assert model.popularity is None or torch.equal(
        grown.item_popularity[-3:], grown.item_popularity[1:].min().expand(3)
    )


def test_the_id_covers_the_features_of_trained_items(model: VistaModel) -> None:
    before = model.summarizer_id()
    assert model.features is not None and model.features.table is not None
    model.features.table.dense[3] += 1
    assert model.summarizer_id() != before
    model.features.table.dense[3] -= 1
    with torch.no_grad():
        model.features.values[1] += 1
    assert model.summarizer_id() != before


def test_a_grown_model_is_saved(model: VistaModel, tmp_path: Path) -> None:
    grown = with_items(model, NEW, drawn(len(NEW), 1))
    grown.save_pretrained(tmp_path / "best")
    loaded = VistaModel.from_pretrained(tmp_path / "best")
    rows = torch.arange(1 + len(grown.items))
    assert torch.equal(loaded.item_vectors(rows), grown.item_vectors(rows))
    assert (loaded.summarizer_id(), loaded.num_trained_items) == (model.summarizer_id(), NUM_ITEMS)
    again = with_items(loaded, [7000], drawn(1, 2))
    assert again.summarizer_id() == model.summarizer_id()


@pytest.mark.parametrize("ids", [[3], [100, 100], [101, 100], [5, 100]])
def test_known_and_unsorted_ids_are_refused(model: VistaModel, ids: list[int]) -> None:
    with pytest.raises(ValueError, match="ids must be new, distinct, and sorted"):
        with_items(model, ids, drawn(len(ids), 1))


def test_a_model_without_features_is_refused() -> None:
    schema = Schema(["view"], True, None, [], True)
    made = VistaModel(ModelConfig(dim=8, num_heads=2), schema, Vocabulary.from_ids([1, 2]), DataConfig())
    with pytest.raises(ValueError, match="the model has no features of items"):
        with_items(made, [3], drawn(1, 0))


def test_a_shorter_tail_keeps_features_and_added_items(model: VistaModel) -> None:
    grown = with_items(model, NEW, drawn(len(NEW), 1))
    shorter = grown.with_tail(2)
    rows = torch.arange(1 + len(grown.items))
    assert torch.equal(shorter.item_vectors(rows), grown.item_vectors(rows))
    assert shorter.summarizer_id() == model.summarizer_id() and shorter.num_trained_items == NUM_ITEMS


def test_the_random_state_stays(model: VistaModel) -> None:
    before = torch.get_rng_state()
    with_items(model, NEW, drawn(len(NEW), 1))
    assert torch.equal(torch.get_rng_state(), before)


def test_histories_know_trained_items_only(model: VistaModel) -> None:
    grown = with_items(model, NEW, drawn(len(NEW), 1))
    rows = grown.item_rows([0, *NEW, 11])
    assert rows.tolist() == [1, 13, 14, 15, 12]
    assert grown.history_rows(rows).tolist() == [1, 0, 0, 0, 12]


DAMAGE: dict[str, Any] = {
    "offsets that wrap": lambda t: t["offsets"].__setitem__(slice(1, 3), torch.tensor([2**62, -(2**62)])),
    "an entry of another model": lambda t: t["entry"].__setitem__(0, 10_000),
    "a weight that is not a number": lambda t: t["weight"].__setitem__(0, math.nan),
    "floats for integers": lambda t: t.update(offsets=t["offsets"].float()),
    "a missing tensor": lambda t: t.pop("dense"),
    "another number of items": lambda t: t.update(offsets=t["offsets"][:-1]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_features_are_refused(model: VistaModel, tmp_path: Path, damage: str) -> None:
    model.save_pretrained(tmp_path)
    file = tmp_path / FEATURES_FILE
    content = file.read_bytes()
    tensors = load_file(file)
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="its content is not what was exported"):
        VistaModel.from_pretrained(tmp_path)
    DAMAGE[damage](tensors)
    save_file(tensors, file)
    sign_model(tmp_path)
    with pytest.raises(CheckpointError, match=r"do not fit the model|must hold"):
        VistaModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda fields: fields.update(num_trained_items=13), "but was trained on 13"),
        (lambda fields: fields["schema"]["item_features"][1].update(mean=10**400), "must be finite floats"),
        (lambda fields: fields["schema"]["item_features"][1].update(name="brand"), "column names must be unique"),
        (lambda fields: fields["schema"]["item_features"].pop(), "does not fit its config.json"),
        (lambda fields: fields["schema"].update(item_features=[3]), "must be a mapping"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(
    model: VistaModel, tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    model.save_pretrained(tmp_path)
    sign_model(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        VistaModel.from_pretrained(tmp_path)
