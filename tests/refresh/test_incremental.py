"""Incremental refreshes compared with full ones, and counters compared with counting event by event."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import ROUNDING, event_vectors
from tests.counters.counter_histories import counted_by_loop, key_by_hand
from tests.refresh.conftest import contents, fail_at, full, stored
from vista.config import SourceColumns
from vista.config.checks import Codec, Decay, Mixing, StateDtype
from vista.counters.counters import CounterCodes, encode_values
from vista.errors import ConfigError, RecordError, StoreError, SummarizerMismatchError
from vista.log.compaction import compact_log
from vista.log.deletions import erase_users, forget_events
from vista.log.event_log import EventLog
from vista.model.vista_model import VistaModel
from vista.refresh import RefreshOptions, erase, refresh, refresh_incremental
from vista.store import StoreReader, user_keys
from vista.store.admin import compact_store, verify_store
from vista.store.folder_generation import SharedEnvironment
from vista.store.layout import Shard, environment_path
from vista.store.parquet import export_store
from vista.store.record import CounterLayout
from vista.store.record_encoding import encode_counters
from vista.store.writer import StoreUpdate

COUNTERS = {"counter_keys": ["item"], "num_counters": 6, "counter_days": [2.0, 30.0], "counter_events": [5.0]}
PRODUCTS = COUNTERS | {"counter_keys": ["item", "genre", "genre*weekday", "previous*item", "genre*action", "action"]}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no reach": {"conv_width": 1, "ignore": ["times"]},
    "a history limit": {"history_limit": 6},
    "no summary": {"num_seeds": 0, "pooled_dim": 0},
    "pooled vectors alone": {"num_seeds": 0},
    "pooled vectors of labels": {"num_seeds": 0, "residual_task": "right"},
    "event features": {"num_tail_features": 1},
    "decay by time": {"decay": Decay.time, "decay_horizons": [3.0, 0.0]},
    "products, decay by position": PRODUCTS | {"decay": Decay.position, "decay_horizons": [8.0, 0.0]},
    "counters, bidirectional": COUNTERS | {"mixing": Mixing.bidirectional, "conv_width": 1},
}
WITHOUT_STATES = "a history limit", "no summary", "counters, bidirectional"
DRIFT = 5e-4
"""Subtraction loses up to three digits before a state is recomputed (`DRIFT_LIMIT`)."""


def forgotten(log: EventLog, user: int, gone: Any) -> EventLog:
    """The log without some events of one user."""
    columns = {"item": log.items.ids(gone.item), "timestamp": gone.timestamp}
    forget_events(log.path, {"user": np.full(len(gone.item), user), **columns})
    return EventLog.open(log.path)


@pytest.mark.parametrize("name", MODELS)
def test_equals_a_full_refresh(tmp_path, grow, name):
    """Models that count are also compared with counting event by event, which a full refresh must equal too."""

    def check(atol: float) -> None:
        grow.assert_same(store, full(model, log, tmp_path / "expected"), atol=atol)
        if model.counter_spec is not None:
            assert_counted(store, model, log)
        if model.config.space_dim:
            assert_pooled(store, model, log)

    model, counts = grow.model(**MODELS[name]), {1: 12, 2: 3, 3: 30, 4: 1, 5: 9}
    model, log, store = stored(tmp_path, counts, model, users_per_batch=2)
    log = grow.later(tmp_path / "log", {1: 5, 3: 1, 6: 4})  # appended; 6 is new
    report = refresh_incremental(model, log, store, options=RefreshOptions(users_per_batch=2))
    assert report.num_users == 3
    if name in WITHOUT_STATES:
        assert report.counts["recomputed"] == 3 and report.num_events == 17 + 31 + 4
    else:
        assert report.counts["appended"] == 2 and report.num_events == 5 + 1 + 4
    check(ROUNDING)
    # Late events of users 2 and 5, and forgotten ones of users 1 and 3 (one of them the newest).
    log = grow.append(tmp_path / "log", grow.events({2: 2, 5: 1}, grow.start - 100 * grow.hour))
    for user, gone in ((1, log[1].slice(0, 3, 5)), (3, log[3].slice(0, log[3].num_events - 1))):
        log = forgotten(log, user, gone)
    assert refresh_incremental(model, log, store).num_users == 4
    check(DRIFT)
    erase_users(log.path, [4, 5])
    log = EventLog.open(log.path)
    assert refresh_incremental(model, log, store).counts["removed"] == 2
    check(DRIFT)
    assert refresh_incremental(model, log, store).num_users == 0


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from([name for name in MODELS if name not in WITHOUT_STATES]))
def test_any_sequence_of_changes(tmp_path_factory, grow, data, name):
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


@pytest.mark.parametrize("size", [0, 127])
def test_a_record_that_is_shorter_than_a_header(tmp_path, grow, caplog, size):
    """It is named when it is read; the next refresh of the user replaces it, and an erasure removes it."""
    model, log, store = stored(tmp_path, {1: 7, 2: 8, 3: 9})
    with SharedEnvironment.acquire(environment_path(store, 1), writable=True) as shared:
        for key in user_keys([1, 2]):
            shared.write(lambda transaction, key=key: transaction.put(key, bytes(transaction.get(key)[:size])))
    with StoreReader.open(store) as opened, pytest.raises(RecordError, match=r"record of user 1 .* length is"):
        opened.get_many([1])
    log = grow.later(tmp_path / "log", {1: 2, 3: 1})
    assert refresh_incremental(model, log, store).counts["appended"] == 2
    assert f"the record of user 1 is damaged: it holds {size} bytes" in caplog.text and "user 2 " not in caplog.text
    assert erase(store, [2]) == 1
    assert verify_store(store).num_problems == 0
    erase_users(log.path, [2])
    grow.assert_same(store, full(model, EventLog.open(log.path), tmp_path / "expected"))


def test_events_appended_and_deleted_between_two_refreshes(tmp_path, grow):
    """Nothing is left to append for the only user that has changed."""
    model, log, store = stored(tmp_path, {1: 7, 2: 8})
    log = grow.later(tmp_path / "log", {2: 1}, 900)
    log = forgotten(log, 2, log.slice(1, 8, 9))
    refresh_incremental(model, log, store)
    grow.assert_same(store, full(model, log, tmp_path / "expected"), atol=DRIFT)


def test_users_without_changes_keep_their_bytes(tmp_path, grow):
    model, log, store = stored(tmp_path, dict.fromkeys(range(20), 7))
    before = contents(store)
    log = grow.later(tmp_path / "log", {3: 2, 11: 1}, 900)
    refresh_incremental(model, log, store)
    after = contents(store)
    changed = {key for key in before if before[key] != after[key] and not key.startswith(b"!")}
    assert len(changed) == 2 and before.keys() == after.keys()


def test_readers_see_new_records_without_a_reload(tmp_path, grow):
    model, log, path = stored(tmp_path, {1: 7, 2: 7})
    with StoreReader.open(path) as store:
        assert store.get_many([1, 2, 9]).event_count.tolist() == [7, 7, 0]
        log = grow.later(tmp_path / "log", {1: 2, 9: 3}, 900)
        refresh_incremental(model, log, path, created_at=77)
        assert store.get_many([1, 2, 9]).event_count.tolist() == [9, 7, 3]
        assert len(store) == 2 and not store.reload() and len(store) == 3
        assert (store.manifest.applied_segment, store.manifest.count) == (2, 3)


@pytest.mark.parametrize(("changes", "at"), [*(({}, at) for at in (1, 2, 5)), ({"num_seeds": 0}, 3)], ids=str)
def test_an_interrupted_run_adds_and_counts_no_event_twice(tmp_path, grow, monkeypatch, changes, at):
    """Each of a batch's two transactions fails in turn, and the log grows before the run is resumed."""
    model, log, store = stored(tmp_path, {1: 7, 2: 8, 3: 9}, grow.model(**PRODUCTS, **changes))
    log = grow.later(tmp_path / "log", {1: 4, 2: 3, 3: 2})
    with monkeypatch.context() as patch:
        fail_at(patch, SharedEnvironment, "write", at, lmdb.Error("Input/output error"))
        with pytest.raises(StoreError, match="cannot be written: Input/output error"):
            refresh_incremental(model, log, store, options=RefreshOptions(users_per_batch=1))
    log = grow.later(tmp_path / "log", {2: 1}, 1000)
    refresh_incremental(model, log, store, options=RefreshOptions(users_per_batch=1))
    grow.assert_same(store, full(model, log, tmp_path / "expected"))
    assert_counted(store, model, log)


