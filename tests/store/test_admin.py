"""Statistics, verification, compaction and rollback of real stores, intact and damaged."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import lmdb
import numpy as np
import pytest

from tests.forked_child import in_child
from tests.record_reference import decode_record_reference
from tests.store.conftest import KEY, damage_record, records, write_generations
from vista.errors import StoreError, StoreLockedError
from vista.store import StoreReader, user_keys
from vista.store.admin import compact_store, roll_back, store_stats, verify_store
from vista.store.folder_files import Tombstones, erasure_lock
from vista.store.layout import environment_path, last_complete, list_generations, read_current
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
