"""Statistics of items as of a time, compared with loops over all events."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import small_config
from tests.counters.counter_histories import only_items
from vista.arrays import Floats, Int
from vista.config import SourceColumns
from vista.config.checks import Split
from vista.counters.counters import CounterSpec
from vista.examples.batch_source import BatchSource, ModelReads
from vista.examples.item_statistics import LEAST_DEVIATION, MOST_TIMES, RECENT_DAYS, ItemStatistics, num_statistics
from vista.log.event_log import EventLog
from vista.log.histories import DAY_MS

START, NUM_ITEMS, DAYS = 1_600_000_000_000, 12, 150


def drawn_log(folder: Path, *, days: float = DAYS, seed: int = 0, changed_after: int | None = None) -> EventLog:
    """Nine users and NUM_ITEMS items, popular ones first; some events have the same time. `changed_after`: events from
    this time on have other items."""
    rng = np.random.default_rng(seed)
    lengths = [40, 1, 3, 90, 0, 25, 60, 2, 80]
    user = np.repeat(np.arange(9), lengths)
    item = np.minimum(rng.geometric(0.25, len(user)) - 1, NUM_ITEMS - 1)
    time = START + (rng.integers(0, 400, len(user)) * days * DAY_MS / 400).astype(np.int64)
    if changed_after is not None:
        item = np.where(time >= changed_after, NUM_ITEMS - 1 - item, item)
    # One user has all items at the end, so that all logs have the same vocabulary; training does not see them.
    user, item = np.append(user, np.full(NUM_ITEMS, 99)), np.append(item, np.arange(NUM_ITEMS))
    time = np.append(time, np.full(NUM_ITEMS, START + int(days * DAY_MS)))
    return EventLog.from_frame({"user": user, "item": item, "timestamp": time}, folder, time_unit="ms")


def visible(log: EventLog) -> Int:
    """All events but each user's newest two, and none of the user who had all items."""
    counts = np.maximum(log.lengths - 2, 0)
    counts[log.users.rows([99])] = 0
    return counts


def rows_of(log: EventLog) -> Int:
    """Model rows: item 2 is unknown, and rows do not follow the log's order."""
    item = np.asarray(log.items.ids(np.arange(log.num_items)))
    return np.where(item == 2, 0, 1 + (item + 5) % log.num_items)


def looped(log: EventLog, counts: Int, rows: Int, time: int, num_rows: int) -> Floats:
    """float64 [num_rows, S] as of a time, by a loop over events."""
    total = np.zeros((num_rows, num_statistics(has_time=True)))
    for user in range(log.num_users):
        history, known = log.slice(user, 0, int(counts[user])), set[int]()
        for item, at in zip(history.item.tolist(), np.asarray(history.timestamp).tolist(), strict=True):
            row, is_first = int(rows[item]), item not in known
            known.add(item)
            if at >= time or row == 0:
                continue
            total[row, 0] += 1
            for index, days in enumerate(RECENT_DAYS):
                if at >= time - days * DAY_MS:
                    total[row, 1 + 2 * index] += 1
                    total[row, 2 + 2 * index] += is_first
    logs, seen = np.log1p(total), total[:, 0] > 0
    if not seen.any():
        return logs / LEAST_DEVIATION
    values: Floats = (logs - logs[seen].mean(0)) / np.maximum(logs[seen].std(0), LEAST_DEVIATION)
    return values


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 99), days=st.sampled_from([0.5, 20.0, 150.0, 900.0]), block=st.sampled_from([1, 64, 10**6]))
def test_statistics_equal_a_loop_over_the_events(
    tmp_path_factory: pytest.TempPathFactory, seed: int, days: float, block: int
) -> None:
    log = drawn_log(tmp_path_factory.mktemp("log") / "log", days=days, seed=seed)
    counts, rows, num_rows = visible(log), rows_of(log), NUM_ITEMS + 3
    made = ItemStatistics(log, rows, counts, block_events=block)
    assert len(made.time) <= MOST_TIMES + 1 and (np.diff(made.time[1:-1]) >= DAY_MS).all()
    asked = np.random.default_rng(seed).integers(START, made.time[-1], 30)
    asked[:2] = START - DAY_MS, made.time[-1]
    some = np.array([1, 4, NUM_ITEMS, NUM_ITEMS + 2])  # the last one has no events
    times, values = made.as_of(asked, some)
    assert values.dtype == np.float32 and values.shape == (len(times), len(some), num_statistics(has_time=True))
    for time, value in zip(times.tolist(), values, strict=True):
        # Logarithms of counts below 100, their mean, and a division by 0.2 at least, each rounded to float32.
        np.testing.assert_allclose(value, looped(log, counts, rows, time, num_rows)[some], atol=2e-5)
    latest = made.latest(num_rows)
    np.testing.assert_allclose(latest[1:], looped(log, counts, rows, int(made.time[-1]), num_rows)[1:], atol=2e-5)
    assert not latest[0].any()


