"""Impressions that are made from events: their labels equal those of a slow loop, in one block of users or in many."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tests.log.conftest import PARSER, write_csv
from tests.log.ingest.test_prepare import fingerprint
from vista.config import FromEventsConfig, ImpressionsConfig, PrepareConfig, SourceColumns, SourceConfig
from vista.config.composition import compose_config
from vista.errors import ConfigError, DataError
from vista.evaluation.cases import impression_cases
from vista.log.compaction import compact_log
from vista.log.deletions import erase_users
from vista.log.event_log import EventLog
from vista.log.histories import DAY_MS
from vista.log.ingest.prepare import PrepareReport, prepare, prepare_frames

NAMES = ["user", "item", "timestamp", "kind", "stars"]
COLUMNS = SourceColumns(action="kind", rating="stars")
Event = tuple[int, int, int, str, float]


def some_events(seed: int, num: int = 400) -> list[Event]:
    """Events of 12 users in 20 days, at whole hours, so that some of a user's are at the same time."""
    rng = np.random.default_rng(seed)
    return [
        (int(user), int(item), int(hour) * 3_600_000, "view" if is_view else "buy", float(stars))
        for user, item, hour, is_view, stars in zip(
            rng.integers(12, size=num), rng.integers(4, size=num), rng.integers(480, size=num),
            rng.random(num) < 0.6, rng.integers(1, 11, size=num) / 2, strict=True,
        )
    ]  # fmt: skip


def expected_rows(events: list[Event], config: FromEventsConfig) -> list[tuple]:
    """(user, item, time, labels) of each impression in the log's order, with None for an unknown label."""
    end = max(event[2] for event in events)
    rows = []
    for user in sorted({event[0] for event in events}):
        for event in sorted((event for event in events if event[0] == user), key=lambda event: event[2]):
            if config.actions and event[3] not in config.actions:
                continue
            labels: list[bool | None] = []
            if config.again_days is not None:
                last = event[2] + round(config.again_days * DAY_MS)
                again = any(
                    other[:2] == event[:2] and event[2] < other[2] <= last and config.again_action in (None, other[3])
                    for other in events
                )
                labels.append(again if last <= end else None)
            if config.min_rating is not None:
                labels.append(event[4] >= config.min_rating)
            if any(label is not None for label in labels):
                rows.append((user, event[1], event[2], labels))
    return rows


def rows_of(log: EventLog) -> list[tuple]:
    shown = log.impressions
    assert shown is not None
    users = log.users.ids(np.repeat(np.arange(log.num_users), np.diff(shown.offsets))).tolist()
    labels = [
        [bool(label) if known else None for label, known in zip(row, mask, strict=True)]
        for row, mask in zip(shown.label.tolist(), shown.mask.tolist(), strict=True)
    ]
    return list(zip(users, log.items.ids(shown.item).tolist(), shown.timestamp.tolist(), labels, strict=True))


def frame_of(events: list[Event]) -> pl.DataFrame:
    return pl.DataFrame(events, schema=NAMES, orient="row")


@pytest.mark.parametrize(
    "settings",
    [
        {"again_days": 3.0},
        {"again_days": 0.5, "again_action": "buy"},
        {"again_days": 7.0, "actions": ["buy"], "again_action": "buy"},
        {"again_days": 7.0, "actions": ["buy"], "again_action": "view"},
        {"min_rating": 4.0},
        {"min_rating": 4.5, "again_days": 2.0},
    ],
)
@pytest.mark.parametrize("bucket_events", [10, 1 << 20])
def test_labels_equal_those_of_a_loop(tmp_path: Path, settings: dict[str, Any], bucket_events: int) -> None:
    config, events = FromEventsConfig(**settings), some_events(len(settings))
    source = SourceConfig(timestamp="timestamp", time_unit="ms", action="kind", rating="stars")
    tables = {"events": (frame_of(events), source)}
    report = prepare_frames(tables, tmp_path / "log", from_events=config, bucket_events=bucket_events)
    log = EventLog.open(tmp_path / "log")
    log.verify()
    assert log.impressions is not None and log.impressions.tasks == config.tasks
    want = expected_rows(events, config)
    assert rows_of(log) == want and report.num_impressions == len(want) > 100
    assert {label for *_, labels in want for label in labels} >= {True, False}


def files_config(tmp_path: Path, events: list[Event], **settings: Any) -> PrepareConfig:
    path = tmp_path / "events.csv"
    frame_of(events).write_csv(path)
    source = SourceConfig(paths=[str(path)], timestamp="timestamp", time_unit="ms", action="kind", rating="stars")
    shown = ImpressionsConfig(from_events=FromEventsConfig(**settings))
    return PrepareConfig(out=str(tmp_path / "log"), events=source, impressions=shown)


def ingest(tmp_path: Path, events: list[Event], **settings: Any) -> PrepareReport:
    return prepare(files_config(tmp_path, events, **settings), parser=PARSER)


def test_a_file_and_a_frame_give_the_same_log(tmp_path: Path) -> None:
    """And so do one block of users and many, byte by byte."""
    events, settings = some_events(1), {"again_days": 2.0, "min_rating": 4.0}
    ingest(tmp_path, events, **settings)
    config = files_config(tmp_path, events, **settings)
    config.out = str(tmp_path / "blocks")
    prepare(config, parser=PARSER, bucket_events=7)
    assert fingerprint(tmp_path / "blocks") == fingerprint(tmp_path / "log")
    made = EventLog.from_frame(
        frame_of(events), tmp_path / "frame", time_unit="ms", columns=COLUMNS, from_events=FromEventsConfig(**settings)
    )
    assert rows_of(made) == rows_of(EventLog.open(tmp_path / "log"))


