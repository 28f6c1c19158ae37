"""Kills and races of the processes of one store: the writer, other writers, and readers."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import DAY
from tests.faults import oracle, preload
from tests.faults.harness import Trial, promise
from tests.faults.nursery import Child, Nursery, Say
from tests.faults.operations import save_model
from tests.faults.oracle import Run
from vista.log.event_log import EventLog
from vista.model.vista_model import VistaModel
from vista.refresh import RefreshOptions, refresh, refresh_incremental
from vista.store import StoreReader
from vista.store.admin import compact_store, verify_store
from vista.store.folder_files import committed_size
from vista.store.folder_generation import SharedEnvironment
from vista.store.layout import environment_path, read_current
from vista.store.writer import erase

PHASES = {"open": "between batches", "begin": "between begin and commit", "ack": "between batches"}


def run_of(trial: Trial) -> Run:
    """A run with records within a page or of several pages."""
    return Run(salt=trial.number % 7, num_tokens=2, dim=trial.random.choice([16, 16, 3000]))


def kill_somewhere(trial: Trial, writer: Child) -> str:
    """Kill a writer at a random time after a random message, usually as a batch begins.

    Returns:
        The phase in which it died.
    """
    wanted = trial.random.choice(["begin"] * 6 + ["open", "ack", "publish", "published"])
    skip = trial.random.randrange(6)
    while (message := writer.hear()) is not None:
        if message[0] == wanted:
            skip -= 1
            if skip < 0 or wanted in ("open", "publish", "published"):
                break
    if wanted != "open":  # Else immediately, often before the first batch.
        time.sleep(trial.random.choice([0, trial.random.uniform(0, 0.001), trial.random.uniform(0, 0.004)]))
    writer.kill()
    writer.end()
    assert writer.exit_code in (0, -9), writer.raised
    if writer.exit_code == 0:
        return "after the end"
    last = writer.messages[-1][0] if writer.messages else "before opening"
    return PHASES.get(last, "while publishing" if last == "publish" else last)


def check_survivors(nursery: Nursery, store: Path, run: Run, writer: Child) -> None:
    """Require that the store holds exactly whole batches, including all acknowledged ones."""
    if (store / "CURRENT").exists():
        nursery.call(oracle.published, store, run.words, 1)
        return
    assert not any(what == "published" for what, _ in writer.messages)
    least = oracle.acknowledged(writer.messages)
    if least >= 0:
        nursery.call(oracle.unpublished, store, run.words, 1, least)


@promise(
    "Acknowledged batch survives",
    fault="kill -9 of the writer",
    full=60,
    smoke=True,
    shares={"between begin and commit": 0.30},
)
def test_killed_writer(trial: Trial, nursery: Nursery) -> None:
    run, store = run_of(trial), trial.folder / "store"
    for _ in range(trial.random.choice([1, 1, 2, 3])):
        writer = nursery.start(oracle.write, store, run.words)
        trial.count(kill_somewhere(trial, writer))
        check_survivors(nursery, store, run, writer)
        if (store / "CURRENT").exists():
            break  # Another run would write the next generation.
    if not (store / "CURRENT").exists():
        assert nursery.call(oracle.write, store, run.words) == 1
    nursery.call(oracle.published, store, run.words, 1)


FLIP_TOTAL, FLIP_BATCH, FLIPS = 96, 32, 5
MOST_CALLS = 26
"""More system calls than publishing makes, so that sometimes no process is killed."""


def flip_run(number: int) -> Run:
    """The run of a generation; every generation has other values."""
    return Run(salt=number, total=FLIP_TOTAL, batch=FLIP_BATCH)


def follow(say: Say, store: str) -> list[int]:
    """Read all users and follow CURRENT until a file `stop` exists next to the store.

    Returns:
        Reads, and generations seen.

    Raises:
        AssertionError: a user was missing, or a batch is not that of one run.
    """
    reads, generations, stop = 0, set(), Path(store).with_name("stop")
    users = range(FLIP_TOTAL)
    with StoreReader.open(store, summarizer_id=oracle.SUMMARIZER) as opened:
        say("follows")
        while not stop.exists():
            opened.reload()
            batch = opened.get_many(users)
            assert batch.found.all(), f"users {np.flatnonzero(~batch.found)[:5]} are missing"
            salts = set((batch.created_at - oracle.CREATED_AT).tolist())
            assert len(salts) == 1, f"a mixture of runs {salts}"
            wrong = oracle.differences(batch, flip_run(salts.pop()), users, opened.manifest.spec())
            assert not wrong, f"generation {opened.generation}: users {wrong[:5]}"
            reads += 1
            time.sleep(0.001)  # Two readers without a pause would starve the writer on few cores.
            generations.add(opened.generation)
    return [reads, len(generations)]


def publish(say: Say, store: str, words: dict[str, Any], kill_at: int) -> int:
    """Write a run and publish it; die right before the n-th system call of publishing (0: do not die)."""
    run = Run(**words)
    preload.watch(store)
    with run.open_writer(store) as writer:
        for users in run.batches(writer.cursor):
            writer.put_batch(*run.records(users, writer.spec), users.stop)
        preload.die_at(kill_at)
        writer.publish()
        return writer.generation


@promise(
    "Atomic flip", fault="2 readers; kill -9 of the writer before any system call of publishing", full=60, each=FLIPS
)
def test_flips(trial: Trial, nursery: Nursery, traced: Nursery) -> None:
    store = trial.folder.resolve() / "store"
    traced.call(publish, store, flip_run(0).words, 0)
    readers = [nursery.start(follow, store) for _ in range(2)]
    assert [reader.hear() for reader in readers] == ["follows"] * 2
    for flip in range(1, FLIPS + 1):
        before = read_current(store)
        for kill_at in (
            1 + (trial.number * FLIPS + flip) % MOST_CALLS,
            trial.random.choice([0, trial.random.randint(1, MOST_CALLS)]),
            0,
        ):
            writer = traced.start(publish, store, flip_run(flip).words, kill_at).end()
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


REWRITTEN = Run(total=1000, batch=20, dim=300)
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
    with REWRITTEN.open_writer(store) as writer:
        for users in REWRITTEN.batches(0):
            writer.put_batch(*REWRITTEN.records(users, writer.spec), users.stop)
        live, largest = committed_size(data)[1], 0
        say("written")
        for _ in range(rewrites):
            for users in REWRITTEN.batches(0):
                writer.put_batch(*REWRITTEN.records(users, writer.spec), REWRITTEN.total)
                time.sleep(PACE_S)
                largest = max(largest, committed_size(data)[1])
            say("rewrite")
        writer.publish()
    return largest / live


@promise("Bounded size", fault="rewrites under reads of 100 ms, a reader killed during each", full=20, each=REWRITES)
def test_bounded_size(trial: Trial, nursery: Nursery) -> None:
    store = trial.folder / "store"
    writer, readers = nursery.start(rewrite, store, len(trial.numbers)), list[Child]()
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
    nursery.call(oracle.published, store, REWRITTEN.words, 1)


NUM_USERS = 60


def name(user: int) -> str:
    """A name that is easy to search for and is not part of another name."""
    return f"erasure-marker-{user:03d}-"


def frame(turn: int) -> dict[str, Any]:
    """Two events per user, later in later turns."""
    rng = np.random.default_rng(turn)
    return {
        "user": np.repeat(np.array([name(user) for user in range(NUM_USERS)]), 2),
        "item": rng.integers(0, 20, 2 * NUM_USERS),
        "timestamp": 1_600_000_000_000 + turn * 30 * DAY + np.tile(np.arange(2), NUM_USERS) * DAY,
    }


@pytest.fixture(scope="module")
def named_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model for such logs."""
    folder = tmp_path_factory.mktemp("model")
    save_model(EventLog.from_frame(frame(0), folder / "log", time_unit="ms"), folder / "m", counters=False)
    return folder / "m"


