"""Hostile files execute no code, end in a typed error or are read, and take at most 1 GiB of memory and 10 seconds.

- Any file of a log, model, run or store is swapped for a pickle, a huge header, deep JSON, and the like.
- Odd values of every type, and of every size up to 10^30, are in the fields of JSON files, under a checksum that fits:
  anyone who can write a folder can write such a file.
- A named pipe, a terabyte, a symbolic link, or a small file that unpacks to gigabytes is in place of a file.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from tests.conftest import Served, small_config
from tests.faults import operations, oracle
from tests.faults.harness import DIFFERENT, Trial, attempt, judge, promise, try_each
from tests.faults.nursery import Nursery, Say
from tests.faults.operations import OPERATIONS, USERS
from vista.config import PrepareConfig, SourceConfig, TrainConfig
from vista.config.composition import compose_config
from vista.errors import VistaError, shown
from vista.log.event_log import EventLog
from vista.log.ingest.prepare import prepare
from vista.log.inspection import verify_log
from vista.log.segment_files import manifest_bytes
from vista.model.saved_model import checksum_of
from vista.model.vista_model import VistaModel
from vista.scorer import Scorer
from vista.store import StoreReader
from vista.store.admin import store_stats, verify_store
from vista.store.keys import MANIFEST_KEY
from vista.store.record_encoding import read_key
from vista.training import checkpoint
from vista.training.checkpoint import latest_checkpoint, load_checkpoint
from vista.training.trainer import train

MOST_GROWTH = 512 << 20
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


USED_BY = {
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
    full=120,
    smoke=True,
)
def test_nothing_executes(trial: Trial, nursery: Nursery, files_of_all_kinds: Path) -> None:
    copy, canary = shutil.copytree(files_of_all_kinds, trial.folder / "files"), trial.folder / "canary"
    files = sorted(path for path in copy.rglob("*") if path.is_file())
    victim = files[trial.random.randrange(len(files))]
    what = sorted(HOSTILE)[trial.number % len(HOSTILE)]
    victim.write_bytes(HOSTILE[what](str(canary)))
    place = str(victim.relative_to(copy))
    reader = nursery.start(use, copy, next(users for start, users in USED_BY.items() if place.startswith(start)))
    reader.end(timeout_s=120)
    assert not canary.exists(), f"{what} as {place} was executed"
    assert reader.exit_code == 0, f"{what} as {place}: {reader.raised or reader.exit_code}"
    assert reader.returned <= MOST_GROWTH, f"{what} as {place} took {reader.returned >> 20} MiB"
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


Fields = dict[str, Any]
MANIFESTS = 20
ODD: list[Any] = [
    *(None, True, -1, 0, 1, 2**31, 2**63, 2**64, 10**18, 10**30, 1.5, float("nan"), float("inf"), "", "x", "a" * 100),
    *("\0", "1" * 300, "../../etc/passwd", [], [1], [[]], {}, {"a": 1}),
]


@dataclass(frozen=True)
class Crafted:
    """A kind of file: how to read and write its fields, and what uses it."""

    read: Callable[[Path], Fields]
    write: Callable[[Path, Fields], Any]
    uses: dict[str, Callable[[Path], Any]]


def write_manifest(folder: Path, fields: Fields) -> None:
    content = json.dumps(fields, sort_keys=True).encode()
    oracle.put_value(str(folder / "store"), MANIFEST_KEY, xxhash.xxh3_64_hexdigest(content).encode() + b"\n" + content)


def read_manifest(folder: Path) -> Fields:
    with StoreReader.open(folder / "store") as opened:
        return dataclasses.asdict(opened.manifest)


def read_crafted_store(folder: Path) -> None:
    with StoreReader.open(folder / "store") as opened:
        opened.get_many(list(USERS))
        opened.states(list(USERS))


def score(folder: Path) -> None:
    with Scorer.open(folder / "model", folder / "store", max_age_s=1e9) as scorer:
        scorer.score(list(USERS), [0, 10])


def without_checksum(path: Path, name: str = "checksum") -> Fields:
    return {field: value for field, value in json.loads(path.read_bytes()).items() if field != name}


def config(folder: Path) -> Path:
    return folder / "model" / "config.json"


def segment(folder: Path) -> Path:
    return folder / "log" / "segment-000001" / "manifest.json"


def state(folder: Path) -> Path:
    return folder / "run" / "checkpoints" / "step-00000007" / checkpoint.STATE_FILE


def write_config(folder: Path, fields: Fields) -> None:
    config(folder).write_text(json.dumps(fields | {"checksum": checksum_of(fields)}))


def write_state(folder: Path, fields: Fields) -> None:
    body = json.dumps(fields, sort_keys=True).encode()
    state(folder).write_text(json.dumps(fields | {"sha256": hashlib.sha256(body).hexdigest()}))


CRAFTED: dict[str, Crafted] = {
    "the manifest of a generation": Crafted(
        read_manifest,
        write_manifest,
        {
            "read": read_crafted_store,
            "stats": lambda folder: str(store_stats(folder / "store")),
            "verify": lambda folder: str(verify_store(folder / "store")),
            "score": score,
            **{name: OPERATIONS[name].run for name in ("a copy", "an incremental refresh", "an erasure of 5")},
            **{name: OPERATIONS[name].run for name in ("a compaction", "a full refresh")},
        },
    ),
    "the manifest of a segment": Crafted(
        lambda folder: without_checksum(segment(folder)),
        lambda folder, fields: segment(folder).write_bytes(manifest_bytes(fields)),
        {
            "read": lambda folder: operations.num_events(operations.log_of(folder)),
            "print": lambda folder: str(operations.log_of(folder)),
            "verify": lambda folder: str(verify_log(folder / "log")),
            **{name: OPERATIONS[name].run for name in ("a full refresh", "an append", "a compaction of a log")},
        },
    ),
    "config.json of a model": Crafted(
        lambda folder: without_checksum(config(folder)),
        write_config,
        {"open": lambda folder: VistaModel.from_pretrained(folder / "model"), "score": score},
    ),
    "the state of a checkpoint": Crafted(
        lambda folder: without_checksum(state(folder), "sha256"),
        write_state,
        {"load": lambda folder: checkpoint.load_checkpoint(state(folder).parent)},
    ),
}


def places(fields: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The keys and indices that lead to each value."""
    for key, value in fields.items() if isinstance(fields, dict) else enumerate(fields):
        yield (*above, key)
        if isinstance(value, dict | list):
            yield from places(value, (*above, key))


