"""Writing, reading and refusals within one process."""

from __future__ import annotations

import pickle
import shutil
import threading

import lmdb
import numpy as np
import pytest

from tests.forked_child import in_child
from tests.store.conftest import users_of, write_generations
from vista.errors import StoreError, SummarizerMismatchError, UserKeyError
from vista.store import NO_TIMESTAMP, StoreReader, encode_records, user_keys
from vista.store.admin import roll_back
from vista.store.folder_generation import SharedEnvironment
from vista.store.layout import Shard, environment_path, last_complete, list_generations, pointer_to, read_current
from vista.store.reader import open_store

TOTAL = 40


def test_round_trip(tmp_path, build):
    manifest = build.write_store(tmp_path / "store")
    assert (manifest.count, manifest.user_kind, manifest.generation) == (TOTAL, "int", 1)
    with StoreReader.open(tmp_path / "store", summarizer_id=build.summarizer()) as store:
        assert (len(store), store.num_tokens, store.dim) == (TOTAL, 2, 8)
        assert store.summarizer_id == build.summarizer()
        assert list(store.keys()) == list(range(TOTAL))
        users = [3, 99, 0, 39, 3, -1]
        batch = store.get_many(users)
    assert batch.found.tolist() == [True, False, True, True, True, False]
    expected = build.summaries(range(TOTAL))
    for row, user in enumerate(users):
        wanted = expected[user] if batch.found[row] else np.zeros_like(expected[0])
        np.testing.assert_allclose(batch.summary[row], wanted, atol=0.02)
    assert batch.event_count.tolist() == [3, 0, 0, 39, 3, 0]
    assert batch.last_event_ts.tolist() == [8, NO_TIMESTAMP, 5, 44, 8, NO_TIMESTAMP]
    assert batch.created_at.tolist() == np.where(batch.found, 1_700_000_000_000, NO_TIMESTAMP).tolist()
    assert batch.history_digest.tolist() == [3, 0, 0, 39, 3, 0]
    assert batch.tail.offsets.tolist() == [0, 3, 3, 3, 6, 9, 9]
    assert batch.tail.items.tolist() == [3, 3, 3, 39, 39, 39, 3, 3, 3]


def test_batches_larger_than_one_transaction_and_empty_ones(tmp_path, build):
    build.write_store(tmp_path, codec="float32", tail_columns=build.tail_columns)
    with StoreReader.open(tmp_path) as store:
        users = np.random.default_rng(0).integers(-5, TOTAL + 5, 2500)
        batch = store.get_many(users)
        assert batch.found.tolist() == [0 <= user < TOTAL for user in users.tolist()]
        expected = build.summaries(range(TOTAL))[users.clip(0, TOTAL - 1)] * batch.found[:, None, None]
        np.testing.assert_array_equal(batch.summary, expected)
        lengths = np.where(batch.found, users % 4, 0)
        assert batch.tail.offsets.tolist() == [0, *np.cumsum(lengths).tolist()]
        assert batch.tail.items.tolist() == np.repeat(users, lengths).tolist()
        for column in store.manifest.tail_layout():
            expected = build.feature_of(column, np.repeat(users, lengths))
            np.testing.assert_array_equal(batch.tail.features[column.name], expected)
        rest = batch.without(users < 20)
        kept = np.repeat(users >= 20, lengths)
        assert rest.tail.features["surface"].tolist() == batch.tail.features["surface"][kept].tolist()
        assert list(store.keys()) == list(range(TOTAL))
        none = store.get_many([])
        assert none.summary.shape == (0, 2, 8) and none.tail.offsets.tolist() == [0]
        missing = store.get_many([-1])
        assert missing.summary.shape == (1, 2, 8) and not missing.found.any()


def test_string_ids_and_ids_of_the_wrong_type(tmp_path, build):
    with build.open_writer(tmp_path, total_users=1, num_tokens=0) as writer:
        users = users_of(user_keys(["é"]), summary=np.zeros((1, 0, 8), np.float32))
        writer.put_batch(users.keys, encode_records(users, writer.spec), 1)
        assert writer.publish().user_kind == "str"
    with StoreReader.open(tmp_path) as store:
        batch = store.get_many(["é", "x"])
        assert batch.found.tolist() == [True, False] and batch.summary.shape == (2, 0, 8)
        with pytest.raises(UserKeyError, match=r"user 5: .* type str"):
            store.get_many([5])


