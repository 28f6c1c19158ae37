"""One writer per store: a second writer gets a typed error immediately, even if the first one is stopped."""

from __future__ import annotations

import signal
import time

from tests.faults import oracle
from tests.faults.harness import Trial, promise
from tests.faults.nursery import Nursery, Say
from tests.faults.oracle import Run
from vista.errors import StoreLockedError

RUN = Run()


def start_at(say: Say, store: str, moment: float, hold_s: float) -> str:
    """Open the writer at a time of the monotonic clock, put a batch and hold the lock."""
    while time.monotonic() < moment:
        pass
    try:
        with oracle.within(10.0):
            writer = RUN.open_writer(store)
    except StoreLockedError as error:
        say("refused")
        return str(error)
    with writer:
        say("holds")
        writer.put_batch(*RUN.records(range(8), writer.spec), max(writer.cursor, 8))
        time.sleep(hold_s)
    return ""


@promise("One writer", fault="two starters at once, SIGSTOP of the holder", full=100, short=2)
def test_one_writer(trial: Trial, nursery: Nursery) -> None:
    store = trial.folder / "store"
    moment = time.monotonic() + 0.2
    two = [nursery.start(start_at, store, moment, 30.0) for _ in range(2)]
    heard = [child.hear() for child in two]
    assert sorted(heard) == ["holds", "refused"], heard
    holder, refused = two if heard[0] == "holds" else two[::-1]
    refused.result()
    for what, number in (("holder awake", signal.SIGCONT), ("holder stopped", signal.SIGSTOP)):
        holder.kill(number)
        third = nursery.start(start_at, store, 0.0, 0.0)
        assert f"process {holder.pid}" in third.result() and third.messages == ["refused"]
        trial.count(f"refused, {what}")
    holder.kill(signal.SIGKILL)
    holder.end()
    assert nursery.call(oracle.write, store, RUN.words) == 1
    nursery.call(oracle.published, store, RUN.words, 1)
