"""Publishing is atomic: readers that follow CURRENT see no mixture and miss no user, wherever the writer dies."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import numpy as np

from tests.faults import oracle, preload
from tests.faults.harness import Trial, promise
from tests.faults.nursery import Nursery, Say
from tests.faults.oracle import Run
from vista.store import StoreReader
from vista.store.layout import read_current

TOTAL, BATCH, FLIPS = 96, 32, 5
MOST_CALLS = 26
"""More system calls than publishing makes, so that sometimes no process is killed."""


def run_of(number: int) -> Run:
    """The run of a generation; every generation has other values."""
    return Run(salt=number, total=TOTAL, batch=BATCH)


def follow(say: Say, store: str) -> list[int]:
    """Read all users and follow CURRENT until a file `stop` exists next to the store.

    Returns:
        Reads, and generations seen.

    Raises:
        AssertionError: a user was missing, or a batch is not that of one run.
    """
    reads, generations, stop = 0, set(), Path(store).with_name("stop")
    users = range(TOTAL)
    with StoreReader.open(store, summarizer_id=oracle.SUMMARIZER) as opened:
        say("follows")
        while not stop.exists():
            opened.reload()
            batch = opened.get_many(users)
            assert batch.found.all(), f"users {np.flatnonzero(~batch.found)[:5]} are missing"
            salts = set((batch.created_at - oracle.CREATED_AT).tolist())
            assert len(salts) == 1, f"a mixture of runs {salts}"
            wrong = oracle.differences(batch, run_of(salts.pop()), users, opened.manifest.spec())
            assert not wrong, f"generation {opened.generation}: users {wrong[:5]}"
            reads += 1
            time.sleep(0.001)  # Two readers without a pause would starve the writer on few cores.
            generations.add(opened.generation)
    return [reads, len(generations)]


def publish(say: Say, store: str, words: dict[str, Any], kill_at: int) -> int:
    """Write a run and publish it; die right before the n-th system call of publishing (0: do not die)."""
    run = Run.of(words)
    preload.watch(store)
    with run.open_writer(store) as writer:
        for users in run.batches(writer.cursor):
            writer.put_batch(*run.records(users, writer.spec), users.stop)
        if kill_at:
            preload.kill_at(preload.WRITES | preload.SYNCS | preload.NAMES, kill_at, signal.SIGKILL)
        writer.publish()
        return writer.generation


@promise(
    "Atomic flip",
    fault="2 readers; kill -9 of the writer before any system call of publishing",
    full=200,
    short=5,
    each=FLIPS,
)
def test_flips(trial: Trial, nursery: Nursery, traced: Nursery) -> None:
    store = trial.folder.resolve() / "store"
    traced.call(publish, store, run_of(0).words, 0)
    readers = [nursery.start(follow, store) for _ in range(2)]
    assert [reader.hear() for reader in readers] == ["follows"] * 2
    for flip in range(1, FLIPS + 1):
        before = read_current(store)
        for kill_at in (
            trial.random.randint(1, MOST_CALLS),
            trial.random.choice([0, trial.random.randint(1, MOST_CALLS)]),
            0,
        ):
            writer = traced.start(publish, store, run_of(flip).words, kill_at).end()
            assert writer.exit_code in (0, -9), writer.raised
            flipped = read_current(store) > before
            trial.count(
                "not killed" if writer.exit_code == 0 else f"killed {'after' if flipped else 'before'} the flip"
            )
            if flipped:
                break
        assert flipped
    (trial.folder / "stop").touch()
    reads = [reader.result() for reader in readers]
    assert min(number for number, _ in reads) > 0 and max(seen for _, seen in reads) > 1, reads
    trial.count("reads", sum(number for number, _ in reads))
