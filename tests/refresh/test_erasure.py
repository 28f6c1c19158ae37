"""Erasure: users are missing at once, no writer brings them back, and compaction removes their last byte."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.log.conftest import PARSER
from tests.refresh.conftest import fail_at
from tests.store.conftest import found
from vista.cli.store_commands import run_store_erase
from vista.config import StoreEraseConfig
from vista.config.checks import StateDtype
from vista.errors import ConfigError, StoreError, VistaError
from vista.log.deletions import erase_users
from vista.log.event_log import EventLog
from vista.refresh import RefreshOptions, erase, refresh, refresh_incremental
from vista.store import StoreReader, StoreWriter
from vista.store.admin import compact_store, copy_generation, roll_back, verify_store
from vista.store.folder_generation import SharedEnvironment
from vista.store.folder_writer import FolderBuilder
from vista.store.parquet import export_store, import_store


def named_log(path: Path, grow: SimpleNamespace, count: int, marker: str = "marker") -> EventLog:
    """Users marker-0000, marker-0001, …"""
    frame = grow.events(dict.fromkeys(range(count), 3))
    frame["user"] = np.array([f"{marker}-{user:04d}" for user in frame["user"].tolist()])
    return grow.append(path, frame)


def files_with(folder: Path, marker: bytes) -> list[str]:
    return [
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and marker in path.read_bytes()
    ]


def test_no_byte_is_left_after_compaction(tmp_path, grow):
    model, store = grow.model(), tmp_path / "store"
    log = named_log(tmp_path / "log", grow, 300)
    for _ in range(2):  # so that two generations hold the users
        refresh(model, log, store, options=RefreshOptions(state=StateDtype.float32))
    gone = [f"marker-{user:04d}" for user in range(0, 300, 3)]
    with StoreReader.open(store) as opened:
        assert erase(store, gone * 2) == 100
        assert not opened.get_many(gone).found.any() and opened.get_many(["marker-0001"]).found.all()
    assert files_with(store, b"marker-0003")  # still in free pages
    report = compact_store(store)
    assert report.num_records == 200 and not verify_store(store).num_problems
    for user in gone:
        assert files_with(store, user.encode()) == [], user
    assert files_with(store, b"marker-0001")
    # The previous generation is gone as well, and nothing brings the users back.
    with pytest.raises(StoreError, match="no complete generation before"):
        roll_back(store)
    erase_users(log.path, gone[:50])
    log = EventLog.open(log.path)
    refresh_incremental(model, log, store)
    counts = refresh(model, log, store).counts
    assert (counts["written"], counts["erased"]) == (200, 50)
    with StoreReader.open(store) as opened:
        assert len(opened) == 200 and not opened.get_many(gone).found.any()


def test_a_compacted_store_can_be_updated(tmp_path, grow):
    model, store = grow.model(counter_keys=["item"]), tmp_path / "store"
    log = grow.append(tmp_path / "log", grow.events(dict.fromkeys(range(30), 5)))
    grow.full(model, log, store)
    compact_store(store)
    log = grow.later(tmp_path / "log", {3: 2, 40: 1})
    assert refresh_incremental(model, log, store).counts["appended"] == 1
    grow.full(model, log, tmp_path / "expected")
    grow.assert_same(store, tmp_path / "expected")
    assert not verify_store(store).num_problems


def test_an_erasure_during_another_operation_is_not_lost(tmp_path, grow, monkeypatch):
    """Just before the publication by a compaction, a copy, and a refresh in turn."""
    model, store = grow.model(), tmp_path / "store"
    log = grow.append(tmp_path / "log", grow.events(dict.fromkeys(range(20), 3)))
    refresh(model, log, store)
    finish, publish, waiting = FolderBuilder.finish, StoreWriter.publish, [5, 6, 7]

    def finish_after_erasure(builder: FolderBuilder) -> Any:
        done = finish(builder)
        if waiting:
            erase(builder.root, [waiting.pop(0)])
        return done

    def publish_after_erasure(writer: StoreWriter) -> Any:
        erase(writer.path, [8])
        return publish(writer)

    export_store(store, tmp_path / "all.parquet")
    monkeypatch.setattr(FolderBuilder, "finish", finish_after_erasure)
    compact_store(store)
    copied = tmp_path / "copied"
    copy_generation(store, copied)
    with pytest.raises(StoreError, match="holds users who were erased"):
        import_store(tmp_path / "all.parquet", store, parser=PARSER)
    import_store(tmp_path / "all.parquet", tmp_path / "imported", parser=PARSER)
    monkeypatch.setattr(StoreWriter, "publish", publish_after_erasure)
    refresh(model, log, store)
    for root, gone in ((store, [5, 8]), (copied, [5, 6]), (tmp_path / "imported", [7])):
        with StoreReader.open(root) as opened:
            assert sorted(set(range(20)) - set(opened.keys())) == gone and len(opened) == 20 - len(gone)
        assert not verify_store(root).num_problems


def test_copies_and_imports_do_not_bring_erased_users_back(tmp_path, grow):
    model, store, host = grow.model(), tmp_path / "store", tmp_path / "host"
    log = grow.append(tmp_path / "log", grow.events(dict.fromkeys(range(20), 3)))
    refresh(model, log, store)
    export_store(store, tmp_path / "all.parquet")
    copy_generation(store, host)
    erase(host, [4])
    refresh(model, log, store)
    with pytest.raises(StoreError, match=r"users were erased here, but are still in .*store; erase them there too"):
        copy_generation(store, host)
    with pytest.raises(StoreError, match="holds users who were erased"):
        import_store(tmp_path / "all.parquet", host, parser=PARSER)
    erase(store, [4])
    copy_generation(store, host)
    with StoreReader.open(host) as opened:
        assert len(opened) == 19 and not opened.get_many([4]).found.any()


def test_from_the_command_line(tmp_path, grow):
    log = grow.append(tmp_path / "log", grow.events({1: 3, 2: 3}))
    refresh(grow.model(), log, tmp_path / "store")
    config = StoreEraseConfig(store=str(tmp_path / "store"), users=["2"], data=str(log.path))
    text = run_store_erase(config)
    assert "1 of 1 users had a record" in text and "vista store compact" in text
    assert EventLog.open(log.path).lengths.tolist() == [3, 0]
    assert "Check the ids" not in text
    config.users, config.data = ["1", "11"], None
    assert "Check the ids: 1 users had no record. No refresh will write any of the 2" in run_store_erase(config)
    refresh(grow.model(), grow.append(tmp_path / "log", grow.events({5: 3})), tmp_path / "store")
    for users, data in ((["5", "77"], log.path), (["5"], tmp_path / "nowhere")):
        config.users, config.data = users, str(data)
        with pytest.raises(VistaError):
            run_store_erase(config)
        assert all(found(tmp_path / "store", [5]))
    config.users, config.data = [], None
    with pytest.raises(ConfigError, match="users: name at least one"):
        run_store_erase(config)
    config.users = ["two"]
    with pytest.raises(ConfigError, match="ids must be integers"):
        run_store_erase(config)


@pytest.mark.parametrize("after", [0, 1])
def test_an_interrupted_erasure_is_completed(tmp_path, grow, monkeypatch, after):
    """Interrupted after the tombstone, or after the record: the next refresh or compaction completes it."""
    model = grow.model()
    log = grow.append(tmp_path / "log", grow.events({1: 3, 2: 3}))
    for name in ("refreshed", "compacted"):
        refresh(model, log, tmp_path / name)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            fail_at(patch, SharedEnvironment, "write", after + 1, KeyboardInterrupt())
            erase(tmp_path / name, [2])
    compact_store(tmp_path / "compacted")
    log = grow.later(tmp_path / "log", {2: 2})
    assert refresh_incremental(model, log, tmp_path / "refreshed").counts["erased"] == 1
    for name in ("refreshed", "compacted"):
        with StoreReader.open(tmp_path / name) as opened:
            assert list(opened.keys()) == [1]
            states = opened.states([1, 2])
            assert states is not None and states[0].tolist() == [0]
        assert not verify_store(tmp_path / name).num_problems
