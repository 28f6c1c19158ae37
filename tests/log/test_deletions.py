"""Deletion rows: reading equals plain lists for any order of segments; forgetting and erasing by raw ids.
Compaction: concurrent readers, what is removed from the disk, and inconsistent logs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.log.conftest import PARSER, run, write_csv
from tests.log.log_oracle import (
    ACTIONS,
    NUM_ITEMS,
    NUM_USERS,
    Event,
    Oracle,
    Step,
    assert_reads_as,
    contents,
    edit_manifest,
    events_of,
    replace_array,
    write,
)
from vista.cli.main import main
from vista.config import SourceColumns
from vista.errors import ConfigError, DataError, LogFormatError, UnknownUserError
from vista.log import segment
from vista.log.compaction import compact_log
from vista.log.deletions import erase_users, forget_events
from vista.log.event_log import EventLog
from vista.log.segment_writer import locked_log

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


STEPS = [
    Step(events=[(0, 1, 5, 0), (0, 2, 7, 1), (1, 0, 3, 0), (4, 2, 2, 0)], impressions=[(1, 1, 4, 1), (4, 1, 1, 1)]),
    Step(events=[(2, 1, 6, 0), (0, 0, 4, 1)], impressions=[(0, 2, 3, 0)]),
    Step(forgotten=[(0, 2, 7, 1), (2, 1, 6, 0)]),
    Step(erased=[4]),
]
OLD = [f"segment-{number:06d}" for number in range(1, 5)]
NEW = "segment-000001-000004"


def test_a_compaction_while_the_log_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The segments are removed after they are listed and before they are read."""
    write(tmp_path / "log", STEPS)
    read = segment.read_segment

    def late(path: Path) -> segment.Segment:
        if path.name == OLD[2]:
            monkeypatch.undo()
            compact_log(tmp_path / "log")
        return read(path)

    monkeypatch.setattr(segment, "read_segment", late)
    log = EventLog.open(tmp_path / "log")
    assert len(log.segments) == 1
    assert_reads_as(log, Oracle(STEPS), np.random.default_rng(0))


def test_writers_exclude_each_other(tmp_path: Path) -> None:
    path = tmp_path / "log"
    run(path, [write_csv(tmp_path / "a.csv", [(1, 1, 1), (2, 2, 2)])])
    more = write_csv(tmp_path / "b.csv", [(1, 3, 3)])
    before = contents(path)
    acts: list[Callable[[], object]] = [
        lambda: run(path, [more], append=True),
        lambda: forget_events(path, {"user": [1], "item": [1], "timestamp": [1000]}),
        lambda: erase_users(path, [1]),
        lambda: compact_log(path),
    ]
    with locked_log(path):
        for act in acts:
            with pytest.raises(DataError, match="another process is writing this log; wait"):
                act()
    assert contents(path) == before
    for act in acts:
        act()
    assert EventLog.open(path).num_events == 1


@pytest.mark.parametrize("kind", ["int", "str"])
def test_no_byte_of_an_erased_users_id_remains(tmp_path: Path, kind: str) -> None:
    """Not in vocabularies, quarantined rows, leftovers of killed writers, or superseded segments."""
    gone, kept = (7_205_759_403_792_793_601, 5) if kind == "int" else ("ann-of-green-gables", "bob")
    path = tmp_path / "log"
    needle = np.array([gone]).tobytes() if kind == "int" else gone.encode()
    first = write_csv(tmp_path / "a.csv", [(gone, 1, 1), (kept, 2, 2), (gone, 3, "x")])
    run(path, [first], on_bad_rows="quarantine")
    run(path, [write_csv(tmp_path / "b.csv", [(kept, 3, 3), (gone, 3, 3)])], append=True)
    erase_users(path, [gone])
    (path / ".segment-000004.tmp").mkdir()
    (path / ".segment-000004.tmp" / "half").write_bytes(needle)
    assert sum(needle in data for data in contents(path).values()) >= 2
    report = compact_log(path)
    assert (report.num_blanked, report.num_users, report.quarantine_removed) == (1, 1, True)
    for name, data in contents(path).items():
        assert needle not in data and str(gone).encode() not in data, name
    log = EventLog.open(path)
    assert gone not in log and log[kept].num_events == 2
    with pytest.raises(UnknownUserError):
        log[gone]
    assert (log.num_users, log.users.num_blank) == (2, 1)
    (blank,) = np.flatnonzero(~log.users.has_ids(np.arange(2))).tolist()
    with pytest.raises(LookupError, match=f"the id of row {blank} was removed"):
        log.users.ids([0, 1])
    assert blank in log.changed_users(2) and blank not in log.changed_users(3)
    run(path, [write_csv(tmp_path / "c.csv", [(gone, 9, 9)])], append=True)
    log = EventLog.open(path)
    assert log.users.rows([gone]).tolist() == [2]
    assert (log[gone].num_events, log.lengths[blank], log.num_users) == (1, 0, 3)
    compact_log(path)
    again = EventLog.open(path)
    assert (again.users.rows([gone, kept]).tolist(), again.users.num_blank) == ([2, 1 - blank], 1)