def test_another_log_is_refused(tmp_path, grow, monkeypatch):
    """A log with other events, and one that was restored from a backup after an unfinished run and then diverged."""
    model, log, store = stored(tmp_path, {1: 7, 2: 7})
    other = grow.append(tmp_path / "other", grow.events({1: 7, 2: 8}))
    with pytest.raises(StoreError, match=r"covers segment 1, but that segment of .* was made from other sources"):
        refresh_incremental(model, other, store)
    shutil.copytree(tmp_path / "log", tmp_path / "backup")
    log = grow.later(tmp_path / "log", {1: 2, 2: 2})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StoreUpdate, "finish", lambda update: (_ for _ in ()).throw(KeyboardInterrupt))
        refresh_incremental(model, log, store)
    with pytest.raises(StoreError, match=r"covers segment 2, but .*backup ends at segment 1"):
        refresh_incremental(model, EventLog.open(tmp_path / "backup"), store)
    grown = grow.later(tmp_path / "backup", {1: 1}, 600)
    with pytest.raises(StoreError, match=r"covers segment 2, but that segment of .* was made from other sources"):
        refresh_incremental(model, grown, store)
    compact_log(tmp_path / "log")
    refresh_incremental(model, EventLog.open(tmp_path / "log"), store)
    grow.assert_same(store, full(model, log, tmp_path / "expected"))


