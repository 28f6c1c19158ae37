"""Records that must not be used: too old, of another summarizer, covering a label, erased, or drifted."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash

from tests.faults import oracle
from tests.faults.harness import Trial, promise
from tests.faults.nursery import Nursery, Say
from tests.faults.operations import log_of, save_model
from tests.faults.oracle import COUNTERS, Run, put_value
from vista.config import DataConfig, EvaluateConfig, ModelConfig
from vista.config.checks import Decay
from vista.errors import ConfigError, LeakageError, RecordError, StoreError
from vista.evaluation.evaluate import evaluate_scorer
from vista.log.event_log import EventLog
from vista.log.histories import Histories
from vista.log.vocabulary import Vocabulary
from vista.model.features import Schema
from vista.model.history_states import history_states, range_states, reach, remove_events
from vista.model.summarizer import merge_states
from vista.model.vista_model import VistaModel
from vista.refresh import RefreshOptions, refresh, refresh_incremental
from vista.scorer import Scorer
from vista.store import StoreReader, user_keys
from vista.store.admin import compact_store, verify_store
from vista.store.folder_files import open_environment
from vista.store.folder_writer import FolderWriter
from vista.store.keys import MANIFEST_KEY
from vista.store.layout import environment_path
from vista.store.manifest import Manifest
from vista.store.reader import CLOCK_SKEW_MS
from vista.store.record import CHECKSUM_OFFSET, HEADER, HEADER_BYTES
from vista.store.record_encoding import seal_record
from vista.store.writer import erase

MAX_AGE_S = 3600


def served(say: Say, log: str, model_dir: str, store: str, shift_ms: int) -> list[bool]:
    """Refresh with a shifted clock, then score with an age limit; returns which of three users got scores."""
    model = VistaModel.from_pretrained(model_dir)
    refresh(model, EventLog.open(log), store, created_at=time.time_ns() // 1_000_000 + shift_ms)
    with Scorer.open(model, store, on_missing="nan") as scorer:
        assert np.isfinite(scorer.score([100, 101, 102], [0])).all()
    with Scorer.open(model, store, on_missing="nan", max_age_s=MAX_AGE_S) as scorer:
        return [bool(scored) for scored in np.isfinite(scorer.score([100, 101, 102], [0]))[:, 0]]


@promise(
    "TTL",
    fault="a record that is about a second older, or younger, than the limit, or from the future",
    full=200,
    short=4,
    smoke=1,
)
def test_age(trial: Trial, nursery: Nursery, event_log: EventLog, model_dir: Path) -> None:
    edge, what = trial.random.choice([(-1000 * MAX_AGE_S, "old"), (CLOCK_SKEW_MS, "from the future")])
    # Records age during the refresh and the scoring, which can take most of a minute.
    inside = trial.random.random() < 0.5
    margin_ms = trial.random.randint(60_000, 70_000) if inside else trial.random.randint(1, 1_000)
    if what == "old":
        shift = edge + margin_ms if inside else edge - margin_ms
    else:
        shift = edge - 1 if inside else edge + trial.random.randint(60_000, 10**12)
    scored = nursery.call(served, event_log.path, model_dir, trial.folder / "store", shift)
    assert scored == [inside] * 3, (what, shift, scored)
    trial.count(f"{what}: {'served' if inside else 'not served'}")


RUN = Run(total=8)
VALUES = 10
CHECKED = (
    *("magic", "format_version", "header_length", "flags", "codec", "tokens", "dim", "scale_dtype", "payload_length"),
    *("generation", "summarizer_id", "key_hash", "tail_length", "counters_length"),
)
"""Header fields that a reader checks against its own; the others describe the refreshed history and may differ."""
NAMED = {"flags": "flags|tail_length"}
"""What the error names if it is not the field: a tail with the other kind of times has another length."""
DATA = ("created_at", "last_event_ts", "event_count", "applied_segment", "history_digest")


def with_flipped(record: bytes, field: str, bit: int) -> bytes:
    """The record with one flipped bit and a valid checksum: a foreign record, not a damaged one."""
    assert HEADER.fields is not None
    offset = HEADER.fields[field][1]
    changed = bytearray(record)
    changed[offset + bit // 8] ^= 1 << bit % 8
    changed[CHECKSUM_OFFSET:HEADER_BYTES] = bytes(8)
    changed[CHECKSUM_OFFSET:HEADER_BYTES] = xxhash.xxh3_64_intdigest(changed).to_bytes(8, "little")
    return bytes(changed)


def foreign_records(say: Say, store: str, field: str, bits: list[int]) -> int:
    """Flip each bit of a field in user 3's record and read it, alone and with others; returns the refusals."""
    (key,), refused = user_keys([3]), 0
    environment = open_environment(environment_path(Path(store), 1), readonly=True)
    with environment.begin() as transaction:
        whole = bytes(transaction.get(key, b""))
    environment.close()
    for bit in bits:
        put_value(store, key, with_flipped(whole, field, bit))
        with StoreReader.open(store) as opened:
            assert opened.get_many([2, 4]).found.all()
            for users in ([3], range(RUN.total)):
                with pytest.raises(RecordError, match=f"user 3 .*{NAMED.get(field, field)}"):
                    opened.get_many(users)
        refused += 1
    put_value(store, key, whole)
    oracle.published(say, store, RUN.words, 1)
    return refused


