"""Deletion rows: whatever is read equals plain lists, over any order of segments; forgetting and erasing by raw ids."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.log_oracle import (
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
from vista.data.compaction import compact_log
from vista.data.event_log import EventLog
from vista.errors import LogFormatError

EVENTS = st.tuples(
    st.integers(0, NUM_USERS - 1), st.integers(0, NUM_ITEMS - 1), st.integers(0, 4), st.integers(0, len(ACTIONS) - 1)
)


@st.composite
def logs(draw: st.DrawFn) -> list[Step]:
    """Segments of events with ties and repeats, not in the order of time; deletions of what is there between them."""
    steps = [Step(events=draw(st.lists(EVENTS, max_size=20)), impressions=draw(st.lists(EVENTS, max_size=4)))]
    for kind in draw(st.lists(st.sampled_from(["append", "append", "forget", "erase"]), max_size=5)):
        here: list[Event] = [row for user in range(NUM_USERS) for row in Oracle(steps).history(user)]
        if kind == "append":
            events, impressions = draw(st.lists(EVENTS, max_size=9)), draw(st.lists(EVENTS, max_size=2))
            steps.append(Step(events=events, impressions=impressions))
        elif kind == "erase":
            steps.append(Step(erased=draw(st.lists(st.integers(0, NUM_USERS - 1), min_size=1, max_size=2))))
        elif here:
            steps.append(Step(forgotten=draw(st.lists(st.sampled_from(here), min_size=1, max_size=5))))
    return steps


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here is about durability."""
    monkeypatch.setattr("vista.data.segment_writer.sync", lambda path: None)
    monkeypatch.setattr("vista.data.compaction.sync", lambda path: None)


def assert_changes(log: EventLog, oracle: Oracle) -> None:
    for after in range(len(oracle.steps) + 1):
        assert log.changed_users(after).tolist() == oracle.changed(after)


@settings(max_examples=40, deadline=None)
@given(steps=logs(), seed=st.integers(0, 99))
def test_whatever_is_read_is_what_lists_say(
    tmp_path_factory: pytest.TempPathFactory, steps: list[Step], seed: int
) -> None:
    """Also as of each earlier segment, and of the new events since it."""
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


@settings(max_examples=25, deadline=None)
@given(steps=logs(), seed=st.integers(0, 99), data=st.data())
def test_compaction_changes_nothing_that_is_read(
    tmp_path_factory: pytest.TempPathFactory, steps: list[Step], seed: int, data: st.DataObject
) -> None:
    """At any moment, in runs of any length, and once more later; the numbers of the segments stay."""
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
            with pytest.raises(LogFormatError, match="does not keep apart what came after"):
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