def test_half_precision_states_stay_close_and_their_counters_exact(tmp_path, grow):
    """After ten appends, each rounded to 11 bits."""
    model, log, store = stored(tmp_path, {1: 40, 2: 40}, grow.model(**PRODUCTS), state=StateDtype.float16)
    for turn in range(1, 11):
        log = grow.later(tmp_path / "log", {1: 5, 2: 1}, turn * 500)
        assert refresh_incremental(model, log, store).counts["appended"] == 2
    grow.assert_same(store, full(model, log, tmp_path / "expected"), atol=5e-3)
    assert_counted(store, model, log)


def test_without_states_changed_users_are_recomputed(tmp_path, grow):
    model, log, store = stored(tmp_path, {1: 12, 2: 3}, state=StateDtype.none)
    log = grow.later(tmp_path / "log", {1: 2})
    assert dict(refresh_incremental(model, log, store).counts)["recomputed"] == 1
    grow.assert_same(store, full(model, log, tmp_path / "expected"))


def test_a_compacted_log(tmp_path, grow):
    """Users with changes are recomputed if the store's segment was merged into another; users without an id go."""
    model, log, store = stored(tmp_path, {1: 7, 2: 7, 3: 7})
    grow.later(tmp_path / "log", {1: 2})
    compact_log(tmp_path / "log")
    log = EventLog.open(tmp_path / "log")
    report = refresh_incremental(model, log, store)
    assert (report.num_users, report.counts["recomputed"]) == (1, 1)
    grow.assert_same(store, full(model, log, tmp_path / "expected"))
    log = grow.later(tmp_path / "log", {3: 2}, 900)
    assert refresh_incremental(model, log, store).counts["appended"] == 1
    grow.assert_same(store, full(model, log, tmp_path / "expected"))
    erase_users(log.path, [2])
    compact_log(log.path)
    log = EventLog.open(log.path)
    assert refresh_incremental(model, log, store).counts["removed"] == 1
    with StoreReader.open(store) as opened:
        assert sorted(opened.keys()) == [1, 3] and opened.manifest.applied_segment == log.last_segment


def test_a_segment_of_item_features_changes_no_user(tmp_path, grow):
    model, log, store = stored(tmp_path, {1: 12, 2: 3})
    log = EventLog.from_frame(None, log.path, append=True, items={"item": log.items.ids([0]), "price": [1.0]})
    assert refresh_incremental(model, log, store).num_users == 0
    log = grow.later(log.path, {1: 2})
    assert refresh_incremental(model, log, store).counts["appended"] == 1
    grow.assert_same(store, full(model, log, tmp_path / "expected"))


