"""Acknowledged batches survive kill -9 of the writer at any time."""

from __future__ import annotations

import time
from pathlib import Path

from tests.faults import oracle
from tests.faults.harness import Trial, promise
from tests.faults.nursery import Child, Nursery
from tests.faults.oracle import Run

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
    full=1000,
    short=5,
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
