"""Checkpoints: round trips, kills at any point of a save, damage, and no pickle."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import math
import os
import pickle
import random
import shutil
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.faults.nursery import Say
from tests.training.ranks_of_run import forked
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


def kill_at_each_call(say: Say, folder: str, log: str, every: int) -> None:
    """Fork children that save the same steps. Child n kills itself at its n-th fsync, rename or removal.

    With every=1, together they die at every relevant point of a save.
    """

    def child(deadly: int) -> None:
        calls = 0

        def counting(function: Callable[..., Any]) -> Callable[..., Any]:
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == deadly:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return wrapper

        os.fsync, os.rename, os.unlink = counting(os.fsync), counting(os.rename), counting(os.unlink)
        for step in (1, 2, 3, 3, 4):
            save(Path(folder, f"{deadly:03d}"), step)
            os.write(written, f"{deadly} {step}\n".encode())
        os._exit(0)

    written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for deadly in range(1, 1000, every):
        pid = os.fork()
        if pid == 0:
            child(deadly)
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0:
            break


def save_forever(say: Say, folder: str) -> None:
    """4 MB per save, so that most of the time is spent on writing."""
    for step in itertools.count(1):
        save_checkpoint(folder, step, {"weight": torch.full((1_000_000,), float(step))}, {"epoch": step})


def check_sound(folder: Path) -> int:
    """Load the newest checkpoint of a folder whose writer was killed, and return its step (0 for none)."""
    path = latest_checkpoint(folder)
    assert not folder.exists() or all(name.startswith("step-") for name in names(folder))
    if path is None:
        return 0
    tensors, state = load_checkpoint(path)
    step = int(path.name.removeprefix("step-"))
    assert state == {"epoch": step}
    assert (tensors["weight"] == step).all()
    return step


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.nightly)])
@pytest.mark.nightly
def test_a_kill_at_any_call_leaves_a_complete_checkpoint(tmp_path: Path, every: int) -> None:
    folder, log = tmp_path / "runs", tmp_path / "log"
    forked(kill_at_each_call, folder, log, every).result()
    finished = {run.name: 0 for run in folder.iterdir()}
    for line in log.read_text().splitlines():
        deadly, step = map(int, line.split())
        finished[f"{deadly:03d}"] = step
    assert len(finished) > 30 // every  # the five saves make at least that many such calls
    for name, step in finished.items():
        saved_step = check_sound(folder / name)
        assert saved_step >= step, f"run {name}: step {step} was reported saved, {saved_step} was saved_step"
        save(folder / name, 9)
        assert check_sound(folder / name) == 9


@pytest.mark.parametrize("killed", [False, True])
def test_no_file_is_removed_before_the_name_of_its_folder_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    """Otherwise a power cut could leave a checkpoint without its files."""
    folder, pending, num_removed = tmp_path / "new" / "checkpoints", set(), 0
    save(folder, 1, keep=9)
    save(folder, 2, keep=9)
    if killed:  # after a rename, which may not be durable
        (folder / "step-00000001").rename(folder / ".replaced-step-00000001")
        save(tmp_path / "other", 1).rename(folder / "step-00000001")
        (folder / "step-00000002").rename(folder / ".tmp-removed-step-00000002")
        pending = {".replaced-step-00000001", ".tmp-removed-step-00000002"}
    rename, unlink, fsync = os.rename, os.unlink, os.fsync

    def note_rename(old: Path, new: Path) -> None:
        rename(old, new)
        pending.add(Path(new).name)

    def note_unlink(name: str, *, dir_fd: int | None = None) -> None:
        nonlocal num_removed
        if dir_fd is not None:
            num_removed += 1
            assert Path(os.readlink(f"/proc/self/fd/{dir_fd}")).name not in pending
        unlink(name, dir_fd=dir_fd)

    def note_fsync(descriptor: int) -> None:
        fsync(descriptor)
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(folder):
            pending.clear()

    monkeypatch.setattr(os, "rename", note_rename)
    monkeypatch.setattr(os, "unlink", note_unlink)
    monkeypatch.setattr(os, "fsync", note_fsync)
    for step in (3, 4, 4, 2):
        save(folder, step, keep=1)
    assert num_removed >= 8 and names(folder) == ["step-00000002"]


def test_kill_nine_during_saves_leaves_a_complete_checkpoint(tmp_path: Path) -> None:
    chance = random.Random(0)
    reached = 0
    for _ in range(2):
        process = forked(save_forever, tmp_path)
        try:
            give_up = time.monotonic() + 60
            while not any(tmp_path.glob("step-*")):
                assert time.monotonic() < give_up, process.raised
                time.sleep(0.005)
            time.sleep(chance.random() * 0.2)
        finally:
            process.kill()
            process.end()
        reached += check_sound(tmp_path)
        remove_checkpoints(tmp_path)
    assert reached >= 2


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


def test_a_changed_value_in_the_state_is_detected(tmp_path: Path) -> None:
    path = save(tmp_path, 8)
    file = path / "state.json"
    file.write_text(file.read_text().replace('"epoch": 8', '"epoch": 9'))
    with pytest.raises(CheckpointError, match="modified or damaged"):
        load_checkpoint(path)


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
        {"format_version": 2.0},
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


def test_a_failing_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def full(descriptor: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"step-00000002: .*No space left.*free space"):
        save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001"]
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="make the folder writable"):
        save(tmp_path / "file", 1)


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
