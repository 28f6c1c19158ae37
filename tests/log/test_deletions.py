"""Deletion rows: reading equals plain lists for any order of segments; forgetting and erasing by raw ids."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.log.conftest import PARSER
from tests.log.log_oracle import (
    ACTIONS,
    NUM_ITEMS,
    NUM_USERS,
    Event,
    Oracle,
    Step,
    assert_reads_as,
    contents,
    events_of,
    write,
)
from vista.cli.main import main
from vista.config import SourceColumns
from vista.errors import ConfigError, DataError, LogFormatError, UnknownUserError
from vista.log.compaction import compact_log
from vista.log.deletions import erase_users, forget_events
from vista.log.event_log import EventLog

EVENTS = st.tuples(
    st.integers(0, NUM_USERS - 1), st.integers(0, NUM_ITEMS - 1), st.integers(0, 4), st.integers(0, len(ACTIONS) - 1)
)


@st.composite
def logs(draw: st.DrawFn) -> list[Step]:
    """Segments of events with ties and repeats, not ordered by time, with deletions of existing rows between them."""
    columns = st.sampled_from([(), ("device",), ("dwell", "device"), ("device", "dwell")])
    events, impressions = draw(st.lists(EVENTS, max_size=20)), draw(st.lists(EVENTS, max_size=4))
    steps = [Step(events=events, impressions=impressions, columns=draw(columns))]
    for kind in draw(st.lists(st.sampled_from(["append", "append", "forget", "erase"]), max_size=5)):
        here: list[Event] = [row for user in range(NUM_USERS) for row in Oracle(steps).history(user)]
        if kind == "append":
            events, impressions = draw(st.lists(EVENTS, max_size=9)), draw(st.lists(EVENTS, max_size=2))
            steps.append(Step(events=events, impressions=impressions, columns=draw(columns)))
        elif kind == "erase":
            steps.append(Step(erased=draw(st.lists(st.integers(0, NUM_USERS - 1), min_size=1, max_size=2))))
        elif here:
            steps.append(Step(forgotten=draw(st.lists(st.sampled_from(here), min_size=1, max_size=5))))
    return steps


@pytest.fixture(autouse=True)
def shared_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    """One child process for all tests; to start one takes half a second."""
    monkeypatch.setattr("vista.log.deletions.SourceParser", lambda: nullcontext(PARSER))


def assert_changes(log: EventLog, oracle: Oracle) -> None:
    for after in range(len(oracle.steps) + 1):
        assert log.changed_users(after).tolist() == oracle.changed(after)


@settings(max_examples=10, deadline=None)
@given(steps=logs(), seed=st.integers(0, 99))
def test_reading_equals_the_lists(tmp_path_factory: pytest.TempPathFactory, steps: list[Step], seed: int) -> None:
    """Also as of each earlier segment, and for the new events since then."""
    log, oracle = write(tmp_path_factory.mktemp("oracle") / "log", steps), Oracle(steps)
    rng = np.random.default_rng(seed)
    assert_reads_as(log, oracle, rng)
    assert_changes(log, oracle)
    users = rng.permutation(NUM_USERS)
    for after in range(len(steps) + 1):
        assert log.has_boundary(after) is (after > 0)
        new = [oracle.history(user, after) for user in users.tolist()]
        assert events_of(log.new_events(users, after), users.tolist()) == new
        if after:
            assert_reads_as(EventLog.open(log.path, last_segment=after), Oracle(steps[:after]), rng)


@settings(max_examples=8, deadline=None)
@given(steps=logs(), seed=st.integers(0, 99), data=st.data())
def test_compaction_does_not_change_what_is_read(
    tmp_path_factory: pytest.TempPathFactory, steps: list[Step], seed: int, data: st.DataObject
) -> None:
    """After any segment, in runs of any length, and again later; the segment numbers stay."""
    folder = tmp_path_factory.mktemp("compaction")
    rng, oracle = np.random.default_rng(seed), Oracle(steps)
    middle = data.draw(st.integers(1, len(steps)), "compacted after")
    path = folder / "log"
    write(path, steps[:middle])
    compact_log(path, run_events=data.draw(st.integers(1, 9), "run"))
    assert_reads_as(EventLog.open(path), Oracle(steps[:middle]), rng)
    log = write(path, steps, middle)
    assert_reads_as(log, oracle, rng)
    assert_changes(log, oracle)
    users = np.arange(NUM_USERS)
    for after in range(len(steps) + 1):
        inside = 0 < after < middle
        assert log.has_boundary(after) is (after >= middle)
        if inside:
            with pytest.raises(LogFormatError, match="does not separate events after"):
                log.new_events(users, after)
        else:
            new = [oracle.history(user, after) for user in users.tolist()]
            assert events_of(log.new_events(users, after), users.tolist()) == new
    other = shutil.copytree(path, folder / "copy")
    compact_log(path, run_events=2)
    compact_log(other)
    again = EventLog.open(path)
    assert_reads_as(again, oracle, rng)
    assert_changes(again, oracle)
    assert again.last_segment == len(steps)
    assert contents(path) == contents(other)
    before = contents(path)
    compact_log(path)
    assert contents(path) == before


FRAME = {
    "user": ["ann", "ann", "bob", "ann", "cy"],
    "item": [1, 1, 1, 2, 3],
    "timestamp": [1000, 1000, 1000, 2000, 3000],
    "kind": ["view", "buy", "view", "view", "buy"],
}


def small_log(path: Path) -> EventLog:
    return EventLog.from_frame(FRAME, path, time_unit="s", columns=SourceColumns(action="kind"))


def rows_of(log: EventLog, user: str) -> list[tuple[int, int, str]]:
    one = log[user]
    codes = [log.actions[code] for code in one.action]
    return list(zip(log.items.ids(one.item).tolist(), (one.timestamp // 1000).tolist(), codes, strict=True))


def test_an_event_is_deleted_with_or_without_its_action(tmp_path: Path) -> None:
    import pandas as pd

    path = tmp_path / "log"
    small_log(path)
    time = np.array([1000, 3000]) * 1000
    report = forget_events(path, {"user": ["ann", "cy"], "item": [1, 3], "timestamp": time, "action": ["buy", "buy"]})
    assert (report.segment, report.num_events, report.num_users) == (2, 2, 2)
    log = EventLog.open(path)
    assert rows_of(log, "ann") == [(1, 1000, "view"), (2, 2000, "view")]
    assert (rows_of(log, "cy"), log.lengths.tolist()) == ([], [2, 1, 0])
    frame = pd.DataFrame({"user": ["bob", "ann"], "item": [1, 1], "timestamp": pd.to_datetime([1000, 1000], unit="s")})
    assert forget_events(path, frame).num_events == 2
    assert EventLog.open(path).lengths.tolist() == [1, 0, 0]


def test_a_forgotten_event_matches_no_more_and_counts_if_it_is_added_again(tmp_path: Path) -> None:
    path = tmp_path / "log"
    small_log(path)
    rows = {"user": ["bob"], "item": [1], "timestamp": [1_000_000]}
    forget_events(path, rows)
    with pytest.raises(DataError, match="match no event"):
        forget_events(path, rows)
    again = {**{name: values[2:3] for name, values in FRAME.items()}}
    log = EventLog.from_frame(again, path, time_unit="s", columns=SourceColumns(action="kind"), append=True)
    assert rows_of(log, "bob") == [(1, 1000, "view")]
    erase_users(path, ["bob"])
    assert rows_of(EventLog.open(path), "bob") == []


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            {"user": ["ann", "dan", "bob"], "item": [1, 1, 9], "timestamp": [1_000_000] * 3},
            r"row 2 \(user 'dan', item 1, timestamp 1000000\), row 3 \(user 'bob', item 9.* match no event of ",
        ),
        (
            {"user": ["bob"], "item": [1], "timestamp": [1_000_000], "action": ["sell"]},
            r"row 1 \(.*action 'sell'\) match no event",
        ),
        ({"user": ["ann"], "item": [1], "timestamp": [-1]}, r"row 1, column 'timestamp': -1 is negative"),
        ({"user": [], "item": [], "timestamp": []}, "has no rows"),
    ],
)
def test_rows_that_match_no_event_are_named_and_nothing_is_deleted(tmp_path: Path, rows: dict, message: str) -> None:
    path = tmp_path / "log"
    small_log(path)
    before = contents(path)
    with pytest.raises(DataError, match=message):
        forget_events(path, rows)
    assert contents(path) == before


def test_unknown_users_are_named_and_no_user_is_erased(tmp_path: Path) -> None:
    path = tmp_path / "log"
    small_log(path)
    before = contents(path)
    with pytest.raises(
        UnknownUserError, match=r"2 of the users .* not in the log, such as 'dan', 'eve'; no user was er"
    ):
        erase_users(path, ["ann", "dan", "eve"])
    with pytest.raises(ConfigError, match="name at least one"):
        erase_users(path, [])
    assert contents(path) == before
    with pytest.raises(LogFormatError, match="no such folder"):
        erase_users(tmp_path / "none", ["ann"])


def test_ordinals_in_a_log_without_times(tmp_path: Path) -> None:
    """Ordinals name events; appended events continue after the last remaining ordinal."""
    path = tmp_path / "log"
    frame = {"user": [1, 1, 1, 2], "item": [5, 6, 7, 5]}
    EventLog.from_frame(frame, path, columns=SourceColumns(timestamp=None))
    forget_events(path, {"user": [1], "item": [6], "timestamp": [1]})
    log = EventLog.from_frame(
        {"user": [2, 1, 3], "item": [6, 8, 5]}, path, columns=SourceColumns(timestamp=None), append=True
    )
    assert (log.items.ids(log[1].item).tolist(), log[1].timestamp.tolist()) == ([5, 7, 8], [0, 2, 3])
    assert (log[2].timestamp.tolist(), log[3].timestamp.tolist()) == ([0, 1], [0])
    with pytest.raises(DataError, match="match no event"):
        forget_events(path, {"user": [1], "item": [8], "timestamp": [2]})


class TestCommands:
    @pytest.mark.parametrize("form", ["csv", "parquet"])
    def test_forget_erase_stats_and_compact(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
    ) -> None:
        path, file = tmp_path / "log", tmp_path / f"deletions.{form}"
        events = {
            "user": [1, 1, 2],
            "item": [1, 2, 3],
            "timestamp": [10, 20, 30],
            "at": ["a", "b", "c"],
            "n": [1, 2, 3],
        }
        EventLog.from_frame(events, path, time_unit="s", categories=["at"], numbers=["n"])
        frame = pl.DataFrame({"user": [1], "item": [2], "timestamp": [20]})
        frame.write_csv(file) if form == "csv" else frame.write_parquet(file)
        data = f"data={path}"
        assert main(["log", "forget", data, f"events={file}", "time_unit=s"]) == 0
        assert main(["log", "erase", data, "users=[2]"]) == 0
        assert main(["log", "stats", data]) == 0
        text = capsys.readouterr().out
        assert "segment 2 deletes 1 events of 1 users" in text and "segment 3 deletes 1 events of 1 users" in text
        assert "3 segment(s)" in text and "2 users, 3 items, 1 events (1970-01-01 00:00:10 to " in text
        assert "deletions: 1 events and 1 users; 2 rows still on disk until a compaction" in text
        assert "feature at: category of 3 values per event" in text and "feature n: number per event" in text
        assert main(["log", "compact", data]) == 0
        assert main(["log", "compact", data]) == 0
        text = capsys.readouterr().out
        assert "merged 3 segments into segment-000001-000003, 1 events of 1 users; removed 2 deleted rows" in text
        assert "is the only segment, nothing to do" in text
        assert EventLog.open(path)[1].timestamp.tolist() == [10_000]
