"""Full refresh: contents of records, splits, codecs, users that fail, the age limit, and resumption."""

from __future__ import annotations

import json
import re
import stat
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.conftest import START, draw_space, event_vectors, small_config, small_frame
from tests.refresh.conftest import fail_at
from vista.cli.serving_commands import run_refresh, run_score
from vista.config import RefreshConfig, ScoreConfig, SourceColumns
from vista.config.checks import Codec, Decay, Mixing, OnMissing, Precision
from vista.errors import ConfigError, RecordError, StoreError, UnknownUserError, UserKeyError
from vista.log.event_log import EventLog
from vista.log.splits import visible_counts
from vista.model import inference
from vista.model.vista_model import VistaModel
from vista.refresh import RefreshOptions, RefreshReport, refresh, refresh_incremental
from vista.refresh.full import STAGES
from vista.scorer import Scorer
from vista.store import NO_TIMESTAMP, StoreReader, StoreWriter
from vista.store.keys import event_digests, item_keys
from vista.store.reader import CLOCK_SKEW_MS
from vista.training.log_schema import schema_of

EXACT = RefreshOptions(codec=Codec.float32)
COLUMNS = SourceColumns(action="action", rating="rating")


def new_model(log: EventLog, **changes: object) -> VistaModel:
    """An untrained model, which is good enough to compare what a refresh stores."""
    config = small_config(log, "unused", **{f"model__{key}": value for key, value in changes.items()})
    model = VistaModel(config.model, schema_of(log, config), log.items, config.data).eval()
    draw_space(model)
    return model


def assert_store_holds(path: Path, model: VistaModel, log: EventLog, counts: np.ndarray, atol: float) -> None:
    """Compare each record with a recomputation of that user alone."""
    users = log.users.ids(np.arange(log.num_users))
    with StoreReader.open(path, summarizer_id=model.summarizer_id()) as store:
        assert len(store) == (counts > 0).sum() and set(store.keys()) == set(users[counts > 0].tolist())
        stored = store.get_many(users)
        tail_len = model.config.tail_len
        for row, user in enumerate(users.tolist()):
            seen = log.slice(row, 0, int(counts[row]))
            assert stored.found[row] == (counts[row] > 0)
            assert stored.event_count[row] == counts[row]
            tail = slice(stored.tail.offsets[row], stored.tail.offsets[row + 1])
            ids = log.items.ids(seen.item)
            assert stored.tail.items[tail].tolist() == model.item_rows(ids[-tail_len:]).tolist()
            assert stored.tail.times[tail].tolist() == seen.timestamp[-tail_len:].tolist()
            assert stored.tail.actions[tail].tolist() == seen.action[-tail_len:].tolist()
            if counts[row] == 0:
                assert stored.last_event_ts[row] == NO_TIMESTAMP and (stored.summary[row] == 0).all(), user
                continue
            assert stored.last_event_ts[row] == seen.timestamp[-1]
            assert stored.history_digest[row] == event_digests(item_keys(ids), seen.timestamp, seen.action).sum()
            rows = type(seen)(model.item_rows(ids), seen.timestamp, seen.action, seen.rating, seen.offsets)
            expected = inference.summarize(model, rows)[0].numpy()
            if width := model.config.space_dim:
                mean = event_vectors(model, rows.item, rows.action).mean(0)
                expected = np.concatenate([expected, np.pad(mean, (0, model.config.dim - width))[None]])
            np.testing.assert_allclose(stored.summary[row], expected, atol=atol)


LOST = {Codec.float32: 1e-5, Codec.float16: 0.002, Codec.int8: 0.02, Codec.int4: 0.25}


@pytest.mark.parametrize(
    ("codec", "until"),
    [
        (Codec.float32, None),
        (Codec.float32, str(START + 20 * 86_400_000)),
        *((codec, "leave-last-out") for codec in Codec),
    ],
)
def test_records_cover_the_visible_events(event_log, tmp_path, codec, until):
    model = new_model(event_log)
    options = RefreshOptions(codec=codec, users_per_batch=3, tokens_per_batch=20)
    report = refresh(model, event_log, tmp_path / "s", until=until, options=options)
    counts = visible_counts(event_log, until)
    assert (report.num_users, report.num_events) == ((counts > 0).sum(), counts.sum())
    assert_store_holds(tmp_path / "s", model, event_log, counts, atol=LOST[codec])


