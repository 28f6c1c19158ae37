"""A log as plain Python lists, and the same log on disk: reading must give what the lists contain."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vista.examples.frequency import item_counts
from vista.log.deletions import write_deletions
from vista.log.event_keys import EventKeys
from vista.log.event_log import EventLog
from vista.log.histories import Histories
from vista.log.segment import segment_name
from vista.log.segment_files import EVENT_COLUMNS, IMPRESSION_COLUMNS
from vista.log.segment_manifest import manifest_bytes
from vista.log.segment_writer import SegmentWriter, TableWriter
from vista.log.vocabulary import Vocabulary

NUM_USERS, NUM_ITEMS, ACTIONS = 5, 3, ["buy", "view"]
USER_IDS = [10, 0, 7, -3, 4]
Event = tuple[int, int, int, int]
"""User, item, time, action, as rows instead of ids."""


@dataclass
class Step:
    """One segment: events (and impressions, in the same form), forgotten events, or erased users."""

    events: list[Event] = field(default_factory=list)
    impressions: list[Event] = field(default_factory=list)
    forgotten: list[Event] = field(default_factory=list)
    erased: list[int] = field(default_factory=list)


class Oracle:
    """The expected content of a log that was written in steps."""

    def __init__(self, steps: list[Step]) -> None:
        self.steps = steps

    def history(self, user: int, after: int = 0) -> list[Event]:
        """Remaining events of segments above `after`, by time, then segment, then input order."""
        rows = [
            event
            for number, step in enumerate(self.steps)
            for event in step.events
            if number >= after and event[0] == user and not self._is_gone(event, number)
        ]
        return sorted(rows, key=lambda event: event[2])

    def impressions(self, user: int) -> list[Event]:
        rows = [
            row
            for number, step in enumerate(self.steps)
            for row in step.impressions
            if row[0] == user and not any(user in later.erased for later in self.steps[number + 1 :])
        ]
        return sorted(rows, key=lambda row: row[2])

    def _is_gone(self, event: Event, number: int) -> bool:
        return any(event in later.forgotten or event[0] in later.erased for later in self.steps[number + 1 :])

    def changed(self, after: int) -> list[int]:
        return sorted(
            {
                user
                for step in self.steps[after:]
                for user in [*(event[0] for event in [*step.events, *step.forgotten]), *step.erased]
            }
        )


def write(path: Path, steps: list[Step], present: int = 0) -> EventLog:
    """Write the steps as segments of a log that already contains the first `present` of them.

    The first one makes every user, item and action known.
    """
    path.mkdir(exist_ok=True)
    log = EventLog.open(path) if present else None
    for number, step in enumerate(steps[present:], present + 1):
        folder = path / segment_name(number)
        folder.mkdir()
        if step.forgotten or step.erased:
            assert log is not None
            keys = np.unique([(u, t, i, a) for u, i, t, a in step.forgotten], axis=0) if step.forgotten else None
            forgotten = None if keys is None else EventKeys(keys[:, 0], keys[:, 2], keys[:, 1], keys[:, 3])
            write_deletions(SegmentWriter(folder), log, forgotten, np.unique(np.array(step.erased, np.int64)))
        else:
            _write_events(folder, step, number)
        log = EventLog.open(path)
    assert log is not None
    return log


def contents(path: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def edit_manifest(segment: Path, **values: object) -> None:
    """Change fields of a segment's manifest, which gets the right checksum for them."""
    file = segment / "manifest.json"
    fields = json.loads(file.read_text()) | values
    del fields["checksum"]
    file.write_bytes(manifest_bytes(fields))


def replace_array(segment: Path, name: str, values: np.ndarray) -> None:
    """Write an array into a segment, which lists it with the right checksum."""
    files = json.loads((segment / "manifest.json").read_text())["files"]
    writer = SegmentWriter(segment)
    writer.save(name, values)
    edit_manifest(segment, files=files | writer.entries)