def test_a_reader_stays_on_the_old_generation_until_it_reloads(tmp_path, build):
    build.write_store(tmp_path)
    store = StoreReader.open(tmp_path)
    with build.open_writer(tmp_path, run_digest="log-2") as writer:
        build.put_users(writer, range(TOTAL), 1)
        assert not store.reload()
        np.testing.assert_allclose(store.get_many([5]).summary[0], build.summaries(range(5, 6))[0], atol=0.02)
        writer.publish()
    np.testing.assert_allclose(store.get_many([5]).summary[0], build.summaries(range(5, 6))[0], atol=0.02)
    assert store.generation == 1
    assert store.reload() and store.generation == 2
    assert not store.reload()
    np.testing.assert_allclose(store.get_many([5]).summary[0], build.summaries(range(5, 6), 1)[0], atol=0.02)
    store.close()
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.get_many([5])


def test_two_generations_are_kept_and_an_open_reader_outlives_its_files(tmp_path, build):
    stores = []
    for run in range(4):
        build.write_store(tmp_path, salt=run, run_digest=f"log-{run}")
        stores.append(StoreReader.open(tmp_path))
    assert list_generations(tmp_path) == [3, 4]
    names = ["CURRENT", "LAST", "erase.lock", "gen-3", "gen-4", "writer.lock"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for run, store in enumerate(stores):
        expected = build.summaries(range(TOTAL), run)
        np.testing.assert_allclose(store.get_many(range(TOTAL)).summary, expected, atol=0.02)
        assert store.reload() == (run < 3) and store.generation == 4
        store.close()


def test_threads_never_mix_generations(tmp_path, build):
    build.write_store(tmp_path)
    store = StoreReader.open(tmp_path)
    wrong, stop, reads = [], threading.Event(), [0] * 3

    def read(number: int) -> None:
        while not stop.is_set():
            try:
                batch = store.get_many(range(TOTAL))
                salts = np.round((batch.summary[:, 0, 0] - np.arange(TOTAL)) / 1000)
                if not batch.found.all() or len(set(salts.tolist())) != 1:
                    wrong.append(salts)
            except Exception as error:
                wrong.append(error)
            reads[number] += 1

    threads = [threading.Thread(target=read, args=(number,)) for number in range(len(reads))]
    for thread in threads:
        thread.start()
    for run in range(1, 5):
        build.write_store(tmp_path, salt=run, run_digest=f"log-{run}")
        assert store.reload()
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert min(reads) > 0
    store.close()


def test_an_earlier_generation_of_the_requested_summarizer_is_opened(tmp_path, build, caplog):
    build.write_store(tmp_path)
    pinned = StoreReader.open(tmp_path, summarizer_id=build.summarizer())
    build.write_store(tmp_path, salt=1, summarizer_id=build.summarizer("b").hex())
    assert not pinned.reload() and pinned.generation == 1
    with StoreReader.open(tmp_path, summarizer_id=build.summarizer()) as again:
        assert again.generation == 1
    assert "opening gen-1 of the requested" in caplog.text
    with pytest.raises(StoreError, match="holds tails of 4 events, but the model reads 5"):
        StoreReader.open(tmp_path, summarizer_id=build.summarizer(), tail_len=5)
    with StoreReader.open(tmp_path, summarizer_id=build.summarizer("b")) as newer:
        assert newer.generation == 2
    pinned.close()


def test_an_unfinished_run_is_resumed(tmp_path, build):
    whole = build.write_store(tmp_path / "whole")
    with build.open_writer(tmp_path / "parts") as writer:
        build.put_users(writer, range(16))
    with build.open_writer(tmp_path / "parts", created_at=5) as writer:
        assert writer.cursor == 16
        with pytest.raises(StoreError, match="16 of 40 users"):
            writer.publish()
        build.put_users(writer, range(16, TOTAL))
        assert writer.publish() == whole


@pytest.mark.parametrize(
    "change", [{"summarizer_id": bytes(32).hex()}, {"until": "leave-last-out"}, {"total_users": 41}]
)
def test_a_run_with_another_identity_starts_over(tmp_path, build, change, caplog):
    with build.open_writer(tmp_path) as writer:
        build.put_users(writer, range(16))
    with build.open_writer(tmp_path, **change) as writer:
        assert (writer.cursor, writer.generation) == (0, 1)
    assert "another run" in caplog.text


def test_a_finished_run_that_was_not_published_is_published_without_repeating_it(tmp_path, build):
    build.write_store(tmp_path)
    (tmp_path / "CURRENT").unlink()
    with build.open_writer(tmp_path) as writer:
        assert writer.cursor == TOTAL
        writer.publish()
    assert read_current(tmp_path) == 1


def test_the_number_of_a_complete_generation_is_not_used_again_after_its_folder_is_removed(tmp_path, build):
    write_generations(tmp_path)
    (tmp_path / "CURRENT").write_bytes(pointer_to(1))
    for digest in ("log-3", "log-4"):  # The first removes gen-2, the second what the first has written.
        with build.open_writer(tmp_path, run_digest=digest) as writer:
            assert writer.generation == 3
            build.put_users(writer, range(16))
    build.write_store(tmp_path, run_digest="log-4")
    assert read_current(tmp_path) == 3 and last_complete(tmp_path) == 3


def test_a_wrong_count_is_not_published(tmp_path, build):
    build.write_store(tmp_path)
    with build.open_writer(tmp_path, run_digest="log-2") as writer:
        build.put_users(writer, range(TOTAL))
        with SharedEnvironment.acquire(environment_path(tmp_path, 2), writable=True) as environment:
            environment.write(lambda transaction: transaction.delete(user_keys([7])[0]))
        with pytest.raises(StoreError, match="holds 39 records, but 40 records, or other ones, were written"):
            writer.publish()
    assert list_generations(tmp_path) == [1] and read_current(tmp_path) == 1


def test_a_damaged_record_is_not_published(tmp_path, build):
    build.write_store(tmp_path)
    with build.open_writer(tmp_path, run_digest="log-2", total_users=1) as writer:
        writer.put_batch(user_keys([7]), [b"not a record"], 1)
        with pytest.raises(StoreError, match=r"user 7.*removed, and CURRENT is unchanged"):
            writer.publish()
    assert list_generations(tmp_path) == [1] and read_current(tmp_path) == 1


def test_a_writer_refuses_a_decreasing_cursor(tmp_path, build):
    with build.open_writer(tmp_path) as writer:
        build.put_users(writer, range(16))
        for cursor in (15, TOTAL + 1):
            with pytest.raises(ValueError, match="cursor"):
                writer.put_batch([], [], cursor)
        with pytest.raises(ValueError, match="got 1 keys, 0 records"):
            writer.put_batch([b"ui"], [], 16)
    with pytest.raises(StoreError, match="writer is closed"):
        writer.put_batch([], [], 16)


def test_a_full_map_is_reported_and_earlier_batches_stay(tmp_path, build):
    with build.open_writer(tmp_path, total_users=2000):
        pass
    # The writer below shares this environment.
    small = SharedEnvironment.acquire(environment_path(tmp_path, 1), writable=True, map_size_bytes=1 << 16)
    with build.open_writer(tmp_path, total_users=2000) as writer:
        build.put_users(writer, range(16))
        with pytest.raises(StoreError, match=r"MAP_FULL.*rerun the command"):
            build.put_users(writer, range(16, 2000))
    small.release()
    with build.open_writer(tmp_path, total_users=2000) as writer:
        assert writer.cursor == 16


def test_a_missing_store(tmp_path, build):
    with pytest.raises(StoreError, match=r"no published generation; run `vista refresh"):
        StoreReader.open(tmp_path)
    with pytest.raises(StoreError, match="missing does not exist"):
        StoreReader.open(tmp_path / "missing")
    with build.open_writer(tmp_path):
        pass
    with pytest.raises(StoreError, match="no published generation"):
        StoreReader.open(tmp_path)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (pointer_to(9), "names gen-9, which does not exist"),
        (b"gen-1\n", "holds 'gen-1' instead of the name of a generation and its checksum"),
        (pointer_to(1).replace(b"gen-1", b"gen-2"), "instead of the name"),
        (b"gen-" + b"1" * 5000, "CURRENT: holds 5004 bytes, but at most 64 are read"),
    ],
)
def test_a_current_that_names_no_generation(tmp_path, build, content, named):
    build.write_store(tmp_path)
    (tmp_path / "CURRENT").write_bytes(content)
    with pytest.raises(StoreError, match=named) as error:
        StoreReader.open(tmp_path)
    assert "existing generations: gen-1; publish one of them with `vista store rollback" in str(error.value)
    roll_back(tmp_path, to=1)
    with StoreReader.open(tmp_path) as store:
        assert store.generation == 1