def test_stores_that_cannot_be_updated_are_refused(tmp_path, grow):
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
    grow.later(tmp_path / "log", {1: 2})
    for time_ms in (-5000, 10**15):  # of a wrong clock; it would make the published generation unreadable
        for run in (refresh, refresh_incremental):
            with pytest.raises(ConfigError, match="is not a time from 1970 to 9999, in ms; correct the clock"):
                run(model, EventLog.open(log.path), store, created_at=time_ms)
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


def test_verification_tolerates_as_many_missing_states_as_a_refresh(tmp_path, grow):
    model = grow.model()
    log = grow.append(tmp_path / "log", grow.events(dict.fromkeys(range(30), 2)))
    refresh(model, log, tmp_path / "store")
    for users, num_problems in ((range(10), 0), (range(10, 11), 1)):
        with StoreUpdate.open(
            tmp_path / "store", summarizer_id=model.summarizer_id(), applied_segment=log.last_segment, created_at=2
        ) as update:
            update.writer.remove_states(user_keys(users))
            update.finish()
        assert verify_store(tmp_path / "store").num_problems == num_problems
    assert "holds 19 states for 30 records" in str(verify_store(tmp_path / "store"))


def counted(
    model: Any, log: EventLog, user: int, until: int | None = None, field: str = "item"
) -> dict[int, list[int]]:
    """Codes by key of the user's history or its first `until` events, counted with a loop."""
    history = log[user].slice(0, 0, until)
    items, times = model.item_rows(log.items.ids(history.item)).tolist(), history.timestamp.tolist()
    genres = {"genre": [0, *(row % 5 for row in range(len(model.items)))]}
    actions = [log.actions[code] for code in history.action.tolist()]
    events = zip(items, times, [0, *items[:-1]], actions, strict=True)
    rows, spec = [key_by_hand(field, *event, genres) for event in events], model.counter_spec
    values = counted_by_loop(spec, list(zip(rows, times, strict=True)))
    newest = {row: position for position, row in enumerate(rows)}
    kept = sorted(values, key=lambda row: (-values[row][0], -newest[row]))[: spec.keys[0]]
    return {row: encode_values(spec, np.array([values[row]]))[0].tolist() for row in sorted(kept)}


def of_user(counters: CounterCodes, row: int) -> dict[int, list[int]]:
    one = counters.select(np.array([row]))
    return dict(zip(one.key.tolist(), one.codes.tolist(), strict=True))


def assert_counted(path: Path, model: Any, log: EventLog) -> None:
    """Records and states hold the counters of the whole log."""
    assert verify_store(path).num_problems == 0
    with StoreReader.open(path) as store:
        users = list(store.keys())
        batch = store.get_many(users)
        states = store.states(users)
        for number, (field, counters) in enumerate(zip(model.counter_spec.fields, batch.counters, strict=True)):
            for row, user in enumerate(users):
                actual, expected = of_user(counters, row), counted(model, log, user, field=field)
                assert actual.keys() == expected.keys()
                # The loop adds in another order, so that a value between two codes may get the other one.
                np.testing.assert_allclose(list(actual.values()), list(expected.values()), atol=1)
                assert counters.clock[row] == batch.last_event_ts[row] == log[user].timestamp[-1]
            if states is not None:
                rows, arrays = states
                table = arrays.counters[number]
                assert table.num_events.tolist() == batch.event_count[rows].tolist()
                held = table.top(model.config.num_counters).codes()
                stored = counters.select(rows)
                for name in ("key", "codes", "offsets", "clock"):
                    np.testing.assert_array_equal(getattr(held, name), getattr(stored, name))


def assert_pooled(path: Path, model: VistaModel, log: EventLog) -> None:
    """Records and states hold the sum of the vectors of all events, added up one after another."""
    with StoreReader.open(path) as store:
        users = list(store.keys())
        batch, states = store.get_many(users), store.states(users)
    for row, user in enumerate(users):
        history = log[user]
        total = np.zeros(model.config.space_dim)
        for vector in event_vectors(model, model.item_rows(log.items.ids(history.item)), history.action):
            total += vector
        expected = np.zeros(model.config.dim, np.float32)
        expected[: len(total)] = total / history.num_events
        assert total.any() and batch.summary[row, -1].tolist() == expected.tolist()
        if states is not None:
            assert states[1].pooled[states[0].tolist().index(row)].tolist() == total.tolist()


