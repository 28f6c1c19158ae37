"""Hostile files execute no code, and the sizes that they claim are not trusted."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Served, small_config
from tests.faults import oracle
from tests.faults.harness import Trial, promise
from tests.faults.nursery import Nursery, Say
from vista.errors import VistaError
from vista.log.event_log import EventLog
from vista.model.vista_model import VistaModel
from vista.scorer import Scorer
from vista.training.trainer import train

MOST_BYTES = 512 << 20
"""Largest growth of the process's memory."""


class Payload:
    """Creates a folder when it is unpickled."""

    def __init__(self, canary: str) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.canary,)


def torch_file(canary: str) -> bytes:
    """A file written by torch.save."""
    buffer = io.BytesIO()
    torch.save({"weights": torch.zeros(3), "payload": Payload(canary)}, buffer)
    return buffer.getvalue()


def npy(canary: str) -> bytes:
    """An object array, which NumPy unpickles if allowed."""
    import numpy as np

    buffer = io.BytesIO()
    np.save(buffer, np.array([Payload(canary)], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def zipped(canary: str) -> bytes:
    """A zip file with pickles under torch's names."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in ("archive/data.pkl", "data.pkl", "constants.pkl"):
            archive.writestr(name, pickle.dumps(Payload(canary)))
    return buffer.getvalue()


def header(size: int, text: bytes = b"{}") -> Callable[[str], bytes]:
    """A safetensors file whose header claims a size."""
    return lambda canary: struct.pack("<Q", size) + text


def tensors(entry: dict[str, Any], data: bytes = b"") -> Callable[[str], bytes]:
    """A safetensors file with one entry."""
    text = json.dumps({"x": entry}).encode()
    return lambda canary: struct.pack("<Q", len(text)) + text + data


USERS = {
    "log/": ["log", "checkpoint"],
    "run/best/": ["model", "scorer", "checkpoint"],
    "run/": ["checkpoint"],
    "store/": ["store", "scorer"],
}
"""Folder -> functions that read its files."""
HOSTILE: dict[str, Callable[[str], bytes]] = {
    **{f"pickle of protocol {n}": lambda canary, n=n: pickle.dumps(Payload(canary), n) for n in range(6)},  # type: ignore[misc]
    "torch.save": torch_file,
    "zip of pickles": zipped,
    "npy of objects": npy,
    "header of 2^63 bytes": header(1 << 63),
    "header of 2^64 - 1 bytes": header((1 << 64) - 1),
    "header of 1 TiB": header(1 << 40),
    "header of 200 MB": header(200 << 20, b"{" + b" " * (1 << 20)),
    "header of deep JSON": lambda canary: struct.pack("<Q", 200_000) + b"[" * 200_000,
    "tensor of 2^60 values": tensors({"dtype": "F32", "shape": [1 << 60], "data_offsets": [0, 1 << 62]}),
    "tensor whose shape overflows": tensors(
        {"dtype": "F32", "shape": [1 << 33, 1 << 33], "data_offsets": [0, 4]}, b"    "
    ),
    "tensor before the file": tensors({"dtype": "F32", "shape": [1], "data_offsets": [8, 4]}, b"        "),
    "deep JSON list": lambda canary: b"[" * 1_000_000,
    "deep JSON object": lambda canary: b'{"a":' * 200_000 + b"1" + b"}" * 200_000,
    "JSON number of 10^5 digits": lambda canary: b'{"format_version": 1' + b"0" * 100_000 + b"}",
    "YAML tag": lambda canary: f"!!python/object/apply:os.mkdir ['{canary}']\n".encode(),
    "Hydra target": lambda canary: json.dumps({"_target_": "os.mkdir", "path": canary}).encode(),
    "nothing": lambda canary: b"",
    "zeros": lambda canary: bytes(1 << 16),
}


@pytest.fixture(scope="module")
def files_of_all_kinds(served: Served, nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log, a trained model with its checkpoints, and its store. Tests must not change them."""
    nursery.imports("torch._dynamo")  # Optimizers import it.
    folder = tmp_path_factory.mktemp("files") / "files"
    for name, source in (("log", served.log.path), ("run", served.config.run_dir), ("store", served.store)):
        shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("*.lock", "lock.mdb", "train.log"))
    return folder


def use(say: Say, folder: str, names: list[str]) -> int:
    """Read as these users of the files do; says what each refused.

    Returns:
        Bytes of memory that it took.
    """
    root = Path(folder)
    before = peak_bytes()
    uses: dict[str, Callable[[], Any]] = {
        "log": lambda: EventLog.open(root / "log").gather([0]),
        "model": lambda: VistaModel.from_pretrained(root / "run" / "best"),
        "scorer": lambda: Scorer.open(root / "run" / "best", root / "store").score([100], [0]),
        "store": lambda: oracle.read_everything(root / "store"),
        "checkpoint": lambda: train(small_config(EventLog.open(root / "log"), root / "run")),
    }
    for name in names:
        try:
            uses[name]()
        except VistaError as error:
            say(f"{name}: {type(error).__name__}")
        else:
            say(f"{name}: read")
    return peak_bytes() - before


def peak_bytes() -> int:
    """Peak memory of this process, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@promise(
    "Checkpoints execute nothing",
    fault="any file of a log, model, run or store swapped for a hostile one",
    full=400,
    short=6,
)
def test_nothing_executes(trial: Trial, nursery: Nursery, files_of_all_kinds: Path) -> None:
    copy, canary = shutil.copytree(files_of_all_kinds, trial.folder / "files"), trial.folder / "canary"
    files = sorted(path for path in copy.rglob("*") if path.is_file())
    victim = files[trial.random.randrange(len(files))]
    what = trial.random.choice(sorted(HOSTILE))
    victim.write_bytes(HOSTILE[what](str(canary)))
    place = str(victim.relative_to(copy))
    reader = nursery.start(use, copy, next(users for start, users in USERS.items() if place.startswith(start)))
    reader.end(timeout_s=120)
    assert not canary.exists(), f"{what} as {place} was executed"
    assert reader.exit_code == 0, f"{what} as {place}: {reader.raised or reader.exit_code}"
    assert reader.returned <= MOST_BYTES, f"{what} as {place} took {reader.returned >> 20} MiB"
    trial.count(
        "refused" if any(not message.endswith(": read") for message in reader.messages) else "read without harm"
    )


def test_the_payloads_would_execute(tmp_path: Path) -> None:
    """A canary that no payload can set would prove nothing."""
    canary = tmp_path / "canary"
    pickle.loads(HOSTILE["pickle of protocol 4"](str(canary)))
    assert canary.is_dir()
    canary.rmdir()
    torch.load(io.BytesIO(HOSTILE["torch.save"](str(canary))), weights_only=False)
    assert canary.is_dir()
