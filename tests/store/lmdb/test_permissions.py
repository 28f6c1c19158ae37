"""Modes of every file and folder of a store, whatever the umask, and what another account can do with them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vista.errors import StoreError
from vista.store import StoreReader
from vista.store.admin.copying import copy_generation
from vista.store.admin.rollback import roll_back
from vista.store.admin.store_compaction import compact_store
from vista.store.admin.store_stats import store_stats
from vista.store.admin.verification import verify_store
from vista.store.layout import environment_path

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
    StoreReader.open(root).close()


def test_a_store_is_private(tmp_path, build, umask):
    root = tmp_path / "store"
    two_generations(build, root)
    assert modes(root) == dict.fromkeys(FOLDERS, 0o700) | dict.fromkeys(
        FILES | LOCKS | {"erase.lock", "writer.lock"}, 0o600
    )


def test_a_store_for_a_group(tmp_path, build, umask):
    root = tmp_path / "store"
    two_generations(build, root, shared_with_group=True)
    expected = dict.fromkeys(FOLDERS, 0o2750) | dict.fromkeys(FILES, 0o640) | dict.fromkeys(LOCKS, 0o660)
    assert modes(root) == expected | {"erase.lock": 0o600, "writer.lock": 0o600}


def test_a_store_becomes_shared_and_private_again(tmp_path, build):
    root = tmp_path / "store"
    two_generations(build, root)
    private = modes(root)
    build.open_writer(root, run_digest="log-2", shared_with_group=True).close()
    shared = modes(root)
    assert shared["."] == 0o2750 and shared["CURRENT"] == 0o640 and shared["gen-1/summary/lock.mdb"] == 0o660
    (environment_path(root, 2) / "lock.mdb").unlink()  # The next reader recreates it with the same mode.
    StoreReader.open(root).close()
    assert modes(root) == shared
    build.open_writer(root, run_digest="log-2").close()
    assert {name: mode for name, mode in modes(root).items() if not name.startswith("gen-3")} == private


def test_a_folder_with_other_contents_keeps_its_mode(tmp_path, build):
    tmp_path.chmod(0o755)
    (tmp_path / "notes.txt").write_text("mine")
    build.write_store(tmp_path)
    after = modes(tmp_path)
    assert after["."] == 0o755 and after["gen-1"] == 0o700 and after["CURRENT"] == 0o600


def test_another_account_reads_a_store_of_its_group_and_no_other(build, as_other_account):
    def read() -> Any:
        with StoreReader.open(root) as store:
            return store.get_many([3]).found.tolist()

    root = as_other_account.folder / "store"
    root.mkdir()
    os.chown(root, -1, as_other_account.group)
    two_generations(build, root, shared_with_group=True)
    assert as_other_account(read) == [True]
    (environment_path(root, 2) / "lock.mdb").chmod(0o640)
    assert "Readers also need write access to lock.mdb" in str(as_other_account(read))
    (environment_path(root, 2) / "lock.mdb").unlink()  # which it cannot recreate either
    assert "Readers also need write access to lock.mdb" in str(as_other_account(read))
    build.write_store(root, run_digest="log-3")
    error = as_other_account(read)
    assert isinstance(error, StoreError) and "permission" in str(error).lower()


def test_another_account_cannot_write_and_is_told_what_to_do(build, as_other_account):
    root = as_other_account.folder / "store"
    root.mkdir()
    os.chown(root, -1, as_other_account.group)
    two_generations(build, root, shared_with_group=True)

    def forms() -> dict[Path, tuple[int, ...]]:
        paths = [path for path in root.rglob("*") if path.name != "lock.mdb"]
        return {path: (path.stat().st_mode, path.stat().st_size, path.stat().st_ctime_ns) for path in paths}

    before = forms()
    for act in (
        lambda: build.open_writer(root, run_digest="log-3"),
        lambda: build.open_writer(root, run_digest="log-3", shared_with_group=True),
        lambda: compact_store(root),
        lambda: roll_back(root),
        lambda: copy_generation(root, as_other_account.folder / "target"),
    ):
        error = as_other_account(act)
        assert isinstance(error, StoreError) and "cannot be written" in str(error) and "permissions" in str(error), (
            error
        )
    assert before == forms()
    assert as_other_account(lambda: verify_store(root).num_problems) == 0
    assert "gen-2 is published" in as_other_account(lambda: str(store_stats(root)))