def test_users_without_visible_events_have_no_record(event_log, tmp_path):
    model = new_model(event_log)
    until = int(np.median([event_log.slice(row).timestamp[0] for row in range(event_log.num_users)]))
    report = refresh(model, event_log, tmp_path / "some", until=until)
    assert 0 < report.num_users < event_log.num_users
    assert refresh(model, event_log, tmp_path / "none", until="1990-01-01").num_users == 0
    with StoreReader.open(tmp_path / "none") as store:
        assert len(store) == 0 and not store.get_many([100]).found.any()


def test_the_manifest_keeps_until(event_log, tmp_path):
    """A time of eight digits would be read as a date if it were stored as text."""
    frame = {"user": [1, 1, 1], "item": [0, 10, 20], "timestamp": [12_000_000, 12_345_678, 12_500_000]}
    log = EventLog.from_frame(frame, tmp_path / "log", time_unit="ms")
    for until, kept in ((12_345_678, 12_345_678), (None, "all"), ("leave-last-out", "leave-last-out")):
        refresh(new_model(log), log, tmp_path / "store", until=until)
        with StoreReader.open(tmp_path / "store") as store:
            assert store.manifest.until == kept


def test_no_summary_tokens(event_log, tmp_path):
    model = new_model(event_log, num_seeds=0, pooled_dim=7)
    refresh(model, event_log, tmp_path / "pooled")
    assert_store_holds(tmp_path / "pooled", model, event_log, event_log.lengths, atol=LOST[Codec.int8])
    model = new_model(event_log, num_seeds=0, pooled_dim=0)
    refresh(model, event_log, tmp_path / "store")
    assert_store_holds(tmp_path / "store", model, event_log, event_log.lengths, atol=0)
    with Scorer.open(model, tmp_path / "store") as scorer:
        assert scorer.score([100, 101], [0, 10]).shape == (2, 2)


def test_string_ids_and_no_times(order_log, tmp_path):
    model = new_model(order_log, mixing=Mixing.bidirectional)
    refresh(model, order_log, tmp_path / "store", options=EXACT, until="leave-last-out")
    assert_store_holds(tmp_path / "store", model, order_log, visible_counts(order_log, "leave-last-out"), atol=1e-5)
    with StoreReader.open(tmp_path / "store") as store, pytest.raises(UserKeyError, match=r"user 1: .*of type str"):
        store.get_many([1])


def test_items_outside_the_vocabulary_are_unknown_items(event_log, tmp_path):
    model = new_model(event_log)
    frame = {**small_frame(), "item": small_frame()["item"] + 200}
    log = EventLog.from_frame(frame, tmp_path / "log", time_unit="ms", columns=COLUMNS)
    refresh(model, log, tmp_path / "store", options=EXACT)
    assert_store_holds(tmp_path / "store", model, log, log.lengths, atol=1e-5)


def test_a_log_of_several_segments(event_log, tmp_path):
    frame = small_frame()
    first = frame["timestamp"] < np.median(frame["timestamp"])
    for part in (first, ~first):
        rows = {name: values[part] for name, values in frame.items()}
        appended = part is not first
        log = EventLog.from_frame(rows, tmp_path / "log", time_unit="ms", columns=COLUMNS, append=appended)
    assert len(log.manifests) == 2
    model = new_model(event_log)
    for until in ("leave-last-out", None):
        refresh(model, log, tmp_path / "store", until=until, options=replace(EXACT, users_per_batch=5))
        assert_store_holds(tmp_path / "store", model, log, visible_counts(log, until), atol=1e-5)
        with StoreReader.open(tmp_path / "store") as store:
            assert store.manifest.applied_segment == 2


def test_no_dropout_for_a_model_in_training_mode(event_log, tmp_path):
    model = new_model(event_log, dropout=0.5)
    refresh(model.train(), event_log, tmp_path / "store", options=EXACT)
    assert not model.training
    assert_store_holds(tmp_path / "store", model, event_log, event_log.lengths, atol=1e-5)


