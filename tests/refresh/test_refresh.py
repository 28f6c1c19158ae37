"""Full refresh: contents of records, splits, codecs, and resumption after a kill or Ctrl-C."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.conftest import START, Served, run_python, small_config, small_frame
from vista.cli.refresh_commands import run_refresh
from vista.cli.score_command import run_score
from vista.config import ModelConfig, RefreshConfig, ScoreConfig, SourceColumns
from vista.config.choices import Codec, Decay, Precision
from vista.errors import ConfigError, StoreError, StoreLockedError, UserKeyError
from vista.log.event_log import EventLog
from vista.log.splits import visible_counts
from vista.model import inference
from vista.model.vista_model import VistaModel
from vista.refresh import RefreshOptions, RefreshReport, refresh
from vista.refresh.stage_clock import STAGES
from vista.scorer import Scorer
from vista.store import NO_TIMESTAMP, StoreReader, StoreWriter
from vista.store.format.digest import event_digests, item_keys
from vista.store.reader import published_manifest
from vista.training.log_schema import schema_of


def new_model(log: EventLog, **changes: object) -> VistaModel:
    """An untrained model, which is good enough to compare what a refresh stores."""
    config = small_config(log, "unused", **{f"model__{key}": value for key, value in changes.items()})
    return VistaModel(config.model, schema_of(log, config), log.items, config.data).eval()


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
            np.testing.assert_allclose(stored.summary[row], expected, atol=atol)


LOST = {Codec.float32: 1e-5, Codec.float16: 0.002, Codec.int8: 0.02, Codec.int4: 0.25}


@pytest.mark.parametrize("codec", list(Codec))
@pytest.mark.parametrize(
    "until", [None, "leave-last-out", "leave-last-two-out", str(START + 20 * 86_400_000), START + 12_345_678]
)
def test_records_cover_the_visible_events(
    event_log: EventLog, tmp_path: Path, codec: Codec, until: str | int | None
) -> None:
    model = new_model(event_log)
    report = refresh(
        model,
        event_log,
        tmp_path / "s",
        until=until,
        options=RefreshOptions(codec=codec, users_per_batch=3, tokens_per_batch=20),
    )
    counts = visible_counts(event_log, until)
    assert (report.num_users, report.num_events) == ((counts > 0).sum(), counts.sum())
    assert_store_holds(tmp_path / "s", model, event_log, counts, atol=LOST[codec])


def test_users_without_visible_events_have_no_record(event_log: EventLog, tmp_path: Path) -> None:
    model = new_model(event_log)
    until = int(np.median([event_log.slice(row).timestamp[0] for row in range(event_log.num_users)]))
    report = refresh(model, event_log, tmp_path / "some", until=until)
    assert 0 < report.num_users < event_log.num_users
    assert refresh(model, event_log, tmp_path / "none", until="1990-01-01").num_users == 0
    with StoreReader.open(tmp_path / "none") as store:
        assert len(store) == 0 and not store.get_many([100]).found.any()


def test_the_manifest_keeps_until(event_log: EventLog, tmp_path: Path) -> None:
    """A time of eight digits would be read as a date if it were stored as text."""
    frame = {"user": [1, 1, 1], "item": [0, 10, 20], "timestamp": [12_000_000, 12_345_678, 12_500_000]}
    log = EventLog.from_frame(frame, tmp_path / "log", time_unit="ms")
    for until, kept in ((12_345_678, 12_345_678), (None, "all"), ("leave-last-out", "leave-last-out")):
        refresh(new_model(log), log, tmp_path / "store", until=until)
        with StoreReader.open(tmp_path / "store") as store:
            assert store.manifest.until == kept


def test_no_summary_tokens(event_log: EventLog, tmp_path: Path) -> None:
    model = new_model(event_log, num_seeds=0)
    refresh(model, event_log, tmp_path / "store")
    assert_store_holds(tmp_path / "store", model, event_log, event_log.lengths, atol=0)
    with Scorer.open(model, tmp_path / "store") as scorer:
        assert scorer.score([100, 101], [0, 10]).shape == (2, 2)


@pytest.mark.parametrize("mixing", ["bidirectional", "separable"])
def test_string_ids_and_no_times(order_log: EventLog, tmp_path: Path, mixing: str) -> None:
    model = new_model(order_log, mixing=ModelConfig().mixing.__class__(mixing))
    refresh(model, order_log, tmp_path / "store", options=RefreshOptions(codec=Codec.float32), until="leave-last-out")
    assert_store_holds(tmp_path / "store", model, order_log, visible_counts(order_log, "leave-last-out"), atol=1e-5)
    with StoreReader.open(tmp_path / "store") as store, pytest.raises(UserKeyError, match=r"user 1: .*of type str"):
        store.get_many([1])


def test_items_outside_the_vocabulary_are_unknown_items(event_log: EventLog, tmp_path: Path) -> None:
    model = new_model(event_log)
    frame = {**small_frame(), "item": small_frame()["item"] + 200}
    log = EventLog.from_frame(
        frame, tmp_path / "log", time_unit="ms", columns=SourceColumns(action="action", rating="rating")
    )
    refresh(model, log, tmp_path / "store", options=RefreshOptions(codec=Codec.float32))
    assert_store_holds(tmp_path / "store", model, log, log.lengths, atol=1e-5)


def test_a_log_of_several_segments(event_log: EventLog, tmp_path: Path) -> None:
    frame = small_frame()
    first = frame["timestamp"] < np.median(frame["timestamp"])
    for part in (first, ~first):
        rows = {name: values[part] for name, values in frame.items()}
        log = EventLog.from_frame(
            rows,
            tmp_path / "log",
            time_unit="ms",
            columns=SourceColumns(action="action", rating="rating"),
            append=part is not first,
        )
    assert len(log.manifests) == 2
    model = new_model(event_log)
    for until in ("leave-last-out", None):
        refresh(
            model, log, tmp_path / "store", until=until, options=RefreshOptions(codec=Codec.float32, users_per_batch=5)
        )
        assert_store_holds(tmp_path / "store", model, log, visible_counts(log, until), atol=1e-5)
        with StoreReader.open(tmp_path / "store") as store:
            assert store.manifest.applied_segment == 2


def test_no_dropout_for_a_model_in_training_mode(event_log: EventLog, tmp_path: Path) -> None:
    model = new_model(event_log, dropout=0.5)
    refresh(model.train(), event_log, tmp_path / "store", options=RefreshOptions(codec=Codec.float32))
    assert not model.training
    assert_store_holds(tmp_path / "store", model, event_log, event_log.lengths, atol=1e-5)


@pytest.mark.processor
@pytest.mark.parametrize("mixing", ["bidirectional", "separable"])
def test_bfloat16_products_change_summaries_little(event_log: EventLog, tmp_path: Path, mixing: str) -> None:
    model = new_model(event_log, mixing=ModelConfig().mixing.__class__(mixing))
    summaries = []
    for precision in (Precision.float32, Precision.bfloat16):
        refresh(
            model,
            event_log,
            tmp_path / precision.value,
            options=RefreshOptions(codec=Codec.float32, precision=precision),
        )
        with StoreReader.open(tmp_path / precision.value) as store:
            summaries.append(store.get_many(event_log.users.ids(np.arange(16))).summary)
    exact, rounded = summaries
    error = np.abs(rounded - exact).max()
    assert 0 < error < 0.1 * np.abs(exact).max()


def test_a_log_with_other_event_features(
    tmp_path: Path, grow: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    frame, columns = grow.events({1: 5, 2: 3}), SourceColumns(action="action", rating="rating")
    frame = {name: frame[name] for name in ("user", "item", "timestamp", "action", "rating")}
    plain = EventLog.from_frame(frame, tmp_path / "plain", time_unit="ms", columns=columns)
    frame |= {"dwell": ["long", "short"] * 4}
    other = EventLog.from_frame(frame, tmp_path / "log", time_unit="ms", columns=columns, categories=["dwell"])
    model = grow.model(num_tail_features=2)
    message = r"'dwell' of events is a category, but a number to the model; prepare .* events.numbers=\[dwell\], or"
    with pytest.raises(ConfigError, match=message):
        refresh(model, other, tmp_path / "store")
    refresh(model, plain, tmp_path / "store")
    assert caplog.text.count("lacks the features surface, dwell of events, so the model takes them as missing") == 1
    with StoreReader.open(tmp_path / "store") as store:
        tail = store.get_many([1, 2]).tail
    assert (tail.features["surface"] == -1).all() and np.isnan(tail.features["dwell"]).all() and len(tail.items) == 8


def test_report(event_log: EventLog, tmp_path: Path) -> None:
    report = refresh(
        new_model(event_log), event_log, tmp_path / "store", options=RefreshOptions(users_per_batch=4, progress=True)
    )
    assert sum(report.shares.values()) == pytest.approx(1) and min(report.shares.values()) >= 0
    assert list(report.shares) == [*STAGES, "other"]
    text = str(report)
    assert f"generation 1 of {tmp_path / 'store'}: 16 users, 233 events in " in text and "users/s (read " in text
    assert re.search(r"\), [1-9][\d,]* bytes per user; 16 written$", text)
    assert "(5 of them by an earlier run)" in str(RefreshReport("s", 2, 16, 5, 100, 1.0, {"read": 1.0}))


def test_the_command_writes_the_same_records(served: Served, tmp_path: Path) -> None:
    config = RefreshConfig(
        data=str(served.log.path),
        model=str(served.model_dir),
        store=str(tmp_path / "store"),
        until="leave-last-out",
        codec=Codec.float32,
        device="cpu",
        progress=False,
    )
    report = run_refresh(config)
    assert report.generation == 1 and run_refresh(config).generation == 2
    assert_store_holds(
        tmp_path / "store", served.model, served.log, visible_counts(served.log, "leave-last-out"), atol=1e-5
    )
    config.device = "abacus"
    with pytest.raises(ConfigError, match="device=abacus: write auto, cpu, cuda or cuda:N"):
        run_refresh(config)


def test_a_log_that_the_model_would_misread_is_refused(
    event_log: EventLog, order_log: EventLog, tmp_path: Path
) -> None:
    frame = small_frame()
    frame["action"] = np.where(frame["action"] == "click", "buy", "like")  # code 0 is another action
    other = EventLog.from_frame(
        frame, tmp_path / "log", time_unit="ms", columns=SourceColumns(action="action", rating="rating")
    )
    with pytest.raises(ConfigError, match=r"actions are \['buy', 'like'\], but the model was trained on \['click'"):
        refresh(new_model(event_log), other, tmp_path / "store")
    del frame["action"]
    plain = EventLog.from_frame(frame, tmp_path / "plain", time_unit="ms", columns=SourceColumns(rating="rating"))
    with pytest.raises(ConfigError, match=r"actions are \['event'\], but the model was trained on \['click'"):
        refresh(new_model(event_log), plain, tmp_path / "store")
    refresh(new_model(event_log, use_action=False), plain, tmp_path / "store-without-actions")
    timeless = {name: small_frame()[name] for name in ("user", "item", "action")}
    log = EventLog.from_frame(timeless, tmp_path / "timeless", columns=SourceColumns(timestamp=None, action="action"))
    decaying = new_model(event_log, use_time=False, decay=Decay.time, decay_horizons=[1.0, 0.0])
    for model in (new_model(event_log), decaying):
        with pytest.raises(ConfigError, match="has no times, which this model reads"):
            refresh(model, log, tmp_path / "store")
    assert not (tmp_path / "store").exists()
    refresh(new_model(event_log, use_time=False), log, tmp_path / "store")
    with pytest.raises(ConfigError, match="has no times; use leave-last-out"):
        refresh(new_model(order_log), order_log, tmp_path / "store", until="2020-01-01")


def test_a_second_writer_is_refused_at_once(event_log: EventLog, tmp_path: Path) -> None:
    model = new_model(event_log)
    refresh(model, event_log, tmp_path / "store")
    other = dataclasses.replace(published_manifest(tmp_path / "store"), run_digest="other")
    with StoreWriter.open(tmp_path / "store", other), pytest.raises(StoreLockedError):
        refresh(model, event_log, tmp_path / "store")
    assert refresh(model, event_log, tmp_path / "store").resumed_at == 0


def test_refresh_while_a_scorer_is_open(served: Served, tmp_path: Path) -> None:
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


# Forks refreshes and kills or interrupts each at a random time after some batches; a last one finishes undisturbed.
DRIVER = """
import json, os, random, signal, sys, time
from pathlib import Path
from vista.config.choices import Codec
from vista.log.event_log import EventLog
from vista.model.vista_model import VistaModel
from vista.refresh import RefreshOptions, refresh
from vista.store import StoreWriter

