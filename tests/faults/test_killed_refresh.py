"""A killed refresh resumes to the same generation as an uninterrupted one, with equal digests."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.faults.harness import Trial, promise
from tests.faults.nursery import Child, Nursery, Say
from vista.config.choices import Codec
from vista.log.event_log import EventLog
from vista.model.vista_model import VistaModel
from vista.refresh import RefreshOptions, refresh
from vista.store import StoreReader, StoreWriter

USERS_PER_BATCH = 2
NUM_BATCHES = 8


def run_refresh(say: Say, log: str, model: str, store: str, codec: str) -> int:
    """Refresh; says "begin" and "ack" around each durable batch, and "publish".

    Returns:
        Users that an earlier run had written.
    """
    put, publish = StoreWriter.put_batch, StoreWriter.publish

    def put_and_tell(writer: StoreWriter, keys: Any, records: Any, cursor: int, states: Any) -> int:
        say("begin")
        written = put(writer, keys, records, cursor, states)
        say("ack")
        return written

    def publish_and_tell(writer: StoreWriter) -> Any:
        say("publish")
        return publish(writer)

    setattr(StoreWriter, "put_batch", put_and_tell)  # noqa: B010
    setattr(StoreWriter, "publish", publish_and_tell)  # noqa: B010
    report = refresh(
        VistaModel.from_pretrained(model),
        EventLog.open(log),
        store,
        options=RefreshOptions(codec=Codec(codec), users_per_batch=USERS_PER_BATCH),
        created_at=1,
    )
    return report.resumed_at


def contents(say: Say, store: str) -> list[Any]:
    """The current generation: its number, the digest of its records, and a hash of all that readers return."""
    import hashlib

    with StoreReader.open(store) as opened:
        batch = opened.get_many(np.array(list(opened.keys())))
        digest = hashlib.sha256(batch.summary.tobytes() + batch.history_digest.tobytes() + batch.created_at.tobytes())
        return [opened.generation, opened.manifest.records_digest, len(opened), digest.hexdigest()]


@pytest.fixture(scope="module")
def whole(
    event_log: EventLog, model_dir: Path, nursery: Nursery, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[Any]]:
    """Contents of uninterrupted refreshes, by codec."""
    folder, expected = tmp_path_factory.mktemp("whole"), {}
    for codec in Codec:
        nursery.call(run_refresh, event_log.path, model_dir, folder / codec.value, codec.value)
        expected[codec.value] = nursery.call(contents, folder / codec.value)
    return expected


def kill_somewhere(trial: Trial, child: Child) -> None:
    """Kill a refresh, usually between begin and commit, and count its phase."""
    batch = trial.random.randrange(NUM_BATCHES)
    wanted = trial.random.choice(["begin"] * 7 + ["ack", "publish", "start"])
    seen = 0
    while wanted != "start" and (message := child.hear()) is not None:
        seen += message == wanted
        if seen > batch or message == wanted == "publish":
            break
    time.sleep(trial.random.choice([0, 0, trial.random.uniform(0, 0.001), trial.random.uniform(0, 0.01)]))
    child.kill()
    child.end()
    assert child.exit_code in (0, -9), child.raised
    last = child.messages[-1] if child.messages else "start"
    names = {"start": "before the first batch", "ack": "between batches", "publish": "while publishing"}
    trial.count("after the end" if child.exit_code == 0 else names.get(last, "between begin and commit"))


@promise(
    "Refresh resumes",
    fault="kill -9 of `refresh`, by phase",
    full=500,
    short=3,
    shares={"between begin and commit": 0.30},
)
def test_killed_refresh(
    trial: Trial, nursery: Nursery, event_log: EventLog, model_dir: Path, whole: dict[str, list[Any]]
) -> None:
    codec = trial.random.choice(list(Codec)).value
    job = (run_refresh, event_log.path, model_dir, trial.folder / "store", codec)
    for _ in range(trial.random.choice([1, 1, 1, 2, 4])):
        child = nursery.start(*job)
        kill_somewhere(trial, child)
        if (trial.folder / "store" / "CURRENT").exists():
            break
    else:
        done = child.messages.count("ack") if child.messages else 0
        resumed_at = nursery.call(*job)
        assert resumed_at >= USERS_PER_BATCH * done, f"{done} batches were acknowledged, resumed at {resumed_at}"
    assert nursery.call(contents, trial.folder / "store") == whole[codec]
