"""The filter of events by action, and by the numbers of events of items and users."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from tests.log.conftest import PARSER, write_csv
from tests.log.ingest.set_logs import events_of
from vista.config import EventFilterConfig, ImpressionsConfig, PrepareConfig, SourceConfig
from vista.errors import ConfigError, DataError
from vista.log.event_log import EventLog
from vista.log.ingest.prepare import PrepareReport, prepare

Event = tuple[int, int, int, str]


def run(folder: Path, events: list[Event], chosen: EventFilterConfig, **settings: object) -> PrepareReport:
    """Prepare events in two files with a filter."""
    half = len(events) // 2
    paths = [
        str(write_csv(folder / f"{name}.csv", rows, "user,item,timestamp,action"))
        for name, rows in (("a", events[:half]), ("b", events[half:]))
    ]
    source = SourceConfig(paths=paths, timestamp="timestamp", time_unit="ms", action="action")
    config = PrepareConfig(out=str(folder / "log"), events=source, filter=chosen, **settings)  # type: ignore[arg-type]
    return prepare(config, bucket_events=50, parser=PARSER)


def some_events(seed: int, num_events: int = 300) -> list[Event]:
    """Events at distinct times, of items and users with very different numbers of them."""
    chance = random.Random(seed)
    return [
        (int(chance.expovariate(0.1)), 100 + int(chance.expovariate(0.1)), time, chance.choice(["view", "buy"]))
        for time in range(num_events)
    ]


def left_by(events: list[Event], min_item_events: int, min_user_events: int) -> list[Event]:
    """What a filter leaves: leave out one event of a rare item or user at a time."""
    left = list(events)
    while True:
        users, items = Counter(event[0] for event in left), Counter(event[1] for event in left)
        rare = [e for e in left if items[e[1]] < min_item_events or users[e[0]] < min_user_events]
        if not rare:
            return left
        left.remove(rare[0])


@pytest.mark.parametrize(("min_items", "min_users"), [(5, 5), (1, 20), (20, 1)])
def test_all_items_and_users_that_are_left_have_enough_events(tmp_path: Path, min_items: int, min_users: int) -> None:
    events = some_events(0)
    report = run(tmp_path, events, EventFilterConfig(min_item_events=min_items, min_user_events=min_users))
    expected = left_by(events, min_items, min_users)
    assert 0 < len(expected) < len(events)
    log = EventLog.open(tmp_path / "log")
    assert events_of(log) == sorted(expected, key=lambda event: (event[0], event[2]))
    assert log.num_items == len({event[1] for event in expected})
    assert report.num_events == len(expected)
    assert f"the filter kept {len(expected):,} of 300 events" in str(report)


def test_actions_are_chosen_before_events_are_counted(tmp_path: Path) -> None:
    events = some_events(0)
    run(tmp_path, events, EventFilterConfig(actions=["buy"], min_item_events=4))
    expected = left_by([event for event in events if event[3] == "buy"], 4, 1)
    log = EventLog.open(tmp_path / "log")
    assert events_of(log) == sorted(expected, key=lambda event: (event[0], event[2]))
    assert log.actions == ["buy"]


def test_impressions_of_what_is_left_out_are_left_out(tmp_path: Path) -> None:
    write_csv(
        tmp_path / "shown.csv", [(1, 7, 5, 0), (1, 8, 6, 1), (2, 7, 7, 1), (1, 9, 8, 0)], "user,item,timestamp,click"
    )
    impressions = ImpressionsConfig(
        paths=[str(tmp_path / "shown.csv")], timestamp="timestamp", time_unit="ms", labels=["click"]
    )
    events = [(1, 7, 1, "view"), (1, 7, 2, "view"), (2, 7, 3, "view"), (1, 8, 4, "view")]
    chosen = EventFilterConfig(min_item_events=2, min_user_events=2)
    report = run(tmp_path, events, chosen, impressions=impressions)
    assert report.kept == "the filter kept 2 of 4 events and 1 of 4 impressions"
    log = EventLog.open(tmp_path / "log")
    assert (log.num_users, log.num_items) == (1, 1) and log.impressions is not None
    assert log.impressions.timestamp.tolist() == [5]


def test_a_filter_that_leaves_no_event(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.csv: the filter leaves no event; lower filter\.min_"):
        run(tmp_path, some_events(0), EventFilterConfig(min_item_events=301))
    assert not (tmp_path / "log").exists()


def test_an_action_that_no_event_has(tmp_path: Path) -> None:
    message = r"a\.csv: no event has the action 'click' of filter\.actions; name some of its actions: buy, view$"
    with pytest.raises(DataError, match=message):
        run(tmp_path, some_events(0), EventFilterConfig(actions=["buy", "click"]))


def test_counts_of_new_files_alone_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"filter: min_item_events and min_user_events would count the events of"):
        PrepareConfig(append=True, filter=EventFilterConfig(min_user_events=2))
    assert PrepareConfig(append=True, filter=EventFilterConfig(actions=["buy"])).append
