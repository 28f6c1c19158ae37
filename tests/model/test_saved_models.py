"""Saved models and models with added items: bit-identical round trips, damage, and the identity of a summarizer."""

from __future__ import annotations

import math
import os
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import draw_space, draw_transitions, model_config, sign_model
from vista.arrays import offsets_of
from vista.config import DataConfig, ModelConfig
from vista.config.checks import Decay, Mixing, TargetAttentionKind
from vista.counters.counters import CounterSpec
from vista.errors import CheckpointError
from vista.log.features import Column, Columns, selected
from vista.log.vocabulary import Vocabulary
from vista.model import inference
from vista.model.features import FeatureSpec, Schema
from vista.model.item_feature_table import FEATURES_FILE, ItemFeatureTable
from vista.model.registry import ARCHITECTURES, load_model, with_items
from vista.model.saved_model import FORMAT_VERSION
from vista.model.summarizer import Stage1Config
from vista.model.vista_model import VistaModel


def test_loading_keeps_the_callers_random_state_and_a_shorter_tail_shares_the_weights(
    make: SimpleNamespace, tmp_path: Path
) -> None:
    make.model(seed=1).save_pretrained(tmp_path / "best")
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    model = VistaModel.from_pretrained(tmp_path / "best")
    shorter = model.with_tail(2)
    assert torch.equal(torch.rand(4), expected)
    assert shorter.item_table.data_ptr() == model.item_table.data_ptr()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mixing": Mixing.bidirectional},
        {"decay": Decay.time, "decay_horizons": [1.5, 0.0]},
        {"num_seeds": 0, "tasks": []},
        {"rating_range": None, "has_time": False},
        {"request_features": True},
        {"embedding_rows": 11},
        {"counter_keys": ["item"]},
    ],
    ids=str,
)
def test_a_round_trip_keeps_every_bit(make: SimpleNamespace, tmp_path: Path, options: dict[str, object]) -> None:
    model = make.model(seed=1, **options)
    model.save_pretrained(tmp_path / "best")
    back = VistaModel.from_pretrained(tmp_path / "best")
    assert (back.config, back.schema, back.data) == (model.config, model.schema, model.data)
    weights, loaded = model.state_dict(), back.state_dict()
    assert weights.keys() == loaded.keys() and all(torch.equal(weights[name], loaded[name]) for name in weights)
    assert back.summarizer_id() == model.summarizer_id() and not back.training
    with pytest.raises(CheckpointError, match=r"is a run folder; its model is .*best"):
        VistaModel.from_pretrained(tmp_path)
    np.testing.assert_array_equal(back.item_rows([100, 139, 99]), [1, 40, 0])
    packed = make.histories([0, 5, 30], 2)
    assert torch.equal(inference.summarize(back, packed), inference.summarize(model, packed))
    if model.schema.has_retrieval:
        assert torch.equal(inference.item_vectors(back.with_tail(2)), inference.item_vectors(model))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best"], "no temporary files are left"


def test_features_of_requests_are_saved_and_leave_the_summarizer(make: SimpleNamespace, tmp_path: Path) -> None:
    plain, model = make.model(seed=1), make.model(seed=2, request_features=True)
    model.load_state_dict(plain.state_dict(), strict=False)
    assert model.summarizer_id() == plain.summarizer_id()
    model.save_pretrained(tmp_path / "best")
    for back in (VistaModel.from_pretrained(tmp_path / "best"), model.with_tail(3)):
        assert back.request_features is not None and back.request_features.columns == model.request_features.columns
        found, expected = (one.request_features.parse({"device": ["phone"]}, 1).columns for one in (back, model))
        assert found["device"] == expected["device"] == [1]
    (tmp_path / "best" / "request_values_0.ids.npy").unlink()
    with pytest.raises(CheckpointError, match=r"request_values_0\.ids\.npy"):
        VistaModel.from_pretrained(tmp_path / "best")


def test_string_ids_survive_saving_and_loading(make: SimpleNamespace, tmp_path: Path) -> None:
    made = make.model(num_items=3)
    model = VistaModel(made.config, made.schema, Vocabulary.from_ids(["a", "ß", "c/d"]), made.data)
    model.save_pretrained(tmp_path / "best")
    back = VistaModel.from_pretrained(tmp_path / "best")
    assert back.item_rows(["ß", "c/d", "b", "a"]).tolist() == model.item_rows(["ß", "c/d", "b", "a"]).tolist()
    assert back.summarizer_id() == model.summarizer_id()