log_path, model, folder = sys.argv[1:]
log, model, chance = EventLog.open(log_path), VistaModel.from_pretrained(model), random.Random(2)
put, publish, pipe = StoreWriter.put_batch, StoreWriter.publish, None
before_wait = 0  # batches of a child that must not get to the publication before it is ended

def put_and_tell(writer, keys, records, cursor, states):
    global before_wait
    written = put(writer, keys, records, cursor, states)
    if pipe is not None:
        os.write(pipe[1], b"b")
        before_wait -= 1
        if before_wait == 0:
            time.sleep(20)
    return written

def publish_and_tell(writer):
    if pipe is not None:
        os.write(pipe[1], b"p")
    return publish(writer)

StoreWriter.put_batch, StoreWriter.publish = put_and_tell, publish_and_tell

def run(store, codec):
    options = RefreshOptions(codec=codec, users_per_batch=1)
    return refresh(model, log, store, until="leave-last-out", options=options, created_at=1)

out = {}
run(Path(folder, "warm"), Codec.int8)
for codec in (Codec.int8, Codec.float32):
    for ending, number, ends in (("kill", signal.SIGKILL, 4), ("interrupt", signal.SIGINT, 2)):
        store, codes, resumed = Path(folder, f"{codec.value}-{ending}"), [], []
        for turn in range(ends):
            pipe, before_wait = os.pipe(), 4 if turn < ends - 1 else 0
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    run(store, codec)
                    code = 0
                except KeyboardInterrupt:
                    code = 130
                finally:
                    os._exit(code)
            os.close(pipe[1])
            if turn == ends - 1:  # during publication
                while os.read(pipe[0], 1) == b"b":
                    pass
            else:
                os.read(pipe[0], 1)
                os.read(pipe[0], 1)
            time.sleep(chance.random() * 0.003)
            os.kill(child, number)
            codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            os.close(pipe[0])
        pipe = None
        if not (store / "CURRENT").exists():
            resumed.append(run(store, codec).resumed_at)
        out[store.name] = {"codes": codes, "resumed": resumed}