def keep_refreshing(say: Say, folder: str, named_model: str, turns: int, kind: str) -> None:
    """Refresh repeatedly, in full or incrementally; says when a turn ends."""
    model = VistaModel.from_pretrained(named_model)
    for turn in range(1, turns + 1):
        log = EventLog.from_frame(frame(turn), Path(folder, "log"), time_unit="ms", append=True)
        run = refresh if kind == "full" else refresh_incremental
        run(model, log, Path(folder, "store"), options=RefreshOptions(users_per_batch=7))
        say(turn)


@promise("Erasure", fault="users erased while refreshes race, then compaction", full=20, smoke=True, each=10)
def test_erasures(trial: Trial, nursery: Nursery, named_model: Path) -> None:
    store, model = trial.folder / "store", VistaModel.from_pretrained(named_model)
    refresh(model, EventLog.from_frame(frame(0), trial.folder / "log", time_unit="ms"), store)
    kind = trial.random.choice(["full", "incremental"])
    child = nursery.start(keep_refreshing, trial.folder, named_model, 3, kind)
    users = trial.random.sample(range(NUM_USERS), 10)
    with StoreReader.open(store) as opened:
        for user in users:
            erase(store, [name(user)])
            opened.reload()
            assert not opened.get_many([name(user)]).found.any(), "an erased user was still served"
            while nursery.listen():  # learn whether it has ended
                pass
            trial.count(f"erased during a refresh ({kind})" if child.exit_code is None else "erased after it")
            if trial.random.random() < 0.3:
                child.hear()
    child.result()
    compact_store(store)
    report = verify_store(store)
    assert not report.num_problems, report
    left = sorted(set(range(NUM_USERS)) - set(users))
    with StoreReader.open(store) as opened:
        assert sorted(opened.keys()) == [name(user) for user in left] and len(opened) == len(left)
    files = [path for path in store.rglob("*") if path.is_file()]
    data = b"\0".join(path.read_bytes() for path in files)
    assert name(left[0]).encode() in data
    assert not [user for user in users if name(user).encode() in data], "the file still holds bytes of an erased user"