@pytest.mark.processor
@pytest.mark.parametrize("mixing", ["bidirectional", "separable"])
def test_bfloat16_products_change_summaries_little(event_log, tmp_path, mixing):
    model = new_model(event_log, mixing=Mixing(mixing))
    summaries = []
    for precision in (Precision.float32, Precision.bfloat16):
        options = RefreshOptions(codec=Codec.float32, precision=precision)
        refresh(model, event_log, tmp_path / precision.value, options=options)
        with StoreReader.open(tmp_path / precision.value) as store:
            summaries.append(store.get_many(event_log.users.ids(np.arange(16))).summary)
    exact, rounded = summaries
    error = np.abs(rounded - exact).max()
    assert 0 < error < 0.1 * np.abs(exact).max()


def test_a_log_with_other_event_features(tmp_path, grow, caplog):
    frame = grow.events({1: 5, 2: 3})
    frame = {name: frame[name] for name in ("user", "item", "timestamp", "action", "rating")}
    plain = EventLog.from_frame(frame, tmp_path / "plain", time_unit="ms", columns=COLUMNS)
    frame |= {"dwell": ["long", "short"] * 4}
    other = EventLog.from_frame(frame, tmp_path / "log", time_unit="ms", columns=COLUMNS, categories=["dwell"])
    model = grow.model(num_tail_features=2)
    message = r"'dwell' of events is a category, but a number to the model; prepare .* events.numbers=\[dwell\], or"
    with pytest.raises(ConfigError, match=message):
        refresh(model, other, tmp_path / "store")
    refresh(model, plain, tmp_path / "store")
    assert caplog.text.count("lacks the features surface, dwell of events, so the model takes them as missing") == 1
    with StoreReader.open(tmp_path / "store") as store:
        tail = store.get_many([1, 2]).tail
    assert (tail.features["surface"] == -1).all() and np.isnan(tail.features["dwell"]).all() and len(tail.items) == 8


def test_report(event_log, tmp_path):
    report = refresh(new_model(event_log), event_log, tmp_path / "store", options=RefreshOptions(users_per_batch=4))
    assert sum(report.shares.values()) == pytest.approx(1) and min(report.shares.values()) >= 0
    assert list(report.shares) == [*STAGES, "other"]
    assert re.search(r"16 users, 233 events in .*\), [1-9][\d,]* bytes per user; 16 written$", str(report))
    assert "(5 of them by an earlier run)" in str(RefreshReport("s", 2, 16, 5, 100, 1.0, {"read": 1.0}))


def test_the_command_writes_the_same_records(served, tmp_path):
    paths = {"data": str(served.log.path), "model": str(served.model_dir), "store": str(tmp_path / "store")}
    config = RefreshConfig(**paths, until="leave-last-out", codec=Codec.float32, device="cpu")
    report = run_refresh(config)
    assert report.generation == 1 and run_refresh(config).generation == 2
    counts = visible_counts(served.log, "leave-last-out")
    assert_store_holds(tmp_path / "store", served.model, served.log, counts, atol=1e-5)
    config.device = "abacus"
    with pytest.raises(ConfigError, match="device=abacus: write auto, cpu, cuda or cuda:N"):
        run_refresh(config)


def test_a_log_that_the_model_would_misread_is_refused(event_log, order_log, tmp_path):
    frame = small_frame()
    frame["action"] = np.where(frame["action"] == "click", "buy", "like")  # code 0 is another action
    other = EventLog.from_frame(frame, tmp_path / "log", time_unit="ms", columns=COLUMNS)
    with pytest.raises(ConfigError, match=r"actions are \['buy', 'like'\], but the model was trained on \['click'"):
        refresh(new_model(event_log), other, tmp_path / "store")
    del frame["action"]
    plain = EventLog.from_frame(frame, tmp_path / "plain", time_unit="ms", columns=SourceColumns(rating="rating"))
    with pytest.raises(ConfigError, match=r"actions are \['event'\], but the model was trained on \['click'"):
        refresh(new_model(event_log), plain, tmp_path / "store")
    timeless = {name: small_frame()[name] for name in ("user", "item", "action")}
    log = EventLog.from_frame(timeless, tmp_path / "timeless", columns=SourceColumns(timestamp=None, action="action"))
    decaying = new_model(event_log, ignore=["times"], decay=Decay.time, decay_horizons=[1.0, 0.0])
    for model in (new_model(event_log), decaying):
        with pytest.raises(ConfigError, match="has no times, which this model reads"):
            refresh(model, log, tmp_path / "store")
    assert not (tmp_path / "store").exists()
    refresh(new_model(event_log, ignore=["times"]), log, tmp_path / "store")
    with pytest.raises(ConfigError, match="has no times; use leave-last-out"):
        refresh(new_model(order_log), order_log, tmp_path / "store", until="2020-01-01")


