"""Counters through full, incremental, sharded and merging refreshes, compared with counting event by event."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lmdb
import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.counters.counter_histories import counted_by_loop
from vista.config import SourceColumns
from vista.config.choices import Codec, Decay, Mixing, StateDtype
from vista.counters.counter_codes import CounterCodes, encode_values
from vista.errors import ConfigError, StoreError
from vista.log.deletions import forget_events
from vista.log.event_log import EventLog
from vista.model.vista_model import VistaModel
from vista.refresh import RefreshOptions, erase, merge, refresh, refresh_incremental
from vista.store import StoreReader
from vista.store.admin.copying import copy_generation
from vista.store.admin.parquet import export_store
from vista.store.admin.store_compaction import compact_store
from vista.store.admin.verification import verify_store
from vista.store.format.counter_layout import CounterLayout
from vista.store.format.counters_section import encode_counters
from vista.store.lmdb.environment import SharedEnvironment
from vista.store.sharded_reader import open_store
from vista.store.shards import Shard

COUNTERS = {"counters": True, "counter_keys": 6, "counter_days": [2.0, 30.0], "counter_events": [5.0]}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay by position": {"decay": Decay.position, "decay_horizons": [8.0, 0.0]},
    "bidirectional": {"mixing": Mixing.bidirectional, "conv_width": 1},
    "no summary": {"num_seeds": 0},
    "categories": {"counter_categories": ["genre"]},
}


@pytest.fixture(params=[{}, {"counter_categories": ["genre"]}], ids=["items", "categories"])
def fields(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Settings of a model that counts items, or categories too."""
    return COUNTERS | request.param


def counted(
    model: Any, log: EventLog, user: int, until: int | None = None, field: str = "item"
) -> dict[int, list[int]]:
    """Codes by key of the user's history or its first `until` events, counted with a loop."""
    history = log[user].slice(0, 0, until)
    rows = model.item_rows(log.items.ids(history.item)).tolist()
    if field == "genre":
        rows = [(row - 1) % 5 if row else 0 for row in rows]
    times, spec = history.timestamp.tolist(), model.counter_spec
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
                held = table.top(model.config.counter_keys).codes()
                stored = counters.select(rows)
                for name in ("key", "codes", "offsets", "clock"):
                    np.testing.assert_array_equal(getattr(held, name), getattr(stored, name))


def full(model: Any, log: EventLog, path: Path, **options: Any) -> Path:
    refresh(model, log, path, options=RefreshOptions(codec=Codec.float32, **options))
    return path


@pytest.mark.parametrize("name", MODELS)
def test_records_and_states_hold_the_counters_of_the_log(tmp_path: Path, grow: SimpleNamespace, name: str) -> None:
    """After a full refresh, appended events, and late and forgotten ones: the same codes as of a new full refresh."""
    model = grow.model(**MODELS[name], **COUNTERS)
    log = grow.append(tmp_path / "log", grow.events({1: 60, 2: 3, 3: 30, 4: 1}))
    store = full(model, log, tmp_path / "store", users_per_batch=2)
    assert_counted(store, model, log)
    log = grow.append(tmp_path / "log", grow.events({1: 5, 3: 1, 6: 4}, grow.start + 500 * grow.hour))
    counts = refresh_incremental(model, log, store, options=RefreshOptions(users_per_batch=2)).counts
    keeps_states = name != "bidirectional"
    assert counts["appended" if keeps_states else "recomputed"] >= 2
    assert_counted(store, model, log)
    grow.assert_same(store, full(model, log, tmp_path / "expected"), atol=2e-5)
    log = grow.append(tmp_path / "log", grow.events({2: 2, 1: 1}, grow.start - 100 * grow.hour))
    gone = log[3].slice(0, 3, 5)
    forget_events(log.path, {"user": [3, 3], "item": log.items.ids(gone.item), "timestamp": gone.timestamp})
    log = EventLog.open(log.path)
    refresh_incremental(model, log, store)
    assert_counted(store, model, log)
    grow.assert_same(store, full(model, log, tmp_path / "expected"), atol=5e-4)


def test_a_store_with_a_limit_counts_only_what_it_covers(
    tmp_path: Path, grow: SimpleNamespace, fields: dict[str, Any]
) -> None:
    model = grow.model(**fields)
    log = grow.append(tmp_path / "log", grow.events({1: 20, 2: 9}))
    refresh(model, log, tmp_path / "store", until="leave-last-3-out")
    with StoreReader.open(tmp_path / "store") as store:
        stored = store.get_many([1, 2]).counters
    for field, counters in zip(model.counter_spec.fields, stored, strict=True):
        for row, (user, length) in enumerate(((1, 17), (2, 6))):
            assert of_user(counters, row).keys() == counted(model, log, user, length, field).keys()
            assert counters.clock[row] == log[user].timestamp[length - 1]


@pytest.mark.parametrize(("broken_at", "num_seeds"), [(0, 3), (2, 0), (4, 3)])
def test_an_interrupted_run_counts_no_event_twice(
    tmp_path: Path,
    grow: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    broken_at: int,
    num_seeds: int,
    fields: dict[str, Any],
) -> None:
    model = grow.model(num_seeds=num_seeds, **fields)
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
    refresh_incremental(model, log, store, options=RefreshOptions(users_per_batch=1))
    assert_counted(store, model, log)


