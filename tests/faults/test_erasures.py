"""Erased users are misses at once, no refresh brings them back, and compaction leaves none of their bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import small_config
from tests.faults.harness import Trial, promise
from tests.faults.nursery import Nursery, Say
from vista.log.event_log import EventLog
from vista.model.vista_model import VistaModel
from vista.refresh import RefreshOptions, refresh, refresh_incremental
from vista.store import StoreReader
from vista.store.admin.store_compaction import compact_store
from vista.store.admin.verification import verify_store
from vista.store.erasure import erase
from vista.training.log_schema import schema_of

NUM_USERS = 60
DAY = 86_400_000


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
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model for such logs."""
    folder = tmp_path_factory.mktemp("model")
    log = EventLog.from_frame(frame(0), folder / "log", time_unit="ms")
    config = small_config(log, "unused")
    VistaModel(config.model, schema_of(log, config), log.items, config.data).save_pretrained(folder / "m")
    return folder / "m"


def keep_refreshing(say: Say, folder: str, model_dir: str, turns: int, kind: str) -> None:
    """Refresh repeatedly, in full or incrementally; says when a turn ends."""
    model = VistaModel.from_pretrained(model_dir)
    for turn in range(1, turns + 1):
        log = EventLog.from_frame(frame(turn), Path(folder, "log"), time_unit="ms", append=True)
        run = refresh if kind == "full" else refresh_incremental
        run(model, log, Path(folder, "store"), options=RefreshOptions(users_per_batch=7))
        say(turn)


@promise("Erasure", fault="100 users erased while refreshes race, then compaction", full=100, short=10, each=10)
def test_erasures(trial: Trial, nursery: Nursery, model_dir: Path) -> None:
    store, model = trial.folder / "store", VistaModel.from_pretrained(model_dir)
    refresh(model, EventLog.from_frame(frame(0), trial.folder / "log", time_unit="ms"), store)
    kind = trial.random.choice(["full", "incremental"])
    child = nursery.start(keep_refreshing, trial.folder, model_dir, 3, kind)
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
