"""A log as plain Python lists, and the same log on disk: reading must give what the lists contain."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vista.examples.item_statistics import item_counts
from vista.log.deletions import write_deletions
from vista.log.event_keys import EventKeys
from vista.log.event_log import EventLog
from vista.log.histories import ColumnValues, Histories, RowFeatures
from vista.log.segment import segment_name
from vista.log.segment_files import EVENT_COLUMNS, EVENTS, IMPRESSION_COLUMNS, IMPRESSIONS, FeatureOwner, manifest_bytes
from vista.log.segment_writer import FeatureWriter, SegmentWriter, TableWriter
from vista.log.vocabulary import Vocabulary

NUM_USERS, NUM_ITEMS, ACTIONS = 5, 3, ["buy", "view"]
USER_IDS = [10, 0, 7, -3, 4]
Event = tuple[int, int, int, int]
"""User, item, time, action, as rows instead of ids."""
Values = dict[str, str | float | None]
"""Features of one row by the name of the column; None where it is missing."""


@dataclass
class Step:
    """One segment: events (and impressions, in the same form), forgotten events, or erased users."""

    events: list[Event] = field(default_factory=list)
    impressions: list[Event] = field(default_factory=list)
    forgotten: list[Event] = field(default_factory=list)
    erased: list[int] = field(default_factory=list)
    columns: tuple[str, ...] = ()
    """Columns of features that the events and impressions have: any of "device" and "dwell"."""

    def values(self, row: Event, names: tuple[str, ...]) -> Values:
        """The features of a row, which it determines. Steps with other columns have other values of the category."""
        _, item, time, action = row
        text = None if time == 0 else f"é{item}{'-'.join(self.columns)}"
        values: Values = {"device": text, "dwell": None if action else time / 2 + item}
        return {name: values[name] if name in self.columns else None for name in names}


class Oracle:
    """The expected content of a log that was written in steps."""

    def __init__(self, steps: list[Step]) -> None:
        self.steps = steps

    def history(self, user: int, after: int = 0) -> list[Event]:
        """Remaining events of segments above `after`, by time, then segment, then input order."""
        return [event for event, _ in self._events(user, after)]

    def event_features(self, user: int) -> list[Values]:
        """Features of the events of `history`."""
        names = self.columns("events")
        return [step.values(event, names) for event, step in self._events(user, 0)]

    def _events(self, user: int, after: int) -> list[tuple[Event, Step]]:
        rows = [
            (event, step)
            for number, step in enumerate(self.steps)
            for event in step.events
            if number >= after and event[0] == user and not self._is_gone(event, number)
        ]
        return sorted(rows, key=lambda row: row[0][2])

    def impressions(self, user: int) -> list[Event]:
        return [row for row, _ in self._impressions(user)]

    def request_features(self, user: int) -> list[Values]:
        """Features of the rows of `impressions`."""
        names = self.columns("impressions")
        return [step.values(row, names) for row, step in self._impressions(user)]

    def _impressions(self, user: int) -> list[tuple[Event, Step]]:
        rows = [
            (row, step)
            for number, step in enumerate(self.steps)
            for row in step.impressions
            if row[0] == user and not any(user in later.erased for later in self.steps[number + 1 :])
        ]
        return sorted(rows, key=lambda row: row[0][2])

    def columns(self, table: str) -> tuple[str, ...]:
        """The columns of features, in the order in which steps first have them."""
        return tuple(dict.fromkeys(name for step in self.steps if getattr(step, table) for name in step.columns))

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
    """Write the steps as segments of a log that already contains the first `present` of them. The first one makes every
    user, item and action known."""
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
            _write_events(folder, step, number, log)
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


def _write_events(folder: Path, step: Step, number: int, log: EventLog | None) -> None:
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
    of_events = _write_features(segment, EVENTS, step, step.events, {} if log is None else log.event_features)
    known = {} if log is None else log.request_features
    of_requests = _write_features(segment, IMPRESSIONS, step, step.impressions, known)
    rows = {"events": len(step.events), "impressions": len(step.impressions)}
    manifest = {
        "first_segment": number,
        "last_segment": number,
        "num_users": NUM_USERS,
        "num_items": NUM_ITEMS,
        "id_types": {"users": "int", "items": "int"},
        "actions": ACTIONS,
        "tasks": ["like"],
        "again_days": None,
        "as_events": None,
        "has_time": True,
        "timestamp": "milliseconds since 1970-01-01 UTC",
        "has_rating": False,
        "read_with": {},
        "counts": {name: {"rows": count, "users": active.get(name, 0)} for name, count in rows.items()},
        "features": [],
        "user_features": [],
        "event_features": of_events,
        "request_features": of_requests,
        "deletions": 0,
        "quarantined": 0,
        "offsets": [],
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


def _write_features(
    segment: SegmentWriter, owner: FeatureOwner, step: Step, rows: list[Event], known: ColumnValues
) -> list:
    if not rows:
        return []
    values = [step.values(row, step.columns) for row in sorted(rows, key=lambda row: (row[0], row[2]))]
    columns, every = {}, {}
    for name in step.columns:
        given = [row[name] for row in values]
        if name == "dwell":
            columns[name], every[name] = np.array(given, np.float32), None
        else:
            texts = [text for text in given if text is not None]
            every[name] = (known.get(name) or Vocabulary.empty("str")).extended(texts)
            codes = every[name].rows(["" if text is None else text for text in given])
            columns[name] = codes.astype(np.int32)
    writer = FeatureWriter(segment, owner, len(rows))
    writer.begin(every, known)
    writer.append(RowFeatures(columns))
    writer.close()
    return writer.columns


def values_of(features: RowFeatures, values: ColumnValues) -> list[Values]:
    """Features in the form of the oracle."""
    assert list(features.columns) == list(values)
    read: dict[str, list] = {}
    for name, known in values.items():
        column = features.columns[name]
        if known is None:
            assert column.dtype == np.float32
            read[name] = [None if np.isnan(number) else number for number in column.tolist()]
        else:
            assert column.dtype == np.int32
            texts = [*known.ids(np.arange(len(known))).tolist(), None]
            read[name] = [texts[code] for code in column.tolist()]
    return [dict(zip(read, row, strict=True)) for row in zip(*read.values(), strict=True)]


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
    names = oracle.columns("events")
    assert tuple(log.event_features) == names and tuple(log.request_features) == oracle.columns("impressions")
    features = [oracle.event_features(user) if names else [] for user in range(NUM_USERS)]
    every = log.gather(np.arange(NUM_USERS)).features
    assert values_of(every, log.event_features) == [row for of_user in features for row in of_user]
    of_cut = [row for user, a, b in zip(rows, low, high, strict=True) for row in features[user][a:b]]
    assert values_of(log.gather_ranges(rows, low, high).features, log.event_features) == of_cut
    for user, a, b in zip(rows.tolist(), low.tolist(), high.tolist(), strict=True):
        assert events_of(log.slice(user, a, b), [user]) == [want[user][a:b]]
        assert values_of(log.slice(user, a, b).features, log.event_features) == features[user][a:b]
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
        of_rows = [row for user in range(NUM_USERS) for row in oracle.request_features(user)]
        assert values_of(seen.features, log.request_features) == (of_rows if log.request_features else [])
    else:
        assert not any(shown)