print(json.dumps(out))
"""


def test_an_interrupted_refresh_resumes_to_the_same_records(served: Served, tmp_path: Path) -> None:
    done = run_python(DRIVER, str(served.log.path), str(served.model_dir), str(tmp_path))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert len(report) == 4
    for codec in (Codec.int8, Codec.float32):
        whole = tmp_path / f"whole-{codec.value}"
        refresh(
            served.model,
            served.log,
            whole,
            until="leave-last-out",
            options=RefreshOptions(codec=codec, users_per_batch=1),
            created_at=1,
        )
        with StoreReader.open(whole) as store:
            expected = store.manifest
        for ending, code in (("kill", -9), ("interrupt", 130)):
            name = f"{codec.value}-{ending}"
            codes = report[name]["codes"]
            assert codes.count(code) >= len(codes) - 1 and set(codes) <= {code, 0}, codes
            assert all(at >= 2 * (len(codes) - 1) for at in report[name]["resumed"]), report[name]
            with StoreReader.open(tmp_path / name) as store:
                assert store.manifest == expected and expected.count == served.log.num_users
                assert store.manifest.records_digest == expected.records_digest != ""


def test_the_next_run_resumes_after_an_interrupt_between_batches(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = StoreWriter.put_batch

    def put_and_interrupt(
        writer: StoreWriter, keys: list[bytes], records: list[bytes], cursor: int, states: list[bytes]
    ) -> int:
        written = put(writer, keys, records, cursor, states)
        if cursor == 8:
            os.kill(os.getpid(), signal.SIGINT)
        return written

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "put_batch", put_and_interrupt)
        with pytest.raises(KeyboardInterrupt):
            refresh(served.model, served.log, tmp_path / "store", options=RefreshOptions(users_per_batch=4))
    assert not (tmp_path / "store" / "CURRENT").exists()
    report = refresh(served.model, served.log, tmp_path / "store", options=RefreshOptions(users_per_batch=4))
    assert (report.resumed_at, report.generation) == (8, 1)
    assert report.num_events == served.log.lengths[8:].sum()
    assert_store_holds(tmp_path / "store", served.model, served.log, served.log.lengths, atol=0.02)


def test_an_unfinished_refresh_of_another_identity_is_not_resumed(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = StoreWriter.put_batch

    def put_and_fail(
        writer: StoreWriter, keys: list[bytes], records: list[bytes], cursor: int, states: list[bytes]
    ) -> None:
        put(writer, keys, records, cursor, states)
        raise KeyboardInterrupt

    exact, int8 = RefreshOptions(codec=Codec.float32, users_per_batch=4), RefreshOptions(users_per_batch=4)
    for until, options in (("leave-last-out", int8), (None, exact)):
        with monkeypatch.context() as patch:
            patch.setattr(StoreWriter, "put_batch", put_and_fail)
            with pytest.raises(KeyboardInterrupt):
                refresh(served.model, served.log, tmp_path / "store", until=until, options=options)
        assert refresh(served.model, served.log, tmp_path / "store", options=int8).resumed_at == 0


def test_a_key_and_a_group_from_the_configuration(served: Served, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("5a" * 32)
    common = {"model": str(served.model_dir), "store": str(tmp_path / "store")}
    keyed = {**common, "authentication_key_file": str(tmp_path / "key")}
    run_refresh(RefreshConfig(data=str(served.log.path), shared_with_group=True, progress=False, **keyed))
    assert (tmp_path / "store").stat().st_mode & 0o7777 == 0o2750
    user = str(served.log.users.ids(np.array([0]))[0])
    assert f"user {user}: " in run_score(ScoreConfig(users=[user], **keyed))
    with pytest.raises(StoreError, match="authentication key"):
        run_score(ScoreConfig(users=[user], **common))
