"""Readers work with fork, spawn and threads: each process opens the store itself, reads right, and frees its slot."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.faults import oracle
from tests.faults.harness import Trial, promise
from tests.faults.nursery import Nursery, Say
from tests.faults.oracle import Run
from vista.store import StoreReader
from vista.store.layout import environment_path
from vista.store.lmdb.data_file import open_environment

RUN = Run(total=64)
NUM_THREADS = 8


def check(opened: StoreReader, times: int = 1) -> int:
    """Read and compare all users, `times` times; returns the process id."""
    users = range(RUN.total)
    for _ in range(times):
        batch = opened.get_many(users)
        assert batch.found.all() and not oracle.differences(batch, RUN, users, opened.manifest.spec())
    return os.getpid()


def read_forever(opened: StoreReader) -> None:
    """Check until killed."""
    while True:
        check(opened)


def parent(say: Say, store: str, spawn: bool) -> None:
    """Read in 8 threads, and meanwhile in forked, spawned, nested and killed children.

    Says "alone" when all children have ended, and runs until a file `stop` exists next to the store.
    """
    fork, stop = multiprocessing.get_context("fork"), threading.Event()

    def read() -> None:
        while not stop.is_set():
            check(opened)
            time.sleep(0.02)

    with StoreReader.open(store) as opened, ThreadPoolExecutor(NUM_THREADS) as threads:
        readers = [threads.submit(read) for _ in range(NUM_THREADS)]
        try:
            children: list[Any] = [fork.Process(target=check, args=(opened, 5)) for _ in range(3)]
            children.append(fork.Process(target=nested, args=(opened,)))
            if spawn:
                children.append(multiprocessing.get_context("spawn").Process(target=check, args=(opened, 5)))
            doomed = fork.Process(target=read_forever, args=(opened,))
            for child in [*children, doomed]:
                child.start()
            time.sleep(0.02)
            doomed.kill()
            for child in [*children, doomed]:
                child.join(120)
            codes = [child.exitcode for child in children]
            assert codes == [0] * len(children) and doomed.exitcode == -signal.SIGKILL, codes
        finally:
            stop.set()
        for reader in readers:
            reader.result()
        check(opened)
        say("alone")
        while not Path(store).with_name("stop").exists():
            time.sleep(0.01)


def nested(opened: StoreReader) -> None:
    """Read in this process and in a forked one."""
    check(opened)
    child = multiprocessing.get_context("fork").Process(target=check, args=(opened, 3))
    child.start()
    child.join(60)
    assert child.exitcode == 0


def taken_slots(say: Say, store: str) -> list[int]:
    """Process of each used slot of the reader table, after the check that a writer makes before each batch."""
    environment = open_environment(environment_path(Path(store), 1), readonly=False)
    environment.reader_check()
    lines = environment.readers().splitlines()[1:]
    environment.close()
    return [int(line.split()[0]) for line in lines if line.split()]


@promise("Fork and thread safe", fault="fork, nested fork, spawn, 8 threads, a killed child", full=50, short=2)
def test_processes(trial: Trial, nursery: Nursery) -> None:
    store = trial.folder / "store"
    nursery.call(oracle.write, store, RUN.words)
    reader = nursery.start(parent, store, trial.number % 5 == 4)
    assert reader.hear(timeout_s=150) == "alone", reader.end().raised
    slots = nursery.call(taken_slots, store)
    assert slots == [], f"slots of processes {slots} are in use without a reader; {reader.pid} still runs"
    (trial.folder / "stop").touch()
    reader.result()
    trial.count("with spawn" if trial.number % 5 == 4 else "with fork")
