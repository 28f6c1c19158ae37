"""Checkpoints: round trips, damage, and no pickle. tests/faults kills savers and cuts their power."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vista.errors import CheckpointError
from vista.training import checkpoint
from vista.training.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    pack_state,
    remove_checkpoints,
    save_checkpoint,
    unpack_state,
)


def save(folder: Path, step: int, **options: int) -> Path:
    return save_checkpoint(folder, step, {"weight": torch.full((5,), float(step))}, {"epoch": step}, **options)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def same_bits(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and left.numpy().tobytes() == right.numpy().tobytes()


def test_round_trip_keeps_every_bit(tmp_path: Path) -> None:
    table = torch.arange(12.0).view(3, 4)
    tensors = {
        "whole": table,
        "view": table[1],  # shares memory
        "transposed": table.T,
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 4),
        "odd": torch.tensor([math.nan, -0.0, math.inf]),
        "bytes": torch.arange(256, dtype=torch.uint8),
        "flags": torch.tensor([True, False]),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "half": torch.tensor([1.5], dtype=torch.bfloat16),
    }
    state = {"step": 3, "best": 0.1 + 0.2, "ids": [2**130, None, "né"], "nested": {"a": {"b": True}}}
    path = save_checkpoint(tmp_path / "new" / "checkpoints", 1234, tensors, state)
    assert path == tmp_path / "new" / "checkpoints" / "step-00001234"
    loaded, loaded_state = load_checkpoint(path)
    assert loaded_state == state
    assert loaded.keys() == tensors.keys()
    assert loaded["half"].dtype == torch.bfloat16 and loaded["half"].item() == 1.5
    for name in tensors.keys() - {"half"}:
        assert same_bits(loaded[name], tensors[name].detach()), name
    shutil.rmtree(path)  # loaded tensors do not depend on the file
    assert loaded["whole"].sum().item() == 66


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = save(tmp_path / "a", 3), save(tmp_path / "b", 3)
    for name in ("tensors.safetensors", "state.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_the_newest_two_stay(tmp_path: Path) -> None:
    for step in (0, 5, 99_999_999, 100_000_000):
        save(tmp_path, step)
    assert names(tmp_path) == ["step-100000000", "step-99999999"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step-100000000"
    assert names(save(tmp_path, 100_000_001, keep=1).parent) == ["step-100000001"]


def test_saving_removes_later_steps_of_a_rewound_run(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step)
    save(tmp_path, 15)
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000015"
    remove_checkpoints(tmp_path)
    assert latest_checkpoint(tmp_path) is None
    remove_checkpoints(tmp_path / "absent")


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save_checkpoint(tmp_path, 1, {"weight": torch.zeros(1)}, {"epoch": 2})
    assert names(tmp_path) == ["step-00000001"]
    assert load_checkpoint(tmp_path / "step-00000001")[1] == {"epoch": 2}


def test_latest_skips_and_clears_unfinished_saves(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "absent") is None
    assert latest_checkpoint(tmp_path) is None
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".tmp-step-00000002")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "step-two").mkdir()
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000001"
    assert names(tmp_path) == ["notes.txt", "step-00000001", "step-two"]


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "longer", "empty", "absent"])
def test_damage_is_named_with_a_remedy(tmp_path: Path, name: str, damage: str) -> None:
    path = save(tmp_path, 8)
    file = path / name
    content = bytearray(file.read_bytes())
    if damage == "absent":
        file.unlink()
    else:
        flipped = content.copy()
        flipped[len(content) // 2] ^= 1
        cases = {"truncated": content[:-7], "flipped": flipped, "longer": content + b"x", "empty": bytearray()}
        file.write_bytes(cases[damage])
    with pytest.raises(CheckpointError, match="remove the folder") as error:
        load_checkpoint(path)
    assert str(file) in str(error.value)


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 8)
    file = path / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": 1}))
    with pytest.raises(CheckpointError, match="has format 1"):
        load_checkpoint(path)
    file.write_text("[]")
    with pytest.raises(CheckpointError, match=r"is not the state of a checkpoint"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "change",
    [
        {"tensors": {}},
        {"tensors": {"bytes": "x", "sha256": "0" * 64}},
        {"tensors": None},
        {"state": 7},
        {"step": "1"},
        {"step": math.nan},
        {"format_version": 3.0},
        {"surplus": 1},
    ],
)
def test_odd_fields_with_a_valid_digest_are_typed_errors(tmp_path: Path, change: dict[str, Any]) -> None:
    path = save(tmp_path, 8)
    body = json.loads((path / "state.json").read_text()) | change
    del body["sha256"]
    body["sha256"] = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (path / "state.json").write_text(json.dumps(body))
    with pytest.raises(CheckpointError, match="remove the folder"):
        load_checkpoint(path)


def test_a_named_pipe_or_a_huge_file_is_refused_at_once(tmp_path: Path) -> None:
    path = save(tmp_path, 8)
    with (path / "state.json").open("ab") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match="at most 67108864 are read"):
        load_checkpoint(path)
    for name in ("state.json", "tensors.safetensors"):
        path = save(tmp_path, 8)
        (path / name).unlink()
        os.mkfifo(path / name)
        with pytest.raises(CheckpointError, match=r"is not a regular file|holds 0 bytes"):
            load_checkpoint(path)


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    target = tmp_path / "executed"
    path = save(tmp_path / "checkpoints", 1)
    for content in (pickle.dumps(Malicious(target)), None):
        if content is None:
            torch.save({"weight": Malicious(target)}, path / "tensors.safetensors")
        else:
            (path / "tensors.safetensors").write_bytes(content)
        # An attacker can make the checksums fit.
        body = json.loads((path / "state.json").read_text())
        del body["sha256"]
        file = path / "tensors.safetensors"
        body["tensors"] = {"bytes": file.stat().st_size, "sha256": checkpoint._file_digest(file)}
        body["sha256"] = checkpoint._body_digest(body)
        (path / "state.json").write_text(json.dumps(body))
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_checkpoint(path)
    assert not target.exists()


def test_bad_arguments_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for state in ({"best": math.nan}, {"best": math.inf}):
        with pytest.raises(ValueError, match="JSON"):
            save_checkpoint(folder, 1, {}, state)
    for odd in ({"pair": (1, 2)}, {"by_row": {1: 2}}, {"tensor": torch.ones(1)}):
        with pytest.raises(TypeError, match=r"pack_state|not JSON serializable"):
            save_checkpoint(folder, 1, {}, odd)
    with pytest.raises(ValueError, match="step=-1"):
        save_checkpoint(folder, -1, {}, {})
    with pytest.raises(ValueError, match="keep=0"):
        save_checkpoint(folder, 1, {}, {}, keep=0)
    assert not folder.exists()
    with pytest.raises(TypeError, match=r"tensors\['a'\] is a list"):
        save_checkpoint(folder, 1, {"a": [1.0]}, {})  # type: ignore[dict-item]
    assert names(folder) == []


LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
KEYS = st.integers() | st.text(max_size=3) | st.sampled_from(["$tensor", "$dict", "a.b", "a"])
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(KEYS, inner, max_size=3) | inner
    ),
    max_leaves=12,
)


@settings(max_examples=40, deadline=None)
@given(TREES)
def test_packing_is_inverted_exactly_through_json(tree: Any) -> None:
    tensors, skeleton = pack_state(tree, "x")
    assert tensors == {}
    back = unpack_state(json.loads(json.dumps(skeleton, allow_nan=False)), tensors)
    assert back == tree and repr(back) == repr(tree)


def test_packing_keeps_tensors_with_like_names_apart() -> None:
    tree = {"a.b": torch.zeros(1), "a": {"b": torch.ones(1)}, "list": [np.arange(3, dtype=np.uint32)], "n": np.int64(4)}
    tensors, skeleton = pack_state(tree, "x")
    back = unpack_state(skeleton, tensors)
    assert back["a.b"].item() == 0 and back["a"]["b"].item() == 1
    assert back["list"][0].dtype == np.uint32 and back["list"][0].tolist() == [0, 1, 2]
    assert back["n"] == 4 and math.isnan(unpack_state(pack_state(math.nan, "x")[1], {}))
    with pytest.raises(CheckpointError, match=r"'x\.a\.b'"):
        unpack_state(skeleton, {})
    with pytest.raises(TypeError, match=r"x\.module: a Linear cannot"):
        pack_state({"module": torch.nn.Linear(1, 1)}, "x")
    with pytest.raises(TypeError, match="a dict cannot"):
        pack_state({1.5: 1}, "x")
