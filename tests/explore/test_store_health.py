"""Freshness, generations, and samples of records agree with what was refreshed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.conftest import START, Served, small_frame
from tests.explore.conftest import places_of
from vista.config import SourceColumns
from vista.errors import StoreError
from vista.explore.explore_workspace import Workspace, log_version
from vista.explore.record_sample import record_sample
from vista.explore.store_freshness import Freshness, store_freshness
from vista.explore.store_health import generation_rows
from vista.explore.user_search import UserSearch
from vista.log.event_log import EventLog
from vista.refresh import refresh
from vista.store import StoreReader
from vista.store.erasure import erase
from vista.store.layout import environment_path

HOUR_MS = 3_600_000


def test_a_store_of_the_whole_log_is_fresh(workspace: Workspace) -> None:
    assert workspace.scorer is not None
    manifest = workspace.scorer.manifest
    fresh = store_freshness(manifest, workspace.log, manifest.refreshed_at + 2 * HOUR_MS)
    assert fresh.state is Freshness.fresh and fresh.reason.startswith("The last refresh started 2 hours ago")
    assert store_freshness(manifest, None).state is Freshness.unknown


def test_a_store_for_evaluation_is_held_back(served: Served) -> None:
    with StoreReader.open(served.test_store) as store:
        held = store_freshness(store.manifest, served.log)
    assert held.state is Freshness.partial and "leave-last-out" in held.reason


def test_a_store_behind_its_log(served: Served, tmp_path: Path) -> None:
    shutil.copytree(served.log.path, tmp_path / "log")
    version = log_version(tmp_path / "log")
    frame = small_frame()
    new = {name: values[:3] for name, values in frame.items()} | {"timestamp": START + 10**11 + frame["user"][:3]}
    columns = SourceColumns(action="action", rating="rating")
    longer = EventLog.from_frame(new, tmp_path / "log", time_unit="ms", columns=columns, append=True)
    assert log_version(tmp_path / "log") != version
    opened = Workspace.open(places_of(served, data=tmp_path / "log"))
    assert opened.scorer is not None
    with opened.scorer as scorer:
        behind = store_freshness(scorer.manifest, longer)
        sample = record_sample(scorer, longer, UserSearch.of(longer, scorer))
    assert behind.state is Freshness.behind and "1 newer segment with changes of 1 user;" in behind.reason
    assert (sample.num_users, sample.without_record, sample.behind) == (16, 0, 1)
    assert {"events": 15, "covered": 12} in sample.covered


def test_users_without_a_record_are_counted(served: Served, tmp_path: Path) -> None:
    shutil.copytree(served.store, tmp_path / "store")
    erase(tmp_path / "store", [100, 104])
    opened = Workspace.open(places_of(served, store=str(tmp_path / "store")))
    assert opened.scorer is not None
    with opened.scorer as scorer:
        sample = record_sample(scorer, served.log, UserSearch.of(served.log, scorer))
        alone = record_sample(scorer, None, UserSearch.of(None, scorer))
    assert (sample.num_users, sample.without_record, sample.behind) == (16, 2, 0)
    assert (alone.num_users, alone.covered) == (14, [])


def test_generations_are_listed_with_the_served_one_first(served: Served, tmp_path: Path) -> None:
    for until in ("leave-last-out", "all"):
        refresh(served.model, served.log, tmp_path / "store", until=until)
    rows, problems = generation_rows(str(tmp_path / "store"))
    assert [(row["generation"], row["state"], row["users"]) for row in rows] == [(2, "served", 16), (1, "kept", 16)]
    assert [row["events"] for row in rows] == ["all", "until=leave-last-out"]
    assert problems == [] and rows[0]["summary"] == "3 x 16" and rows[0]["tail"] == 6 and rows[0]["bytes per user"] > 0
    (environment_path(tmp_path / "store", 1) / "data.mdb").write_bytes(b"damaged")
    rows, problems = generation_rows(str(tmp_path / "store"))
    assert rows[1] == {"generation": 1, "state": "damaged"} and problems[0].startswith("gen-1: ")


def test_there_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError):
        generation_rows(str(tmp_path / "nowhere"))