def test_refresh_while_a_scorer_is_open(served, tmp_path):
    refresh(served.model, served.log, tmp_path / "store", until="leave-last-out")
    with Scorer.open(served.model, tmp_path / "store") as scorer:
        before = scorer.score([100, 104], [0, 10, 20])
        assert not scorer.reload()
        refresh(served.model, served.log, tmp_path / "store")
        np.testing.assert_array_equal(scorer.score([100, 104], [0, 10, 20]), before)
        assert scorer.store.generation == 1 and scorer.reload() and scorer.store.generation == 2
        assert np.abs(scorer.score([100, 104], [0, 10, 20]) - before).max() > 1e-3
        refresh(served.model, served.log, tmp_path / "store")
        refresh(served.model, served.log, tmp_path / "store")
        assert scorer.reload() and scorer.store.generation == 4


def test_the_next_run_resumes_after_an_interrupt_between_batches(served, tmp_path, monkeypatch):
    options = RefreshOptions(users_per_batch=4)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        fail_at(patch, StoreWriter, "put_batch", 3, KeyboardInterrupt())
        refresh(served.model, served.log, tmp_path / "store", options=options)
    assert not (tmp_path / "store" / "CURRENT").exists()
    report = refresh(served.model, served.log, tmp_path / "store", options=options)
    assert (report.resumed_at, report.generation) == (8, 1)
    assert report.num_events == served.log.lengths[8:].sum()
    assert_store_holds(tmp_path / "store", served.model, served.log, served.log.lengths, atol=0.02)


def test_a_key_and_a_group_from_the_configuration(served, tmp_path):
    (tmp_path / "key").write_text("5a" * 32)
    common = {"model": str(served.model_dir), "store": str(tmp_path / "store")}
    keyed = {**common, "authentication_key_file": str(tmp_path / "key")}
    run_refresh(RefreshConfig(data=str(served.log.path), shared_with_group=True, **keyed))
    assert (tmp_path / "store").stat().st_mode & 0o7777 == 0o2750
    user = str(served.log.users.ids(np.array([0]))[0])
    assert f"user {user} (now " in run_score(ScoreConfig(users=[user], **keyed))
    with pytest.raises(StoreError, match="authentication key"):
        run_score(ScoreConfig(users=[user], **common))


def poisoned(grow: SimpleNamespace, counts: dict[int, int], users: list[int]) -> tuple[object, dict[str, object]]:
    """A model with NaN for one item, and events in which only some users have that item."""
    model, frame = grow.model(), grow.events(counts)
    frame["item"] = np.where(frame["item"] == 0, 10, frame["item"])
    for user in users:
        frame["item"][np.flatnonzero(frame["user"] == user)[0]] = 0
    with torch.no_grad():
        model.item_table[int(model.item_rows([0])[0])] = float("nan")
    return model, frame


def test_a_few_failing_users_change_no_others(tmp_path, grow):
    counts = dict.fromkeys(range(250), 2)
    model, frame = poisoned(grow, counts, [17, 101])
    log = grow.append(tmp_path / "log", frame)
    report = refresh(model, log, tmp_path / "store", options=RefreshOptions(codec=Codec.float32, users_per_batch=64))
    assert report.counts == {"written": 248, "erased": 0, "failed": 2} and set(report.failures) == {"17", "101"}
    assert "user 17 failed: the summary of user 17 cannot be stored: row 0 holds NaN or infinity" in str(report)
    refresh(grow.model(), log, tmp_path / "healthy", options=EXACT)
    others = [user for user in range(250) if user not in (17, 101)]
    with StoreReader.open(tmp_path / "store") as store, StoreReader.open(tmp_path / "healthy") as healthy:
        assert sorted(store.keys()) == others and len(store) == 248
        assert (store.get_many(others).summary == healthy.get_many(others).summary).all()


