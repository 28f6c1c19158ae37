"""Inputs without a bound: each ends in a typed error or is read, with at most 1 GiB of memory and 10 seconds.

A named pipe, a terabyte or a symbolic link in place of each file, and small files that unpack to gigabytes.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.faults import bombs, operations
from tests.faults.harness import Trial, promise
from tests.faults.judging import DIFFERENT, MAX_TEXT, attempt, judge, outcomes
from tests.faults.nursery import Nursery, Say
from tests.faults.operations import OPERATIONS
from tests.faults.test_mutations import MOST_SECONDS, limit_resources
from vista.config import PrepareConfig, SourceConfig, TrainConfig
from vista.config.composition import compose_config
from vista.log.ingest.prepare import prepare
from vista.store.format.authentication import read_key
from vista.training.checkpoint import latest_checkpoint, load_checkpoint

Change = Callable[[Path], None]
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
    prepare(PrepareConfig(out=str(folder / "made"), events=source, progress=False), parser=operations.parser())


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
    "key": lambda folder: read_key(str(folder / "key")) and None,
}
"""File -> what reads it."""
SOURCES = ("day.csv", "day.csv.gz", "day.parquet", "events.npz")
LINKS = ("writer.lock", "erase.lock", "CURRENT", "CURRENT.tmp", "LAST", "LAST.tmp", "tombstones", "refresh.jsonl")
SLOW: dict[str, Change] = {"day.csv.gz": bombs.csv_gz, "day.parquet": bombs.parquet, "events.npz": bombs.npz}
BOMBS: dict[str, list[Change]] = {
    "train.yaml": [bombs.yaml_aliases, bombs.yaml_cycle, bombs.yaml_deep, bombs.yaml_long],
    "day.csv": [bombs.csv_line, bombs.csv_columns],
    **{name: [make] for name, make in SLOW.items()},
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
NUM_SHORT = len(CASES) - len(SLOW)


def use_unbounded(say: Say, world: str, scratch: str, numbers: list[int]) -> None:
    """Make the files of each case and read them; says [outcome, text]."""
    logging.disable(logging.CRITICAL)
    limit_resources()
    whole = Path(scratch, "whole")
    shutil.copytree(world, whole, dirs_exist_ok=True)  # another child may have died
    operations.checkpoints(whole)
    for number in numbers:
        what, change, read = CASES[number]
        folder = Path(scratch, str(number))
        shutil.copytree(whole, folder)
        change(folder)
        signal.alarm(MOST_SECONDS)
        outcome, text, _ = attempt(partial(read, folder))
        signal.alarm(0)
        victim = folder / "victim"
        if victim.exists() and (victim.read_bytes() != b"precious" or victim.stat().st_mode & 0o777 != 0o644):
            outcome, text = DIFFERENT, "a file outside of the store was changed"
        say([outcome or "read", f"{what}: {text}"[:MAX_TEXT]])


@promise(
    "Resources are bounded",
    fault="a pipe, a terabyte, a link, or a bomb in place of a file",
    judged=True,
    full=len(CASES),
    short=NUM_SHORT,
    each=3,
)
def test_bounds(trial: Trial, nursery: Nursery, world: Path) -> None:
    judge(trial, outcomes(nursery, use_unbounded, world, trial.folder, numbers=list(trial.numbers), timeout_s=120))