def save_checkpoints(say: Say, folder: str) -> None:
    operations.checkpoints(Path(folder))


@pytest.fixture(scope="module")
def world_with_run(nursery: Nursery, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world with run/, which has checkpoints. Tests must not change it."""
    folder = tmp_path_factory.mktemp("run") / "world"
    shutil.copytree(world, folder)
    nursery.call(save_checkpoints, folder)
    return folder


def use_crafted(say: Say, whole: str, scratch: str, numbers: list[int]) -> None:
    """Write an odd value for each number and use the file; says [outcome, text]."""

    def use(number: int, folder: Path) -> tuple[str, str]:
        chance = random.Random(number)
        name = list(CRAFTED)[number % len(CRAFTED)]
        fields = CRAFTED[name].read(folder)
        *above, last = chance.choice(list(places(fields)))
        value, user = chance.choice(ODD), chance.choice(list(CRAFTED[name].uses))
        inner: Any = fields
        for key in above:
            inner = inner[key]
        inner[last] = value
        CRAFTED[name].write(folder, fields)
        outcome, text, _ = attempt(lambda: CRAFTED[name].uses[user](folder))
        return outcome or "used", f"{'.'.join(map(str, (*above, last)))}={shown(value)} in {name}, {user}: {text}"

    try_each(say, whole, scratch, numbers, use)


@promise(
    "Errors are typed or documented",
    fault="an odd value in a JSON file with a checksum that fits",
    full=2000,
    smoke=True,
    each=MANIFESTS,
)
def test_crafted_fields(trial: Trial, nursery: Nursery, world_with_run: Path) -> None:
    judge(trial, nursery, use_crafted, world_with_run, trial.folder)


def use_unchanged(say: Say, whole: str, scratch: str) -> None:
    """Rewrite each file with the fields that it has, and use it."""
    for name, crafted in CRAFTED.items():
        for use in crafted.uses:
            folder = Path(scratch, name, use)
            shutil.copytree(whole, folder)
            crafted.write(folder, crafted.read(folder))
            crafted.uses[use](folder)


def test_unchanged_fields_are_used(nursery: Nursery, world_with_run: Path, tmp_path: Path) -> None:
    nursery.call(use_unchanged, world_with_run, tmp_path)


ZEROS = bytes(1 << 24)
TIMES = 192
"""Times ZEROS that an archive unpacks to: 3 GiB."""


def npz(path: Path) -> None:
    """An archive of two arrays of 1.5 GiB each, compressed to a few MB."""
    entries, directory, place = b"", b"", 0
    for name in (b"user.npy", b"item.npy"):
        count = TIMES // 2 * len(ZEROS) // 8
        text = b"{'descr': '<i8', 'fortran_order': False, 'shape': (%d,), }" % count
        header = b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + text.ljust(117) + b"\n"
        packer = zlib.compressobj(6, zlib.DEFLATED, -15)
        start = packer.compress(header) + packer.flush(zlib.Z_FULL_FLUSH)
        piece = packer.compress(ZEROS) + packer.flush(zlib.Z_FULL_FLUSH)  # may be repeated after a full flush
        data = start + piece * (TIMES // 2) + packer.flush()
        fields = struct.pack("<HHHHHIIIHH", 20, 0, 8, 0, 33, 0, len(data), len(header) + 8 * count, len(name), 0)
        entry = b"PK\x03\x04" + fields + name + data
        directory += b"PK\x01\x02\x14\x00" + fields + bytes(10) + struct.pack("<I", place) + name
        entries, place = entries + entry, place + len(entry)
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 2, 2, len(directory), place, 0)
    path.write_bytes(entries + directory + end)


def csv_gz(path: Path) -> None:
    """A table whose third line is 3 GiB long, in gzip members."""
    path.write_bytes(gzip.compress(b"user,item,timestamp\n1,2,3\n") + gzip.compress(ZEROS) * TIMES)


def csv_line(path: Path) -> None:
    """A line of 64 MiB."""
    path.write_bytes(b"user,item,timestamp\n1,2,3\n" + b"x" * (1 << 26) + b"\n")


def csv_columns(path: Path) -> None:
    """A header of a million columns."""
    path.write_bytes(b",".join([b"user,item,timestamp", *(b"c%d" % number for number in range(10**6))]) + b"\n")


def parquet(path: Path) -> None:
    """Twelve row groups with 10^7 rows of one value each, in some KB."""
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    column = pyarrow.repeat(pyarrow.scalar(7, pyarrow.int64()), 10**7)
    table = pyarrow.table(dict.fromkeys(("user", "item", "timestamp"), column))
    with ParquetWriter(path, table.schema, compression="zstd") as writer:
        for _ in range(12):
            writer.write_table(table, row_group_size=10**7)


def yaml_aliases(path: Path) -> None:
    """Nine levels of nine aliases each."""
    levels = (f"a{level}: &a{level} [{','.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 9))
    path.write_text("a0: &a0 [1,1,1,1,1,1,1,1,1]\n" + "".join(levels))


def yaml_cycle(path: Path) -> None:
    """A mapping that contains itself."""
    path.write_text("model: &m\n  dim: *m\n")


def yaml_deep(path: Path) -> None:
    """20,000 nested lists."""
    path.write_text("a: " + "[" * 20_000)


def yaml_long(path: Path) -> None:
    """A value of 30 MB."""
    path.write_text("run_dir: '" + "x" * 30_000_000 + "'\n")


Change = Callable[[Path], Any]
"""Called with a folder, or the path of a file."""


def read_store(folder: Path) -> None:
    operations.served_users(folder / "store")


def read_log(folder: Path) -> None:
    operations.num_events(operations.log_of(folder))


def read_model(folder: Path) -> None:
    operations.model_of(folder)


def read_checkpoint(folder: Path) -> None:
    newest = latest_checkpoint(folder / "run" / "checkpoints")
    assert newest is not None
    load_checkpoint(newest)


def read_yaml(folder: Path) -> None:
    compose_config(TrainConfig, [], config_file=str(folder / "train.yaml"))


def read_source(name: str, folder: Path) -> None:
    options: dict[str, Any] = {"kind": "npz"} if name == "events.npz" else {"timestamp": "timestamp", "time_unit": "ms"}
    source = SourceConfig(paths=[str(folder / name)], **options)
    prepare(PrepareConfig(out=str(folder / "made"), events=source), parser=operations.parser())


def write_store(folder: Path) -> None:
    operations.refresh_full(folder)
    OPERATIONS["an erasure of 5"].run(folder)


READS: dict[str, Change] = {
    **dict.fromkeys(("store/CURRENT", "store/gen-1/summary/data.mdb"), read_store),
    **dict.fromkeys(("store/LAST", "store/tombstones", "store/writer.lock", "store/refresh.jsonl"), write_store),
    **dict.fromkeys(("model/config.json", "model/model.safetensors", "model/items.ids.npy"), read_model),
    **dict.fromkeys(("log/segment-000001/manifest.json", "log/segment-000001/item.npy"), read_log),
    **dict.fromkeys(
        ("run/checkpoints/step-00000007/state.json", "run/checkpoints/step-00000007/tensors.safetensors"),
        read_checkpoint,
    ),
    "train.yaml": read_yaml,
    "key": lambda folder: read_key(str(folder / "key")),
}
"""File -> what reads it."""
SOURCES = ("day.csv", "day.csv.gz", "day.parquet", "events.npz")
LINKS = ("writer.lock", "erase.lock", "CURRENT", "CURRENT.tmp", "LAST", "LAST.tmp", "tombstones", "refresh.jsonl")
BOMBS: dict[str, list[Change]] = {
    "train.yaml": [yaml_aliases, yaml_cycle, yaml_deep, yaml_long],
    "day.csv": [csv_line, csv_columns],
    "day.csv.gz": [csv_gz],
    "day.parquet": [parquet],
    "events.npz": [npz],
}


def pipe(path: Path) -> None:
    """Put a named pipe in place of a file."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def terabyte(path: Path) -> None:
    """Lengthen a file to a terabyte, which takes no room."""
    path.touch()
    os.truncate(path, 1 << 40)


def link(name: str, folder: Path) -> None:
    """Put symbolic links to a file outside of the store in place of one of its files and of its temporary files."""
    (folder / "victim").write_text("precious")
    (folder / "victim").chmod(0o644)
    for path in (folder / "store" / name, folder / "store" / f".{name}.{os.getpid()}.tmp"):
        path.unlink(missing_ok=True)
        path.symlink_to(folder / "victim")


def explode(make: Change, path: Path) -> None:
    """Make a bomb in another process, whose memory does not count here."""
    child = os.fork()
    if child == 0:
        make(path)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


Case = tuple[str, Change, Change]
"""What it is, a change of a folder, and what reads the folder."""
READERS: dict[str, Change] = {**READS, **{name: partial(read_source, name) for name in SOURCES}}
QUICK: list[Case] = [
    *((f"a pipe as {name}", lambda folder, name=name: pipe(folder / name), read) for name, read in READERS.items()),
    *(
        (f"a terabyte as {name}", lambda folder, name=name: terabyte(folder / name), read)
        for name, read in READS.items()
    ),
    *((f"a link as {name}", partial(link, name), write_store) for name in LINKS),
]  # type: ignore[misc]
CASES: list[Case] = QUICK + [
    (f"{make.__name__} as {name}", lambda folder, name=name, make=make: explode(make, folder / name), READERS[name])  # type: ignore[misc]
    for name, makes in BOMBS.items()
    for make in makes
]


def use_unbounded(say: Say, whole: str, scratch: str, numbers: list[int]) -> None:
    """Make the files of each case and read them; says [outcome, text]."""

    def use(number: int, folder: Path) -> tuple[str, str]:
        what, change, read = CASES[number]
        change(folder)
        outcome, text, _ = attempt(lambda: read(folder))
        victim = folder / "victim"
        if victim.exists() and (victim.read_bytes() != b"precious" or victim.stat().st_mode & 0o777 != 0o644):
            outcome, text = DIFFERENT, "a file outside of the store was changed"
        return outcome or "read", f"{what}: {text}"

    try_each(say, whole, scratch, numbers, use)


@promise(
    "Resources are bounded",
    fault="a pipe, a terabyte, a link, or a bomb in place of a file",
    full=len(CASES),
    smoke=True,
    each=3,
)
def test_bounds(trial: Trial, nursery: Nursery, world_with_run: Path) -> None:
    judge(trial, nursery, use_unbounded, world_with_run, trial.folder)