def _write_events(folder: Path, step: Step, number: int) -> None:
    users, items = Vocabulary("int", np.array(USER_IDS)), Vocabulary("int", np.arange(100, 100 + NUM_ITEMS))
    segment = SegmentWriter(folder)
    segment.save_vocabulary("new_users", users.part(0 if number == 1 else NUM_USERS))
    segment.save_vocabulary("new_items", items.part(0 if number == 1 else NUM_ITEMS))
    names = ("item", "timestamp", "action")
    active = {"events": _write_table(segment, "", step.events, {name: (EVENT_COLUMNS[name], ()) for name in names})}
    wide = {"item": (), "timestamp": (), "label": (1,), "mask": (1,)}
    if step.impressions:
        columns = {name: (IMPRESSION_COLUMNS[name], shape) for name, shape in wide.items()}
        active["impressions"] = _write_table(segment, "impressions/", step.impressions, columns)
    rows = {"events": len(step.events), "impressions": len(step.impressions)}
    manifest = {
        "first_segment": number,
        "last_segment": number,
        "num_users": NUM_USERS,
        "num_items": NUM_ITEMS,
        "id_types": {"users": "int", "items": "int"},
        "actions": ACTIONS,
        "tasks": ["like"],
        "has_time": True,
        "timestamp": "milliseconds since 1970-01-01 UTC",
        "has_rating": False,
        "counts": {name: {"rows": count, "users": active.get(name, 0)} for name, count in rows.items()},
        "features": [],
        "deletions": 0,
        "quarantined": 0,
        "sources": [
            {
                "table": "events",
                "name": f"{number}.csv",
                "bytes": 0,
                "sha256": f"{number:064x}",
                "rows": len(step.events),
                "bad_rows": 0,
            }
        ],
    }
    segment.write_manifest(manifest)


def _write_table(segment: SegmentWriter, prefix: str, rows: list[Event], columns: dict) -> int:
    writer = TableWriter(segment, prefix, len(rows), columns)
    user, item, time, last = np.array(sorted(rows, key=lambda row: (row[0], row[2])), np.int64).reshape(-1, 4).T
    label = last[:, None]
    values = {"item": item, "timestamp": time, "action": last, "label": label, "mask": np.ones_like(label)}
    writer.append(user, {name: values[name] for name in columns})
    return writer.close()


def events_of(histories: Histories, users: list[int]) -> list[list[Event]]:
    """Histories in the form of the oracle."""
    out = []
    for place, user in enumerate(users):
        one = histories.slice(place)
        out.append(
            [(user, *row) for row in zip(one.item.tolist(), one.timestamp.tolist(), one.action.tolist(), strict=True)]
        )
    return out


def assert_reads_as(log: EventLog, oracle: Oracle, rng: np.random.Generator) -> None:
    """Check that every way to read the log gives what the oracle contains."""
    want = [oracle.history(user) for user in range(NUM_USERS)]
    lengths = np.array([len(rows) for rows in want])
    assert log.lengths.tolist() == lengths.tolist()
    assert (log.num_events, len(log)) == (lengths.sum(), NUM_USERS)
    assert events_of(log.gather(np.arange(NUM_USERS)), list(range(NUM_USERS))) == want
    rows = rng.integers(0, NUM_USERS, 7)
    low, high = rng.integers(0, 9, 7), rng.integers(0, 12, 7)
    low, high = np.minimum(low, high), np.maximum(low, high)
    cut = [want[user][a:b] for user, a, b in zip(rows, low, high, strict=True)]
    assert events_of(log.gather_ranges(rows, low, high), rows.tolist()) == cut
    for user, a, b in zip(rows.tolist(), low.tolist(), high.tolist(), strict=True):
        assert events_of(log.slice(user, a, b), [user]) == [want[user][a:b]]
    times = [row[2] for rows in want for row in rows]
    for time in (0, 2, 3, 9):
        before = [sum(row[2] < time for row in rows) for rows in want]
        assert log.counts_before(time).tolist() == before
    assert log.time_range() == ((min(times), max(times)) if times else None)
    every = [row[1] for rows in want for row in rows]
    assert item_counts(log).tolist() == np.bincount(np.array(every, np.int64), minlength=NUM_ITEMS).tolist()
    shown = [oracle.impressions(user) for user in range(NUM_USERS)]
    seen = log.impressions
    if seen is not None:
        table = zip(seen.item.tolist(), seen.timestamp.tolist(), seen.label[:, 0].tolist(), strict=True)
        owner = np.repeat(np.arange(NUM_USERS), np.diff(seen.offsets)).tolist()
        assert [(user, *row) for user, row in zip(owner, table, strict=True)] == [row for rows in shown for row in rows]
    else:
        assert not any(shown)
