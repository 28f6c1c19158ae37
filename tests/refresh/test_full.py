"""Full refresh: users that fail, the log of a run, and the age limit of records."""

from __future__ import annotations

import json
import stat
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vista.config.choices import Codec, OnMissing, StateDtype
from vista.errors import RecordError, UnknownUserError
from vista.model import inference
from vista.refresh import RefreshOptions, refresh, refresh_incremental
from vista.scorer import Scorer
from vista.store import StoreReader
from vista.store.stored_batch import CLOCK_SKEW_MS


def poisoned(grow: SimpleNamespace, counts: dict[int, int], users: list[int]) -> tuple[object, dict[str, object]]:
    """A model with NaN for one item, and events in which only some users have that item."""
    model, frame = grow.model(), grow.events(counts)
    frame["item"] = np.where(frame["item"] == 0, 10, frame["item"])
    for user in users:
        frame["item"][np.flatnonzero(frame["user"] == user)[0]] = 0
    with torch.no_grad():
        model.item_table[int(model.item_rows([0])[0])] = float("nan")
    return model, frame


def test_a_few_failing_users_change_no_others(tmp_path: Path, grow: SimpleNamespace) -> None:
    counts = dict.fromkeys(range(250), 2)
    model, frame = poisoned(grow, counts, [17, 101])
    log = grow.append(tmp_path / "log", frame)
    report = refresh(model, log, tmp_path / "store", options=RefreshOptions(codec=Codec.float32, users_per_batch=64))
    assert report.counts == {"written": 248, "erased": 0, "failed": 2} and set(report.failures) == {"17", "101"}
    assert "user 17 failed: the summary of user 17 cannot be stored: row 0 holds NaN or infinity" in str(report)
    refresh(grow.model(), log, tmp_path / "healthy", options=RefreshOptions(codec=Codec.float32))
    others = [user for user in range(250) if user not in (17, 101)]
    with StoreReader.open(tmp_path / "store") as store, StoreReader.open(tmp_path / "healthy") as healthy:
        assert sorted(store.keys()) == others and len(store) == 248
        assert (store.get_many(others).summary == healthy.get_many(others).summary).all()


@pytest.mark.parametrize("state", [StateDtype.float32, StateDtype.none])
def test_summaries_without_the_tail_cover_the_events_before_it(
    tmp_path: Path, grow: SimpleNamespace, state: StateDtype
) -> None:
    model, whole = grow.model(tail_in_summary=False, counters=True), grow.model(counters=True)
    log = grow.append(tmp_path / "log", grow.events({1: 12, 2: 5, 3: 30, 4: 1}))
    for name, each in (("store", model), ("whole", whole)):
        refresh(each, log, tmp_path / name, options=RefreshOptions(codec=Codec.float32, state=state))
    history = log.gather(np.arange(4), np.array([7, 0, 25, 0]))
    history = replace(history, item=model.rows_of(log.items)[history.item].astype(np.int32))
    with StoreReader.open(tmp_path / "store") as store, StoreReader.open(tmp_path / "whole") as other:
        batch, of_all = (opened.get_many(log.users.ids(np.arange(4))) for opened in (store, other))
    np.testing.assert_allclose(batch.summary, inference.summarize(whole, history).numpy(), atol=2e-5)
    assert batch.event_count.tolist() == [12, 5, 30, 1] and np.diff(batch.tail.offsets).tolist() == [5, 5, 5, 1]
    for name in ("key", "codes", "offsets", "clock"):  # counters cover the tail
        np.testing.assert_array_equal(getattr(batch.counters[0], name), getattr(of_all.counters[0], name))


def test_an_incremental_failure_keeps_the_old_record(tmp_path: Path, grow: SimpleNamespace) -> None:
    counts = dict.fromkeys(range(250), 2)
    model, frame = poisoned(grow, counts, [])
    log = grow.append(tmp_path / "log", frame)
    refresh(model, log, tmp_path / "store", options=RefreshOptions(codec=Codec.float32))
    model, frame = poisoned(grow, counts, [17])
    frame["timestamp"] = frame["timestamp"] + 500 * grow.hour
    log = grow.append(tmp_path / "log", frame)
    report = refresh_incremental(model, log, tmp_path / "store")
    assert (report.counts["failed"], report.num_users) == (1, 250)
    with StoreReader.open(tmp_path / "store") as store:
        assert store.manifest.applied_segment == 2
        assert store.get_many([16, 17]).event_count.tolist() == [4, 2]
    assert refresh_incremental(model, log, tmp_path / "store").num_users == 0


def test_many_failing_users_stop_the_run(tmp_path: Path, grow: SimpleNamespace) -> None:
    model, frame = poisoned(grow, dict.fromkeys(range(100), 2), list(range(17, 28)))
    log = grow.append(tmp_path / "log", frame)
    with pytest.raises(RecordError, match=r"11 users failed; the first one is '17': .*NaN or infinity"):
        refresh(model, log, tmp_path / "store")
    assert not (tmp_path / "store" / "CURRENT").exists()


def test_one_json_line_per_batch(tmp_path: Path, grow: SimpleNamespace) -> None:
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
    [(0, True), (59_000, True), (60_000, True), (61_000, False), (-CLOCK_SKEW_MS, True), (-CLOCK_SKEW_MS - 1, False)],
)
def test_records_beyond_the_age_limit_are_not_used(
    tmp_path: Path, grow: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, age_ms: int, served: bool
) -> None:
    model = grow.model()
    log = grow.append(tmp_path / "log", grow.events({1: 7, 2: 5}))
    refresh(model, log, tmp_path / "store", created_at=NOW - age_ms)
    monkeypatch.setattr("time.time_ns", lambda: NOW * 1_000_000)
    with Scorer.open(model, tmp_path / "store", on_missing=OnMissing.nan, max_age_s=60) as scorer:
        assert np.isfinite(scorer.score([1, 2, 3], [10])).tolist() == [[served], [served], [False]]
    with Scorer.open(model, tmp_path / "store", on_missing=OnMissing.nan) as scorer:
        assert np.isfinite(scorer.score([1, 2], [10])).all()
    if not served:
        with (
            Scorer.open(model, tmp_path / "store", on_missing="raise", max_age_s=60) as scorer,
            pytest.raises(UnknownUserError, match=r"users \[1, 2\]"),
        ):
            scorer.score([1, 2], [10])


def test_a_refresh_without_new_events_makes_all_records_current(
    tmp_path: Path, grow: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
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
