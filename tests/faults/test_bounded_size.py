"""A generation rewritten in place stays small while readers hold transactions and are killed in them."""

from __future__ import annotations

import random
import time
from pathlib import Path

from tests.faults import oracle
from tests.faults.harness import Trial, promise
from tests.faults.nursery import Child, Nursery, Say
from tests.faults.oracle import Run
from vista.store.layout import environment_path
from vista.store.lmdb.data_file import committed_size
from vista.store.lmdb.environment import SharedEnvironment

RUN = Run(total=1000, batch=20, dim=300)
"""Batches of 2 %, one per PACE_S. Writing at full speed would make a small store grow by half in 100 ms."""
PACE_S = 0.05
MOST_TIMES_LIVE = 1.5
LONGEST_READ_S = 0.1
REWRITES = 5


def read_slowly(say: Say, store: str, generation: int, seed: int) -> None:
    """Hold read transactions of up to 100 ms, one after the other, until killed."""
    chance = random.Random(seed)
    shared = SharedEnvironment.acquire(environment_path(Path(store), generation))
    say("reads")
    while True:
        shared.read(lambda transaction: time.sleep(chance.uniform(0, LONGEST_READ_S)))


def rewrite(say: Say, store: str, rewrites: int) -> float:
    """Write all users, then rewrite them repeatedly in place; says "rewrite" after each time.

    Returns:
        The largest size of the file, as a multiple of its size after the first writing.
    """
    data = environment_path(Path(store), 1) / "data.mdb"
    with RUN.open_writer(store) as writer:
        for users in RUN.batches(0):
            writer.put_batch(*RUN.records(users, writer.spec), users.stop)
        live, largest = committed_size(data)[1], 0
        say("written")
        for _ in range(rewrites):
            for users in RUN.batches(0):
                writer.put_batch(*RUN.records(users, writer.spec), RUN.total)
                time.sleep(PACE_S)
                largest = max(largest, committed_size(data)[1])
            say("rewrite")
        writer.publish()
    return largest / live


@promise(
    "Bounded size",
    fault="rewrites under reads of 100 ms, a reader killed during each",
    full=100,
    short=5,
    each=REWRITES,
)
def test_bounded_size(trial: Trial, nursery: Nursery) -> None:
    store = trial.folder / "store"
    writer, readers = nursery.start(rewrite, store, REWRITES), list[Child]()
    assert writer.hear() == "written"
    while True:
        while len(readers) < 3:
            readers.append(nursery.start(read_slowly, store, 1, trial.random.randrange(1 << 30)))
            assert readers[-1].hear() == "reads"
        if writer.hear(timeout_s=300) is None:
            break
        readers.pop(0).kill()
        trial.count("reader killed")
    for reader in readers:
        reader.kill()
    times = writer.result()
    assert times <= MOST_TIMES_LIVE, f"the file grew to {times:.2f} times its live size"
    trial.count(f"at most {times:.1f} times live")
    nursery.call(oracle.published, store, RUN.words, 1)
