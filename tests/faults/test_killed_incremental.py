"""A killed incremental refresh resumes, and every user gets every event exactly once."""

from __future__ import annotations

import shutil
import time
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import small_config, small_frame
from tests.faults.harness import Trial, promise
from tests.faults.nursery import Nursery, Say
from vista.config import SourceColumns
from vista.config.choices import Codec
from vista.log.event_log import EventLog
from vista.model.vista_model import VistaModel
from vista.refresh import RefreshOptions, refresh, refresh_incremental
from vista.store import StoreReader
from vista.store.lmdb.environment import SharedEnvironment
from vista.training.log_schema import schema_of

USERS_PER_BATCH = 2
DAY = 86_400_000


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """log/ with three segments, model/, store/ that covers the first segment, and whole/, a full refresh of all."""
    folder = tmp_path_factory.mktemp("incremental")
    columns = SourceColumns(action="action", rating="rating")
    frame = small_frame()
    log = EventLog.from_frame(frame, folder / "log", time_unit="ms", columns=columns)
    config = small_config(log, "unused")
    config.model.counters = True
    model = VistaModel(config.model, schema_of(log, config), log.items, config.data).eval()
    model.save_pretrained(folder / "model")
    refresh(model, log, folder / "store", options=RefreshOptions(codec=Codec.float32), created_at=1)
    for turn in (1, 2):
        own = np.arange(len(frame["user"])) % (turn + 2) == 0  # some events are new, some of these late
        later = {name: values[own] for name, values in frame.items()}
        later["timestamp"] = later["timestamp"] + turn * 40 * DAY + 7
        log = EventLog.from_frame(later, folder / "log", time_unit="ms", columns=columns, append=True)
    refresh(model, log, folder / "whole", options=RefreshOptions(codec=Codec.float32), created_at=1)
    return folder


def refresh_segments(say: Say, folder: str, store: str, last_segment: int) -> dict[str, int]:
    """Refresh up to a segment; says "begin" and "done" around each transaction. Returns the counts of the report."""
    write = SharedEnvironment.write

    def write_and_tell(environment: SharedEnvironment, *arguments: Any) -> Any:
        say("begin")
        written = write(environment, *arguments)
        say("done")
        return written

    setattr(SharedEnvironment, "write", write_and_tell)  # noqa: B010
    log = EventLog.open(Path(folder, "log"), last_segment=last_segment)
    model = VistaModel.from_pretrained(Path(folder, "model"))
    return refresh_incremental(
        model, log, store, options=RefreshOptions(users_per_batch=USERS_PER_BATCH), created_at=2
    ).counts


def compare(say: Say, store: str, whole: str) -> bool:
    """Require the same events of the same users, and equal summaries up to rounding."""
    with StoreReader.open(store) as opened, StoreReader.open(whole) as expected:
        users = list(expected.keys())
        assert list(opened.keys()) == users and len(opened) == len(users)
        actual, wanted = opened.get_many(users), expected.get_many(users)
        for name in ("event_count", "last_event_ts", "history_digest"):
            assert getattr(actual, name).tolist() == getattr(wanted, name).tolist(), name
        assert actual.tail.times.tolist() == wanted.tail.times.tolist()
        for counters, others in zip(actual.counters, wanted.counters, strict=True):
            assert counters.key.tolist() == others.key.tolist() and counters.codes.tolist() == others.codes.tolist()
        np.testing.assert_allclose(actual.summary, wanted.summary, atol=1e-4)
        states, wanted_states = opened.states(users), expected.states(users)
        assert states is not None and wanted_states is not None
        assert states[1].history_digest.tolist() == wanted_states[1].history_digest.tolist()
    return True


@promise(
    "Refresh resumes",
    fault="kill -9 of `refresh incremental=true`, by phase; the log grows in between",
    full=500,
    short=3,
    shares={"within a transaction": 0.3},
)
def test_killed_incremental(trial: Trial, nursery: Nursery, base: Path) -> None:
    store = trial.folder / "store"
    shutil.copytree(base / "store", store)
    last = trial.random.choice([2, 3])
    for _ in range(trial.random.choice([1, 1, 2, 4])):
        child = nursery.start(refresh_segments, base, store, last)
        in_transaction = trial.random.random() < 0.5
        least = trial.random.randrange(1, 36)
        for number in count(1):
            heard = child.hear()
            if heard is None or (number >= least and (heard == "begin" or not in_transaction)):
                break
        time.sleep(trial.random.choice([0, 0, trial.random.uniform(0, 0.002)]))
        child.kill()
        child.end()
        assert child.exit_code in (0, -9), child.raised
        ended = child.messages[-1] if child.messages else ""
        where = {"begin": "within a transaction", "done": "between transactions"}.get(ended, "before the first")
        trial.count("after the end" if child.exit_code == 0 else where)
        last = 3
    nursery.call(refresh_segments, base, store, 3)
    assert nursery.call(compare, store, base / "whole")
    again = nursery.call(refresh_segments, base, store, 3)
    assert not any(again.get(name) for name in ("appended", "exchanged", "recomputed")), again