def test_a_refresh_repairs_a_current_that_names_no_generation(tmp_path, build, caplog):
    build.write_store(tmp_path)
    (tmp_path / "CURRENT").write_bytes(pointer_to(9))
    assert build.write_store(tmp_path, salt=1, run_digest="log-2").generation == 2
    assert list_generations(tmp_path) == [1, 2] and read_current(tmp_path) == 2
    assert pointer_to(9).split()[0].decode() in caplog.text


def test_a_recreated_store_is_not_mistaken_for_the_removed_one(tmp_path, build):
    build.write_store(tmp_path / "store")
    with StoreReader.open(tmp_path / "store") as old:
        shutil.rmtree(tmp_path / "store")
        build.write_store(tmp_path / "store", salt=1)
        with StoreReader.open(tmp_path / "store") as new:
            np.testing.assert_allclose(new.get_many([5]).summary[0], build.summaries(range(5, 6), 1)[0], atol=0.02)
            np.testing.assert_allclose(old.get_many([5]).summary[0], build.summaries(range(5, 6))[0], atol=0.02)
        assert old.reload()
        np.testing.assert_allclose(old.get_many([5]).summary[0], build.summaries(range(5, 6), 1)[0], atol=0.02)


def test_keys_stay_within_one_generation_across_a_reload(tmp_path, build):
    build.write_store(tmp_path, total_users=2500, batch=500)
    with StoreReader.open(tmp_path) as store:
        keys = store.keys()
        first = next(keys)
        build.write_store(tmp_path)
        assert store.reload() and len(store) == TOTAL
        assert [first, *keys] == list(range(2500))


