"""Evaluation refuses records that cover a label's event, for whatever reason."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import Served
from tests.faults.harness import Trial, promise
from tests.faults.nursery import Nursery, Say
from vista.config import EvaluateConfig
from vista.errors import ConfigError, LeakageError
from vista.evaluation.evaluate import evaluate_scorer
from vista.log.event_log import EventLog
from vista.model.vista_model import VistaModel
from vista.refresh import refresh
from vista.scorer import Scorer
from vista.store.format.keys import user_keys
from vista.store.format.record import seal_record
from vista.store.format.record_spec import HEADER, HEADER_BYTES
from vista.store.generation_files import GenerationFiles
from vista.store.tombstones import Tombstones


def evaluated(say: Say, log_path: str, model_dir: str, store: str, until: str, user: int, more: int) -> str:
    """Refresh `until`, let one record claim `more` events, and evaluate; returns "evaluated" or the error."""
    import numpy as np

    model, log = VistaModel.from_pretrained(model_dir), EventLog.open(log_path)
    refresh(model, log, store, until=until)
    (key,) = user_keys([user])
    if more:
        files = GenerationFiles.open(Path(store), 1)
        record = files.summary.read(lambda transaction: bytes(transaction.get(key, b"")))
        header = np.frombuffer(record[:HEADER_BYTES], HEADER).copy()
        header["event_count"] += more
        header["checksum"] = 0
        files.put(
            Tombstones(Path(store)), [key], [seal_record(header.tobytes(), [record[HEADER_BYTES:]], key, None)], [], {}
        )
        files.close()
    with Scorer.open(model, store) as scorer:
        try:
            evaluate_scorer(scorer, log, EvaluateConfig())
        except (LeakageError, ConfigError) as error:
            return f"{type(error).__name__}: {error}"
    return "evaluated"


@promise("No leakage", fault="a store, or one record, that covers a test label", full=100, short=4)
def test_leakage(trial: Trial, nursery: Nursery, served: Served) -> None:
    log = served.log
    kind = trial.random.choice(["whole store", "one record", "none"])
    users = [100 + row for row in range(log.num_users) if log.lengths[row] >= 3]
    user, more = trial.random.choice(users), trial.random.randint(1, 3) if kind == "one record" else 0
    until = "all" if kind == "whole store" else "leave-last-out"
    outcome = nursery.call(evaluated, log.path, served.model_dir, trial.folder / "store", until, user, more)
    if kind == "none":
        assert outcome == "evaluated"
    elif kind == "whole store":
        assert outcome.startswith("LeakageError"), outcome
    else:
        assert outcome.startswith("LeakageError") and f"user {user}" in outcome, outcome
    trial.count(f"{kind}: {outcome.split(':')[0]}")
