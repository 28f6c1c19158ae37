"""Statistics, verification, compaction and rollback of real stores, intact and damaged. Copies of generations:
equal to the source, resumable after any kill, and published only when complete."""

from __future__ import annotations

import os
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest

from tests.forked_child import in_child
from tests.record_reference import decode_record_reference
from tests.store.conftest import KEY, damage_record, killed_at, records, write_generations
from vista.errors import StoreBusyError, StoreError, StoreLockedError
from vista.store import StoreReader, folder_writer, user_keys
from vista.store.admin import compact_store, copy_generation, roll_back, store_stats, verify_store
from vista.store.folder_files import Tombstones, erasure_lock
from vista.store.folder_generation import FolderGeneration
from vista.store.folder_writer import FolderBuilder
from vista.store.layout import (
    Shard,
    environment_path,
    last_complete,
    list_generations,
    published_or_none,
    read_current,
    shards_of,
)
from vista.store.parquet import export_store, import_store
from vista.store.writer import erase

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


def opened(root: Path, generation: int) -> lmdb.Environment:
    return lmdb.open(str(environment_path(root, generation)), map_size=1 << 26, lib_version=0)


def remove_user(root: Path, user: int) -> bytes:
    """Remove a record in place as an erasure does, and return its bytes, which must be nowhere afterwards."""
    (key,) = user_keys([user])
    with opened(root, read_current(root)) as environment:
        with environment.begin(write=True) as transaction:
            record = transaction.pop(key)
        # Later commits reuse free pages, but not all of them.
        with environment.begin(write=True) as transaction:
            transaction.put(b"!cursor", b"40")
    return record


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_stats_of_a_store(tmp_path, build):
    write_generations(tmp_path, until="leave-last-out")
    with build.open_writer(tmp_path, run_digest="log-3") as writer:
        build.put_users(writer, range(16))
    with StoreReader.open(tmp_path) as store:
        store.get_many([1])
        stats = store_stats(tmp_path)
        assert in_child(lambda: store_stats(tmp_path).generations[1].num_open) == 1
    assert stats.published == 2
    rows = [(one.number, one.complete, one.num_records, one.num_open) for one in stats.generations]
    assert rows == [(1, True, 40, 0), (2, True, 40, 0), (3, False, 16, 0)]
    for one in stats.generations:
        assert 0 < one.live_bytes <= one.size_bytes + 4096 and one.manifest.dim == 8
    text = str(stats)
    assert (
        "gen-2 is published" in text
        and "gen-2 (published): 40 records, int8 2 x 8, tails of 4, states none, until leave-last-out" in text
    )
    assert "gen-3 (unfinished): 16 users done" in text and "gen-1 (kept)" in text


def test_stats_of_damaged_and_missing_stores(tmp_path, build):
    with pytest.raises(StoreError, match="none does not exist"):
        store_stats(tmp_path / "none")
    write_generations(tmp_path)
    (tmp_path / "CURRENT").write_text("nonsense")
    (environment_path(tmp_path, 1) / "data.mdb").write_bytes(b"garbage")
    text = str(store_stats(tmp_path))
    assert "holds 'nonsense'" in text and "is not an LMDB" in text and "gen-2 (kept): 40 records" in text


def test_an_intact_store_passes_verification(tmp_path, build):
    write_generations(tmp_path, key=KEY)
    build.open_writer(tmp_path, run_digest="log-3", key=KEY).close()
    before = files(tmp_path)
    report = verify_store(tmp_path, key=KEY)
    assert (report.records, report.unfinished, report.problems) == ({1: 40, 2: 40}, [3], [])
    assert "no problem found; gen-1: 40 records, gen-2: 40 records; unfinished: gen-3" in str(report)
    after = files(tmp_path)
    assert {name for name in before if before[name] != after[name]} <= {f"gen-{n}/summary/lock.mdb" for n in (1, 2, 3)}


def test_verification_names_every_damaged_record(tmp_path, build):
    write_generations(tmp_path)
    data = environment_path(tmp_path, 2) / "data.mdb"
    flipped = bytearray(data.read_bytes())
    for user in (3, 17, 30):
        record = records(tmp_path)[user_keys([user])[0]]
        place = bytes(flipped).find(record)
        while place >= 0:  # including old pages
            flipped[place + 130] ^= 4
            place = bytes(flipped).find(record)
    data.write_bytes(flipped)
    report = verify_store(tmp_path)
    assert report.records == {1: 40, 2: 37} and report.num_problems == 3
    for user, problem in zip((3, 17, 30), report.problems, strict=True):
        assert f"gen-2: the record of user {user} is corrupt" in problem and "checksum" in problem