@promise(
    "No skew",
    fault="a flipped bit in each header field of a record, under a checksum that fits",
    full=1400,
    short=140,
    each=140,
)
def test_foreign_records(trial: Trial, nursery: Nursery) -> None:
    assert {*CHECKED, *DATA, "checksum"} == set(HEADER.names or ())
    store = trial.folder / "store"
    nursery.call(oracle.write, store, RUN.words)
    for field in CHECKED:
        bits = [trial.random.randrange(8 * HEADER[field].itemsize) for _ in range(VALUES)]
        assert nursery.call(foreign_records, store, field, bits) == VALUES
        trial.count(field, VALUES)


MANIFEST_FIELDS: dict[str, Callable[[Trial], Any]] = {
    "summarizer_id": lambda trial: trial.random.randbytes(32).hex(),
    "num_tokens": lambda trial: trial.random.choice([0, 1, 3, 17]),
    "dim": lambda trial: trial.random.choice([8, 15, 17, 32]),
    "codec": lambda trial: "float32",
    "counters": lambda trial: trial.random.choice([None, COUNTERS.to_dict() | {"key_bytes": [3]}]),
    "generation": lambda trial: trial.random.randrange(2, 9),
    "format_version": lambda trial: trial.random.choice([0, 1, 9]),
    "tail_columns": lambda trial: trial.random.choice([[], [{"name": "surface", "size": 3}]]),
}


def foreign_manifest(say: Say, store: str, changes: dict[str, Any]) -> str:
    """Open and read a store with another value in its manifest; returns the refusal."""
    environment = open_environment(environment_path(Path(store), 1), readonly=True)
    with environment.begin() as transaction:
        whole = bytes(transaction.get(MANIFEST_KEY, b""))
    environment.close()
    manifest = dataclasses.replace(Manifest.from_bytes(whole, Path(store)), **changes)
    put_value(store, MANIFEST_KEY, manifest.to_bytes())
    with pytest.raises(StoreError) as refused, StoreReader.open(store, summarizer_id=oracle.SUMMARIZER) as opened:
        opened.get_many([3])
    put_value(store, MANIFEST_KEY, whole)
    return type(refused.value).__name__


@promise("No skew", fault="another value in a manifest field of a store", full=600, short=12, smoke=6, each=6)
def test_foreign_manifests(trial: Trial, nursery: Nursery) -> None:
    store = trial.folder / "store"
    nursery.call(oracle.write, store, RUN.words)
    for field, value in MANIFEST_FIELDS.items():
        trial.count(f"{field}: {nursery.call(foreign_manifest, store, {field: value(trial)})}")


def evaluated(say: Say, log_path: str, model_dir: str, store: str, until: str, user: int, more: int) -> str:
    """Refresh `until`, let one record claim `more` events, and evaluate; returns "evaluated" or the error."""
    import numpy as np

    model, log = VistaModel.from_pretrained(model_dir), EventLog.open(log_path)
    refresh(model, log, store, until=until)
    (key,) = user_keys([user])
    if more:
        files = FolderWriter.open(Path(store), 1)
        record = files.summary.read(lambda transaction: bytes(transaction.get(key, b"")))
        header = np.frombuffer(record[:HEADER_BYTES], HEADER).copy()
        header["event_count"] += more
        header["checksum"] = 0
        files.put([key], [seal_record(header.tobytes(), [record[HEADER_BYTES:]], key, None)], [], {})
        files.close()
    with Scorer.open(model, store) as scorer:
        try:
            evaluate_scorer(scorer, log, EvaluateConfig())
        except (LeakageError, ConfigError) as error:
            return f"{type(error).__name__}: {error}"
    return "evaluated"


