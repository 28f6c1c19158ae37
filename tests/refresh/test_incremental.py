"""Incremental refreshes compared with full ones: appends, late events, deletions, new users, interruptions."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lmdb
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vista.config.choices import Codec, Decay, Mixing, StateDtype, TargetAttentionKind
from vista.errors import ConfigError, StoreError, SummarizerMismatchError
from vista.log.compaction import compact_log
from vista.log.deletions import erase_users, forget_events
from vista.log.event_log import EventLog
from vista.refresh import RefreshOptions, erase, refresh, refresh_incremental
from vista.store import StoreReader, user_keys
from vista.store.admin.verification import verify_store
from vista.store.layout import environment_path
from vista.store.lmdb.environment import SharedEnvironment
from vista.store.update import StoreUpdate

MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no reach": {"conv_width": 1, "use_time": False},
    "decay by time": {"decay": Decay.time, "decay_horizons": [3.0, 0.0]},
    "decay by position": {"decay": Decay.position, "decay_horizons": [8.0, 0.0]},
    "bidirectional": {"mixing": Mixing.bidirectional, "conv_width": 1},
    "a history limit": {"history_limit": 6},
    "no summary": {"num_seeds": 0},
    "quasi-linear": {"target_attention": TargetAttentionKind.quasi_linear},
    "quasi-linear, no tokens": {"target_attention": TargetAttentionKind.quasi_linear, "num_seeds": 0},
    "interests": {"num_interests": 7},
    "mean token": {"mean_token": True, "decay": Decay.time, "decay_horizons": [3.0, 0.0]},
    "event features": {"num_tail_features": 1},
    "event features, decay by time": {
        "num_tail_features": 2,
        "tail_in_summary": False,
        "decay": Decay.time,
        "decay_horizons": [3.0, 0.0],
    },
    "counters": {"counters": True, "counter_keys": 4},
    "tail not in the summary": {"tail_in_summary": False, "counters": True, "counter_keys": 4},
    "tail not in the summary, decay by time": {
        "tail_in_summary": False,
        "decay": Decay.time,
        "decay_horizons": [3.0, 0.0],
    },
    "tail not in the summary, decay by position": {
        "tail_in_summary": False,
        "decay": Decay.position,
        "decay_horizons": [8.0, 0.0],
    },
    "tail not in the summary, bidirectional": {"tail_in_summary": False, "mixing": Mixing.bidirectional},
    "counters alone": {"num_seeds": 0, "counters": True, "counter_keys": 4},
}
WITHOUT_STATES = ("bidirectional", "a history limit", "no summary", "tail not in the summary, bidirectional")
DRIFT = 5e-4
"""Subtraction loses up to three digits before a state is recomputed (`DRIFT_LIMIT`)."""


def full(model: Any, log: EventLog, path: Path, **options: Any) -> Path:
    """A full refresh; options as of `RefreshOptions`."""
    refresh(model, log, path, options=RefreshOptions(codec=Codec.float32, **options))
    return path


@pytest.mark.parametrize("name", MODELS)
def test_equals_a_full_refresh(tmp_path: Path, grow: SimpleNamespace, name: str) -> None:
    model = grow.model(**MODELS[name])
    log = grow.append(tmp_path / "log", grow.events({1: 12, 2: 3, 3: 30, 4: 1, 5: 9}))
    store = full(model, log, tmp_path / "store", users_per_batch=2)
    later = grow.start + 500 * grow.hour
    log = grow.append(tmp_path / "log", grow.events({1: 5, 3: 1, 6: 4}, later))  # appended; 6 is new
    report = refresh_incremental(model, log, store, options=RefreshOptions(users_per_batch=2))
    assert report.num_users == 3
    if name in WITHOUT_STATES:
        assert report.counts["recomputed"] == 3 and report.num_events == 17 + 31 + 4
    else:
        assert report.counts["appended"] == 2 and report.num_events == 5 + 1 + 4
    grow.assert_same(store, full(model, log, tmp_path / "expected"), atol=2e-5)
    # Late events of users 2 and 5, and forgotten ones of users 1 and 3 (one of them the newest).
    log = grow.append(tmp_path / "log", grow.events({2: 2, 5: 1}, grow.start - 100 * grow.hour))
    gone = {name: log[1].slice(0, 3, 5).__getattribute__(name) for name in ("item", "timestamp")}
    newest = log[3].slice(0, log[3].num_events - 1)
    forget_events(
        log.path,
        {
            "user": np.array([1, 1, 3]),
            "item": log.items.ids(np.concatenate([gone["item"], newest.item])),
            "timestamp": np.concatenate([gone["timestamp"], newest.timestamp]),
        },
    )
    log = EventLog.open(log.path)
    report = refresh_incremental(model, log, store)
    assert report.num_users == 4
    grow.assert_same(store, full(model, log, tmp_path / "expected"), atol=DRIFT)
    erase_users(log.path, [4, 5])
    log = EventLog.open(log.path)
    assert refresh_incremental(model, log, store).counts["removed"] == 2
    grow.assert_same(store, full(model, log, tmp_path / "expected"), atol=DRIFT)
    assert refresh_incremental(model, log, store).num_users == 0


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from([name for name in MODELS if name not in WITHOUT_STATES]))
def test_any_sequence_of_changes(
    tmp_path_factory: pytest.TempPathFactory, grow: SimpleNamespace, data: st.DataObject, name: str
) -> None:
    folder = tmp_path_factory.mktemp("sequence")
    model = grow.model(**MODELS[name])
    counts = st.dictionaries(st.integers(1, 5), st.integers(1, 12), min_size=1, max_size=4)
    log = grow.append(folder / "log", grow.events(data.draw(counts)))
    store = full(model, log, folder / "store")
    for turn in range(data.draw(st.integers(1, 4))):
        for step in range(data.draw(st.integers(1, 2))):  # a refresh may follow several segments
            change = data.draw(st.sampled_from(["append", "anywhere", "forget", "erase"]))
            if change in ("append", "anywhere"):
                start = grow.start + ((turn + 1) * 500 * grow.hour if change == "append" else 0)
                log = grow.append(folder / "log", grow.events(data.draw(counts), start, seed=10 * turn + step + 1))
            else:
                present = np.flatnonzero(log.lengths)
                if len(present):
                    row = int(data.draw(st.sampled_from(present.tolist())))
                    user, history = int(log.users.ids(np.array([row]))[0]), log.slice(row)
                    if change == "erase":
                        erase_users(log.path, [user])
                    else:
                        positions = st.sets(st.integers(0, history.num_events - 1), min_size=1, max_size=3)
                        index = np.array(sorted(data.draw(positions)))
                        frame = {"item": log.items.ids(history.item[index]), "timestamp": history.timestamp[index]}
                        forget_events(log.path, {"user": np.full(len(index), user), **frame})
                    log = EventLog.open(log.path)
        refresh_incremental(model, log, store, options=RefreshOptions(users_per_batch=2))
        grow.assert_same(store, full(model, log, folder / f"expected-{turn}"), atol=DRIFT)


def test_events_appended_and_deleted_between_two_refreshes(tmp_path: Path, grow: SimpleNamespace) -> None:
    """Nothing is left to append for the only user that has changed."""
    model, later = grow.model(), grow.start + 900 * grow.hour
    log = grow.append(tmp_path / "log", grow.events({1: 7, 2: 8}))
    store = full(model, log, tmp_path / "store")
    log = grow.append(tmp_path / "log", grow.events({2: 1}, later))
    gone = log.slice(1, 8, 9)
    forget_events(log.path, {"user": [2], "item": log.items.ids(gone.item), "timestamp": gone.timestamp})
    log = EventLog.open(log.path)
    refresh_incremental(model, log, store)
    grow.assert_same(store, full(model, log, tmp_path / "expected"), atol=DRIFT)


def test_users_without_changes_keep_their_bytes(tmp_path: Path, grow: SimpleNamespace) -> None:
    model = grow.model()
    log = grow.append(tmp_path / "log", grow.events(dict.fromkeys(range(20), 7)))
    store = full(model, log, tmp_path / "store")
    before = contents(store)
    log = grow.append(tmp_path / "log", grow.events({3: 2, 11: 1}, grow.start + 900 * grow.hour))
    refresh_incremental(model, log, store)
    after = contents(store)
    changed = {key for key in before if before[key] != after[key] and not key.startswith(b"!")}
    assert len(changed) == 2 and before.keys() == after.keys()


def contents(store: Path, generation: int = 1) -> dict[bytes, bytes]:
    environment = SharedEnvironment.acquire(environment_path(store, generation))
    try:
        return environment.read(lambda t: {bytes(key): bytes(value) for key, value in t.cursor()})
    finally:
        environment.release()


def test_readers_see_new_records_without_a_reload(tmp_path: Path, grow: SimpleNamespace) -> None:
    model = grow.model()
    log = grow.append(tmp_path / "log", grow.events({1: 7, 2: 7}))
    path = full(model, log, tmp_path / "store")
    with StoreReader.open(path) as store:
        assert store.get_many([1, 2, 9]).event_count.tolist() == [7, 7, 0]
        log = grow.append(tmp_path / "log", grow.events({1: 2, 9: 3}, grow.start + 900 * grow.hour))
        refresh_incremental(model, log, path, created_at=77)
        assert store.get_many([1, 2, 9]).event_count.tolist() == [9, 7, 3]
        assert len(store) == 2 and not store.reload() and len(store) == 3
        assert (store.manifest.applied_segment, store.manifest.count) == (2, 3)


@pytest.mark.parametrize("broken_at", range(6))
@pytest.mark.parametrize("tail_in_summary", [True, False])
def test_an_interrupted_run_adds_no_event_twice(
    tmp_path: Path, grow: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tail_in_summary: bool, broken_at: int
) -> None:
    """Each of a batch's two transactions fails in turn, and the log grows before the run is resumed."""
    model = grow.model(tail_in_summary=tail_in_summary)
    log = grow.append(tmp_path / "log", grow.events({1: 7, 2: 8, 3: 9}))
    store = full(model, log, tmp_path / "store")
    log = grow.append(tmp_path / "log", grow.events({1: 4, 2: 3, 3: 2}, grow.start + 500 * grow.hour))
    write, done = SharedEnvironment.write, []

    def failing(environment: SharedEnvironment, *arguments: Any) -> Any:
        done.append(environment)
        if len(done) == broken_at + 1:
            raise lmdb.Error("Input/output error")
        return write(environment, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(SharedEnvironment, "write", failing)
        with pytest.raises(StoreError, match="cannot be written: Input/output error"):
            refresh_incremental(model, log, store, options=RefreshOptions(users_per_batch=1))
    log = grow.append(tmp_path / "log", grow.events({2: 1}, grow.start + 1000 * grow.hour))
    report = refresh_incremental(model, log, store, options=RefreshOptions(users_per_batch=1))
    assert report.num_users == 3
    grow.assert_same(store, full(model, log, tmp_path / "expected"), atol=2e-5)


def test_another_log_is_refused(tmp_path: Path, grow: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log with other events, and one that was restored from a backup after an unfinished run and then diverged."""
    model = grow.model()
    log = grow.append(tmp_path / "log", grow.events({1: 7, 2: 7}))
    store = full(model, log, tmp_path / "store")
    other = grow.append(tmp_path / "other", grow.events({1: 7, 2: 8}))
    with pytest.raises(StoreError, match=r"covers segment 1, but that segment of .* was made from other sources"):
        refresh_incremental(model, other, store)
    shutil.copytree(tmp_path / "log", tmp_path / "backup")
    log = grow.append(tmp_path / "log", grow.events({1: 2, 2: 2}, grow.start + 500 * grow.hour))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StoreUpdate, "finish", lambda update: (_ for _ in ()).throw(KeyboardInterrupt))
        refresh_incremental(model, log, store)
    with pytest.raises(StoreError, match=r"covers segment 2, but .*backup ends at segment 1"):
        refresh_incremental(model, EventLog.open(tmp_path / "backup"), store)
    grown = grow.append(tmp_path / "backup", grow.events({1: 1}, grow.start + 600 * grow.hour))
    with pytest.raises(StoreError, match=r"covers segment 2, but that segment of .* was made from other sources"):
        refresh_incremental(model, grown, store)
    compact_log(tmp_path / "log")
    refresh_incremental(model, EventLog.open(tmp_path / "log"), store)
    grow.assert_same(store, full(model, log, tmp_path / "expected"), atol=2e-5)


def test_half_precision_states_stay_close(tmp_path: Path, grow: SimpleNamespace) -> None:
    """After ten appends, each rounded to 11 bits."""
    model = grow.model()
    log = grow.append(tmp_path / "log", grow.events({1: 40, 2: 40}))
    store = full(model, log, tmp_path / "store", state=StateDtype.float16)
    for turn in range(10):
        log = grow.append(tmp_path / "log", grow.events({1: 5, 2: 1}, grow.start + (turn + 1) * 500 * grow.hour))
        assert refresh_incremental(model, log, store).counts["appended"] == 2
    grow.assert_same(store, full(model, log, tmp_path / "expected"), atol=5e-3)


def test_without_states_changed_users_are_recomputed(tmp_path: Path, grow: SimpleNamespace) -> None:
    model = grow.model()
    log = grow.append(tmp_path / "log", grow.events({1: 12, 2: 3}))
    store = full(model, log, tmp_path / "store", state=StateDtype.none)
    log = grow.append(tmp_path / "log", grow.events({1: 2}, grow.start + 500 * grow.hour))
    assert dict(refresh_incremental(model, log, store).counts)["recomputed"] == 1
    grow.assert_same(store, full(model, log, tmp_path / "expected"), atol=2e-5)


def test_a_compacted_log(tmp_path: Path, grow: SimpleNamespace) -> None:
    """Users with changes are recomputed if the store's segment was merged into another; users without an id go."""
    model = grow.model()
    log = grow.append(tmp_path / "log", grow.events({1: 7, 2: 7, 3: 7}))
    store = full(model, log, tmp_path / "store")
    grow.append(tmp_path / "log", grow.events({1: 2}, grow.start + 500 * grow.hour))
    compact_log(tmp_path / "log")
    log = EventLog.open(tmp_path / "log")
    report = refresh_incremental(model, log, store)
    assert (report.num_users, report.counts["recomputed"]) == (1, 1)
    grow.assert_same(store, full(model, log, tmp_path / "expected"), atol=2e-5)
    log = grow.append(tmp_path / "log", grow.events({3: 2}, grow.start + 900 * grow.hour))
    assert refresh_incremental(model, log, store).counts["appended"] == 1
    grow.assert_same(store, full(model, log, tmp_path / "expected"), atol=2e-5)
    erase_users(log.path, [2])
    compact_log(log.path)
    log = EventLog.open(log.path)
    assert refresh_incremental(model, log, store).counts["removed"] == 1
    with StoreReader.open(store) as opened:
        assert sorted(opened.keys()) == [1, 3] and opened.manifest.applied_segment == log.last_segment


def test_a_segment_of_item_features_changes_no_user(tmp_path: Path, grow: SimpleNamespace) -> None:
    model = grow.model()
    log = grow.append(tmp_path / "log", grow.events({1: 12, 2: 3}))
    store = full(model, log, tmp_path / "store")
    log = EventLog.from_frame(None, log.path, append=True, items={"item": log.items.ids([0]), "price": [1.0]})
    assert refresh_incremental(model, log, store).num_users == 0
    log = grow.append(log.path, grow.events({1: 2}, grow.start + 500 * grow.hour))
    assert refresh_incremental(model, log, store).counts["appended"] == 1
    grow.assert_same(store, full(model, log, tmp_path / "expected"), atol=2e-5)


def test_erased_users_stay_erased(tmp_path: Path, grow: SimpleNamespace) -> None:
    model = grow.model()
    log = grow.append(tmp_path / "log", grow.events({1: 7, 2: 7, 3: 7}))
    path = full(model, log, tmp_path / "store")
    with StoreReader.open(path) as store:
        assert erase(path, [2, 99]) == 1
        assert store.get_many([1, 2, 3]).found.tolist() == [True, False, True]
    log = grow.append(tmp_path / "log", grow.events({2: 3, 3: 1, 99: 5}, grow.start + 500 * grow.hour))
    assert refresh_incremental(model, log, path).counts["erased"] == 2
    refresh(model, log, path)
    with StoreReader.open(path) as store:
        assert store.generation == 2 and sorted(store.keys()) == [1, 3] and len(store) == 2


def test_stores_that_cannot_be_updated_are_refused(tmp_path: Path, grow: SimpleNamespace) -> None:
    model = grow.model()
    log = grow.append(tmp_path / "log", grow.events({1: 7, 2: 7}))
    with pytest.raises(StoreError, match="vista refresh"):
        refresh_incremental(model, log, tmp_path / "nowhere")
    refresh(model, log, tmp_path / "past", until="leave-last-out")
    with pytest.raises(ConfigError, match="was refreshed with until=leave-last-out and cannot be updated"):
        refresh_incremental(model, log, tmp_path / "past")
    store = full(model, log, tmp_path / "store")
    with pytest.raises(SummarizerMismatchError):
        refresh_incremental(grow.model(seed=1), log, store)
    grow.append(tmp_path / "log", grow.events({1: 2}, grow.start + 500 * grow.hour))
    refresh_incremental(model, EventLog.open(log.path), store)
    with pytest.raises(StoreError, match=r"covers segment 2, but .* ends at segment 1"):
        refresh_incremental(model, log, store)
    with pytest.raises(ConfigError, match=r"options\.codec: was set by the store's full refresh; leave it out"):
        refresh_incremental(model, log, store, options=RefreshOptions(codec=Codec.float32))
    with (
        StoreUpdate.open(store, summarizer_id=model.summarizer_id(), applied_segment=2, created_at=0),
        pytest.raises(StoreError, match="is being written"),
    ):
        refresh_incremental(model, log, store)


def test_verification_tolerates_as_many_missing_states_as_a_refresh(tmp_path: Path, grow: SimpleNamespace) -> None:
    model = grow.model()
    log = grow.append(tmp_path / "log", grow.events(dict.fromkeys(range(30), 2)))
    refresh(model, log, tmp_path / "store")
    for users, num_problems in ((range(10), 0), (range(10, 11), 1)):
        with StoreUpdate.open(
            tmp_path / "store", summarizer_id=model.summarizer_id(), applied_segment=log.last_segment, created_at=2
        ) as update:
            update.remove_states(user_keys(users))
            update.finish()
        assert verify_store(tmp_path / "store").num_problems == num_problems
    assert "holds 19 states for 30 records" in str(verify_store(tmp_path / "store"))