def test_an_incremental_failure_keeps_the_old_record(tmp_path, grow):
    counts = dict.fromkeys(range(250), 2)
    model, frame = poisoned(grow, counts, [])
    log = grow.append(tmp_path / "log", frame)
    refresh(model, log, tmp_path / "store", options=EXACT)
    model, frame = poisoned(grow, counts, [17])
    frame["timestamp"] = frame["timestamp"] + 500 * grow.hour
    log = grow.append(tmp_path / "log", frame)
    report = refresh_incremental(model, log, tmp_path / "store")
    assert (report.counts["failed"], report.num_users) == (1, 250)
    with StoreReader.open(tmp_path / "store") as store:
        assert store.manifest.applied_segment == 2
        assert store.get_many([16, 17]).event_count.tolist() == [4, 2]
    assert refresh_incremental(model, log, tmp_path / "store").num_users == 0


def test_many_failing_users_stop_the_run(tmp_path, grow):
    model, frame = poisoned(grow, dict.fromkeys(range(100), 2), list(range(17, 28)))
    log = grow.append(tmp_path / "log", frame)
    with pytest.raises(RecordError, match=r"11 users failed; the first one is '17': .*NaN or infinity"):
        refresh(model, log, tmp_path / "store")
    assert not (tmp_path / "store" / "CURRENT").exists()


def test_one_json_line_per_batch(tmp_path, grow):
    log = grow.append(tmp_path / "log", grow.events(dict.fromkeys(range(10), 3)))
    refresh(grow.model(), log, tmp_path / "store", options=RefreshOptions(users_per_batch=4))
    path = tmp_path / "store" / "refresh.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["users"] for line in lines] == [4, 8, 10] and lines[-1]["events"] == 30
    assert lines[-1]["seconds_left"] == 0 and set(lines[0]["stages"]) >= {"read", "summarize", "encode", "write"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


NOW = 1_800_000_000_000


@pytest.mark.parametrize(
    ("age_ms", "served"),
    [(60_000, True), (61_000, False), (-CLOCK_SKEW_MS, True), (-CLOCK_SKEW_MS - 1, False)],
)
def test_records_beyond_the_age_limit_are_not_used(tmp_path, grow, monkeypatch, age_ms, served):
    model = grow.model()
    log = grow.append(tmp_path / "log", grow.events({1: 7, 2: 5}))
    refresh(model, log, tmp_path / "store", created_at=NOW - age_ms)
    monkeypatch.setattr("time.time_ns", lambda: NOW * 1_000_000)
    with Scorer.open(model, tmp_path / "store", on_missing=OnMissing.nan, max_age_s=60) as scorer:
        assert np.isfinite(scorer.score([1, 2, 3], [10])).tolist() == [[served], [served], [False]]
    with Scorer.open(model, tmp_path / "store", on_missing=OnMissing.nan) as scorer:
        assert np.isfinite(scorer.score([1, 2], [10])).all()
    if not served:
        refused = pytest.raises(UnknownUserError, match=r"users \[1, 2\]")
        with Scorer.open(model, tmp_path / "store", on_missing="raise", max_age_s=60) as scorer, refused:
            scorer.score([1, 2], [10])


def test_a_refresh_without_new_events_makes_all_records_current(tmp_path, grow, monkeypatch):
    model = grow.model()
    log = grow.append(tmp_path / "log", grow.events({1: 7, 2: 5}))
    refresh(model, log, tmp_path / "store", created_at=NOW - 100_000)
    monkeypatch.setattr("time.time_ns", lambda: NOW * 1_000_000)
    with Scorer.open(model, tmp_path / "store", on_missing="nan", max_age_s=60) as scorer:
        assert np.isnan(scorer.score([1, 2], [10])).all()
        refresh_incremental(model, log, tmp_path / "store")
        assert not scorer.reload()
        assert np.isfinite(scorer.score([1, 2], [10])).all()
        with pytest.raises(ValueError, match="max_age_s: must be positive"):
            Scorer.open(model, tmp_path / "store", max_age_s=0)
