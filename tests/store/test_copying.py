"""Copies of generations: equal to the source, resumable after any kill, and published only when complete."""

from __future__ import annotations

import os
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.store.conftest import KEY, damage_record, killed_at, records, write_generations
from vista.errors import StoreBusyError, StoreError, StoreLockedError
from vista.store import StoreReader, folder_writer, user_keys
from vista.store.admin import compact_store, copy_generation, verify_store
from vista.store.folder_files import Tombstones, erasure_lock
from vista.store.folder_generation import FolderGeneration
from vista.store.folder_writer import FolderBuilder
from vista.store.layout import (
    Shard,
    environment_path,
    list_generations,
    published_or_none,
    read_current,
    shards_of,
)
from vista.store.parquet import export_store, import_store
from vista.store.writer import erase

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
THREE_BATCHES = {"total_users": 2500, "batch": 500}
"""Generations are read and copied in batches of 1,024 users."""


def test_a_copy_is_equal_and_published(tmp_path, build):
    source, target = tmp_path / "source", tmp_path / "host" / "store"
    build.write_store(source, key=KEY)
    report = copy_generation(source, target, key=KEY, shared_with_group=True)
    assert (report.generation, report.num_records, report.num_resumed, report.published) == (1, 40, 0, True)
    assert records(target, 1, KEY) == records(source, 1, KEY)
    assert sorted(path.name for path in target.iterdir()) == ["CURRENT", "LAST", "erase.lock", "gen-1", "writer.lock"]
    assert verify_store(target, key=KEY).num_problems == 0
    assert environment_path(target, 1).stat().st_mode & 0o7777 == 0o2750
    with StoreReader.open(target, summarizer_id=build.summarizer(), key=KEY) as store:
        np.testing.assert_allclose(store.get_many(range(40)).summary, build.summaries(range(40)), atol=0.02)


def test_a_two_step_rollout_keeps_the_previous_generation(tmp_path, build):
    source, target = tmp_path / "source", tmp_path / "target"
    for salt, digest in enumerate(("log-1", "log-2", "log-3")):
        build.write_store(source, salt=salt, run_digest=digest)
        if salt < 2:
            copy_generation(source, target)
    assert read_current(target) == 2 and list_generations(target) == [1, 2]
    with StoreReader.open(target) as store:
        report = copy_generation(source, target, publish=False)
        assert not report.published and "not published yet" in str(report)
        assert not store.reload() and store.generation == 2
        report = copy_generation(source, target)
        assert report.num_resumed == 40 and store.reload() and store.generation == 3
    assert list_generations(target) == [2, 3]
    assert "is published" in str(copy_generation(source, target, publish=False))
    assert copy_generation(source, target, generation=2).generation == 2 and read_current(target) == 2


def test_no_generation_is_removed_if_current_is_damaged(tmp_path, build):
    source, target = tmp_path / "source", tmp_path / "target"
    build.write_store(source, 9)
    export_store(source, tmp_path / "all.parquet")
    write_generations(target)
    (target / "CURRENT").write_bytes(bytes(6))
    assert copy_generation(source, target).generation == 3
    assert (read_current(target), list_generations(target)) == (3, [1, 2, 3])
    (target / "CURRENT").write_bytes(bytes(6))
    import_store(tmp_path / "all.parquet", target)
    assert (read_current(target), list_generations(target)) == (4, [1, 2, 3, 4])
    assert verify_store(target).num_problems == 0


def killed_copy(source: Path, target: Path, batches: int) -> int:
    """Exit code of a copy that is killed after it has written some batches."""
    return killed_at(batches, FolderBuilder, "put", lambda: copy_generation(source, target), after=True)


def test_a_killed_copy_resumes(tmp_path, build):
    source, target = tmp_path / "source", tmp_path / "target"
    build.write_store(source, **THREE_BATCHES)
    for batches in (1, 1):
        assert killed_copy(source, target, batches) == -9
        assert not (target / "CURRENT").exists() and list_generations(target) == []
    report = copy_generation(source, target)
    assert report.num_resumed == 2048 and report.num_records == 2500
    assert records(target, 1) == records(source, 1)


def test_a_killed_copy_starts_over_if_the_source_has_changed(tmp_path, build, caplog):
    source, target = tmp_path / "source", tmp_path / "target"
    build.write_store(source, **THREE_BATCHES)
    assert killed_copy(source, target, 2) == -9
    shutil.rmtree(source)
    build.write_store(source, salt=1, **THREE_BATCHES)
    report = copy_generation(source, target)
    assert report.num_resumed == 0 and "starts over" in caplog.text
    assert records(target, 1) == records(source, 1)