def test_later_events_and_deletions_do_not_change_when_labels_are_known(tmp_path: Path) -> None:
    ingest(tmp_path, some_events(1), again_days=2.0, min_rating=4.0)
    path = tmp_path / "log"
    newest = int(EventLog.open(path).impressions.timestamp.max())  # type: ignore[union-attr]
    later = frame_of([(1, 1, newest + 90 * DAY_MS, "buy", 5.0), (2, 1, newest + 91 * DAY_MS, "buy", 5.0)])
    EventLog.from_frame(later, path, time_unit="ms", columns=COLUMNS, append=True)
    erase_users(path, [2])
    for change in (lambda: None, lambda: compact_log(path)):
        change()
        shown = EventLog.open(path).impressions
        assert shown is not None and dict(zip(shown.tasks, shown.delay.tolist(), strict=True)) == {
            "again": 2 * DAY_MS,
            "liked": 0,
        }


def test_what_is_known_of_the_user_is_strictly_before(tmp_path: Path) -> None:
    """The event of an impression, and others at its time, are not among the events before it."""
    events = some_events(2)
    ingest(tmp_path, events, min_rating=4.0)
    log = EventLog.open(tmp_path / "log")
    cases = impression_cases(log, 0, None)
    users = log.users.ids(cases.user).tolist()
    for user, time, seen in zip(users, cases.timestamp.tolist(), cases.seen.tolist(), strict=True):
        assert seen == sum(event[0] == user and event[2] < time for event in events)


def test_what_follows_the_days_of_a_label_does_not_change_it(tmp_path: Path) -> None:
    """With later events removed, the labels whose days are over stay, and the others are unknown."""
    events, cut = some_events(3), 12 * DAY_MS
    config = FromEventsConfig(again_days=4.0)
    columns = {"time_unit": "ms", "columns": COLUMNS, "from_events": config}
    log = EventLog.from_frame(frame_of(events), tmp_path / "all", **columns)
    all_rows = rows_of(log)
    past = [event for event in events if event[2] <= cut]
    past_rows = rows_of(EventLog.from_frame(frame_of(past), tmp_path / "past", **columns))
    end = max(event[2] for event in past)
    known = [row for row in all_rows if row[2] + 4 * DAY_MS <= end]
    assert sorted(past_rows, key=str) == sorted(known, key=str) and len(known) > 100
    # The log, which does not say the days, calls no label known that the past lacks, and almost all that it has.
    assert log.impressions is not None
    is_known = log.impressions.known(np.arange(len(all_rows)), cut + 1)[:, 0]
    called = [row for row, own in zip(all_rows, is_known.tolist(), strict=True) if own]
    assert {str(row) for row in called} <= {str(row) for row in known} and len(called) > 0.95 * len(known)


def test_an_append_adds_labels_of_ratings(tmp_path: Path) -> None:
    ingest(tmp_path, [(1, 7, 0, "buy", 4.0)], min_rating=4.0)
    config = files_config(tmp_path, [(1, 8, 1, "buy", 3.0), (2, 8, 2, "buy", 5.0)], min_rating=4.0)
    config.append = True
    prepare(config, parser=PARSER)
    assert [labels for *_, labels in rows_of(EventLog.open(tmp_path / "log"))] == [[True], [False], [True]]
    write_csv(tmp_path / "more.csv", [(2, 8, 3, "buy", 5.0)], ",".join(NAMES))
    config.events.paths = [str(tmp_path / "more.csv")]
    config.impressions = ImpressionsConfig(from_events=FromEventsConfig(again_days=1.0))
    with pytest.raises(
        DataError, match=r"the log has the labels \['liked'\], but impressions\.from_events makes \['again'\]"
    ):
        prepare(config, parser=PARSER)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["actions=[buy]"], "impressions.from_events: makes no label; set again_days or min_rating"),
        (["again_action=buy", "min_rating=4"], "impressions.from_events.again_action: needs again_days"),
    ],
)
def test_contradictory_settings_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        compose_config(PrepareConfig, [f"impressions.from_events.{word}" for word in words])


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("impressions.paths=[a.csv]", "impressions.from_events: makes the impressions; leave impressions.paths out"),
        ("append=true", "impressions.from_events.again_days: looks from each event to later ones, which append adds;"),
    ],
)
def test_settings_that_do_not_go_with_it(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        compose_config(PrepareConfig, ["impressions.from_events.again_days=3", word])


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        ({"rating": None}, {"min_rating": 4.0}, r"from_events\.min_rating: .*events\.csv has no ratings; name "),
        ({"action": None}, {"again_days": 1.0, "again_action": "buy"}, r"from_events\.again_action: .* has no actions"),
        ({"timestamp": None, "time_unit": None}, {"again_days": 1.0}, r"from_events: .* has no timestamps; name their"),
        ({}, {"again_days": 99.0}, r"again_days=99: the log ends less than so many days after its first event"),
        ({}, {"again_days": 1.0, "actions": ["rent"]}, r"'rent' of impressions\.from_events\.actions; .* buy, view$"),
    ],
)  # fmt: skip
def test_events_that_lack_what_labels_need(
    tmp_path: Path, columns: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    config = files_config(tmp_path, some_events(4), **settings)
    for name, value in columns.items():
        setattr(config.events, name, value)
    with pytest.raises((ConfigError, DataError), match=message):
        prepare(config, parser=PARSER)
    assert not (tmp_path / "log").exists()
