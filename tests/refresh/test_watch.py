"""Watching a folder: each file once, whatever its writer, other processes, or the disk do."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest

from tests.log.conftest import PARSER
from vista.cli.serving_commands import run_watch
from vista.config import SourceConfig, WatchConfig
from vista.config.checks import Codec, OnBadRows
from vista.errors import ConfigError, StoreError, StoreLockedError
from vista.log.event_log import EventLog
from vista.log.ingest.source_parser import SourceParser
from vista.log.segment_writer import locked_log
from vista.refresh import RefreshOptions, refresh
from vista.refresh.watch import FileVersion, RefusedFiles, Watch
from vista.store.layout import Shard
from vista.store.reader import open_store
from vista.store.writer import StoreUpdate


def arrive(folder: Path, name: str, frame: dict[str, Any], age_s: float = 60) -> Path:
    """A complete file that arrived a while ago, with its marker."""
    path = folder / name
    pl.DataFrame(frame).write_csv(path)
    mark(path, age_s)
    return path


def mark(path: Path, age_s: float = 60) -> None:
    """Say that a file was complete some seconds ago."""
    marker = path.with_name(path.name + ".done")
    marker.touch()
    for file in (path, marker):
        os.utime(file, (time.time() - age_s,) * 2)


def config_of(folder: Path) -> WatchConfig:
    columns = {"timestamp": "timestamp", "time_unit": "ms", "action": "action", "rating": "rating"}
    paths = {name: str(folder / name) for name in ("model", "store")}
    return WatchConfig(
        data=str(folder / "log"),
        folder=str(folder / "incoming"),
        events=SourceConfig(**columns),
        device="cpu",
        num_threads=1,
        once=True,
        **paths,
    )


@pytest.fixture
def watched(tmp_path, grow, monkeypatch):
    monkeypatch.setattr("vista.refresh.watch.SourceParser", lambda: nullcontext(PARSER))
    log = grow.append(tmp_path / "log", grow.events({1: 7, 2: 7}))
    model = grow.model()
    model.save_pretrained(tmp_path / "model")
    grow.full(model, log, tmp_path / "store")
    (tmp_path / "incoming").mkdir()
    return config_of(tmp_path)


def expect(config: WatchConfig, grow: SimpleNamespace, tmp_path: Path, num_events: int) -> None:
    log = EventLog.open(config.data)
    assert log.num_events == num_events
    grow.full(grow.model(), log, tmp_path / "expected")
    grow.assert_same(Path(config.store), tmp_path / "expected", atol=5e-5)


def test_each_file_once(tmp_path, grow, watched):
    watching, folder = Watch(watched), tmp_path / "incoming"
    assert watching.look().refreshes == []
    later = grow.start + 500 * grow.hour
    first = grow.events({1: 2, 3: 4}, later)
    arrive(folder, "b.csv", first)
    arrive(folder, ".hidden.csv", grow.events({1: 1}, later, seed=5))
    arrive(folder, "young.csv", grow.events({2: 1}, later)).with_name("young.csv.done").unlink()
    report = watching.look()
    assert (report.files, report.refused) == (1, 0) and len(report.refreshes) == 1
    assert report.lag_s is not None and 60 <= report.lag_s < 120
    expect(watched, grow, tmp_path, 20)
    arrive(folder, "again.csv", first)  # the same content under another name
    mark(folder / "young.csv")
    assert watching.look().files == 1
    expect(watched, grow, tmp_path, 21)
    again = Watch(watched).look()  # as after a restart
    assert (again.files, again.refreshes) == (0, [])


def test_a_file_waits_for_its_marker_and_is_reported_once(tmp_path, grow, watched, caplog):
    watching, later = Watch(watched), grow.start + 500 * grow.hour
    path = arrive(tmp_path / "incoming", "a.csv", grow.events({1: 2}, later), age_s=50)
    marker = path.with_name("a.csv.done")
    marker.unlink()
    for age_s, warnings in ((50, 0), (70, 1), (80, 1)):
        os.utime(path, (time.time() - age_s,) * 2)
        assert watching.look().files == 0
        assert caplog.text.count("a.csv: is waiting for a.csv.done; create it when the file is complete") == warnings
    mark(path)
    os.utime(path, (time.time() - 30,) * 2)  # its writer continued after the marker
    restarted = Watch(watched)
    for _ in range(2):
        assert restarted.look().files == 0
    assert caplog.text.count("a.csv: is newer than a.csv.done; `touch` the marker when the file is complete again") == 1
    marker.touch()
    assert restarted.look().files == 1
    expect(watched, grow, tmp_path, 16)


def test_a_writer_that_pauses(tmp_path, grow, watched):
    """With a marker, each row enters once. Without one, the rows before a pause enter twice, as the setting says."""
    folder, later = tmp_path / "incoming", grow.start + 500 * grow.hour
    events = grow.events({1: 6}, later)
    begun = {name: values[:4] for name, values in events.items()}
    for settle_s, num_events in ((None, 20), (2.0, 20 + 4 + 6)):
        watched.settle_s = settle_s
        watching, name = Watch(watched), f"{settle_s}.csv"
        path = arrive(folder, name, begun)
        path.with_name(f"{name}.done").unlink()
        assert watching.look().files == (settle_s is not None)
        arrive(folder, name, events)
        assert watching.look().files == 1
        assert EventLog.open(watched.data).num_events == num_events
        events = grow.events({2: 6}, later, seed=8)
        begun = {name: values[:4] for name, values in events.items()}


def test_a_pause_is_measured_and_a_file_dated_in_the_future_is_reported_once(tmp_path, grow, watched, caplog):
    watched.settle_s = 100.0
    watching = Watch(watched)
    path = arrive(tmp_path / "incoming", "a.csv", grow.events({1: 2}, grow.start + 500 * grow.hour), age_s=-3600)
    for _ in range(2):
        assert watching.look().files == 0
    assert caplog.text.count("in the future and will be read then") == 1 and "a.csv" in caplog.text
    os.utime(path, (time.time() - 60,) * 2)
    assert watching.look().files == 0
    os.utime(path, (time.time() - 120,) * 2)
    assert watching.look().files == 1


def test_a_bad_file_does_not_hold_up_others(tmp_path, grow, watched, caplog):
    folder, later = tmp_path / "incoming", grow.start + 500 * grow.hour
    bad = {name: [str(value) for value in values] for name, values in grow.events({1: 3}, later, seed=3).items()}
    bad["timestamp"][1] = "soon"
    arrive(folder, "a.csv", bad)
    (folder / "b.parquet").write_bytes(b"PAR1" + bytes(range(256)) + b"\xff\xff\xff\x7fPAR1")
    mark(folder / "b.parquet")
    for name in ("loop.csv", "loop.csv.done"):
        (folder / name).symlink_to(folder / name)
        os.utime(folder / name, (time.time() - 60,) * 2, follow_symlinks=False)
    os.mkfifo(folder / "pipe.csv")
    mark(folder / "pipe.csv")
    arrive(folder, "c.csv", grow.events({2: 2}, later))
    report = run_watch(watched)
    assert (report.files, report.refused) == (1, 4) and run_watch(watched).refused == 0
    assert "pipe.csv: is not a regular file" in json.loads((folder / "refused" / "pipe.csv.json").read_text())["reason"]
    assert "no such file" in json.loads((folder / "refused" / "loop.csv.json").read_text())["reason"]
    assert "a.csv" in caplog.text and "soon" in caplog.text
    expect(watched, grow, tmp_path, 16)
    watched.folder = str(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="is not a folder"):
        run_watch(watched)


def test_a_refused_file_is_listed_until_something_changes(tmp_path, grow, watched):
    folder, later = tmp_path / "incoming", grow.start + 500 * grow.hour
    bad = {name: [str(value) for value in values] for name, values in grow.events({1: 3}, later).items()}
    bad["timestamp"][1] = "soon"
    path = arrive(folder, "a.csv", bad)
    entry = folder / "refused" / "a.csv.json"

    def refused(config: WatchConfig = watched) -> int:
        return Watch(config).look().refused  # as after a restart

    assert refused() == 1 and "soon" in json.loads(entry.read_text())["reason"]
    assert json.loads(entry.read_text())["size"] == path.stat().st_size
    assert refused() == 0
    entry.unlink()
    assert refused() == 1
    entry.write_bytes(b"{")
    assert refused() == 1 and refused() == 0
    mark(path, 30)
    assert refused() == 1
    report = Watch(replace(watched, on_bad_rows=OnBadRows.quarantine)).look()
    assert (report.files, report.refused) == (1, 0)
    assert path.exists() and path.with_name("a.csv.done").exists()


def test_a_file_that_changes_while_it_is_read_is_tried_again(tmp_path, grow, watched, caplog, monkeypatch):
    events = grow.events({1: 4}, grow.start + 500 * grow.hour)
    path = arrive(tmp_path / "incoming", "a.csv", {name: values[:2] for name, values in events.items()})

    def call(parser: SourceParser, task: str, file: Path, **arguments: Any) -> tuple[Any, bytes]:
        if task == "read_part":
            arrive(tmp_path / "incoming", "a.csv", events, age_s=30)
        return unchanged(parser, task, file, **arguments)

    unchanged = SourceParser.call
    watching = Watch(watched)
    with monkeypatch.context() as patch:
        patch.setattr(SourceParser, "call", call)
        report = watching.look()
    assert (report.files, report.refused) == (0, 0) and not (tmp_path / "incoming" / "refused").exists()
    assert "a.csv: changed while it was read" in caplog.text and "the next check will retry" in caplog.text
    assert watching.look().files == 1 and path.exists()
    expect(watched, grow, tmp_path, 18)


def test_a_list_of_refused_files_that_cannot_be_written(tmp_path, grow, watched, caplog):
    folder = tmp_path / "incoming"
    (folder / "refused").write_text("in the way")
    (folder / "a.csv").write_text("no columns\n")
    mark(folder / "a.csv")
    watching = Watch(watched)
    assert watching.look().refused == 1 and "will be retried after a restart" in caplog.text
    assert watching.look().refused == 0
    assert Watch(watched).look().refused == 1


def test_a_log_that_other_processes_append_to_is_followed(tmp_path, grow, watched):
    watched.folder = None
    watching = Watch(watched)
    grow.later(tmp_path / "log", {2: 3})
    report = watching.look()
    assert report.files == 0 and [refreshed.num_users for refreshed in report.refreshes] == [1]
    assert report.lag_s is not None and 0 <= report.lag_s < 60
    expect(watched, grow, tmp_path, 17)
    log = grow.later(tmp_path / "log", {2: 3}, 900, seed=4)
    os.utime(log.segments[-1].path / "manifest.json", (time.time() - 600,) * 2)
    grow.later(tmp_path / "log", {1: 3}, 950, seed=5)
    lag = watching.look().lag_s
    assert lag is not None and 600 <= lag < 660


def test_a_log_that_was_restored_from_a_backup_is_refused(tmp_path, grow, watched):
    """Its new segment has the number of one that the store covers, but holds other events."""
    shutil.copytree(tmp_path / "log", tmp_path / "backup")
    grow.later(tmp_path / "log", {2: 3})
    assert len(Watch(watched).look().refreshes) == 1
    shutil.rmtree(tmp_path / "log")
    (tmp_path / "backup").rename(tmp_path / "log")
    arrive(tmp_path / "incoming", "a.csv", grow.events({1: 2}, grow.start + 500 * grow.hour))
    with pytest.raises(StoreError, match=r"covers segment 2, .* ends at segment 1; restore the log, or run a full"):
        Watch(watched).look()
    log = grow.later(tmp_path / "log", {2: 4})
    with pytest.raises(StoreError, match=r"covers segment 2, .* other sources; restore the log, or run a full"):
        Watch(watched).look()
    assert EventLog.open(log.path).last_segment == 2  # the file was never appended


def test_nothing_is_appended_for_a_store_that_cannot_be_updated(tmp_path, grow, watched):
    log = EventLog.open(watched.data)
    refresh(grow.model(), log, watched.store, until="leave-last-out")
    path = arrive(tmp_path / "incoming", "a.csv", grow.events({1: 2}, grow.start + 500 * grow.hour))
    watching = Watch(watched)
    with pytest.raises(ConfigError, match="was refreshed with until=leave-last-out and cannot be updated"):
        watching.look()
    assert EventLog.open(watched.data).num_events == log.num_events
    refresh(grow.model(), log, watched.store)
    assert watching.look().files == 1 and path.exists()


def test_no_file_is_lost_while_log_or_store_are_busy(tmp_path, grow, watched, caplog):
    """Other processes write the log, and then the store; a file that was removed after it was appended is harmless."""
    watching, later = Watch(watched), grow.start + 500 * grow.hour
    arrive(tmp_path / "incoming", "a.csv", grow.events({1: 3}, later))
    with locked_log(Path(watched.data)):
        assert watching.look().files == 0
    assert "the next check will retry" in caplog.text
    with (
        StoreUpdate.open(watched.store, summarizer_id=grow.model().summarizer_id(), applied_segment=1, created_at=0),
        pytest.raises(StoreLockedError),
    ):
        watching.look()
    (tmp_path / "incoming" / "a.csv").unlink()
    report = watching.look()
    assert report.refreshes and report.lag_s is not None and report.lag_s >= 60
    expect(watched, grow, tmp_path, 17)


def test_no_file_is_lost_on_a_full_disk(tmp_path, grow, watched, caplog, monkeypatch):
    watching = Watch(watched)
    arrive(tmp_path / "incoming", "a.csv", grow.events({1: 3}, grow.start + 500 * grow.hour))

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("vista.log.segment_writer.sync", full)
        report = watching.look()
    assert (report.files, report.refused, report.refreshes) == (0, 0, [])
    assert "free disk space" in caplog.text and "the next check will retry" in caplog.text
    assert watching.look().files == 1
    expect(watched, grow, tmp_path, 17)


def test_all_shards_are_refreshed(tmp_path, grow, watched):
    watched.store = str(tmp_path / "sharded")
    for index in range(2):
        refresh(
            grow.model(),
            EventLog.open(watched.data),
            watched.store,
            options=RefreshOptions(codec=Codec.float32),
            shard=Shard(index, 2),
        )
    arrive(tmp_path / "incoming", "a.csv", grow.events({1: 2, 2: 1, 3: 4, 4: 1}, grow.start + 500 * grow.hour))
    report = run_watch(watched)
    assert len(report.refreshes) == 2 and sum(refreshed.num_users for refreshed in report.refreshes) == 4
    with open_store(watched.store) as store:
        assert sorted(store.keys()) == [1, 2, 3, 4] and store.get_many([1, 3]).event_count.tolist() == [9, 4]
    watched.store = str(tmp_path / "sharded" / "part-0-of-2")
    assert run_watch(watched).refreshes == []


SECTOR_BYTES = 512
VERSION = FileVersion("day.csv", 1000, 1_700_000_000_000_000_000)


def test_a_torn_entry_is_retried_and_rewritten(tmp_path):
    refused, entry = RefusedFiles(tmp_path, {"paths": []}), tmp_path / "refused" / "day.csv.json"
    contents = []
    for version, reason in ((replace(VERSION, size=900), "a" * 700), (VERSION, "é" * 200)):
        refused.add(version, reason)
        contents.append(entry.read_bytes())
    old, new = contents
    torn = [new[:size] for size in range(0, len(new), 7)]
    for sectors in product((old, new, bytes(len(new))), repeat=-(-len(new) // SECTOR_BYTES)):
        parts = (part[i * SECTOR_BYTES :][:SECTOR_BYTES] for i, part in enumerate(sectors))
        torn.append(b"".join(parts)[: len(new)])
    listed = 0
    for content in torn:
        entry.write_bytes(content)
        listed += VERSION in refused
        assert replace(VERSION, mtime_ns=VERSION.mtime_ns + 1) not in refused
    assert 1 <= listed < 10  # among them the new entry itself
    entry.write_bytes(torn[5])
    assert VERSION not in refused
    refused.add(VERSION, "again")
    assert VERSION in refused and entry.read_bytes() != torn[5]
