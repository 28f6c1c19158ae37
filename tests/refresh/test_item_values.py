"""The values of items of a generation: what refreshes write, what scorers read, and what copies keep."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import draw_counter_weights, untrained
from tests.refresh.conftest import HOUR, START, append, contents, events, full, later
from vista.config import FromEventsConfig, SourceColumns
from vista.errors import StoreError
from vista.examples.item_spaces import RATE_PRIOR
from vista.log.compaction import compact_log
from vista.log.deletions import erase_users
from vista.log.event_log import EventLog
from vista.log.splits import Until, visible_counts
from vista.model.vista_model import VistaModel
from vista.refresh import refresh, refresh_incremental
from vista.refresh.log_reading import item_values
from vista.scorer import Scorer
from vista.store import StoreReader
from vista.store.admin import compact_store, copy_generation, verify_store
from vista.store.folder_writer import FolderWriter
from vista.store.item_values import ItemValues
from vista.store.keys import ITEMS_KEY, user_keys
from vista.store.layout import Shard
from vista.store.parquet import export_store, import_store

DAY = 24 * HOUR
COUNTS = {1: 30, 2: 25, 3: 40, 4: 1}


@pytest.fixture
def log(tmp_path: Path) -> EventLog:
    return append(tmp_path / "log", events(COUNTS))


def counting_model(log: EventLog, seed: int = 0) -> VistaModel:
    """A model whose scores depend on statistics of items, pooled vectors, and counters."""
    parts = {"model__counter_keys": ["item"], "model__pooled_dim": 4, "model__transitions": 3}
    model = untrained(log, seed, model__ignore=["event_features"], **parts)
    draw_counter_weights(model, seed)
    return model


def values_of(store: Path) -> ItemValues | None:
    with StoreReader.open(store) as reader:
        return reader.item_values()


def logs_counted(log: EventLog, before: int | None = None) -> np.ndarray:
    """float64 [V, 5] log(1 + count), counted event by event: all, 30 days, 7 days; users whose first event is there."""
    end = max(int(log.slice(user).timestamp[-1]) for user in range(log.num_users)) if before is None else before - 1
    seen = [log.slice(user) for user in range(log.num_users)]
    kept = [(e.item[e.timestamp <= end], e.timestamp[e.timestamp <= end]) for e in seen]
    newest = max(int(times[-1]) for _, times in kept if len(times))
    counts = np.zeros((log.num_items, 5))
    for items, times in kept:
        met = set[int]()
        for item, time in zip(items.tolist(), times.tolist(), strict=True):
            counts[item, 0] += 1
            for place, days in ((1, 30), (3, 7)):
                if time + days * DAY > newest + 1:
                    counts[item, place] += 1
                    counts[item, place + 1] += item not in met
            met.add(item)
    return np.log1p(counts)


@pytest.mark.parametrize("until", [None, START + 300 * HOUR])
def test_a_full_refresh_writes_what_its_events_say(log: EventLog, tmp_path: Path, until: int | None) -> None:
    model = counting_model(log)
    refresh(model, log, tmp_path / "store", until=until)
    values = values_of(tmp_path / "store")
    assert values is not None and values.tasks == [] and values.rates.shape == (1 + log.num_items, 0)
    logs = logs_counted(log, until)
    used = logs[:, 0] > 0
    expected = (logs - logs[used].mean(0)) / np.maximum(logs[used].std(0), 0.2)
    np.testing.assert_allclose(values.statistics[1:], expected, atol=1e-5)
    assert (values.statistics[0] == 0).all() and values.as_of is not None
    assert values.as_of < (until or START + 400 * HOUR) and values.as_of == newest_time(log, until)


def newest_time(log: EventLog, until: int | None) -> int:
    counts = visible_counts(log, until)
    return max(int(log.slice(user).timestamp[counts[user] - 1]) for user in np.flatnonzero(counts))


def test_label_rates_are_those_of_the_impressions_that_are_visible(impression_log: EventLog, tmp_path: Path) -> None:
    model, shown = untrained(impression_log, model__pooled_dim=4), impression_log.impressions
    assert shown is not None
    draw_counter_weights(model)
    until, rates = int(np.median(shown.timestamp)), list[np.ndarray]()
    for limit in (None, until, "leave-last-out"):
        refresh(model, impression_log, tmp_path / "store", until=limit)
        values = values_of(tmp_path / "store")
        assert values is not None and values.tasks == ([] if limit == "leave-last-out" else shown.tasks)
        rates.append(values.rates)
    assert rates[2].shape[1] == 0
    for of_all, kept in zip(rates, (np.ones(len(shown.timestamp), bool), shown.timestamp < until), strict=False):
        counts = np.zeros((2, impression_log.num_items, len(shown.tasks)))
        known = np.asarray(shown.mask)[kept] > 0
        np.add.at(counts[0], shown.item[kept], known)
        np.add.at(counts[1], shown.item[kept], known & (np.asarray(shown.label)[kept] > 0))
        mean = (counts[1].sum(0) + 1) / (counts[0].sum(0) + 2)
        true, false = counts[1] + RATE_PRIOR * mean, counts[0] - counts[1] + RATE_PRIOR * (1 - mean)
        np.testing.assert_allclose(of_all[1:], np.log(true / false) - np.log(mean / (1 - mean)), atol=1e-5)


def test_a_scorer_reads_those_of_the_generation(log: EventLog, tmp_path: Path) -> None:
    """Its scores are those of a model that was exported with these values, by every path."""
    model = counting_model(log)
    values = values_of(full(model, log, tmp_path / "store"))
    assert values is not None
    same = counting_model(log)
    same.item_statistics.copy_(torch.from_numpy(values.statistics.copy()))
    assert not torch.equal(same.item_statistics, model.item_statistics)
    # Without the values, a scorer serves those of the model.
    copied = full(same, log, tmp_path / "bare")
    export_store(copied, tmp_path / "bare.parquet")
    import_store(tmp_path / "bare.parquet", copied)
    assert values_of(copied) is None
    users, items = [1, 2, 3], log.items.ids(np.arange(log.num_items))
    with Scorer.open(model, tmp_path / "store") as served, Scorer.open(same, copied) as expected:
        for method in ("score", "catalog_scores"):
            arguments: tuple[Any, ...] = (users, items) if method == "score" else (users,)
            ours, theirs = getattr(served, method)(*arguments), getattr(expected, method)(*arguments)
            np.testing.assert_array_equal(ours, theirs)
        told, wanted = (scorer.explain(1, items[:3]).shares for scorer in (served, expected))
        np.testing.assert_array_equal(told["popularity"], wanted["popularity"])
        np.testing.assert_array_equal(served.item_vectors()[1], expected.item_vectors()[1])
    assert not torch.equal(same.item_statistics, model.item_statistics)  # the caller's model is unchanged


def test_an_incremental_refresh_replaces_them_after_a_day(tmp_path: Path) -> None:
    first = append(tmp_path / "log", events(COUNTS, spread=20 * HOUR))
    model = counting_model(first)
    store = full(model, first, tmp_path / "store")
    before = values_of(store)
    log = append(tmp_path / "log", events({2: 3}, START + 20 * HOUR, spread=3 * HOUR))
    refresh_incremental(model, log, store)
    assert values_of(store).to_bytes() == before.to_bytes()  # type: ignore[union-attr]
    log = later(tmp_path / "log", {3: 2, 5: 4}, hours=60)
    with Scorer.open(model, store) as scorer:
        old = scorer.catalog_scores([1])
        refresh_incremental(model, log, store)
        assert not scorer.reload()  # the generation is the same
        new = scorer.catalog_scores([1])
    assert not np.array_equal(old, new)
    full(model, log, tmp_path / "again")
    assert contents(store)[ITEMS_KEY] == contents(tmp_path / "again")[ITEMS_KEY]
    refresh_incremental(model, log, store)  # without new events
    assert contents(store)[ITEMS_KEY] == contents(tmp_path / "again")[ITEMS_KEY]


@pytest.mark.parametrize("compacts", [False, True])
@pytest.mark.parametrize("shard", [None, Shard(0, 2)])
def test_erased_events_are_not_counted_from_the_next_refresh_on(
    log: EventLog, tmp_path: Path, shard: Shard | None, compacts: bool
) -> None:
    """Although no day has passed, and although the first shard may not have the user."""
    model = counting_model(log)
    refresh(model, log, tmp_path / "store", shard=shard)
    store = tmp_path / "store" if shard is None else shard.path(tmp_path / "store")
    others = [user for user in COUNTS if shard is None or not shard.holds(user_keys([user])).any()]
    erase_users(log.path, others[:1])
    if compacts:
        compact_log(log.path)
    left = EventLog.open(log.path)
    refresh_incremental(model, left, tmp_path / "store", shard=shard)
    expected = item_values(model, left, model.rows_of(left.items), left.lengths, Until())
    assert expected is not None and contents(store)[ITEMS_KEY] == expected.to_bytes()


def test_a_call_that_runs_keeps_its_store_while_values_and_models_change(log: EventLog, tmp_path: Path) -> None:
    """New values make a snapshot of the same store; the store closes after the last call of both."""
    model = counting_model(log)
    folder, store = tmp_path / "model", full(model, log, tmp_path / "store")
    model.save_pretrained(folder)
    with Scorer.open(folder, store) as scorer, scorer.in_service() as first:
        refresh_incremental(model, later(tmp_path / "log", {2: 3}), store)
        assert not scorer.reload() and scorer._current is not first and scorer._current.store is first.store
        model.save_pretrained(folder)
        assert scorer.reload() and scorer._current.store is not first.store
        assert first.store.get_many([1]).found.all()
    with pytest.raises(StoreError, match="is closed"):
        first.store.get_many([1])


def test_labels_that_tell_what_came_later_are_left_out(tmp_path: Path) -> None:
    """`impressions.from_events.again_days`: at a refresh in the past, nobody knew the labels of the last days."""
    rng = np.random.default_rng(0)
    frame = {
        "user": rng.integers(1, 9, 400),
        "item": rng.integers(0, 5, 400),
        "timestamp": START + HOUR * np.arange(400),
    }
    past, found = frame["timestamp"] < START + 300 * HOUR, []
    for name, given in (("all", frame), ("past", {name: column[past] for name, column in frame.items()})):
        log = EventLog.from_frame(given, tmp_path / name, time_unit="ms", from_events=FromEventsConfig(again_days=2))
        model = untrained(log, model__pooled_dim=4)
        draw_counter_weights(model)
        for until in (START + 300 * HOUR, START + HOUR):
            refresh(model, log, tmp_path / "store", until=until)
            found.append(values_of(tmp_path / "store"))
    assert found[0].tasks == ["again"] and found[0].rates.any() and found[1].tasks == []
    # The items of both logs have the same rows, because the first events have all of them.
    np.testing.assert_array_equal(found[0].rates, found[2].rates)


def test_a_refresh_looks_up_all_items_once(log: EventLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes, look_up = counting_model(log), list[int](), VistaModel.item_rows
    monkeypatch.setattr(VistaModel, "item_rows", lambda self, ids: sizes.append(len(ids)) or look_up(self, ids))
    store = full(model, log, tmp_path / "store")
    assert sizes == [log.num_items]
    log = later(tmp_path / "log", {2: 3}, hours=401)
    refresh_incremental(model, log, store)
    assert sizes[1:] == [log.num_items]


def test_a_log_with_times_has_no_values_for_a_model_without(log: EventLog, tmp_path: Path) -> None:
    timeless = EventLog.from_frame(
        {"user": [1, 1, 2], "item": [10, 20, 10]}, tmp_path / "timeless", columns=SourceColumns(timestamp=None)
    )
    model = untrained(timeless, model__pooled_dim=4, model__counter_keys=["item"], model__ignore=["times"])
    draw_counter_weights(model)
    assert model.item_statistics.shape[1] == 1
    assert item_values(model, log, model.rows_of(log.items), log.lengths, Until()) is None


def test_a_model_that_reads_none_gets_none(log: EventLog, tmp_path: Path) -> None:
    bare = untrained(log, model__ignore=["event_features"])
    full(bare, log, tmp_path / "store")
    assert values_of(tmp_path / "store") is None
    refresh_incremental(bare, later(tmp_path / "log", {2: 3}), tmp_path / "store")
    assert values_of(tmp_path / "store") is None


def test_copies_and_compactions_keep_them(log: EventLog, tmp_path: Path) -> None:
    store = full(counting_model(log), log, tmp_path / "store")
    value = contents(store)[ITEMS_KEY]
    copy_generation(store, tmp_path / "copy")
    assert contents(tmp_path / "copy")[ITEMS_KEY] == value
    assert not verify_store(tmp_path / "copy").num_problems
    assert compact_store(store).generation == 2
    assert contents(store, 2)[ITEMS_KEY] == value and not verify_store(store).num_problems


def test_those_of_another_vocabulary_are_not_served(
    log: EventLog, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As after `vista items add`, until the next refresh."""
    model = counting_model(log)
    refresh(model, log, tmp_path / "store")
    values = values_of(tmp_path / "store")
    assert values is not None
    writer = FolderWriter.open(tmp_path / "store", 1)
    strange = ItemValues("0" * 64, values.statistics, values.rates, values.tasks, values.as_of)
    writer.put_items(strange.to_bytes())
    writer.close()
    with caplog.at_level(logging.INFO), Scorer.open(model, tmp_path / "store") as scorer:
        assert torch.equal(scorer._current.model.item_statistics, model.item_statistics)
    assert "another vocabulary" in caplog.text
    refresh_incremental(model, later(tmp_path / "log", {2: 3}, hours=401), tmp_path / "store")
    renewed = values_of(tmp_path / "store")
    assert renewed is not None and renewed.vocabulary == values.vocabulary  # at once, as if none were held


@pytest.mark.parametrize("place", [0, 20, -1])
def test_damaged_values_are_found(log: EventLog, tmp_path: Path, place: int, caplog: pytest.LogCaptureFixture) -> None:
    model = counting_model(log)
    store = full(model, log, tmp_path / "store")
    value = bytearray(contents(store)[ITEMS_KEY])
    value[place] ^= 1
    with pytest.raises(StoreError, match="the values of items are damaged"):
        ItemValues.from_bytes(bytes(value), "here")
    writer = FolderWriter.open(store, 1)
    writer.put_items(bytes(value))
    writer.close()
    assert "values of items" in "".join(verify_store(store).problems)
    with pytest.raises(StoreError, match="values of items are damaged"):
        Scorer.open(model, store)
    refresh_incremental(model, later(tmp_path / "log", {2: 3}, hours=401), store)
    assert not verify_store(store).num_problems and "they are replaced" in caplog.text