@promise("No leakage", fault="a store, or one record, that covers a test label", full=100, smoke=4)
def test_leakage(trial: Trial, nursery: Nursery, world: Path) -> None:
    log = log_of(world)
    kind = trial.random.choice(["whole store", "one record", "none"])
    users = [100 + row for row in range(log.num_users) if log.lengths[row] >= 3]
    user, more = trial.random.choice(users), trial.random.randint(1, 3) if kind == "one record" else 0
    until = "all" if kind == "whole store" else "leave-last-out"
    outcome = nursery.call(evaluated, log.path, world / "model", trial.folder / "store", until, user, more)
    if kind == "none":
        assert outcome == "evaluated"
    elif kind == "whole store":
        assert outcome.startswith("LeakageError"), outcome
    else:
        assert outcome.startswith("LeakageError") and f"user {user}" in outcome, outcome
    trial.count(f"{kind}: {outcome.split(':')[0]}")


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


@promise("Erasure", fault="100 users erased while refreshes race, then compaction", full=100, smoke=10, each=10)
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


HOUR = 3_600_000
MAX_DRIFT = 1e-3
"""||Z - Z'|| / ||Z'|| per layer and head, in float32, with up to 99.9 % of the summed events removed."""


def make_model() -> VistaModel:
    """A model with decay, convolution and gaps, which reaches three events back."""
    torch.manual_seed(0)
    config = ModelConfig(
        dim=16, num_heads=2, num_seeds=3, tail_len=5, conv_width=3, decay=Decay.time, decay_horizons=[2.0, 30.0]
    )
    return VistaModel(config, Schema(["view"], True, None, []), Vocabulary.from_ids(np.arange(50)), DataConfig()).eval()


def history_of(events: list[tuple[int, int]]) -> Histories:
    """A history from (time, item) pairs."""
    item = np.array([item for _, item in events], np.int32)
    time = np.array([time for time, _ in events], np.int64)
    return Histories(item, time, np.zeros(len(item), np.uint8), None, np.array([0, len(item)], np.int64))


def exact_z(model: VistaModel, history: Histories) -> torch.Tensor:
    """Z of a history, in float64."""
    double = make_model().double()
    state = history_states(double, history)
    return state.z


def rounds(say: Say, seed: int, count: int) -> list[float]:
    """Append and forget a few events, `count` times; returns the drift, checked every hundred rounds and at the end."""
    rng, model = np.random.default_rng(seed), make_model()
    assert model.summarizer is not None
    now, events = 1_600_000_000_000, []
    state = model.summarizer.empty_state(1)
    drifts = []
    for number in range(count):
        new = int(rng.integers(0, 3)) if len(events) > 5 else 4
        for _ in range(new):
            now += int(rng.exponential(20 * HOUR)) + 1
            events.append((now, int(rng.integers(1, 51))))
        if new:
            context = min(reach(model), len(events) - new)
            terms = range_states(model, history_of(events[-new - context :]), np.array([context]))
            state = merge_states(state, terms, model.summarizer.decay_rate)
        while len(events) > 40 or (events and rng.random() < 0.5):
            gone = np.sort(rng.choice(len(events), min(len(events), int(rng.integers(1, 4))), replace=False))
            state = remove_events(model, state, history_of(events), gone)
            events = [event for place, event in enumerate(events) if place not in set(gone.tolist())]
        if number % 100 == 99 and events:
            exact = exact_z(model, history_of(events))
            norm = exact.flatten(-2).norm(dim=-1)
            drifts.append(float(((state.z.double() - exact).flatten(-2).norm(dim=-1) / norm.clamp(min=1e-12)).max()))
    return [max(drifts), len(events)]


@promise(
    "Forgetting", fault="rounds of append and forget, with decay and convolution", full=10_000, short=500, each=500
)
def test_forgetting(trial: Trial, nursery: Nursery) -> None:
    run_rounds(trial, nursery, 500)


@promise("Forgetting", fault="as many rounds on one state", full=10_000, each=10_000)
def test_forgetting_on_one_state(trial: Trial, nursery: Nursery) -> None:
    run_rounds(trial, nursery, 10_000)


def run_rounds(trial: Trial, nursery: Nursery, count: int) -> None:
    """Run rounds on one state in a child, and count its drift by magnitude."""
    drift, _ = nursery.start(rounds, trial.number, count).result(timeout_s=1800)
    assert drift <= MAX_DRIFT, f"drifted by {drift:.2e}"
    trial.count(f"drift below 1e{int(np.ceil(np.log10(max(drift, 1e-9))))}", count)
