"""The harness resumes, notices failures, and its disk model loses data that were not synced."""

from __future__ import annotations

import json
import platform
import random
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest

from tests.faults import preload
from tests.faults.disk_images import Disk
from tests.faults.harness import Promise, Trial, Trials, formats, missed_shares, read_record
from tests.faults.nursery import Child, Nursery, Say
from tests.faults.preload import Call
from tests.faults.table import BARS, bars, import_promises, is_old, markdown, own_rows, problems, row_of, summary
from tests.faults.test_power_loss import check_images, runs_of, traced_writer
from vista import files
from vista.errors import StoreError

PROMISE = Promise("name", "text", "fault", full=6, short=2, each=1, shares={"even": 0.5})


def test_an_interrupted_suite_resumes(tmp_path: Path) -> None:
    ran: list[int] = []

    def interrupted(trial: Trial) -> None:
        if trial.number == 3 and 3 not in ran:
            ran.append(3)
            raise KeyboardInterrupt
        ran.append(trial.number)
        trial.count("odd" if trial.number % 2 else "even")

    def trials() -> Trials:
        return Trials(PROMISE, 6, tmp_path / "notes", tmp_path / "scratch")

    with pytest.raises(KeyboardInterrupt):
        trials().run(interrupted)
    with (tmp_path / "notes").open("a") as file:
        file.write('\n{"trial": 3, "seco')  # Truncated by a kill.
    trials().run(interrupted)
    assert ran == [0, 1, 2, 3, 3, 4, 5]
    trials().run(interrupted)
    record = read_record(tmp_path / "notes")
    assert len(ran) == 7 and record is not None and record.counts == {"even": 3, "odd": 3} and len(record.done) == 6
    record.counts["odd"] = 9
    assert missed_shares(PROMISE, record) == "even: 25% instead of 50%"


def test_a_failed_repetition_stays_noted_and_another_commits_do_not_count(tmp_path: Path) -> None:
    def fails_once(trial: Trial) -> None:
        trial.count("even")
        assert trial.number != 1, "broken"

    notes = tmp_path / "notes"
    for _ in range(2):
        with pytest.raises(AssertionError, match="1 of 6 calls failed: 1: AssertionError: broken"):
            Trials(PROMISE, 6, notes, tmp_path / "scratch", keeps_going=True).run(fails_once)
    header, *rows = notes.read_text().splitlines()
    assert len(rows) == 6
    notes.write_text("\n".join([json.dumps({**json.loads(header), "commit": "another"}), *rows]))
    assert not Trials(PROMISE, 6, notes, tmp_path / "scratch").record.done


def leave(say: Say, how: str) -> None:
    """End in one of the possible ways."""
    import ctypes

    say("began")
    if how == "crash":
        ctypes.string_at(0)
    raise {"typed": StoreError, "untyped": ValueError}[how]("text")


@pytest.mark.parametrize(("how", "code", "typed"), [("crash", -11, False), ("typed", 1, True), ("untyped", 1, False)])
def test_how_a_child_ended_is_told_apart(nursery: Nursery, how: str, code: int, typed: bool) -> None:
    child = nursery.start(leave, how).end()
    assert (child.messages, child.exit_code, child.typed) == (["began"], code, typed)
    assert nursery.start(leave, how).pid != child.pid


def test_a_child_that_has_not_started_is_not_killed(nursery: Nursery) -> None:
    """Its process id is 0, which is the process group of the tests."""
    Child(nursery, job=0).kill(signal.SIGKILL)


def unsynced_writer(say: Say, *arguments: Any) -> None:
    """A writer whose LMDB does not sync, which the images must reveal."""
    lmdb.open = partial(lmdb.open, sync=False)  # type: ignore[assignment]
    traced_writer(say, *arguments)


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


def exchange(say: Say, folder: str, log: str) -> None:
    preload.watch(folder, log)
    assert files._exchanged(Path(folder, "x"), Path(folder, "y"))


def test_two_names_are_exchanged_both_or_neither(tmp_path: Path, traced: Nursery) -> None:
    for name in ("x", "y"):
        (tmp_path / "before" / name).mkdir(parents=True)
    shutil.copytree(tmp_path / "before", tmp_path / "disk")
    (tmp_path / "before" / "x" / "file").write_bytes(b"1")
    (tmp_path / "disk" / "x" / "file").write_bytes(b"1")
    traced.start(exchange, tmp_path / "disk", tmp_path / "log").result()
    disk = Disk(tmp_path / "disk", tmp_path / "before")
    disk.take(preload.read_log(tmp_path / "log"))
    assert not disk.unseen(tmp_path / "disk") and disk.not_durable() == ["the name x", "the name y"]
    seen = set()
    for seed in range(20):
        image = tmp_path / str(seed)
        image.mkdir()
        disk.write_image(image, random.Random(seed))
        seen.add(tuple(sorted(str(path.relative_to(image)) for path in image.rglob("*"))))
    assert seen == {("x", "x/file", "y"), ("x", "y", "y/file")}


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