def test_a_copy_starts_over_if_its_partial_file_is_not_a_database(tmp_path, build, caplog):
    source, target = tmp_path / "source", tmp_path / "target"
    build.write_store(source)
    assert killed_copy(source, target, 1) == -9
    (target / ".partial-gen-1" / "summary" / "data.mdb").write_bytes(b"PAR1" * 4000)
    assert copy_generation(source, target).num_resumed == 0 and "starts over" in caplog.text
    assert records(target, 1) == records(source, 1)


def test_a_damaged_source_is_not_copied(tmp_path, build):
    source, target = tmp_path / "source", tmp_path / "target"
    build.write_store(source)
    copy_generation(source, target)
    build.write_store(source, salt=1, run_digest="log-2")
    data, whole = environment_path(source, 2) / "data.mdb", damage_record(source, 2, 20)
    with pytest.raises(StoreError, match="user 20"):
        copy_generation(source, target)
    data.write_bytes(whole[:-4096])
    with pytest.raises(StoreError, match="truncated"):
        copy_generation(source, target)
    assert read_current(target) == 1 and list_generations(target) == [1]
    data.write_bytes(whole)
    assert copy_generation(source, target).generation == 2


def erased_before_the_copy_ends(tmp_path: Path, build: Any, patch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A source and its target, where user 3 is erased from the target just before the next copy gets its name."""
    source, target, finish = tmp_path / "source", tmp_path / "target", FolderBuilder.finish
    build.write_store(source)
    copy_generation(source, target)
    build.write_store(source, salt=1, run_digest="log-2")

    def erase_and_finish(builder: FolderBuilder) -> Any:
        assert erase(target, [3]) == 1
        return finish(builder)

    patch.setattr(FolderBuilder, "finish", erase_and_finish)
    return source, target


def test_a_user_who_is_erased_just_before_a_copy_gets_its_name_is_not_in_it(tmp_path, build, monkeypatch):
    source, target = erased_before_the_copy_ends(tmp_path, build, monkeypatch)
    report = copy_generation(source, target, publish=False)
    assert (report.generation, report.num_records) == (2, 39)
    assert set(records(target, 2)) == set(user_keys([user for user in range(40) if user != 3]))
    assert verify_store(target).records == {1: 39, 2: 39} and verify_store(target).num_problems == 0


def test_a_copy_killed_after_it_got_its_name_has_no_user_who_was_erased_meanwhile(tmp_path, build, monkeypatch):
    with monkeypatch.context() as patch:
        source, target = erased_before_the_copy_ends(tmp_path, build, patch)
        copy = partial(copy_generation, source, target, publish=False)
        assert killed_at(1, folder_writer, "record_complete", copy) == -signal.SIGKILL
    assert user_keys([3])[0] not in records(target, 2) and len(records(target, 2)) == 39


@pytest.mark.parametrize("publish", [True, False])
def test_a_copy_that_an_interrupted_erasure_left_is_not_used(tmp_path, build, publish):
    source, target = tmp_path / "source", tmp_path / "target"
    build.write_store(source)
    copy_generation(source, target, publish=False)
    with erasure_lock(target):
        Tombstones(target).add(user_keys([3]))
    with pytest.raises(StoreError, match="some users were erased here, but are still in"):
        copy_generation(source, target, publish=publish)
    assert published_or_none(target) is None


@pytest.mark.parametrize(
    "write", [lambda build, source, to: copy_generation(source, to), lambda build, source, to: build.write_store(to)]
)
def test_no_one_writes_users_of_other_shards(tmp_path, build, write):
    build.write_store(tmp_path / "store")
    index = int(shards_of(user_keys([0]), 2)[0])
    to = Shard(1 - index, 2).path(tmp_path)
    with pytest.raises(StoreError, match=f"user 0 belongs to shard {index} of 2, not to shard {1 - index}"):
        write(build, tmp_path / "store", to)
    assert published_or_none(to) is None


def test_invalid_copies_are_refused(tmp_path, build):
    source, target = tmp_path / "source", tmp_path / "target"
    build.write_store(source)
    with pytest.raises(StoreError, match="is the source store itself"):
        copy_generation(source, source)
    with pytest.raises(StoreError, match="has no gen-5"):
        copy_generation(source, target, generation=5)
    with pytest.raises(StoreError, match="none does not exist"):
        copy_generation(tmp_path / "none", target)
    with build.open_writer(target), pytest.raises(StoreLockedError, match=f"process {os.getpid()}"):
        copy_generation(source, target)
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match=r"cannot be written: .*check free space, the path"):
        copy_generation(source, tmp_path / "file" / "store")


def test_a_generation_updated_in_place_becomes_a_new_generation_of_the_copy(tmp_path, build):
    """Because a published generation of a copy never changes under its readers."""
    source, target = tmp_path / "source", tmp_path / "target"
    build.write_store(source)
    copy_generation(source, target)
    build.update(source, range(5, 50), salt=3)
    with StoreReader.open(target) as store:
        report = copy_generation(source, target, publish=False)
        assert (report.generation, report.num_records, report.num_resumed) == (2, 50, 0)
        assert not store.reload() and len(store) == 40
        report = copy_generation(source, target)
        assert (report.generation, report.num_resumed) == (2, 50) and store.reload()
        np.testing.assert_allclose(store.get_many(range(4)).summary, build.summaries(range(4)), atol=0.02)
        np.testing.assert_allclose(store.get_many(range(5, 50)).summary, build.summaries(range(5, 50), 3), atol=0.02)
        assert store.manifest.refreshed_at == 1_700_000_000_001
    assert copy_generation(source, target).num_resumed == 50 and list_generations(target) == [1, 2]
    assert verify_store(target).num_problems == 0
    # The source's numbers are independent of the copy's.
    build.write_store(source, salt=4, run_digest="log-2")
    assert read_current(source) == 2 and copy_generation(source, target).generation == 3
    assert list_generations(target) == [2, 3] and verify_store(target).num_problems == 0
    assert copy_generation(source, target, generation=1).generation == 2
    assert copy_generation(source, target).generation == 3
    for root in (source, target):
        compact_store(root)
    assert copy_generation(source, target).generation == 4, "the same records, compacted in both stores"


def test_a_generation_written_once_during_a_read_is_read_again(tmp_path, build, monkeypatch):
    source, target, salts = tmp_path / "source", tmp_path / "target", iter(range(1, 9))
    build.write_store(source, **THREE_BATCHES)
    batches = FolderGeneration.raw_batches

    def raw_batches(reader: FolderGeneration, after: bytes = b"u") -> Any:
        for number, batch in enumerate(batches(reader, after)):
            yield batch
            if number == 1 and written and reader.root == source:
                del written[0]
                build.update(source, range(2490, 2510), next(salts))

    monkeypatch.setattr(FolderGeneration, "raw_batches", raw_batches)
    written = [1]
    assert verify_store(source).records == {1: 2510} and not written
    written = [1]
    assert export_store(source, tmp_path / "all.parquet").num_records == 2510 and not written
    written = [1]
    assert copy_generation(source, target).num_records == 2510 and not written
    assert records(source, 1) == records(target, 1)
    for function in (
        lambda: verify_store(source),
        lambda: export_store(source, tmp_path / "again.parquet"),
        lambda: copy_generation(source, tmp_path / "again"),
    ):
        written, salts = [1] * 9, iter(range(1, 9))
        with pytest.raises(StoreBusyError, match="gen-1 is being written by a refresh or an erasure; try again"):
            function()
    assert not (tmp_path / "again.parquet").exists() and not (tmp_path / "again" / "CURRENT").exists()


def test_a_copy_of_a_source_that_changes_meanwhile_is_not_published(tmp_path, build, monkeypatch):
    source, target = tmp_path / "source", tmp_path / "target"
    build.write_store(source)
    put = FolderBuilder.put
    (key,) = user_keys([0])

    def put_and_change(builder: FolderBuilder, keys: Any, held: Any) -> None:
        """Exchange the first record, as if an update came between the copy and the comparison."""
        put(builder, keys, [records(other)[key], *held[1:]] if keys[0] == key else held)

    other = tmp_path / "other"
    build.write_store(other, salt=1)
    monkeypatch.setattr(FolderBuilder, "put", put_and_change)
    with pytest.raises(StoreError, match="was written while it was copied"):
        copy_generation(source, target)
    assert not (target / "CURRENT").exists() and list_generations(target) == []
    monkeypatch.undo()
    assert copy_generation(source, target).num_records == 40
    assert records(target, 1) == records(source, 1)