def test_a_store_with_a_limit_counts_only_what_it_covers(tmp_path, grow):
    model = grow.model(**PRODUCTS)
    log = grow.append(tmp_path / "log", grow.events({1: 20, 2: 9}))
    refresh(model, log, tmp_path / "store", until="leave-last-3-out")
    with StoreReader.open(tmp_path / "store") as store:
        stored = store.get_many([1, 2]).counters
    for field, counters in zip(model.counter_spec.fields, stored, strict=True):
        for row, (user, length) in enumerate(((1, 17), (2, 6))):
            assert of_user(counters, row).keys() == counted(model, log, user, length, field).keys()
            assert counters.clock[row] == log[user].timestamp[length - 1]


def test_no_counter_of_an_erased_user_survives(tmp_path, grow):
    """Neither in answers, nor in an export, nor, after a compaction, as bytes in a file of the store or of a shard."""
    model, log, store = stored(tmp_path, {1: 20, 2: 90, 3: 4}, grow.model(**PRODUCTS))
    refresh(model, log, tmp_path / "shards", shard=Shard(0, 1), options=RefreshOptions(codec=Codec.float32))
    places = (store, Shard(0, 1).path(tmp_path / "shards"))
    with StoreReader.open(store) as opened:
        kept, gone = opened.get_many([1, 3]).counters, opened.get_many([2]).counters
        _, states = opened.states([2]) or pytest.fail("no states")
        traces = [record_bytes(gone), *(table.rows.decayed[0].tobytes() for table in states.counters)]
        assert all(any(trace in content for content in files(place)) for place in places for trace in traces)
        assert [erase(place, [2]) for place in places] == [1, 1]
        for counters, others in zip(opened.get_many([1, 2, 3]).counters, kept, strict=True):
            assert np.diff(counters.offsets)[1] == 0
            np.testing.assert_array_equal(counters.key, others.key)
        assert opened.states([2]) is None or len(opened.states([2])[0]) == 0
    export_store(store, tmp_path / "out.parquet")
    table = pq.read_table(tmp_path / "out.parquet").to_pydict()
    assert table["user"] == [1, 3]
    key, field = np.concatenate(table["counter_key"]), np.concatenate(table["counter_field"])
    for number, one in enumerate(kept):
        assert key[field == number].tolist() == one.key.tolist()
    for place in places:
        compact_store(place)
        assert not any(trace in content for content in files(place) for trace in traces)


def record_bytes(counters: tuple[CounterCodes, ...]) -> bytes:
    """The counters of one user, as its record holds them."""
    layout = CounterLayout.of(counters[0].spec, [30, 4, 28, 2**31 - 1, 4, 4, 1, 1][: len(counters)])
    return encode_counters(counters, layout, 1)[0]


def files(folder: Path) -> list[bytes]:
    """The contents of all files below a folder."""
    return [path.read_bytes() for path in folder.rglob("*") if path.is_file()]


def test_a_log_without_times_is_refused_or_counted_by_events(tmp_path, grow):
    frame = {name: values for name, values in grow.events({1: 20}).items() if name in ("user", "item")}
    log = EventLog.from_frame(frame, tmp_path / "log", columns=SourceColumns(timestamp=None))
    model = grow.model(ignore=["times"], **COUNTERS)
    model.schema.actions[:] = log.actions
    with pytest.raises(ConfigError, match="has no times, which this model reads"):
        refresh(model, log, tmp_path / "store")
    schema = dataclasses.replace(model.schema, has_time=False)
    model = VistaModel(model.config, schema, model.items, model.data).eval()
    assert model.counter_spec is not None and model.counter_spec.days == ()
    refresh(model, log, tmp_path / "store")
    with StoreReader.open(tmp_path / "store") as store:
        (counters,) = store.get_many([1]).counters
    newest = model.item_rows(log.items.ids(log[1].item))
    ages = [19 - int(np.flatnonzero(newest == key)[-1]) for key in counters.key]
    np.testing.assert_allclose(counters.values()[:, -1], ages, rtol=0.15, atol=0.6)
