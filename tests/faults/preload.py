"""Interface to the library of `preload.c`, for tests and for children of the nursery `traced`."""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

WRITES, SYNCS, NAMES = 1, 2, 4
"""Kinds of calls: writes and truncations; fsync, fdatasync and synchronous writes; creating, renaming and removing
files and folders."""
FOREVER = 1 << 40

_RECORD = struct.Struct("<IIqQQQ")
_SYNCHRONOUS, _FAILED = 1, 2


@dataclass(frozen=True, slots=True)
class Call:
    """A system call in the log."""

    name: str
    """w(rite), t(runcate), s(ync), c(reate), m(kdir), r(ename), x (exchange of names), u(nlink, rmdir)."""
    path: str
    other: str
    """The new name of a renamed file, or the name that is exchanged with `path`."""
    offset: int
    """Start of a write; the size after a truncation; the size of a synced file, or -1 for a synced folder."""
    data: bytes
    synchronous: bool
    """Whether a write is durable when it returns (O_DSYNC)."""
    failed: bool
    """Whether a sync returned an error."""


def compiled(folder: Path) -> Path:
    """Compile the library and return its path."""
    library = folder / "faults.so"
    source = Path(__file__).with_name("preload.c")
    words = ["cc", *shlex.split(os.environ.get("CFLAGS", "")), "-O1", "-shared", "-fPIC", "-o", str(library)]
    done = subprocess.run([*words, str(source), "-ldl", "-lpthread"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library


def watch(folder: str, log: str = "") -> None:
    """In a child: let the library follow calls below `folder`, and write them to `log`."""
    ctypes.CDLL(None).faults_watch(os.fsencode(folder), os.fsencode(log))


def fail_at(kinds: int, number: int, error: int, times: int = 1) -> None:
    """In a child: fail the `number`-th call from now (1 is the next) and `times - 1` more with errno `error`."""
    ctypes.CDLL(None).faults_arm(kinds, ctypes.c_long(number), error, ctypes.c_long(times))


def die_at(number: int) -> None:
    """In a child: kill this process right before the `number`-th call from now of any kind; 0 for none."""
    fail_at(WRITES | SYNCS | NAMES, number or FOREVER, -signal.SIGKILL)


def calls_since(number: int) -> int:
    """In a child: calls of the kinds since `fail_at(kinds, number, …)` or `die_at(number)`."""
    function = ctypes.CDLL(None).faults_count
    function.restype = ctypes.c_long
    return int(function(ctypes.c_long(number or FOREVER)))


def read_log(path: Path) -> Iterator[Call]:
    """All calls of a log, in order."""
    block = path.read_bytes()
    place = 0
    while place < len(block):
        name, flags, offset, *lengths = _RECORD.unpack_from(block, place)
        place += _RECORD.size
        parts = []
        for length in lengths:
            parts.append(block[place : place + length])
            place += length
        yield Call(
            chr(name), os.fsdecode(parts[0]), os.fsdecode(parts[1]), offset, parts[2],
            bool(flags & _SYNCHRONOUS), bool(flags & _FAILED),
        )  # fmt: skip
