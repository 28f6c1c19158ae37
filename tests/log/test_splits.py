"""Visible counts, item frequencies, and repeats against plain loops and by hand."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vista.config import DataConfig, SourceColumns
from vista.config.checks import Split
from vista.errors import ConfigError
from vista.examples.item_statistics import item_counts
from vista.log.event_log import EventLog
from vista.log.splits import (
    MIN_EVENTS,
    Until,
    leaves_out_seen,
    parse_time,
    parse_until,
    part_counts,
    part_times,
    repeat_share,
    split_until,
    visible_counts,
)

DAY = 86_400_000


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> EventLog:
    """Two segments; users 0..9 have 1 to 10 events, one per day."""
    rows = [(user, (user * day) % 7, day * DAY) for user in range(10) for day in range(user + 1)]
    frame = pl.DataFrame(rows, schema=["user", "item", "timestamp"], orient="row")
    path = tmp_path_factory.mktemp("splits") / "log"
    late = pl.col("timestamp") >= 4 * DAY
    EventLog.from_frame(frame.filter(late.not_()), path, time_unit="ms")
    return EventLog.from_frame(frame.filter(late), path, time_unit="ms", append=True)


def test_leave_out_hides_nothing_from_short_histories(log: EventLog) -> None:
    assert visible_counts(log, None).tolist() == list(range(1, 11))
    assert visible_counts(log, "leave-last-out").tolist() == [1, 2, 2, 3, 4, 5, 6, 7, 8, 9]
    assert visible_counts(log, "leave-last-two-out").tolist() == [1, 2, 1, 2, 3, 4, 5, 6, 7, 8]
    assert visible_counts(log, "leave-last-7-out").tolist() == [1, 2, 0, 0, 0, 0, 0, 1, 2, 3]


@pytest.mark.parametrize("until", ["1970-01-06", "1970-01-06T00:00:00Z", 5 * DAY, str(5 * DAY), Until(before=5 * DAY)])
def test_a_time_hides_events_at_that_time_or_later(log: EventLog, until: object) -> None:
    assert visible_counts(log, until).tolist() == [1, 2, 3, 4, 5, 5, 5, 5, 5, 5]


def test_a_time_is_exclusive_to_the_millisecond(log: EventLog) -> None:
    assert visible_counts(log, 5 * DAY + 1)[-1] == 6
    assert visible_counts(log, 0).tolist() == [0] * 10


def test_a_time_less_n_also_hides_the_newest_events_before_it(log: EventLog) -> None:
    assert visible_counts(log, "1970-01-06-less-2").tolist() == [0, 0, 1, 2, 3, 3, 3, 3, 3, 3]


def test_a_share_hides_the_newest_events_rounded_up(log: EventLog) -> None:
    """Of 10 events, 10 % are one event exactly; of 9, they are part of one."""
    assert visible_counts(log, "leave-last-10-percent-out").tolist() == [1, 2, 2, 3, 4, 5, 6, 7, 8, 9]
    assert visible_counts(log, "leave-last-30-percent-out").tolist() == [1, 2, 2, 2, 3, 4, 4, 5, 6, 7]
    assert visible_counts(log, "leave-last-90-percent-out").tolist() == [1, 2, 0, 0, 0, 0, 0, 0, 0, 1]
    assert visible_counts(log, "leave-last-30-percent-out-less-2").tolist() == [1, 2, 0, 0, 1, 2, 2, 3, 4, 5]


def test_the_parts_of_a_share_split_do_not_overlap(log: EventLog) -> None:
    data = DataConfig(split=Split.share, test_share=0.1, validation_share=0.2)
    train, validation, test = (split_until(data, part) for part in ("train", "validation", "test"))
    assert (str(train), str(test)) == ("leave-last-30-percent-out", "leave-last-10-percent-out")
    assert train == validation
    exact = [
        math.floor(Fraction(length) * Fraction(7, 10)) if length >= MIN_EVENTS else length for length in log.lengths
    ]
    assert visible_counts(log, train).tolist() == exact


@given(st.floats(1e-6, 1, exclude_max=True))
def test_the_text_of_a_share_keeps_all_its_digits(share: float) -> None:
    for until in (Until(held_share=share), Until(3, held_share=share)):
        assert parse_until(str(until)) == until


def test_parsing() -> None:
    assert parse_time("2024-05-01") == 1_714_521_600_000
    assert parse_time("2024-05-01T02:00:00+02:00") == 1_714_521_600_000
    assert parse_time("1714521600000") == parse_time(1_714_521_600_000) == 1_714_521_600_000
    for text in ("2024", "202405", " 1999 "):
        with pytest.raises(ConfigError, match="is a year or a month; write a full date"):
            parse_time(text)
    with pytest.raises(ConfigError, match=r"until='2024': write .* an ISO date"):
        parse_until("2024")
    assert parse_time("2500") == 2500 and parse_time("202413") == 202_413
    assert parse_until("leave-last-two-out") == parse_until("leave-last-2-out") == Until(held_out=2)
    assert parse_until("leave-last-101-out") == parse_until(str(Until(held_out=101))) == Until(held_out=101)
    with pytest.raises(ConfigError, match="leave-last-N-out"):
        parse_until("leave-last-0-out")
    assert parse_until("5-less-3") == parse_until(str(Until(3, 5))) == Until(held_out=3, before=5)
    assert parse_until("all") == parse_until(None) == Until()
    assert [str(parse_until(text)) for text in (None, "leave-last-out", "5")] == ["all", "leave-last-out", "5"]
    assert parse_until("leave-last-12.5-percent-out-less-3") == Until(held_out=3, held_share=0.125)
    for text in ("yesterday", "5-less-", "5-less--1", "less-5", "", "leave-last-0-percent-out"):
        with pytest.raises(ConfigError, match=f"until='{text}': write all, leave-last-out, .*TIME-less-N"):
            parse_until(text)


def test_a_time_needs_a_log_with_times(tmp_path: Path) -> None:
    log = EventLog.from_frame({"user": [1, 1], "item": [1, 2]}, tmp_path / "log", columns=SourceColumns(timestamp=None))
    with pytest.raises(ConfigError, match="has no times; use leave-last-out"):
        visible_counts(log, "2024-01-01")
    assert visible_counts(log, "leave-last-out").tolist() == [2]


@pytest.mark.parametrize("block_events", [1, 7, 1 << 22])
@pytest.mark.parametrize("until", [None, "leave-last-out", "1970-01-04"])
def test_item_counts(log: EventLog, block_events: int, until: str | None) -> None:
    counts = visible_counts(log, until)
    want = np.zeros(log.num_items, np.int64)
    for user in range(log.num_users):
        for item in log.slice(user, 0, int(counts[user])).item:
            want[item] += 1
    assert item_counts(log, counts, block_events=block_events).tolist() == want.tolist()
    if until is None:
        assert item_counts(log, block_events=block_events).tolist() == want.tolist()


def test_item_counts_refuse_a_wrong_shape(log: EventLog) -> None:
    with pytest.raises(ValueError, match=r"one entry per user, 10 in all.*\(3,\)"):
        item_counts(log, np.zeros(3, np.int64))


def gap_split(minutes: float) -> DataConfig:
    return DataConfig(split=Split.time, validation_from="1970-01-05", test_from="1970-01-08", gap_minutes=minutes)


@pytest.mark.parametrize(("part", "begin", "end"), [("validation", 4, 7), ("test", 7, 10)])
def test_events_of_the_gap_are_neither_visible_nor_labels(log: EventLog, part: str, begin: int, end: int) -> None:
    """A gap of a day and a half has two events of a user with an event per day, at 2.5 and 3 days or later."""
    data = gap_split(36 * 60)
    seen, first, stop = part_counts(log, data, part)
    lengths = log.lengths
    assert seen.tolist() == np.minimum(lengths, begin - 1).tolist()  # events at days 0 … begin - 2
    assert first.tolist() == np.minimum(lengths, begin).tolist()
    before_gap = end if part == "test" else end - 1
    assert stop.tolist() == np.maximum(first, np.minimum(lengths, before_gap)).tolist()
    assert part_times(data, part) == (begin * DAY, None if part == "test" else end * DAY - 36 * 3_600_000)
    assert split_until(data, part) == Until(before=begin * DAY - 36 * 3_600_000)


def test_training_ends_before_the_gap(log: EventLog) -> None:
    assert split_until(gap_split(1), "train") == Until(before=4 * DAY - 60_000)
    assert split_until(gap_split(0), "train") == Until(before=4 * DAY)


def test_a_gap_reaches_past_the_validation_labels(log: EventLog) -> None:
    seen, first, stop = part_counts(log, gap_split(4 * 24 * 60), "validation")
    assert seen.tolist() == [0] * 10
    assert (stop == first).all()


def test_a_gap_without_times() -> None:
    with pytest.raises(ConfigError, match=r"data\.gap_minutes: only applies with data\.split=time; set that"):
        DataConfig(gap_minutes=30)
    for bad in (-1.0, math.inf):
        with pytest.raises(ConfigError, match=r"data\.gap_minutes: must be"):
            gap_split(bad)


def log_of(histories: list[list[int]], folder: Path) -> EventLog:
    user = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
    frame = {"user": user, "item": np.concatenate(histories)}
    return EventLog.from_frame(frame, folder / "log", columns=SourceColumns(timestamp=None))


@pytest.mark.parametrize("events_per_batch", [1, 4, 1 << 22])
def test_by_hand(tmp_path: Path, events_per_batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An item that another user had is not a repeat."""
    monkeypatch.setattr("vista.log.splits.EVENTS_PER_BLOCK", events_per_batch)
    log = log_of([[1, 2, 1, 1], [1, 2], [3, 3, 3, 4]], tmp_path)
    assert repeat_share(log, log.lengths) == pytest.approx(4 / 10)
    assert repeat_share(log, visible_counts(log, "leave-last-two-out")) == pytest.approx(1 / 6)
    assert repeat_share(log, np.zeros(3, np.int64)) == 0


def test_only_the_training_events_decide(tmp_path: Path) -> None:
    """With a hundred events and one repeat, users return; repeats among the held-out events do not count."""
    once = list(range(100))
    assert leaves_out_seen(log_of([[*once, 1, 2]], tmp_path / "a"), DataConfig())
    assert not leaves_out_seen(log_of([[*once[:-1], 1, 101, 102]], tmp_path / "b"), DataConfig())


@pytest.mark.parametrize("chosen", [True, False])
def test_a_choice_is_kept(tmp_path: Path, chosen: bool) -> None:
    assert leaves_out_seen(log_of([[1, 1, 1, 1]], tmp_path), DataConfig(exclude_seen=chosen)) is chosen