def test_a_question_reads_the_newest_statistics_that_are_not_later(tmp_path: Path) -> None:
    log = drawn_log(tmp_path / "log")
    made = ItemStatistics(log, rows_of(log), visible(log))
    step = -(-int(DAYS * DAY_MS) // MOST_TIMES)
    asked = np.arange(START, made.time[-1], step // 7)
    times, _ = made.as_of(asked, np.arange(3))
    read = times[np.searchsorted(times, asked, side="right") - 1]
    assert (read <= asked).all() and (read > asked - step)[read > START].all()
    assert (read < START).sum() <= 8, "those before the first step has passed, which see no events"


def test_no_question_reads_what_came_later(tmp_path: Path) -> None:
    """Other items from a time on, and other events that training does not see, change nothing before that time."""
    log, change = drawn_log(tmp_path / "log"), START + 70 * DAY_MS
    other = drawn_log(tmp_path / "other", changed_after=change)
    asked, some = np.arange(START, change, DAY_MS // 2), np.arange(NUM_ITEMS + 1)
    before, after = (ItemStatistics(each, rows_of(each), visible(each)) for each in (log, other))
    for one, two in zip(before.as_of(asked, some), after.as_of(asked, some), strict=True):
        np.testing.assert_array_equal(one, two)
    assert (before.latest(NUM_ITEMS + 1) != after.latest(NUM_ITEMS + 1)).any()

    hidden = ItemStatistics(log, rows_of(log), log.lengths)  # also the newest events of each user
    assert (hidden.latest(NUM_ITEMS + 1) != before.latest(NUM_ITEMS + 1)).any()


def test_without_times_there_is_one_statistic_of_all_events(tmp_path: Path) -> None:
    frame = {"user": [0, 0, 0, 1, 1, 2], "item": ["a", "b", "a", "a", "c", "d"]}
    log = EventLog.from_frame(frame, tmp_path / "log", columns=SourceColumns(timestamp=None))
    made = ItemStatistics(log, np.arange(1, 5), np.array([3, 2, 0]))
    logs = np.log1p([3, 1, 1, 0])
    expected = ((logs - logs[:3].mean()) / logs[:3].std())[:, None]
    np.testing.assert_allclose(made.latest(5)[1:], expected, atol=1e-6)
    times, values = made.as_of(np.array([0, 1, 2]), np.arange(5))
    assert len(times) == 1 and (times <= 0).all()
    np.testing.assert_allclose(values[0, 1:], expected, atol=1e-6)


def test_a_log_without_visible_events_has_the_statistics_of_no_events(tmp_path: Path) -> None:
    log = drawn_log(tmp_path / "log")
    assert not ItemStatistics(log, rows_of(log), np.zeros(log.num_users, np.int64)).latest(4).any()


@pytest.mark.parametrize("split", [Split.leave_last_out, Split.time])
def test_batches_have_the_statistics_of_their_questions(tmp_path: Path, split: Split) -> None:
    log = drawn_log(tmp_path / "log")
    ends = {"data__validation_from": str(START + 100 * DAY_MS), "data__test_from": str(START + 120 * DAY_MS)}
    config = small_config(
        log,
        tmp_path / "run",
        model__counter_keys=["item"],
        optim__window_weight=1.0,
        data__split=split,
        **(ends if split is Split.time else {}),
    )
    rows = rows_of(log)
    source = BatchSource(log, ModelReads(rows, keys=only_items(CounterSpec())), config)
    num_anchors = 0
    for index in range(source.num_batches(0)):
        batch = source.batch(0, index)
        assert batch.anchors is not None and batch.statistics is not None
        num_anchors += len(batch.anchors.time)
        for time, value in zip(batch.statistics.time.tolist(), batch.statistics.values, strict=True):
            expected = looped(log, source.counts, rows, time, NUM_ITEMS + 1)[batch.rows.numpy()]
            known = batch.rows.numpy() > 0
            np.testing.assert_allclose(value[known], expected[known], atol=2e-5)
    assert num_anchors > 10
    assert BatchSource(log, ModelReads(rows), config).batch(0, 0).statistics is None, "without counters"
