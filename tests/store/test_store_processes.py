"""Kills, forks, spawned readers and second writers: real processes and signals."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import random
import resource
import signal
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.forked_child import in_child
from tests.store.conftest import found
from vista.errors import StoreError, StoreLockedError
from vista.store import StoreReader
from vista.store.layout import generation_path, list_generations

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
TOTAL = 400
BATCH = 8
_fork = multiprocessing.get_context("fork")


def write_until_killed(path: Path, build: Any, acknowledged: Connection, max_batches: int) -> None:
    """Write batches and publish; after `max_batches`, wait to be killed instead.

    Without the limit, a writer on a fast file system (tmpfs, where fsync does nothing) could publish before the kill.
    """
    with build.open_writer(path, total_users=TOTAL) as writer:
        acknowledged.send(writer.cursor)
        for number, start in enumerate(range(writer.cursor, TOTAL, BATCH)):
            if number == max_batches:
                time.sleep(60)
            build.put_users(writer, range(start, min(start + BATCH, TOTAL)))
            acknowledged.send(writer.cursor)
        writer.publish()


def kill_after(path: Path, build: Any, num_messages: int, delay_s: float, max_batches: int = TOTAL) -> int:
    """Kill a writer a while after some of its messages; the last acknowledged cursor, -1 if there was none."""
    receiver, sender = _fork.Pipe(duplex=False)
    child = _fork.Process(target=write_until_killed, args=(path, build, sender, max_batches))
    child.start()
    sender.close()
    last = -1
    for _ in range(num_messages):
        assert receiver.poll(60)
        last = receiver.recv()
    time.sleep(delay_s)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    while True:
        try:
            last = receiver.recv()
        except (EOFError, OSError):
            return last


def test_a_writer_killed_five_times_resumes_to_the_same_bytes(tmp_path, build):
    whole = build.write_store(tmp_path / "whole", total_users=TOTAL)
    killed, chance = tmp_path / "killed", random.Random(0)
    # The first kill comes before or during the creation. However fast the disk is, the last one comes before the end.
    for num_messages in (0, 1, 6, 9, 13):
        last = kill_after(killed, build, num_messages, chance.uniform(0, 0.003), max_batches=num_messages + 4)
        assert not (killed / "CURRENT").exists()
        if last >= 0:
            with build.open_writer(killed, total_users=TOTAL, created_at=1) as writer:
                assert last <= writer.cursor <= last + BATCH
    with build.open_writer(killed, total_users=TOTAL, created_at=1) as writer:
        assert 0 < writer.cursor < TOTAL
        assert writer.manifest.created_at != 1
        for start in range(writer.cursor, TOTAL, BATCH):
            build.put_users(writer, range(start, min(start + BATCH, TOTAL)))
        assert writer.publish() == whole
    with StoreReader.open(killed) as store, StoreReader.open(tmp_path / "whole") as expected:
        np.testing.assert_array_equal(store.get_many(range(TOTAL)).summary, expected.get_many(range(TOTAL)).summary)


@pytest.mark.parametrize("delay_s", [0.0, 0.004, 0.012])
def test_a_writer_killed_while_publishing_leaves_all_or_nothing(tmp_path, build, delay_s):
    build.write_store(tmp_path, salt=9, run_digest="log-0")
    assert kill_after(tmp_path, build, 1 + TOTAL // BATCH, delay_s) == TOTAL
    with StoreReader.open(tmp_path) as store:
        published = store.generation == 2
        assert len(store) == (TOTAL if published else 40)
        assert store.get_many(range(40)).found.all()
    if not published:
        with build.open_writer(tmp_path, total_users=TOTAL) as writer:
            assert (writer.generation, writer.cursor) == (2, TOTAL)
            writer.publish()


@pytest.mark.parametrize("stopped", [False, True])
def test_a_second_writer_is_refused_at_once_with_the_process_of_the_first(tmp_path, build, stopped):
    receiver, sender = _fork.Pipe(duplex=False)

    def hold() -> None:
        with build.open_writer(tmp_path):
            sender.send(True)
            time.sleep(60)

    child = _fork.Process(target=hold)
    child.start()
    try:
        assert receiver.poll(60)
        if stopped:
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


def pickled_reader(say, pickled):
    with pickle.loads(bytes.fromhex(pickled)) as store:
        return store.get_many([7]).summary.tobytes().hex()


def test_a_pickled_store_opens_in_another_process(tmp_path, build, nursery):
    build.write_store(tmp_path)
    with StoreReader.open(tmp_path, summarizer_id=build.summarizer()) as store:
        pickled, expected = pickle.dumps(store), store.get_many([7]).summary
    assert len(pickled) < 1000
    assert nursery.call(pickled_reader, pickled.hex()) == expected.tobytes().hex()


def test_a_full_disk_is_reported_and_the_run_resumes_afterwards(tmp_path, build):
    def limited() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))  # so that pwrite fails beyond it
        with build.open_writer(tmp_path, total_users=TOTAL) as writer:
            with pytest.raises(StoreError, match="rerun the command"):
                for start in range(0, TOTAL, BATCH):
                    build.put_users(writer, range(start, start + BATCH))
            return writer.cursor

    build.write_store(tmp_path, salt=9, run_digest="log-0")
    cursor = in_child(limited)
    with StoreReader.open(tmp_path) as store:
        assert store.generation == 1 and store.get_many(range(40)).found.all()
    with build.open_writer(tmp_path, total_users=TOTAL) as writer:
        assert 0 < writer.cursor == cursor < TOTAL
    assert build.write_store(tmp_path, total_users=TOTAL).count == TOTAL


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