def test_the_sign_of_a_zero_does_not_change_the_id(make: SimpleNamespace) -> None:
    model = make.model()
    weight = next(model.encoder.parameters()).data.view(-1)
    ids = []
    for value in (0.0, -0.0, 0.5):
        weight[0] = value
        ids.append(model.summarizer_id())
    assert ids[0] == ids[1] != ids[2]


def test_a_folder_with_something_else_is_not_replaced(make: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="holds something other than a model"):
        make.model().save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    make.model().save_pretrained(tmp_path / "empty")


def test_saving_again_replaces_the_folder(make: SimpleNamespace, tmp_path: Path) -> None:
    make.model(seed=1).save_pretrained(tmp_path / "best")
    other = make.model(seed=2)
    other.save_pretrained(tmp_path / "best")
    assert VistaModel.from_pretrained(tmp_path / "best").summarizer_id() == other.summarizer_id()
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def rewritten(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def cut(name: str) -> Callable[[Path], object]:
    return rewritten(name, lambda data: data[: len(data) // 2])


def without(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def piped(name: str) -> Callable[[Path], object]:
    return lambda folder: ((folder / name).unlink(), os.mkfifo(folder / name))


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    return lambda folder: sign_model(folder, change)


def with_other_items(folder: Path) -> None:
    Vocabulary.from_ids(np.arange(7)).save(folder, "items")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated weights": (cut("model.safetensors"), r"model\.safetensors: holds \d+ bytes instead of \d+"),
    "a flipped bit": (
        rewritten("model.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
        r"model\.safetensors: its content is not what was exported",
    ),
    "an edited config": (
        rewritten("config.json", lambda data: data.replace(b'"dropout": 0.0', b'"dropout": 0.1')),
        r"config\.json: its checksum does not match",
    ),
    "a file too many": (
        lambda folder: np.save(folder / "items.blank.npy", np.zeros(1, np.int64)),
        r"items\.blank\.npy: does not belong to the model",
    ),
    "a pipe": (piped("config.json"), "no readable model .*is not a regular file"),
    "a huge config": (
        lambda folder: os.truncate(folder / "config.json", 1 << 31),
        "no readable model .*holds 2147483648 bytes, but at most 16777216 are read",
    ),
    "a file elsewhere": (edited(lambda d: d["files"].update({"../x.npy": {}})), "files: expected a table of files"),
    "many actions": (
        edited(lambda d: d["schema"].update(actions=["a"] * 10**6)),
        r"schema\.actions: at most 256 are possible, got 1000000",
    ),
    "another vocabulary": (with_other_items, r"items\.ids\.npy: holds 184 bytes instead of 448; copy the model again"),
    "a signed other vocabulary": (lambda folder: (with_other_items(folder), sign_model(folder)), "does not fit"),
    "no weights": (without("model.safetensors"), "no readable model"),
    "no folder": (shutil.rmtree, "no readable model .*vista train"),
    "another format": (
        edited(lambda d: d.update(format_version=99)),
        f"format 99, but this version of vista reads {FORMAT_VERSION}",
    ),
    "no schema": (edited(lambda d: d.pop("schema")), r"config\.json: the field 'schema' is missing"),
    "missing key": (
        edited(lambda d: d["model"].pop("target_attention")),
        r"config\.json: .*target_attention: missing or unknown in ModelConfig",
    ),
    "unknown key": (
        edited(lambda d: d["model"].update(wings=2)),
        r"config\.json: .*wings: missing or unknown in ModelConfig",
    ),
    "contradiction": (
        edited(lambda d: d["model"].update(num_heads=5)),
        r"config\.json: .*model\.num_heads: must divide",
    ),
    "another width": (edited(lambda d: d["model"].update(dim=32)), r"model\.safetensors does not fit its config\.json"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(make: SimpleNamespace, tmp_path: Path, damage: str) -> None:
    make.model().save_pretrained(tmp_path / "best")
    inflict, message = DAMAGE[damage]
    inflict(tmp_path / "best")
    began = time.process_time()
    with pytest.raises(CheckpointError, match=message) as caught:
        VistaModel.from_pretrained(tmp_path / "best")
    assert time.process_time() - began < 1
    assert str(tmp_path / "best") in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [{"tail_len": 4096, "dim": 4096, "num_heads": 1}, {"embedding_rows": 2**31 - 1}, {"num_layers": 64, "dim": 1024}],
    ids=str,
)
def test_a_config_that_asks_for_more_than_the_weights_hold(
    make: SimpleNamespace, tmp_path: Path, change: dict[str, int]
) -> None:
    make.model().save_pretrained(tmp_path / "best")
    sign_model(tmp_path / "best", lambda fields: fields["model"].update(change))
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not fit its config\.json, which asks for far"):
        VistaModel.from_pretrained(tmp_path / "best")
    assert time.process_time() - began < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


@pytest.mark.parametrize(
    "sizes",
    [
        {"tail_len": 4096},
        {"conv_width": 1024},
        {"num_layers": 64, "num_target_layers": 64},
        {"embedding_rows": 100_000},
        {"architecture": "hstu", "history_limit": 10_000},
    ],
    ids=str,
)
def test_small_models_with_one_large_size_are_loaded(make: SimpleNamespace, tmp_path: Path, sizes: Any) -> None:
    like = make.model()
    config = model_config(**({"dim": 8, "num_heads": 1} | sizes))
    model = ARCHITECTURES[config.architecture](config, like.schema, like.items, like.data)
    model.save_pretrained(tmp_path / "best")
    weights, loaded = model.state_dict(), load_model(tmp_path / "best").state_dict()
    assert all(torch.equal(weights[name], loaded[name]) for name in weights)


def test_a_weight_that_is_not_finite_is_named(make: SimpleNamespace, tmp_path: Path) -> None:
    make.model().save_pretrained(tmp_path / "best")
    weights = load_file(tmp_path / "best" / "model.safetensors")
    weights["target_attention.layers.1.bias"].view(-1)[3] = math.nan
    save_file(weights, tmp_path / "best" / "model.safetensors")
    sign_model(tmp_path / "best")
    with pytest.raises(CheckpointError, match=r"target_attention\.layers\.1\.bias is not finite"):
        VistaModel.from_pretrained(tmp_path / "best")


def test_a_full_disk(make: SimpleNamespace, tmp_path: Path) -> None:
    model = make.model(num_items=2000)
    model.save_pretrained(tmp_path / "best")
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "best").iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in {size - 1 for size in sizes.values()}:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(CheckpointError, match=r"the model could not be written \(.*free space"):
                model.save_pretrained(tmp_path / "again")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


@pytest.mark.parametrize("mixing", Mixing)
def test_summarizer_id_follows_stage_1_and_nothing_else(make: SimpleNamespace, mixing: Mixing) -> None:
    model = make.model(mixing=mixing, has_decoder=True)
    before = model.summarizer_id()
    assert len(before) == 32 and model.summarizer_id() == before
    with torch.no_grad():
        model.item_table[1, 0] = -0.0
        negative = model.summarizer_id()
        model.item_table[1, 0] = 0.0
        assert model.summarizer_id() == negative != before
    before = negative
    packed = make.histories([12], 1)
    summary = inference.summarize(model, packed)
    stages = set()
    for name, parameter in model.named_parameters():
        stage = name.split(".")[0]
        saved = parameter.detach().clone()
        with torch.no_grad():
            parameter += 0.25
        if stage in ("item_table", "encoder", "summarizer"):
            assert model.summarizer_id() != before, name
        else:
            assert model.summarizer_id() == before, name
            assert torch.equal(inference.summarize(model, packed), summary), name
        with torch.no_grad():
            parameter.copy_(saved)
        stages.add(stage)
    assert model.summarizer_id() == before
    assert stages == {
        *("item_table", "encoder", "summarizer", "decoder", "target_attention"),
        *("request", "task_head"),
    }


OTHERS = {"decay": Decay.time, "mixing": Mixing.bidirectional, "decay_horizons": (1.0, 2.0)}
OTHERS |= {"rating_range": (0.0, 5.0), "actions": ("view", "buy", "click"), "counters": CounterSpec(), "has_gap": False}
OTHERS |= {"item_features": (FeatureSpec("brand", "category", 3),)}
OTHERS |= {"event_features": (FeatureSpec("device", "category", 3),)}
"""Other values of the fields of Stage1Config whose values cannot be increased by 1."""


@pytest.mark.parametrize("name", [field.name for field in fields(Stage1Config)])
def test_summarizer_id_follows_every_setting_of_stage_1(make: SimpleNamespace, name: str) -> None:
    model = make.model()
    before = model.summarizer_id()
    other = OTHERS[name] if name in OTHERS else getattr(model.stage1, name) + 1
    model.stage1 = replace(model.stage1, **{name: other})
    assert model.summarizer_id() != before


def test_summarizer_id_follows_the_vocabulary_and_no_setting_of_stage_2(make: SimpleNamespace) -> None:
    model = make.model()
    before, config = model.summarizer_id(), model.config
    for same in (
        {"config": replace(config, tail_len=9, dropout=0.3, temperature=0.1, num_target_layers=5)},
        {"config": replace(config, target_attention=TargetAttentionKind.softmax)},
        {"schema": replace(model.schema, tasks=["buy"], has_retrieval=False)},
    ):
        made = make.model()
        for key, value in same.items():
            setattr(made, key, value)
        assert Stage1Config.of(made.config, made.schema) == model.stage1 and made.summarizer_id() == before
    model.items = Vocabulary.from_ids(np.arange(40) + 101)
    assert model.summarizer_id() != before


NUM_ITEMS, NEW = 12, [100, 101, 250]


def drawn_items(count: int, seed: int) -> Columns:
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 3, count)
    codes = np.concatenate([np.sort(rng.permutation(4)[:n]) for n in counts] + [np.zeros(0)]).astype(np.int32)
    columns = {
        "brand": Column(codes, Vocabulary.from_ids(["a", "b", "c", "d"]), offsets_of(counts)),
        "price": Column(rng.random(count).astype(np.float32)),
        "text": Column(rng.normal(size=(count, 5)).astype(np.float32)),
    }
    return columns


@pytest.fixture(params=[False, True], ids=["plain", "counters"])
def featured(request: pytest.FixtureRequest) -> VistaModel:
    """With drawn weights."""
    torch.manual_seed(0)
    features = drawn_items(NUM_ITEMS, 0)
    columns = [FeatureSpec.of(name, column) for name, column in features.items()]
    schema = Schema(["view"], True, None, ["click"], True, columns)
    config = ModelConfig(dim=8, num_heads=2, num_seeds=2, tail_len=4, counter_keys=["item"] if request.param else [])
    made = VistaModel(config, schema, Vocabulary.from_ids(np.arange(NUM_ITEMS)), DataConfig())
    made.set_item_features(ItemFeatureTable.of(features, columns))
    with torch.no_grad():
        for weight in made.features.parameters():  # type: ignore[union-attr]
            weight.normal_()
    draw_space(made)
    for measured in (made.item_statistics, made.item_rates):
        measured[1:] = torch.randn(NUM_ITEMS, measured.shape[1])
    if made.transitions is not None:
        draw_transitions(made.transitions)
    return made.eval()


def test_only_the_catalog_grows(featured: VistaModel) -> None:
    before = torch.get_rng_state()
    grown = with_items(featured, NEW, drawn_items(len(NEW), 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert grown.items.ids(range(len(grown.items))).tolist() == [*range(NUM_ITEMS), *NEW]
    rows_of_ids = grown.item_rows([0, *NEW, 11])
    assert rows_of_ids.tolist() == [1, 13, 14, 15, 12]
    assert grown.history_rows(rows_of_ids).tolist() == [1, 0, 0, 0, 12], "histories know trained items only"
    assert grown.summarizer_id() == featured.summarizer_id()
    rows = np.arange(1 + NUM_ITEMS)
    for old, new in zip(featured.project_items(rows), grown.project_items(rows), strict=True):
        assert old is not None and new is not None and np.array_equal(old, new)
    twice = with_items(grown, [7000], drawn_items(1, 2))
    assert twice.summarizer_id() == featured.summarizer_id() and len(twice.items) == NUM_ITEMS + 4


def test_added_items_are_their_features(featured: VistaModel) -> None:
    features = drawn_items(NUM_ITEMS, 0)
    grown = with_items(featured, NEW, selected(features, np.array([4, 0, 11])))
    added = grown.item_vectors(torch.arange(3) + 1 + NUM_ITEMS)
    assert featured.features is not None
    assert torch.equal(added, featured.features(torch.tensor([5, 1, 12])))
    for old, new in ((featured.item_space, grown.item_space), (featured.item_rates, grown.item_rates)):
        assert torch.equal(new[: 1 + NUM_ITEMS], old) and old.any()
        assert new.shape[0] == 4 + NUM_ITEMS and not new[1 + NUM_ITEMS :].any()
    least = featured.item_statistics[1:].amin(0)  # of the rarest items
    assert torch.equal(grown.item_statistics, torch.cat([featured.item_statistics, least.expand(3, -1)]))
    if featured.transitions is not None and grown.transitions is not None:
        for name in ("transition_items", "transition_weights"):
            old, new = getattr(featured, name), getattr(grown, name)
            assert torch.equal(new[: 1 + NUM_ITEMS], old) and not new[1 + NUM_ITEMS :].any(), "no user had them"


def test_transitions_are_saved_as_they_are(featured: VistaModel, tmp_path: Path) -> None:
    featured.save_pretrained(tmp_path / "model")
    saved, transitions = load_model(tmp_path / "model").transitions, featured.transitions
    assert (saved is None) == (transitions is None) == (featured.counted is None)
    if saved is not None and transitions is not None:
        assert saved.item.dtype == torch.int32 and saved.item.any()
        assert torch.equal(saved.item, transitions.item) and torch.equal(saved.weight, transitions.weight)


def test_the_id_covers_the_features_of_trained_items(featured: VistaModel) -> None:
    before = featured.summarizer_id()
    assert featured.features is not None and featured.features.table is not None
    featured.features.table.dense[3] += 1
    assert featured.summarizer_id() != before
    featured.features.table.dense[3] -= 1
    with torch.no_grad():
        featured.features.values[1] += 1
    assert featured.summarizer_id() != before


def test_a_grown_model_is_saved_and_its_tail_shortened(featured: VistaModel, tmp_path: Path) -> None:
    grown = with_items(featured, NEW, drawn_items(len(NEW), 1))
    grown.save_pretrained(tmp_path / "best")
    loaded = VistaModel.from_pretrained(tmp_path / "best")
    rows = torch.arange(1 + len(grown.items))
    for other in (loaded, grown.with_tail(2)):
        assert torch.equal(other.item_vectors(rows), grown.item_vectors(rows))
        assert (other.summarizer_id(), other.num_trained_items) == (featured.summarizer_id(), NUM_ITEMS)
    again = with_items(loaded, [7000], drawn_items(1, 2))
    assert again.summarizer_id() == featured.summarizer_id()


@pytest.mark.parametrize("ids", [[3], [100, 100], [101, 100], [5, 100]])
def test_known_and_unsorted_ids_are_refused(featured: VistaModel, ids: list[int]) -> None:
    with pytest.raises(ValueError, match="ids must be new, distinct, and sorted"):
        with_items(featured, ids, drawn_items(len(ids), 1))


def test_a_model_without_features_is_refused() -> None:
    schema = Schema(["view"], True, None, [], True)
    made = VistaModel(ModelConfig(dim=8, num_heads=2), schema, Vocabulary.from_ids([1, 2]), DataConfig())
    with pytest.raises(ValueError, match="the model has no features of items"):
        with_items(made, [3], drawn_items(1, 0))


FEATURE_DAMAGE: dict[str, Any] = {
    "offsets that wrap": lambda t: t["offsets"].__setitem__(slice(1, 3), torch.tensor([2**62, -(2**62)])),
    "a negative entry": lambda t: t["entry"].__setitem__(0, -1),
    "an infinite number": lambda t: t["dense"].__setitem__((3, 0), math.inf),
    "an entry of another model": lambda t: t["entry"].__setitem__(0, 10_000),
    "floats for integers": lambda t: t.update(offsets=t["offsets"].float()),
    "a missing tensor": lambda t: t.pop("dense"),
    "another number of items": lambda t: t.update(offsets=t["offsets"][:-1]),
}


@pytest.mark.parametrize("featured", [False], indirect=True)
@pytest.mark.parametrize("damage", FEATURE_DAMAGE)
def test_damaged_features_are_refused(featured: VistaModel, tmp_path: Path, damage: str) -> None:
    featured.save_pretrained(tmp_path)
    file = tmp_path / FEATURES_FILE
    content = file.read_bytes()
    tensors = load_file(file)
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="its content is not what was exported"):
        VistaModel.from_pretrained(tmp_path)
    FEATURE_DAMAGE[damage](tensors)
    save_file(tensors, file)
    sign_model(tmp_path)
    with pytest.raises(CheckpointError, match=r"do not fit the model|must hold"):
        VistaModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("featured", [False], indirect=True)
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
    featured: VistaModel, tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    featured.save_pretrained(tmp_path)
    sign_model(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        VistaModel.from_pretrained(tmp_path)