def test_verification_detects_damaged_files(tmp_path, build):
    write_generations(tmp_path)
    whole = files(tmp_path)
    data = environment_path(tmp_path, 2) / "data.mdb"
    structure = bytearray(whole["gen-2/summary/data.mdb"])
    for page in range(2, len(structure) // 4096):
        structure[4096 * page + 12] ^= 0xFF  # the offset of a page's free space
    for damaged, named in (
        (whole["gen-2/summary/data.mdb"][:-4096], "truncated"),
        (b"PAR1" * 4000, "is not an LMDB"),
        (bytes(structure), "structure of the database is damaged"),
    ):
        data.write_bytes(damaged)
        report = verify_store(tmp_path)
        assert report.num_problems == 1 and named in report.problems[0] and report.records == {1: 40}
    data.unlink()
    assert "No such file" in verify_store(tmp_path).problems[0]
    shutil.rmtree(environment_path(tmp_path, 2).parent)
    assert "names gen-2, which does not exist" in verify_store(tmp_path).problems[0]
    (tmp_path / "CURRENT").unlink()
    assert "no published generation" in verify_store(tmp_path).problems[0]
    with pytest.raises(StoreError, match="none does not exist"):
        verify_store(tmp_path / "none")


@pytest.mark.parametrize("left", ["gen-3", "gen-3/summary", "gen-3/summary/data.mdb"])
def test_files_that_a_stopped_refresh_had_not_filled_are_unfinished_and_no_problem(tmp_path, build, left):
    write_generations(tmp_path)
    environment_path(tmp_path, 3).mkdir(parents=True)
    if left == "gen-3":
        environment_path(tmp_path, 3).rmdir()
    elif left.endswith("mdb"):
        (tmp_path / left).touch()
    report = verify_store(tmp_path)
    assert (report.records, report.unfinished, report.problems) == ({1: 40, 2: 40}, [3], [])
    (environment_path(tmp_path, 1) / "data.mdb").unlink()  # A kept generation was complete.
    report = verify_store(tmp_path)
    assert report.num_problems == 1 and "gen-1" in report.problems[0]
    (tmp_path / "LAST").write_text("damaged")
    report = verify_store(tmp_path)
    assert report.unfinished == [] and report.num_problems == 3


def test_verification_detects_removed_exchanged_and_foreign_records(tmp_path, build):
    build.write_store(tmp_path / "other", salt=1)
    for change, named in (
        ("remove", "holds 39 records, but its manifest says 40"),
        ("exchange", "not the ones that were published"),
        ("foreign", "key b'zz' is neither a user key"),
    ):
        root = tmp_path / change
        build.write_store(root)
        with opened(root, 1) as environment, environment.begin(write=True) as transaction:
            (key,) = user_keys([7])
            if change == "remove":
                transaction.delete(key)
            elif change == "exchange":  # for a valid record of the same user and generation
                transaction.put(key, records(tmp_path / "other")[key])
            else:
                transaction.put(b"zz", b"x")
        report = verify_store(root)
        assert report.num_problems == 1 and named in report.problems[0], report


def test_verification_detects_exchanged_shards(tmp_path, build):
    build.write_store(tmp_path / "store")
    (tmp_path / "store").rename(tmp_path / "part-0-of-2")
    report = verify_store(tmp_path / "part-0-of-2")
    assert report.num_problems == 1 and "users of other shards, whom readers do not find here" in report.problems[0]


def test_verification_finds_users_whose_erasure_was_interrupted(tmp_path, build):
    write_generations(tmp_path)
    with erasure_lock(tmp_path):
        Tombstones(tmp_path).add(user_keys([7, 8]))
    report = verify_store(tmp_path)
    assert report.num_problems == 2 and "gen-1 holds 2 users who were erased" in report.problems[0]
    erase(tmp_path, [7, 8])
    assert verify_store(tmp_path).num_problems == 0


@pytest.mark.parametrize("key", [None, KEY])
def test_compaction_changes_only_the_generation_of_records(tmp_path, build, key):
    write_generations(tmp_path, key=key, codec="int8", shared_with_group=True)
    before = records(tmp_path, key=key)
    with StoreReader.open(tmp_path, key=key) as reader:
        expected = reader.get_many(range(40))
        report = compact_store(tmp_path, key=key)
        assert (report.generation, report.num_records) == (3, 40)
        assert list_generations(tmp_path) == [3] and read_current(tmp_path) == last_complete(tmp_path) == 3
        np.testing.assert_array_equal(reader.get_many(range(40)).summary, expected.summary)  # from the old files
        assert reader.reload() and reader.generation == 3
        np.testing.assert_array_equal(reader.get_many(range(40)).summary, expected.summary)
    after = records(tmp_path, key=key)
    assert list(after) == list(before)
    for user, record in after.items():
        fields, old = decode_record_reference(record), decode_record_reference(before[user])
        assert fields.pop("generation") == 3 and old.pop("generation") == 2
        for name in set(fields) - {"checksum"}:
            np.testing.assert_array_equal(fields[name], old[name])
        end = len(record) - 16 * (key is not None)
        assert record[128:end] == before[user][128:end]
    assert verify_store(tmp_path, key=key).num_problems == 0
    assert environment_path(tmp_path, 3).stat().st_mode & 0o7777 == 0o2750


def test_no_file_holds_a_removed_user_after_compaction(tmp_path, build):
    write_generations(tmp_path)
    with build.open_writer(tmp_path, run_digest="log-3") as writer:  # an unfinished run that holds the user too
        build.put_users(writer, range(16))
    removed = remove_user(tmp_path, 7)
    marker = removed[64:72]  # the hash of the user's key, which each of the user's records holds
    holding = [name for name, data in files(tmp_path).items() if marker in data]
    assert set(holding) == {f"gen-{number}/summary/data.mdb" for number in (1, 2, 3)}
    compact_store(tmp_path)
    left = files(tmp_path)
    assert all(marker not in data and user_keys([7])[0] not in data for data in left.values())
    kept = {"CURRENT", "LAST", "erase.lock", "gen-4/summary/data.mdb", "gen-4/summary/lock.mdb", "writer.lock"}
    assert set(left) == kept
    with StoreReader.open(tmp_path) as store:
        assert len(store) == 39 and store.get_many([6, 7, 8]).found.tolist() == [True, False, True]


def test_a_damaged_or_locked_store_is_not_compacted(tmp_path, build):
    write_generations(tmp_path)
    with build.open_writer(tmp_path, run_digest="log-3"):
        for act in (lambda: compact_store(tmp_path), lambda: roll_back(tmp_path)):
            with pytest.raises(StoreLockedError, match=f"process {os.getpid()}"):
                act()
    data, whole = environment_path(tmp_path, 2) / "data.mdb", damage_record(tmp_path, 2, 5)
    with pytest.raises(StoreError, match="user 5"):
        compact_store(tmp_path)
    data.write_bytes(whole[:-4096])
    with pytest.raises(StoreError, match="truncated"):
        compact_store(tmp_path)
    data.write_bytes(whole)
    assert read_current(tmp_path) == 2 and not list(tmp_path.glob(".*"))
    assert list_generations(tmp_path) == [1, 2, 3]


def test_rollback_publishes_the_previous_generation_and_a_later_one_again(tmp_path, build, monkeypatch):
    write_generations(tmp_path)
    with StoreReader.open(tmp_path) as store:
        (report,) = roll_back(tmp_path)
        assert (report.generation, report.num_records) == (1, 40) and store.generation == 2
        assert store.reload() and store.generation == 1
        np.testing.assert_allclose(store.get_many(range(40)).summary, build.summaries(range(40), 0), atol=0.02)
        synced = list[Path]()
        with monkeypatch.context() as patch, pytest.raises(StoreError, match="no complete generation before gen-1"):
            patch.setattr("vista.store.folder_files.sync", synced.append)
            roll_back(tmp_path)
        assert synced == [tmp_path]  # The rollback that is refused may repeat one that was killed before a sync.
        assert roll_back(tmp_path, to=2)[0].generation == 2 and store.reload() and store.generation == 2
    roll_back(tmp_path)
    # The next run writes a new generation with an unused number.
    assert build.write_store(tmp_path, salt=3, run_digest="log-3").generation == 3
    assert list_generations(tmp_path) == [1, 3] and read_current(tmp_path) == 3


def test_rollback_refuses_unfinished_missing_and_damaged_generations(tmp_path, build):
    write_generations(tmp_path)
    build.open_writer(tmp_path, run_digest="log-3").close()
    with pytest.raises(StoreError, match=r"gen-3 cannot be published: .*never finished"):
        roll_back(tmp_path, to=3)
    with pytest.raises(StoreError, match=r"gen-9 cannot be published: .*has no gen-9"):
        roll_back(tmp_path, to=9)
    damage_record(tmp_path, 1, 5)
    with pytest.raises(StoreError, match=r"gen-1 cannot be published: .*user 5 .*generation is unchanged"):
        roll_back(tmp_path)
    assert read_current(tmp_path) == 2


def test_rollback_does_not_touch_a_folder_that_is_not_a_store(tmp_path, build):
    write_generations(tmp_path / "store")
    (tmp_path / "other").mkdir()
    for other in ("other", "nowhere"):
        with pytest.raises(StoreError, match=r"no published generation|does not exist"):
            roll_back(tmp_path / "store", tmp_path / other)
    assert not list((tmp_path / "other").iterdir()) and read_current(tmp_path / "store") == 2
    (tmp_path / "store" / "CURRENT").unlink()  # Rolling back to a given number repairs this.
    assert roll_back(tmp_path / "store", to=2)[0].generation == read_current(tmp_path / "store") == 2


def test_an_authenticated_store_needs_its_key(tmp_path, build):
    write_generations(tmp_path, key=KEY)
    for act in (compact_store, roll_back):
        with pytest.raises(StoreError, match="authentication key"):
            act(tmp_path)
    assert all("authentication key" in problem for problem in verify_store(tmp_path).problems)
    assert verify_store(tmp_path).num_problems == 2 and read_current(tmp_path) == 2
    assert "key" in str(store_stats(tmp_path))


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
