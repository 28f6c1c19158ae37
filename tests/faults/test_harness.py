"""The harness can fail: it notices broken promises, lost writes, and calls that it cannot follow."""

from __future__ import annotations

import platform
import random
import re
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest

import vista
from tests.faults import preload, table
from tests.faults.disk_images import Disk
from tests.faults.harness import Promise, formats, run_all
from tests.faults.nursery import Nursery, Say
from tests.faults.preload import Call
from tests.faults.test_power_loss import check_images, runs_of, traced_writer

PROMISE = Promise("text", "fault", full=6, test="file::test_name[full]", shares={"even": 0.5})


def test_the_table_tells_what_is_missing_or_old(tmp_path: Path) -> None:
    rows = [table.row_of(PROMISE, tmp_path)]
    assert rows[0]["outcome"] == "not run"
    run_all(PROMISE, lambda trial: trial.count("even"), tmp_path / "name-full.jsonl", tmp_path / "scratch")
    rows.append(table.row_of(PROMISE, tmp_path))
    rows.append(rows[1] | {"formats": formats() | {"log": 1}, "failures": ["why"], "outcome": "FAILED: why"})
    assert not table.is_old(rows[1]) and table.is_old({key: rows[1][key] for key in rows[1] if key != "formats"})
    found = table.problems(rows)
    assert found[:3] == ["text, fault: not run", "text, fault: FAILED: why", "text, fault: older formats"]
    assert len(found) == 3 + len(table.BARS) and "power-loss images: 0 of at least 5,000, 0 broken" in found
    page = table.markdown(rows)
    assert f"- 1 of 3 promises: commit {rows[1]['commit']}; formats: log {formats()['log']}, record" in page
    assert "log 1, record" in page and "(older than the current formats)" in page and "| text | 12 | 1 |" in page
    assert "| text | fault | 6 | held | even 6 |" in page and "| text | fault | 0 of 6 | not run |  |" in page


def unsynced_writer(say: Say, *arguments: Any) -> None:
    """A writer whose LMDB does not sync, which the images must reveal."""
    lmdb.open = partial(lmdb.open, sync=False)  # type: ignore[assignment]
    traced_writer(say, *arguments)


def test_every_version_of_a_format_makes_rows_old() -> None:
    sources = (path.read_text(encoding="utf-8") for path in Path(vista.__file__).parent.rglob("*.py"))
    assert len(formats()) == sum(
        len(re.findall(r"^(?:[A-Z][A-Z_, ]*)?VERSION = ", source, re.MULTILINE)) for source in sources
    )


def test_images_show_a_writer_that_does_not_sync(tmp_path: Path, traced: Nursery) -> None:
    folder, words = tmp_path.resolve() / "disk", [run.words for run in runs_of(0)]
    folder.mkdir()
    traced.call(unsynced_writer, folder, words, tmp_path / "log")
    checker = traced.start(check_images, folder, tmp_path / "log", words, tmp_path, 0).end()
    assert checker.exit_code != 0 and not checker.raised.startswith("AssertionError: an empty log"), checker.raised


def calls(*words: tuple[str, str, bytes]) -> list[Call]:
    return [
        Call(name, f"/r/{path}", f"/r/{data.decode()}", 0, data, synchronous=False, failed=name == "f")
        for name, path, data in words
    ]


def synced(path: str, size: int) -> Call:
    return Call("s", f"/r/{path}", "", size, b"", synchronous=False, failed=False)


def test_the_disk_loses_tears_and_keeps_what_it_may(tmp_path: Path) -> None:
    disk = Disk(Path("/r"))
    first, second = b"a" * 1024, b"b" * 1024
    disk.take([*calls(("c", "x", b""), ("w", "x", first)), synced("x", 1024), synced("", -1)])
    disk.take(calls(("w", "x", second), ("c", "y", b""), ("r", "y", b"z")))
    contents, names = set(), set()
    for seed in range(200):
        image = tmp_path / str(seed)
        image.mkdir()
        disk.write_image(image, random.Random(seed))
        contents.add((image / "x").read_bytes())
        names.add(tuple(sorted(path.name for path in image.iterdir())))
    halves = {left * 512 + right * 512 for left in (b"a", b"b") for right in (b"a", b"b")}
    assert contents == halves
    assert names == {("x",), ("x", "y"), ("x", "z")}


def test_a_write_that_was_not_seen_is_noticed(tmp_path: Path) -> None:
    disk = Disk(Path("/r"))
    disk.take(calls(("c", "x", b""), ("w", "x", b"seen")))
    with pytest.raises(AssertionError, match=r"x has 9 bytes, and 4 of them were seen"):
        disk.take([synced("x", 9)])
    (tmp_path / "x").write_bytes(b"sEen")
    (tmp_path / "y").mkdir()
    assert disk.unseen(tmp_path) == ["x", "y/"]


def test_a_failed_sync_loses_data_and_keeps_the_size(tmp_path: Path) -> None:
    disk = Disk(Path("/r"))
    failed = replace(synced("x", 6), failed=True)
    disk.take([*calls(("c", "x", b""), ("w", "x", b"lost..")), failed, *calls(("w", "x", b"new"))])
    disk.take([synced("x", 6), synced("", -1)])
    disk.write_image(tmp_path, random.Random(0))
    assert (tmp_path / "x").read_bytes() == b"new" + bytes(3)


def unlogged(say: Say, folder: str, log: str, how: str) -> None:
    """Change a watched folder by a call that needs care."""
    import ctypes
    import mmap
    import os

    preload.watch(folder, log)
    path, other = f"{folder}/x", f"{folder}/y"
    with open(path, "wb", buffering=0) as file:
        file.write(bytes(4096))
    match how:
        case "buffered":
            np.save(other, np.arange(10**5))
            with open(f"{other}.npy", "rb") as file:
                os.fsync(file.fileno())
        case "raw rename":
            ctypes.CDLL(None).syscall(82, path.encode(), other.encode())  # SYS_rename
            with open(other, "rb") as file:
                os.fsync(file.fileno())
        case "link":
            os.link(path, other)
        case "truncate":
            os.truncate(path, 9)
        case "copy":
            os.sendfile(os.open(other, os.O_WRONLY | os.O_CREAT), os.open(path, os.O_RDONLY), 0, 9)
        case "map":
            with open(path, "r+b") as file:
                mmap.mmap(file.fileno(), 0)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers of system calls")
@pytest.mark.parametrize("how", ["raw rename", "buffered"])
def test_raw_renames_and_buffered_writes_are_logged(tmp_path: Path, traced: Nursery, how: str) -> None:
    folder, log = tmp_path.resolve() / "disk", tmp_path / "log"
    folder.mkdir()
    traced.call(unlogged, folder, log, how)
    disk = Disk(folder)
    disk.take(preload.read_log(log))
    assert not disk.unseen(folder)


@pytest.mark.parametrize("how", ["link", "truncate", "copy", "map"])
def test_calls_that_cannot_be_logged_end_the_process(tmp_path: Path, traced: Nursery, how: str) -> None:
    folder = tmp_path.resolve() / "disk"
    folder.mkdir()
    assert traced.start(unlogged, folder, tmp_path / "log", how).end().exit_code == -signal.SIGABRT


def test_the_planned_repetitions_reach_the_bars() -> None:
    promises = table.import_promises()
    for begins, least in table.BARS.values():
        assert sum(promise.full for promise in promises if promise.fault.startswith(begins)) >= least, begins