def test_a_damaged_current_leaves_the_open_generation_in_service(tmp_path, build):
    build.write_store(tmp_path)
    with StoreReader.open(tmp_path) as store:
        (tmp_path / "CURRENT").write_bytes(pointer_to(9))
        with pytest.raises(StoreError, match="gen-9"):
            store.reload()
        assert store.get_many([1]).found.all()


def test_a_map_that_another_writer_grew_is_followed(tmp_path):
    lmdb.open(str(tmp_path), map_size=1 << 20, lib_version=0).close()
    reader = SharedEnvironment.acquire(tmp_path, map_size_bytes=1 << 20)

    def grow() -> None:
        reader.release()
        environment = lmdb.open(str(tmp_path), map_size=1 << 24, lib_version=0)
        with environment.begin(write=True) as transaction:
            for number in range(1000):
                transaction.put(b"%d" % number, bytes(4000))

    in_child(grow)
    assert reader.read(lambda transaction: len(transaction.get(b"999"))) == 4000
    reader.release()


def test_counters_of_batches_with_gaps_and_repetitions(tmp_path, build):
    """Users without a record have no counters; users are read in parts of 1,024."""
    build.write_store(tmp_path, counters=build.layout.to_dict())
    users = [*range(-3, 43), 7, 7, *([5] * 2000), -1, 8]
    with StoreReader.open(tmp_path) as store:
        batch = store.get_many(users)
        assert store.get_many([]).counters[0].offsets.tolist() == [0]
    known = np.flatnonzero([0 <= user < 40 for user in users])
    for read, written in zip(batch.counters, build.counters(range(40), build.layout), strict=True):
        assert read.spec == build.layout.spec and len(read.clock) == len(users)
        ours, expected = read.select(known), written.select(np.array(users)[known])
        for name in ("key", "codes", "offsets", "clock"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(expected, name))
        assert read.offsets[-1] == expected.offsets[-1] and (np.delete(read.clock, known) == NO_TIMESTAMP).all()


USERS = range(40)


def test_a_given_generation_is_opened_and_kept(tmp_path, build):
    for run in range(2):
        build.write_store(tmp_path, salt=run, run_digest=f"log-{run}")
    with open_store(tmp_path, generation=1) as earlier, open_store(tmp_path) as served:
        assert (earlier.generation, served.generation) == (1, 2)
        build.write_store(tmp_path, salt=2, run_digest="log-2")
        assert served.reload() and served.generation == 3
        with pytest.raises(StoreError, match="has no gen-1"):  # a publication keeps one earlier generation
            earlier.reload()
        np.testing.assert_allclose(earlier.get_many(USERS).summary, build.summaries(USERS, 0), atol=0.02)
    with open_store(tmp_path, generation=2) as earlier:
        assert not earlier.reload() and earlier.generation == 2
        again = pickle.loads(pickle.dumps(earlier))
        assert again.generation == 2
        again.close()


def test_a_given_generation_of_another_summarizer_is_refused(tmp_path, build):
    build.write_store(tmp_path)
    build.write_store(tmp_path, salt=1, summarizer_id=build.summarizer("b").hex())
    with pytest.raises(SummarizerMismatchError):  # although generation 1 would match
        StoreReader.open(tmp_path, summarizer_id=build.summarizer(), generation=2)


def test_a_generation_of_a_sharded_store_is_refused(tmp_path, build):
    build.write_store(Shard(0, 1).path(tmp_path))
    with pytest.raises(StoreError, match="is sharded"):
        open_store(tmp_path, generation=1)
