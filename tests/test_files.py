"""Reads with a limit, and atomic, durable writes."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from vista import files
from vista.errors import ConfigError, DataError, StoreError, UnknownUserError
from vista.files import (
    HashedFile,
    checked_path,
    make_folders,
    open_file,
    read_limited,
    recover_folder,
    remove_folder,
    replace_file,
    replaced_folder,
    writable_file,
    writable_folder,
)


def test_a_file_at_the_limit_is_read_and_one_above_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_limited(path, 5) == b"12345"
    with pytest.raises(OSError, match="holds 5 bytes, but at most 4 are read") as caught:
        read_limited(path, 4)
    assert caught.value.errno == errno.EFBIG


def test_a_high_limit_allocates_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    tracemalloc.start()
    assert read_limited(tmp_path / "file", 1 << 30) == b"12345"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_named_pipe_or_folder_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR | os.O_CREAT):
        with pytest.raises(OSError, match="is not a regular file"):
            open_file(tmp_path / "pipe", flags)
    with pytest.raises(OSError, match="is not a regular file"):
        open_file(tmp_path)


def test_a_link_is_followed_only_where_that_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1")
    (tmp_path / "link").symlink_to("file")
    assert read_limited(tmp_path / "link", 1) == b"1"
    with pytest.raises(OSError, match="is a symbolic link; remove it"):
        read_limited(tmp_path / "link", 1, follow=False)


@pytest.mark.parametrize("path", ["a\0b", "\ud800"])
def test_what_cannot_be_a_path_cannot_be_opened(path: str) -> None:
    with pytest.raises(OSError, match="cannot be a path"):
        open_file(Path(path))


@pytest.mark.parametrize("path", ["x" * 300, "x/" * 3000, "a\0b", "\ud800"], ids=lambda path: repr(path[:6]))
def test_a_path_that_the_system_does_not_accept_is_a_typed_error(path: str) -> None:
    with pytest.raises(StoreError, match="cannot be a path") as caught:
        checked_path(path, StoreError)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("path", ["", "/", "missing/folder", "x" * 180, "/dev/null"])
def test_other_paths_are_returned(path: str) -> None:
    assert checked_path(path, StoreError) == Path(path)


def test_a_link_that_refers_to_itself_is_left_to_the_caller(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert checked_path(tmp_path / "loop" / "x", StoreError) == tmp_path / "loop" / "x"


@pytest.mark.parametrize("folder", ["", ".", "..", "/"])
def test_only_a_folder_with_a_name_can_be_replaced(folder: str) -> None:
    with pytest.raises(OSError, match="by its name only"), replaced_folder(Path(folder)):
        pytest.fail("replaced")


class Stopped(BaseException):
    """Stands for the end of a killed process."""


def write(folder: Path, content: str) -> None:
    """Replace a folder by one with a file."""
    with replaced_folder(folder) as partial:
        (partial / "file").write_text(content)


def test_the_folder_is_there_at_any_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "folder", "old")
    seen = []
    for name in ("_exchanged", "remove_renamed", "sync"):  # the calls that change names
        call = getattr(files, name)

        def watched(*paths: Path, call: Callable[..., Any] = call) -> Any:
            seen.append((tmp_path / "folder" / "file").read_text())
            done = call(*paths)
            seen.append((tmp_path / "folder" / "file").read_text())
            return done

        monkeypatch.setattr(files, name, watched)
    write(tmp_path / "folder", "new")
    assert seen == sorted(seen, reverse=True) and set(seen) == {"old", "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_where_names_cannot_be_exchanged_a_kill_between_two_renames_is_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "folder", "old")
    rename = Path.rename

    def stop(path: Path, target: Path) -> Path:
        if target.name == "folder":
            raise Stopped
        return rename(path, target)

    monkeypatch.setattr(files, "_exchanged", lambda one, other: False)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Path, "rename", stop)
        write(tmp_path / "folder", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.old"]
    recover_folder(tmp_path / "folder")
    assert (tmp_path / "folder" / "file").read_text() == "old"
    write(tmp_path / "folder", "new")
    assert (tmp_path / "folder" / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_leftovers_of_killed_processes_are_removed_and_those_of_others_stay(tmp_path: Path) -> None:
    left, busy = tmp_path / ".folder.1.tmp", tmp_path / ".folder.2.tmp"
    left.mkdir()
    busy.mkdir()
    handle = os.open(busy, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    write(tmp_path / "folder", "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == [busy.name, "folder"]
    os.close(handle)
    write(tmp_path / "folder", "newer")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_link_is_replaced_and_its_target_stays(tmp_path: Path) -> None:
    write(tmp_path / "target", "old")
    (tmp_path / "folder").symlink_to("target")
    write(tmp_path / "folder", "new")
    assert (tmp_path / "target" / "file").read_text() == "old"
    assert not (tmp_path / "folder").is_symlink() and (tmp_path / "folder" / "file").read_text() == "new"


def test_replaces_a_link_and_leaves_its_target(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"kept")
    (tmp_path / "file").symlink_to("victim")
    replace_file(tmp_path / "file", b"new", 0o640)
    assert (tmp_path / "victim").read_bytes() == b"kept"
    assert (tmp_path / "file").read_bytes() == b"new" and not (tmp_path / "file").is_symlink()
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(OSError):
        replace_file(tmp_path / "file", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("link", [False, True])
def test_a_pipe_or_device_is_not_replaced(tmp_path: Path, link: bool) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    with pytest.raises(OSError, match="is not a regular file"):
        replace_file(tmp_path / ("link" if link else "pipe"), b"new")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode) and (tmp_path / "link").is_symlink()


def test_without_a_mode_the_umask_decides(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        replace_file(tmp_path / "file", b"new")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_the_check_of_a_folder_does_not_write_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"kept")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / f".probe.{os.getpid()}.tmp").symlink_to(tmp_path / "victim")
    writable_folder(tmp_path / "folder", "run_dir")
    assert (tmp_path / "victim").read_bytes() == b"kept"
    assert list((tmp_path / "folder").iterdir()) == []


@pytest.mark.parametrize("place", ["", "run", "segment-000001-000003/run", "link/run"])
def test_a_folder_in_an_event_log_is_not_written(tmp_path: Path, place: str) -> None:
    (tmp_path / "log" / "segment-000001-000003").mkdir(parents=True)
    (tmp_path / "log" / "segment-000001-000003" / "manifest.json").touch()
    (tmp_path / "log" / "link").symlink_to("segment-000001-000003")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        ConfigError, match=rf"^run_dir=\S*: lies in the EventLog {tmp_path}/log; choose another folder$"
    ):
        writable_folder(tmp_path / "log" / place, "run_dir")
    with pytest.raises(ConfigError, match=r"^out=\S*: lies in the EventLog"):
        writable_file(tmp_path / "log" / place / "report.html", "out")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["run.json", "best/config.json", "checkpoints/x.json"])
def test_the_files_of_a_run_are_not_replaced(tmp_path: Path, name: str) -> None:
    (tmp_path / "run" / "best").mkdir(parents=True)
    (tmp_path / "link").symlink_to("run")
    for path in (tmp_path / "run" / name, tmp_path / "link" / name):
        writable_file(path, "out")  # the folder is not a run
    for file in ("run.json", "train.log"):
        (tmp_path / "run" / file).touch()
    for path in (tmp_path / "run" / name, tmp_path / "link" / name):
        with pytest.raises(ConfigError, match=rf"^out={path}: belongs to the run {tmp_path}/run; name another file$"):
            writable_file(path, "out")
    writable_file(tmp_path / "run" / "report.html", "out")
    (tmp_path / "run.json").touch()
    writable_file(tmp_path / "run.json", "out")  # perhaps of the same command


def test_makes_all_parents_and_accepts_what_exists(tmp_path: Path) -> None:
    for _ in range(2):
        make_folders(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c").is_dir()


def test_processes_that_make_the_same_folder_do_not_collide(tmp_path: Path) -> None:
    failures: list[OSError] = []

    def make() -> None:
        try:
            make_folders(tmp_path / "a" / "b")
        except OSError as error:
            failures.append(error)

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_file_in_the_way_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    for folder in (tmp_path / "a", tmp_path / "a" / "b"):
        with pytest.raises(NotADirectoryError):
            make_folders(folder)


def test_a_folder_is_removed_with_what_an_earlier_removal_left(tmp_path: Path) -> None:
    for name in ("folder", ".removed"):
        make_folders(tmp_path / name / "sub")
    remove_folder(tmp_path / "folder", tmp_path / ".removed")
    assert not list(tmp_path.iterdir())


def test_the_name_is_durable_before_any_file_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    fsync, unlink, rename = os.fsync, os.unlink, os.rename
    monkeypatch.setattr(os, "fsync", lambda descriptor: (steps.append("sync"), fsync(descriptor)))
    monkeypatch.setattr(os, "unlink", lambda *a, **b: (steps.append("unlink"), unlink(*a, **b)))
    monkeypatch.setattr(os, "rename", lambda *a: (steps.append("rename"), rename(*a)))
    for name in ("folder", "left"):  # `left` is that of a killed removal
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(b"")
    remove_folder(tmp_path / "folder", tmp_path / "left")
    assert steps == ["sync", "unlink", "rename", "sync", "unlink"]


def test_the_hash_of_a_file_covers_all_that_numpy_writes(tmp_path: Path) -> None:
    rows = np.arange(24, dtype="<i8").reshape(4, 6)
    with (tmp_path / "rows.npy").open("wb") as file:
        hashed = HashedFile(file)
        np.lib.format.write_array(hashed, rows)
    content = (tmp_path / "rows.npy").read_bytes()
    assert (hashed.size, hashed.hexdigest()) == (len(content), xxhash.xxh3_64_hexdigest(content))
    assert np.array_equal(np.load(tmp_path / "rows.npy"), rows)


@pytest.mark.parametrize("error", [DataError, UnknownUserError])
def test_the_text_of_an_error_is_bounded(error: type[Exception]) -> None:
    text = str(error(f"user {'x' * 10**6} is unknown"))
    assert len(text) < 4_100 and text.startswith("user xx") and text.endswith("is unknown")
    assert "characters left out" in text
    assert str(error("short")) == "short"