def test_quarantined_rows_stay_if_no_user_was_erased(tmp_path: Path) -> None:
    path = tmp_path / "log"
    for number, append in ((1, False), (2, True)):
        file = write_csv(tmp_path / f"{number}.csv", [(number, 1, 1), (number, number, "x")])
        run(path, [file], on_bad_rows="quarantine", append=append)
    old = [(path / name / "quarantine.csv").read_text().splitlines() for name in OLD[:2]]
    compact_log(path)
    assert (path / "segment-000001-000002" / "quarantine.csv").read_text().splitlines() == [*old[0], old[1][1]]
    with pytest.raises(DataError, match=r"segment 2 already contains it \(as 1\.csv\)"):
        run(path, [tmp_path / "1.csv"], append=True)


def test_ratings_and_probabilities_are_kept(tmp_path: Path) -> None:
    """A probability that a segment lacks is NaN, before and after; deleted rows are skipped in every column."""
    path, rng = tmp_path / "log", np.random.default_rng(0)
    for number in range(3):
        time = rng.integers(0, 90, 200)
        events = {"user": rng.integers(0, 9, 200), "item": rng.integers(0, 20, 200), "timestamp": time}
        shown = {name: values[:50] for name, values in events.items()} | {"like": rng.integers(0, 2, 50)}
        shown |= {"p": rng.random(50)} if number == 1 else {}
        events |= {"stars": rng.random(200).astype(np.float32), "kind": rng.choice(["buy", "view"], 200)}
        EventLog.from_frame(
            events,
            path,
            append=number > 0,
            impressions=shown,
            time_unit="ms",
            columns=SourceColumns(
                rating="stars", action="kind", labels=["like"], probabilities=["p"] if number == 1 else []
            ),
        )
        if number == 1:
            forget_events(path, {name: events[name][:20] for name in ("user", "item", "timestamp")})
            erase_users(path, [3])
    before = EventLog.open(path)
    compact_log(path, run_events=100)
    after = EventLog.open(path)
    users = np.arange(before.num_users)
    ranges = users[::-1], users % 5, users + 9
    assert (len(before.segments), len(after.segments), after.users.num_blank) == (5, 1, 0)
    assert before.num_events == after.num_events < 600
    for one, other in (
        (before.gather(users), after.gather(users)),
        (before.gather_ranges(*ranges), after.gather_ranges(*ranges)),
        (before.impressions, after.impressions),
    ):
        for name in one.__slots__:
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), name)
    assert np.isnan(after.impressions.probability).any() and not np.isnan(after.impressions.probability).all()


def without_changed(folder: Path) -> None:
    files = json.loads((folder / NEW / "manifest.json").read_text())["files"]
    edit_manifest(folder / NEW, files={name: entry for name, entry in files.items() if name != "changed.npy"})


def renamed(folder: Path) -> None:
    (folder / NEW).rename(folder / "segment-000001-000005")


def with_a_user_too_many(folder: Path) -> None:
    users = np.load(folder / NEW / "users.npy")
    replace_array(folder / NEW, "users.npy", np.append(users[:-1], 77))


COUNTS = {"events": {"rows": 9, "users": 3}, "impressions": {"rows": 2, "users": 2}}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_changed, r"rows of changed\.npy: the manifest says 5, found None; restore"),
        (
            lambda folder: edit_manifest(folder / NEW, counts=COUNTS),
            r"events: the manifest says 9, found 3; restore the folder",
        ),
        (renamed, r"name: the manifest says segment-000001-000004, found segment-000001-000005"),
        (with_a_user_too_many, r"contains user row 77, but the manifest says 5 users"),
    ],
)
def test_a_segment_that_does_not_match_its_manifest_is_refused(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    path = tmp_path / "log"
    write(path, STEPS)
    compact_log(path)
    damage(path)
    with pytest.raises(LogFormatError, match=message):
        EventLog.open(path)


def test_missing_segments_and_those_inside_a_range_are_named(tmp_path: Path) -> None:
    log = write(tmp_path / "log", STEPS)
    shutil.rmtree(log.path / OLD[3])
    again = EventLog.open(log.path)
    for ask in (again.changed_users, lambda after: again.new_events([0], after)):
        with pytest.raises(LogFormatError, match=r"ends at segment 3, so it has no segment 4; .* refresh all users"):
            ask(4)
    assert not again.has_boundary(4)
    compact_log(log.path)
    for number in (1, 2):
        message = f"number {number}, because it is inside the compacted segment-000001-000003"
        with pytest.raises(LogFormatError, match=message):
            EventLog.open(log.path, last_segment=number)
    with pytest.raises(LogFormatError, match="number 7, because the log ends at 3"):
        EventLog.open(log.path, last_segment=7)
