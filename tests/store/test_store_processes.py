"""Forks, spawned readers and second writers: real processes and signals."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

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
