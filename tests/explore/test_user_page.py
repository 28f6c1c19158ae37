"""The facts, the tail, the counters and the timeline of one user agree with the store and the log."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from tests.conftest import Served, small_config, small_frame
from tests.explore.conftest import places_of
from vista.explore.explore_workspace import Workspace, record_of
from vista.explore.item_names import ItemNames
from vista.explore.timeline import MAX_KINDS, NUM_BINS, OTHER, timeline
from vista.explore.user_page import counter_rows, frequent_items, history_of, shown_age, shown_time, user_facts
from vista.log.event_log import EventLog
from vista.refresh import refresh
from vista.store.erasure import erase
from vista.training.trainer import train

USER = 104
"""The user with the most events, 40."""


def test_facts_agree_with_store_and_log(workspace: Workspace) -> None:
    assert workspace.scorer is not None and workspace.log is not None
    facts, history = user_facts(workspace, workspace.scorer, USER), workspace.log[USER]
    assert facts.in_log and facts.has_record and facts.num_events == facts.num_covered == 40 and facts.num_missing == 0
    assert facts.summary_shape == (3, 16) and facts.newest_at == history.timestamp[-1]
    newest = workspace.log.items.ids(history.item[-6:]).tolist()[::-1]
    assert [row["item"] for row in facts.tail] == newest and facts.tail[0]["time"] == history.timestamp[-1]
    assert {row["action"] for row in facts.tail} <= {"click", "like"} and facts.counters == {}


def test_a_user_without_a_record(served: Served, tmp_path: Path) -> None:
    shutil.copytree(served.store, tmp_path / "store")
    erase(tmp_path / "store", [USER])
    opened = Workspace.open(places_of(served, store=str(tmp_path / "store")))
    assert opened.scorer is not None
    with opened.scorer as scorer:
        facts, nobody = user_facts(opened, scorer, USER), user_facts(opened, scorer, 999_999)
    assert not facts.has_record and facts.num_events == 40 and facts.tail == [] and facts.num_missing is None
    assert not nobody.in_log and not nobody.has_record and nobody.num_events is None
    assert history_of(opened, 999_999) is None


def test_counters_have_the_counts_of_the_history(tmp_path: Path) -> None:
    frame = small_frame()
    log = EventLog.from_frame(frame, tmp_path / "log", time_unit="ms")
    config = small_config(log, tmp_path / "run", model__counters=True, optim__epochs=1)
    refresh(train(config, log), log, tmp_path / "store")
    served = Served(log, config, None, tmp_path / "run" / "best", tmp_path / "store", tmp_path, tmp_path)  # type: ignore[arg-type]
    opened = Workspace.open(places_of(served))
    assert opened.scorer is not None
    with opened.scorer as scorer:
        rows = counter_rows(opened, scorer, record_of(scorer, USER))["item"]
    items, counts = np.unique(frame["item"][frame["user"] == USER], return_counts=True)
    assert {row["item"]: row["count"] for row in rows} == dict(zip(map(str, items), counts.astype(float), strict=True))
    assert [row["count"] for row in rows] == sorted((row["count"] for row in rows), reverse=True)
    assert all(row["seconds since the last"] >= 0 for row in rows)


def test_the_timeline_counts_every_event_once(workspace: Workspace) -> None:
    log = workspace.log
    assert log is not None
    history = log[USER]
    line = timeline(log, history, workspace.names, [int(history.timestamp[-6])])
    assert sum(row["events"] for row in line.rows) == 40 and line.tail_from == history.timestamp[-6]
    assert line.kind_name == "action" and set(line.kinds) == {"click", "like"}
    assert len({row["time"] for row in line.rows}) <= NUM_BINS
    assert all(row["above"] - row["below"] == row["events"] and row["time"] < row["end"] for row in line.rows)
    times = np.asarray(history.timestamp)
    for row in line.rows:
        inside = (times >= row["time"]) & (times < row["end"])
        assert row["events"] == (np.array(log.actions)[history.action[inside]] == row["kind"]).sum()
    empty = timeline(log, log.gather([0], [0]), workspace.names, [])
    assert empty.rows == [] and empty.kinds == []


def test_rare_kinds_are_counted_together(tmp_path: Path) -> None:
    count = MAX_KINDS + 3
    frame = {"user": np.ones(count, int), "item": np.arange(count), "timestamp": 10**12 + np.arange(count) * 1000}
    items = {"item": np.arange(count), "title": [f"Film {n}" for n in range(count)], "genre": [*"abcdefghi"]}
    log = EventLog.from_frame(frame, tmp_path / "log", time_unit="ms", items=items)
    names = ItemNames.of(log)
    line = timeline(log, log[1], names, [])
    assert line.kind_name == "genre" and len(line.kinds) == MAX_KINDS + 1 and line.kinds[-1] == OTHER
    assert sum(row["events"] for row in line.rows if row["kind"] == OTHER) == 3
    assert names.of_ids([3, None, 0]) == ["Film 3 (3)", "unknown item", "Film 0 (0)"]
    assert names.groups_of_ids([2, None, 12345]) == ["c", "", ""]
    long = replace(names, titles=replace(names.titles, values=type(names.items).from_ids(["x" * 99])))  # type: ignore[type-var]
    assert long.titles is not None and len(long.titles.values) == 1


def test_names_without_a_title_are_ids(workspace: Workspace) -> None:
    assert workspace.names.of_ids([10, None]) == ["10", "unknown item"]
    assert workspace.names.groups_of_ids([10]) == [""] and ItemNames.of(None).of_ids(["a"]) == ["a"]


def test_frequent_items(workspace: Workspace) -> None:
    assert workspace.log is not None
    history = workspace.log[USER]
    rows = frequent_items(workspace, history, 5)
    items = workspace.log.items.ids(history.item)
    top = rows[0]
    assert top["events"] == (items == int(top["item"])).sum() == max(np.unique(items, return_counts=True)[1])
    assert top["last"] == history.timestamp[items == int(top["item"])].max() and len(rows) == 5


def test_times_and_ages_are_readable() -> None:
    assert shown_time(1_600_000_000_000) == "2020-09-13 12:26" and shown_time(12) == "12" and shown_time(None) == "–"
    ages = [shown_age(ms) for ms in (-5, 59_000, 60_000, 7_200_000, 86_400_000, 3 * 86_400_000)]
    assert ages == ["less than a minute", "less than a minute", "1 minute", "2 hours", "1 day", "3 days"]
