"""Modes of every file and folder of a store, whatever the umask, and what another account can do with them."""

from __future__ import annotations

import multiprocessing
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vista.errors import StoreError
from vista.store import SummaryStore
from vista.store.layout import environment_path

READER, GROUP = 60_001, 60_002

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


@pytest.fixture(params=[0, 0o022, 0o077, 0o777], ids=lambda mask: f"umask-{mask:03o}")
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


def modes(root: Path) -> dict[str, int]:
    return {str(path.relative_to(root)): stat.S_IMODE(path.stat().st_mode) for path in [root, *root.rglob("*")]}


FOLDERS = {".", "gen-1", "gen-1/summary", "gen-2", "gen-2/summary"}
LOCKS = {"gen-1/summary/lock.mdb", "gen-2/summary/lock.mdb"}
FILES = {"CURRENT", "LAST", "gen-1/summary/data.mdb", "gen-2/summary/data.mdb"}


def two_generations(build: Any, root: Path, **options: Any) -> None:
    for digest in ("log-1", "log-2"):
        build.write_store(root, run_digest=digest, **options)
    SummaryStore.open(root).close()


def test_a_store_is_private(tmp_path, build, umask):
    root = tmp_path / "store"
    two_generations(build, root)
    assert modes(root) == dict.fromkeys(FOLDERS, 0o700) | dict.fromkeys(
        FILES | LOCKS | {"tombstones", "writer.lock"}, 0o600
    )


def test_a_store_for_a_group(tmp_path, build, umask):
    root = tmp_path / "store"
    two_generations(build, root, shared_with_group=True)
    expected = dict.fromkeys(FOLDERS, 0o2750) | dict.fromkeys(FILES, 0o640) | dict.fromkeys(LOCKS, 0o660)
    assert modes(root) == expected | {"tombstones": 0o600, "writer.lock": 0o600}


def test_a_store_becomes_shared_and_private_again(tmp_path, build):
    root = tmp_path / "store"
    two_generations(build, root)
    private = modes(root)
    build.open_writer(root, run_digest="log-2", shared_with_group=True).close()
    shared = modes(root)
    assert shared["."] == 0o2750 and shared["CURRENT"] == 0o640 and shared["gen-1/summary/lock.mdb"] == 0o660
    (environment_path(root, 2) / "lock.mdb").unlink()  # Whoever makes it anew makes it as it was.
    SummaryStore.open(root).close()
    assert modes(root) == shared
    build.open_writer(root, run_digest="log-2").close()
    assert {name: mode for name, mode in modes(root).items() if not name.startswith("gen-3")} == private


def test_a_folder_that_holds_something_else_keeps_its_mode(tmp_path, build):
    tmp_path.chmod(0o755)
    (tmp_path / "notes.txt").write_text("mine")
    build.write_store(tmp_path)
    found = modes(tmp_path)
    assert found["."] == 0o755 and found["gen-1"] == 0o700 and found["CURRENT"] == 0o600


def as_reader(function: Callable[[], Any]) -> Any:
    """Result of a function in a child of another account, which belongs to the group GROUP."""
    receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)

    def call() -> None:
        os.setgroups([])
        os.setgid(GROUP)
        os.setuid(READER)
        try:
            sender.send(function())
        except StoreError as error:
            sender.send(error)

    child = multiprocessing.get_context("fork").Process(target=call)
    child.start()
    assert receiver.poll(20), "the child hangs"
    result = receiver.recv()
    child.join(20)
    return result


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be several accounts")
def test_another_account_reads_a_store_of_its_group_and_no_other(tmp_path, build):
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and len(folder.parts) > 2:
            folder.chmod(folder.stat().st_mode | 0o011)

    def read() -> Any:
        with SummaryStore.open(root) as store:
            return store.get_many([3]).found.tolist()

    root = tmp_path / "store"
    root.mkdir()
    os.chown(root, -1, GROUP)
    two_generations(build, root, shared_with_group=True)
    assert as_reader(read) == [True]
    (environment_path(root, 2) / "lock.mdb").chmod(0o640)
    assert "Readers too need write access to lock.mdb" in str(as_reader(read))
    build.write_store(root, run_digest="log-3")
    error = as_reader(read)
    assert isinstance(error, StoreError) and "permission" in str(error).lower()