def test_what_exists_at_first_is_durable(tmp_path: Path) -> None:
    before, image = tmp_path / "before", tmp_path / "image"
    for folder in (before / "inner", image):
        folder.mkdir(parents=True)
    (before / "inner" / "x").write_bytes(b"old")
    disk = Disk(Path("/r"), before)
    assert not disk.not_durable()
    disk.take(calls(("c", "y", b""), ("w", "inner/x", b"new"), ("m", "z", b""), ("u", "inner/x", b"")))
    assert disk.not_durable() == ["the name y", "the name z", "the removal of inner/x"]
    disk = Disk(Path("/r"), before)
    disk.write_image(image, random.Random(0))
    assert (image / "inner" / "x").read_bytes() == b"old"


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


def test_the_summary_adds_up_the_outcomes_of_judged_promises() -> None:
    rows = [
        {"promise": "a", "judged": True, "repetitions": 1000, "counts": {"held": 998, "lost": 2}},
        {"promise": "a", "judged": True, "repetitions": 500, "counts": {"held": 498, "lost": 1, "untyped": 1}},
        {"promise": "b", "judged": True, "repetitions": 0},
        {"promise": "c", "judged": False, "repetitions": 9},
    ]
    assert summary(rows).splitlines()[-2:] == [
        "| a | 1,500 | 3 | 0 | 0 | 1 | 0 | 0 | 0 | 0 |",
        "| b | 0 | 0 | 0 | 0 | 0 | 0 | 0 | 0 | 0 |",
    ]


def row(fault: str, repetitions: int, **others: Any) -> dict[str, Any]:
    return {
        "promise": "a",
        "fault": fault,
        "judged": True,
        "repetitions": repetitions,
        "outcome": "held",
        "counts": {"held": repetitions},
        "failures": [],
        **others,
    }


def test_the_repetitions_are_compared_with_the_bars() -> None:
    rows = [row("power cut: images", 9_000, judged=False), row("power cut during a copy: images", 1_000)]
    rows += [row("changed bytes in YAML", 20_000), row("kill -9", 5), row("beyond one machine, kill -9 of a rank", 201)]
    assert not problems(rows)
    assert bars(rows) == (
        "Together, there are 10,000 power-loss images (at least 10,000), 20,000 damaged files (at least 20,000), and "
        "201 kills of ranks, actors, streams, servers, and their clients (at least 200); 0 of them broke a promise (at "
        "most 0)."
    )
    rows[1] = row("power cut during a copy: images", 999, counts={"held": 997, "lost": 2})
    rows[2] = row("changed bytes in YAML", 20_000, judged=False, failures=["one"])
    assert problems(rows) == [
        "power-loss images: 9,999 of at least 10,000, 2 broken",
        "damaged files: 20,000 of at least 20,000, 1 broken",
    ]
    assert "; 3 of them broke" in bars(rows)


def test_promises_that_are_not_complete_are_problems(tmp_path: Path) -> None:
    (tmp_path / "name.jsonl").write_text(json.dumps({"commit": "x", "formats": formats(), "hardware": {}}))
    found = [row_of(PROMISE, tmp_path), row_of(replace(PROMISE, name="other"), tmp_path)]
    found.append(row("fault", 0, outcome="skipped: no compiler"))
    assert problems(found)[:-3] == ["text, fault: held so far", "text, fault: not run"]


def test_a_promise_that_was_not_run_keeps_its_row(tmp_path: Path) -> None:
    """Its formats say whether it still counts."""
    before = row("fault", 6, promise="text", commit="x", formats=formats(), hardware={}, seconds=1.0, wanted=6)
    old = before | {"formats": {"log": 1}}
    assert row_of(PROMISE, tmp_path, [row("another", 3), before]) == before and not is_old(before)
    assert row_of(PROMISE, tmp_path, [old]) == old and problems([old])[0] == "text, fault: older formats"
    assert "| held, older formats |" in markdown([old]) and "formats: log 1;" in markdown([old])
    header = {"commit": "y", "formats": formats(), "hardware": {}}
    lines = [header, {"trial": 0, "seconds": 1, "counts": {"even": 1}, "failure": ""}]
    (tmp_path / "name.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert row_of(PROMISE, tmp_path, [before])["commit"] == "y"


def test_the_full_forms_suffice_for_the_bars() -> None:
    rows = [row(promise.fault, promise.full) for promise in import_promises()]
    for bar in BARS.values():
        assert sum(one["repetitions"] for one in own_rows(rows, bar)) >= bar.least
