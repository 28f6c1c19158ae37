"""What lies in a store's folder: states, odd names, links, and other stores. Forks, spawned readers and second
writers: real processes and signals."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from tests.forked_child import in_child
from tests.store.conftest import found, users_of, write_generations
from vista.errors import ConfigError, StoreError, StoreLockedError, StoreWriteError
from vista.refresh.full import RefreshProgress
from vista.store import StoreReader, StoreWriter, encode_records, user_keys
from vista.store.admin import compact_store, copy_generation, roll_back, store_stats, verify_store
from vista.store.folder_files import open_environment
from vista.store.folder_generation import SharedEnvironment
from vista.store.keys import CURSOR_KEY
from vista.store.layout import (
    Shard,
    entries_like_generations,
    environment_path,
    generation_path,
    last_complete,
    list_generations,
    pointer_to,
    read_current,
    shards_in,
    state_path,
    stores_in,
)
from vista.store.state_record import StateArrays, encode_states
from vista.store.writer import erase

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


def test_only_folders_with_canonical_names_are_generations(tmp_path, build):
    build.write_store(tmp_path)
    odd = ["gen-", "gen-0", "gen-007", "gen-2x", f"gen-{10**18}", "gen-" + "9" * 250, "gen-\N{SUPERSCRIPT TWO}"]
    for name in odd:
        (tmp_path / name).mkdir()
    (tmp_path / "gen-2").write_text("a file")
    (tmp_path / "gen-3").symlink_to(tmp_path / "gen-1")
    assert list_generations(tmp_path) == [1]
    assert entries_like_generations(tmp_path) == sorted([*odd, "gen-2", "gen-3"])
    report = verify_store(tmp_path)
    assert report.records == {1: 40} and report.num_problems == len(odd) + 2
    assert any("gen-007 is ignored" in problem for problem in report.problems)
    assert erase(tmp_path, [3]) == 1
    assert build.write_store(tmp_path, run_digest="log-2").generation == 4
    assert [stats.number for stats in store_stats(tmp_path).generations] == [1, 4]
    assert compact_store(tmp_path).generation == 5
    assert copy_generation(tmp_path, tmp_path.with_name("to")).generation == 5
    assert all(os.path.lexists(tmp_path / name) for name in [*odd, "gen-2", "gen-3"])


@pytest.mark.parametrize("content", [pointer_to(2**64 - 1), b"gen-1\n", b"1" * 5000, b"", pointer_to(1)[:-3]])
def test_a_damaged_last_is_an_error_with_a_remedy(tmp_path, build, content):
    build.write_store(tmp_path)
    (tmp_path / "LAST").write_bytes(content)
    with pytest.raises(StoreWriteError, match=r"LAST .*remove it, and numbering continues after gen-1"):
        build.write_store(tmp_path, run_digest="log-2")
    assert verify_store(tmp_path).num_problems == 1
    assert StoreReader.open(tmp_path).generation == 1
    (tmp_path / "LAST").unlink()
    assert build.write_store(tmp_path, run_digest="log-2").generation == 2 and last_complete(tmp_path) == 2


def test_a_changed_byte_of_current_serves_no_other_generation(tmp_path, build):
    write_generations(tmp_path)
    whole = (tmp_path / "CURRENT").read_bytes()
    assert whole == b"gen-2 " + xxhash.xxh3_64_hexdigest(b"gen-2").encode() + b"\n"
    for at in range(len(whole)):
        for bits in (1, 3, 0x20, 0x80):
            (tmp_path / "CURRENT").write_bytes(whole[:at] + bytes([whole[at] ^ bits]) + whole[at + 1 :])
            with pytest.raises(StoreError, match="rollback"):
                read_current(tmp_path)


def test_shards(tmp_path):
    for name in ("part-0-of-100000000", "part-0-of-65537", "part-00-of-2", "part-1-of-02", "part-2-of-2"):
        (tmp_path / name).mkdir()
    (tmp_path / "part-0-of-2").write_text("a file")
    assert shards_in(tmp_path) == [] and stores_in(tmp_path) == [tmp_path]
    (tmp_path / "part-1-of-2").mkdir()
    assert shards_in(tmp_path) == [Shard(1, 2)]
    for text in ("0/" + "1" * 5000, "0/65537", "2/2", "00/2", "1/", "\N{SUPERSCRIPT TWO}/3"):
        with pytest.raises(ConfigError, match=r"shard=.*write i/n") as caught:
            Shard.parse(text)
        assert len(str(caught.value)) < 300
    assert Shard.parse(" 65535/65536 ") == Shard(65535, 65536)


@pytest.mark.parametrize("inside", ["gen-1/x", "x/y"])
def test_a_store_inside_of_another_is_refused(tmp_path, build, inside):
    build.write_store(tmp_path / "source")
    build.write_store(tmp_path / "store")
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / "link").symlink_to(tmp_path / "store")
    for act in (
        lambda: copy_generation(tmp_path / "source", tmp_path / "store" / inside),
        lambda: build.open_writer(tmp_path / "store" / inside),
        lambda: build.open_writer(tmp_path / "link" / inside),
    ):
        with pytest.raises(StoreError, match=r"is inside the store .* outside of it|is a generation of the store"):
            act()
    (tmp_path / "link").unlink()
    assert sorted(tmp_path.rglob("*")) == before


def log_a_batch(root: Path) -> None:
    RefreshProgress(root, "full", 1, 0).batch(1, 1, 1)


@pytest.mark.parametrize("name", ["writer.lock", "erase.lock", "tombstones", "LAST", "refresh.jsonl"])
def test_a_link_is_never_followed(tmp_path, build, name):
    root, victim = tmp_path / "store", tmp_path / "victim"
    build.write_store(root)
    victim.write_text("precious\n")
    victim.chmod(0o644)
    (root / name).unlink(missing_ok=True)
    (root / name).symlink_to(victim)
    log_a_batch(root)
    for act in (
        lambda: build.write_store(root, run_digest="log-2", shared_with_group=True),
        lambda: erase(root, [1]),
        lambda: roll_back(root, to=1),
    ):
        try:
            act()
        except StoreError as error:
            assert "symbolic link" in str(error) or "remove it" in str(error), error
    assert victim.read_text() == "precious\n" and victim.stat().st_mode & 0o777 == 0o644


def test_a_link_at_current_is_an_error_and_is_replaced(tmp_path, build):
    root = tmp_path / "store"
    build.write_store(root)
    (root / "CURRENT").rename(tmp_path / "victim")
    (root / "CURRENT").symlink_to(tmp_path / "victim")
    with pytest.raises(StoreError, match="is a symbolic link; remove it; existing generations: gen-1; publish one"):
        StoreReader.open(root)
    roll_back(root, to=1)
    assert not (root / "CURRENT").is_symlink() and read_current(root) == 1


@pytest.mark.parametrize("name", ["data.mdb", "lock.mdb"])
def test_links_in_a_generation(tmp_path, build, name):
    build.write_store(tmp_path / "store")
    path = environment_path(tmp_path / "store", 1) / name
    path.rename(tmp_path / "victim")
    path.symlink_to(tmp_path / "victim")
    (tmp_path / "victim").chmod(0o644)
    for act in (lambda: StoreReader.open(tmp_path / "store"), lambda: erase(tmp_path / "store", [1])):
        with pytest.raises(StoreError, match=r"is not a regular file|is a symbolic link"):
            act()
    build.open_writer(tmp_path / "store", shared_with_group=True, run_digest="log-2").close()
    assert (tmp_path / "victim").stat().st_mode & 0o777 == 0o644


def test_a_copy_is_never_built_outside_of_the_store(tmp_path, build):
    build.write_store(tmp_path / "source")
    for folder in (tmp_path / "to", tmp_path / "victim"):
        folder.mkdir()
    for name in (".partial-gen-1", ".partial-gen-7", ".removed-3"):
        (tmp_path / "to" / name).symlink_to(tmp_path / "victim")
    assert copy_generation(tmp_path / "source", tmp_path / "to").generation == 1
    assert not list((tmp_path / "victim").iterdir()) and not list((tmp_path / "to").glob(".*"))


def put(root: Path, key: bytes, value: bytes) -> None:
    environment = open_environment(environment_path(root, 1), readonly=False)
    with environment.begin(write=True) as transaction:
        transaction.put(key, value)
    environment.close()


@pytest.mark.parametrize("cursor", [b"x", b"41"])
def test_a_damaged_cursor_starts_the_generation_over(tmp_path, build, cursor):
    with build.open_writer(tmp_path) as writer:
        build.put_users(writer, range(16))
    put(tmp_path, CURSOR_KEY, cursor)
    assert "cursor" in store_stats(tmp_path).generations[0].problem
    assert build.write_store(tmp_path).count == 40


WITH_STATES = {"state_dtype": "float32", "state_shape": (1, 2, 3)}


def put_states(build: Any, writer: StoreWriter, users: range, salt: int = 0) -> None:
    """One batch with states of zeros."""
    keys, records = build.records_of(users, writer.spec, salt)
    count, zeros = len(users), np.zeros(len(users), np.int64)
    weights = np.zeros((count, 2), np.float32)
    states = StateArrays(
        np.zeros((count, 1, 2, 3, 3), np.float32),
        *(weights, weights, zeros, zeros, zeros, zeros.astype(np.uint64), np.zeros((count, 0))),
    )
    assert writer.state_spec is not None
    writer.put_batch(keys, records, users.stop, encode_states(keys, states, writer.state_spec))


def write_states(build: Any, root: Path, salt: int = 0) -> None:
    with build.open_writer(root, run_digest=f"log-{salt}", **WITH_STATES) as writer:
        for start in range(writer.cursor, 40, 8):
            put_states(build, writer, range(start, start + 8), salt)
        writer.publish()


def test_all_folders_of_a_generation_are_durable_before_its_manifest_is_committed(tmp_path, build, monkeypatch):
    """Otherwise a power cut could keep the manifest and lose the folder of the states."""
    root, fsync, commit, steps = tmp_path / "store", os.fsync, SharedEnvironment.write, []

    def note_sync(descriptor: int) -> None:
        steps.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def note_commit(environment: SharedEnvironment, *arguments: Any) -> Any:
        steps.append("commit")
        return commit(environment, *arguments)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(SharedEnvironment, "write", note_commit)
    build.open_writer(root, **WITH_STATES).close()
    folders = (tmp_path, root, root / "gen-1", root / "gen-1" / "summary", root / "gen-1" / "state")
    assert set(map(str, folders)) <= set(steps[: steps.index("commit")])


def test_an_unfinished_generation_without_its_states_starts_over(tmp_path, build, caplog):
    write_states(build, tmp_path)
    with build.open_writer(tmp_path, run_digest="log-1", **WITH_STATES) as writer:
        for start in range(0, 16, 8):
            put_states(build, writer, range(start, start + 8), 1)
    shutil.rmtree(state_path(tmp_path, 2))
    write_states(build, tmp_path, salt=1)
    assert "the states that its manifest names are missing" in caplog.text and "starts over" in caplog.text
    assert list_generations(tmp_path) == [1, 2] and verify_store(tmp_path).num_problems == 0
    with StoreReader.open(tmp_path) as store:
        assert store.generation == 2
        np.testing.assert_allclose(store.get_many(range(40)).summary, build.summaries(range(40), 1), atol=0.02)


def test_a_served_generation_that_lost_its_states_is_read_and_erased_from_but_not_updated(tmp_path, build):
    write_states(build, tmp_path)
    shutil.rmtree(generation_path(tmp_path, 1) / "state")
    with pytest.raises(StoreError, match=r"gen-1/state: the states .* are missing; run a full refresh"):
        build.update(tmp_path, range(4), 1)
    assert erase(tmp_path, [3]) == 1
    assert found(tmp_path, [2, 3]) == [True, False]
    write_states(build, tmp_path, salt=1)
    assert verify_store(tmp_path).records == {1: 39, 2: 39}


def test_records_in_ascending_order_fill_their_pages(tmp_path, build):
    """Records of a bit less than half a page: two per page in ascending batches, and nothing lost in another order."""
    sizes = {}
    for name, order in (("ascending", range(0, 400, 20)), ("descending", range(380, -20, -20))):
        with build.open_writer(tmp_path / name, num_tokens=110, total_users=400) as writer:
            for done, first in enumerate(order, 1):
                users = range(first, first + 20)
                events = {"event_count": np.array(users), "last_event_ts": np.array(users)}
                held = users_of(user_keys(list(users)), summary=np.ones((20, 110, 8), np.float32), **events)
                writer.put_batch(held.keys, encode_records(held, writer.spec), 20 * done)
            writer.publish()
        with StoreReader.open(tmp_path / name) as store:
            assert store.get_many(range(400)).event_count.tolist() == list(range(400))
        sizes[name] = store_stats(tmp_path / name).generations[0].live_bytes
    assert sizes["ascending"] < 1.1 * 400 * 2048 < sizes["descending"]


TOTAL = 400
BATCH = 8
_fork = multiprocessing.get_context("fork")


def test_a_second_writer_is_refused_at_once_with_the_process_of_the_first(tmp_path, build):
    receiver, sender = _fork.Pipe(duplex=False)

    def hold() -> None:
        with build.open_writer(tmp_path):
            sender.send(True)
            time.sleep(60)

    child = _fork.Process(target=hold)
    child.start()
    try:
        assert receiver.poll(60)
        os.kill(child.pid, signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(StoreLockedError, match=rf"process {child.pid}\b"):
            build.open_writer(tmp_path)
        assert time.monotonic() - start < 10
    finally:
        child.kill()
        child.join()
    build.open_writer(tmp_path).close()


def test_a_forked_child_does_not_keep_the_lock(tmp_path, build):
    writer = build.open_writer(tmp_path)
    receiver, sender = _fork.Pipe(duplex=False)

    def linger() -> None:
        sender.send(True)
        time.sleep(60)

    child = _fork.Process(target=linger)
    child.start()
    try:
        assert receiver.poll(60)
        writer.close()
        build.open_writer(tmp_path).close()
    finally:
        child.kill()
        child.join()


def test_a_writer_cannot_be_used_after_a_fork(tmp_path, build):
    with build.open_writer(tmp_path) as writer:
        with pytest.raises(StoreError, match="before a fork"):
            in_child(lambda: build.put_users(writer, range(16)))
        build.put_users(writer, range(16))


def test_forked_children_and_their_parent_can_both_read(tmp_path, build):
    build.write_store(tmp_path)
    with StoreReader.open(tmp_path) as store:
        expected = store.get_many(range(40)).summary
        for _ in range(3):
            np.testing.assert_array_equal(in_child(lambda: store.get_many(range(40)).summary), expected)
            np.testing.assert_array_equal(store.get_many(range(40)).summary, expected)
        nested = in_child(lambda: in_child(lambda: store.get_many([1]).found.tolist()))
        assert nested == [True]


def test_a_fork_waits_for_reading_threads(tmp_path, build):
    build.write_store(tmp_path)
    with StoreReader.open(tmp_path) as store:
        stop = threading.Event()

        def read() -> None:
            while not stop.is_set():
                assert store.get_many(range(40)).found.all()

        threads = [threading.Thread(target=read) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(4):
                assert in_child(lambda: store.get_many(range(40)).found.all())
        finally:
            stop.set()
            for thread in threads:
                thread.join()


def test_a_forked_child_follows_current_if_its_parents_generation_was_removed(tmp_path, build):
    build.write_store(tmp_path)
    with StoreReader.open(tmp_path) as store:
        for run in range(2, 4):
            build.write_store(tmp_path, salt=run, run_digest=f"log-{run}")
        assert not generation_path(tmp_path, 1).exists()
        assert in_child(lambda: (store.get_many([1]).found.tolist(), store.generation)) == ([True], 3)
        assert store.get_many([1]).found.all() and store.generation == 1


READ = "import pickle, sys; print(pickle.loads(bytes.fromhex(sys.argv[1])).get_many([7]).summary.tobytes().hex())"


def test_a_pickled_store_opens_in_another_process(tmp_path, build):
    build.write_store(tmp_path)
    with StoreReader.open(tmp_path, summarizer_id=build.summarizer()) as store:
        pickled, expected = pickle.dumps(store), store.get_many([7]).summary
    assert len(pickled) < 1000
    read = subprocess.run([sys.executable, "-c", READ, pickled.hex()], capture_output=True, text=True, check=True)
    assert read.stdout == f"{expected.tobytes().hex()}\n"


def test_a_limited_address_space_gets_a_smaller_map(tmp_path, build):
    def limited() -> tuple[int, list[str]]:
        messages: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("vista.store.folder_files").addHandler(handler)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (8 << 30), resource.RLIM_INFINITY))
        return build.write_store(tmp_path).count, messages

    count, messages = in_child(limited)
    assert count == 40
    assert any("the address space is limited" in message for message in messages)
    assert all(found(tmp_path, range(40)))


def test_a_lack_of_address_space_is_reported(tmp_path, build):
    def limited() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
        build.open_writer(tmp_path)

    with pytest.raises(StoreError, match="ulimit -v"):
        in_child(limited)
    assert list_generations(tmp_path) in ([], [1])
    assert build.write_store(tmp_path).count == 40
