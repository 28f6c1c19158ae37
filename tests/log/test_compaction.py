"""Compaction: concurrent readers, what is removed from the disk, and inconsistent logs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.log.conftest import run, write_csv
from tests.log.log_oracle import Oracle, Step, assert_reads_as, contents, edit_manifest, replace_array, write
from vista.config import SourceColumns
from vista.errors import DataError, LogFormatError, UnknownUserError
from vista.log import segment
from vista.log.compaction import compact_log
from vista.log.deletions import erase_users, forget_events
from vista.log.event_log import EventLog
from vista.log.segment_writer import locked_log

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