def test_half_precision_does_not_round_counters(tmp_path: Path, grow: SimpleNamespace, fields: dict[str, Any]) -> None:
    model = grow.model(**fields)
    log = grow.append(tmp_path / "log", grow.events({1: 40, 2: 40}))
    store = full(model, log, tmp_path / "store", state=StateDtype.float16)
    for turn in range(3):
        log = grow.append(tmp_path / "log", grow.events({1: 5, 2: 1}, grow.start + (turn + 1) * 500 * grow.hour))
        assert refresh_incremental(model, log, store).counts["appended"] == 2
    assert_counted(store, model, log)


@pytest.mark.parametrize("name", ["plain", "categories"])
def test_merged_stores_count_all_parts(tmp_path: Path, grow: SimpleNamespace, name: str) -> None:
    model = grow.model(**MODELS[name], **COUNTERS)
    whole = grow.append(tmp_path / "log", grow.events({1: 30, 2: 8}))
    logs = [grow.append(tmp_path / "a", grow.events({1: 30, 2: 8}))]
    later = grow.events({1: 9, 3: 4}, grow.start + 100 * grow.hour)  # between the events of the other part
    logs.append(grow.append(tmp_path / "b", later))
    whole = grow.append(tmp_path / "log", later)
    parts = [(full(model, log, tmp_path / f"store-{number}"), log) for number, log in enumerate(logs)]
    merge(model, parts, tmp_path / "merged")
    assert_counted(tmp_path / "merged", model, whole)
    with pytest.raises(ConfigError, match="has no states to merge"):
        merge(grow.model(num_seeds=0, **COUNTERS), parts, tmp_path / "other")


def test_shards_hold_the_counters_of_their_users(tmp_path: Path, grow: SimpleNamespace, fields: dict[str, Any]) -> None:
    model = grow.model(**fields)
    log = grow.append(tmp_path / "log", grow.events(dict.fromkeys(range(1, 12), 20)))
    for index in range(3):
        refresh(model, log, tmp_path / "store", shard=Shard(index, 3))
    users = [5, 1, 99, 11, 5]
    with open_store(tmp_path / "store") as store:
        stored = store.get_many(users).counters
    for field, counters in zip(model.counter_spec.fields, stored, strict=True):
        for row, user in enumerate(users):
            expected = counted(model, log, user, field=field).keys() if user != 99 else set()
            assert of_user(counters, row).keys() == expected


def test_copies_and_compactions_keep_the_counters(
    tmp_path: Path, grow: SimpleNamespace, fields: dict[str, Any]
) -> None:
    model = grow.model(**fields)
    log = grow.append(tmp_path / "log", grow.events({1: 20, 2: 9, 3: 4}))
    store = full(model, log, tmp_path / "store")
    copy_generation(store, tmp_path / "copy")
    assert_counted(tmp_path / "copy", model, log)
    log = grow.append(tmp_path / "log", grow.events({1: 2}, grow.start + 500 * grow.hour))
    compact_store(store)
    assert refresh_incremental(model, log, store).counts["appended"] == 1
    assert_counted(store, model, log)


def test_no_counter_of_an_erased_user_survives(tmp_path: Path, grow: SimpleNamespace, fields: dict[str, Any]) -> None:
    """Neither in answers, nor in an export, nor, after a compaction, as bytes in a file of the store or of a shard."""
    model = grow.model(**fields)
    log = grow.append(tmp_path / "log", grow.events({1: 20, 2: 90, 3: 4}))
    store = full(model, log, tmp_path / "store")
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
    layout = CounterLayout.of(counters[0].spec, [30, 4][: len(counters)])
    return encode_counters(counters, layout, 1)[0]


def files(folder: Path) -> list[bytes]:
    """The contents of all files below a folder."""
    return [path.read_bytes() for path in folder.rglob("*") if path.is_file()]


def test_without_counters_nothing_is_counted(tmp_path: Path, grow: SimpleNamespace) -> None:
    model = grow.model()
    log = grow.append(tmp_path / "log", grow.events({1: 20}))
    store = full(model, log, tmp_path / "store")
    with StoreReader.open(store) as opened:
        assert opened.manifest.counters is None and opened.get_many([1]).counters == ()
    with_counters = grow.model(**COUNTERS)
    assert with_counters.summarizer_id() != model.summarizer_id()
    fewer = grow.model(**COUNTERS | {"counter_keys": 5})
    assert fewer.summarizer_id() != with_counters.summarizer_id()


def test_a_log_without_times_is_refused_or_counted_by_events(tmp_path: Path, grow: SimpleNamespace) -> None:
    frame = {name: values for name, values in grow.events({1: 20}).items() if name in ("user", "item")}
    log = EventLog.from_frame(frame, tmp_path / "log", columns=SourceColumns(timestamp=None))
    model = grow.model(use_time=False, **COUNTERS)
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
