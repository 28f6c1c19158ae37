"""Transitions of items and the sums over them, compared with loops over all events."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from tests.conftest import draw_transitions, small_config
from tests.counters.counter_histories import only_items
from tests.examples.test_item_statistics import rows_of, visible
from vista.arrays import Floats, Int
from vista.counters.counters import CounterSpec
from vista.examples.batch import Batch
from vista.examples.batch_source import BatchSource, ModelReads
from vista.examples.item_statistics import NUM_RECENT, RECENT_DECAY
from vista.examples.transitions import NUM_SUMS, SCALE, SHRINKAGE, TransitionCounts, TransitionTable, transition_sums
from vista.log.event_log import EventLog
from vista.model.serving_model import newest_first

NUM_ITEMS, NUM_USERS = 20, 13
SIZES = [1, 4, 50]


def drawn_log(folder: Path, *, seed: int = 0, other_ends: bool = False) -> EventLog:
    """Users with 0 to 40 events, popular items first. `other_ends`: the last two items of all users are others."""
    rng = np.random.default_rng(seed)
    lengths = np.array([40, 1, 3, 25, 0, 25, 30, 2, 40, 17, 9, 33, 21])
    user = np.repeat(np.arange(NUM_USERS), lengths)
    item = np.minimum(rng.geometric(0.15, len(user)) - 1, NUM_ITEMS - 1)
    if other_ends:
        last = np.isin(np.arange(len(user)), np.concatenate([np.cumsum(lengths) - 1, np.cumsum(lengths) - 2]))
        item = np.where(last, NUM_ITEMS - 1 - item, item)
    # One user has all items, so that all logs have the same vocabulary; training does not see them.
    user, item = np.append(user, np.full(NUM_ITEMS, 99)), np.append(item, np.arange(NUM_ITEMS))
    frame = {"user": user, "item": item, "timestamp": np.arange(len(user))}
    return EventLog.from_frame(frame, folder, time_unit="s")


def looped(log: EventLog, counts: Int, since: dict[int, int] | None = None) -> Floats:
    """float64 [V1, V1]: how often the second item came right after the first one. `since`: by user, the first position
    of a second item that does not count."""
    found, rows = np.zeros((NUM_ITEMS + 1, NUM_ITEMS + 1)), rows_of(log)
    for user in range(log.num_users):
        had = rows[log.slice(user, 0, min(int(counts[user]), (since or {}).get(user, 1000))).item].tolist()
        for (i, j), times in Counter(pairwise(had)).items():
            found[i, j] += times if i and j else 0
    return found


def weights(counts: Floats) -> Floats:
    """float64 [V1, V1] of counts."""
    found: Floats = np.log(1 + SCALE * counts / (counts.sum(1, keepdims=True) + SHRINKAGE))
    return found


def is_strongest(counts: Floats, size: int) -> NDArray[np.bool_]:
    """Whether a count is among the `size` largest of its row; of equal ones, the first are larger."""
    return (np.argsort(np.argsort(-counts, axis=1, kind="stable"), axis=1) < size) & (counts > 0)


@settings(max_examples=12)
@given(seed=st.integers(0, 99), size=st.sampled_from(SIZES))
def test_the_table_equals_loops_over_all_events(tmp_path_factory: pytest.TempPathFactory, seed: int, size: int) -> None:
    log = drawn_log(tmp_path_factory.mktemp("log") / "log", seed=seed)
    table = TransitionCounts(log, rows_of(log), visible(log), size).table(NUM_ITEMS + 4)
    assert table.item.dtype == torch.int32 and table.weight.dtype == torch.float32
    assert table.item.shape == table.weight.shape == (NUM_ITEMS + 4, size) and not table.item[NUM_ITEMS + 1 :].any()
    counts, dense = looped(log, visible(log)), np.zeros((NUM_ITEMS + 1, NUM_ITEMS + 1))
    for row in range(NUM_ITEMS + 1):
        item, weight = (part[row].numpy() for part in (table.item, table.weight))
        filled = item > 0
        assert (np.diff(weight) <= 0).all() and (weight[~filled] == 0).all() and (weight[filled] > 0).all()
        assert len({*item[filled].tolist()}) == filled.sum()
        dense[row, item[filled]] = weight[filled]
    np.testing.assert_allclose(dense, weights(counts) * is_strongest(counts, size), rtol=1e-6)


def test_events_that_training_does_not_see_change_nothing(tmp_path: Path) -> None:
    log, other = drawn_log(tmp_path / "log"), drawn_log(tmp_path / "other", other_ends=True)
    one, two = (TransitionCounts(each, rows_of(each), visible(each), 50).table(99) for each in (log, other))
    seen = TransitionCounts(other, rows_of(other), other.lengths, 50).table(99)
    assert torch.equal(one.item, two.item) and torch.equal(one.weight, two.weight)
    assert not torch.equal(one.item, seen.item) and not torch.equal(one.weight, seen.weight)


@pytest.fixture
def table() -> TransitionTable:
    """A drawn one of 30 items with 6 followers each."""
    made = TransitionTable(torch.zeros(31, 6, dtype=torch.int32), torch.zeros(31, 6))
    draw_transitions(made)
    return made


def drawn_recent(num_requests: int, num_recent: int = NUM_RECENT, seed: int = 0) -> Tensor:
    return torch.randint(0, 31, (num_requests, num_recent), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("num_recent", [1, 2, NUM_RECENT])
@pytest.mark.parametrize("num_requests", [1, 4])
def test_sums_equal_loops_over_all_followers(table: TransitionTable, num_requests: int, num_recent: int) -> None:
    recent = drawn_recent(num_requests, num_recent)
    expected = torch.zeros(num_requests, NUM_SUMS, 31, dtype=torch.float64)
    for request, rows in enumerate(recent.tolist()):
        for back, row in enumerate(rows):
            for item, weight in zip(table.item[row].tolist(), table.weight[row].tolist(), strict=True):
                expected[request, min(back, 1), item] += RECENT_DECAY**back * weight
    sums = transition_sums(table, recent, range(31))
    # At most 8 float32 terms below 1.
    torch.testing.assert_close(sums.double(), expected, atol=1e-5, rtol=1e-5)
    assert sums.shape == (num_requests, NUM_SUMS, 31) and sums.dtype == torch.float32


@pytest.mark.parametrize("num_recent", [2, NUM_RECENT], ids=["searched", "looked up"])
def test_sums_of_candidates_are_those_of_all_items(table: TransitionTable, num_recent: int) -> None:
    """To the bit, in any order, with repeats, and for one request alone."""
    recent = drawn_recent(3, num_recent)
    whole = transition_sums(table, recent, range(31))
    for some in (torch.tensor([7, 0, 30, 7, 3]), torch.arange(31), torch.zeros(0, dtype=torch.int64)):
        assert torch.equal(transition_sums(table, recent, some), whole[..., some])
    of_requests = torch.randint(0, 31, (3, 50))
    expected = whole.gather(2, of_requests.unsqueeze(1).expand(-1, NUM_SUMS, -1))
    assert torch.equal(transition_sums(table, recent, of_requests), expected)
    assert torch.equal(transition_sums(table, recent, range(4, 9)), whole[..., 4:9])
    assert torch.equal(transition_sums(table, recent[1:2], range(31)), whole[1:2])


def test_the_newest_events_come_first() -> None:
    tail = np.array([[0, *range(1, 10)], np.zeros(10, int)])
    assert newest_first(tail).tolist() == [[9, 8, 7, 6, 5, 4, 3, 2], [0] * 8]
    assert newest_first(tail[:, -1:]).tolist() == [[9], [0]]


# What training questions read.


def source_of(log: EventLog, folder: Path, **settings: int) -> BatchSource:
    config = small_config(log, folder, model__counter_keys=["item"], optim__window_weight=1.0, **settings)
    return BatchSource(log, ModelReads(rows_of(log), keys=only_items(CounterSpec())), config)


def questions(log: EventLog, source: BatchSource) -> list[tuple[int, int, Int, Batch, Tensor]]:
    """Of all anchors of an epoch: the user, the events before the question, the newest of them in the chunk, int64 [J]
    model rows with the newest first, the batch, and the sums [K, R]."""
    found = []
    for batch in [source.batch(0, index) for index in range(source.num_batches(0))]:
        anchors, windows = batch.anchors, batch.windows
        assert anchors is not None and anchors.transitions is not None
        tail_len = windows.tail_index.shape[1]
        for anchor, sums in enumerate(anchors.transitions):
            window = int(anchors.window[anchor])
            user = int(batch.user[windows.chunk[window]])
            history = log.slice(user)
            seen = int((np.asarray(history.timestamp) < int(anchors.time[anchor])).sum())
            column = tail_len - batch.labels.item.shape[1] + int(anchors.position[anchor])
            newest = int(windows.tail_index[window, column])
            known = 0 if newest < 0 else newest + 1 - int(batch.events.offsets[windows.chunk[window]])
            recent = rows_of(log)[history.item[max(seen - min(known, NUM_RECENT, tail_len), 0) : seen]][::-1]
            found.append((user, seen, np.pad(recent, (0, NUM_RECENT - len(recent))), batch, sums))
    return found


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 99), size=st.sampled_from(SIZES), chunk_len=st.sampled_from([12, 1000]))
def test_questions_do_not_count_what_their_users_did_afterwards(
    tmp_path_factory: pytest.TempPathFactory, seed: int, size: int, chunk_len: int
) -> None:
    folder = tmp_path_factory.mktemp("log")
    log = drawn_log(folder / "log", seed=seed)
    source, num_reading = source_of(log, folder, model__transitions=size, data__chunk_len=chunk_len), 0
    named = is_strongest(looped(log, source.counts), size)
    for user, seen, recent, batch, sums in questions(log, source):
        table, expected = weights(looped(log, source.counts, {user: seen})) * named, np.zeros((NUM_SUMS, NUM_ITEMS + 1))
        for back, row in enumerate(recent):
            expected[min(back, 1)] += RECENT_DECAY**back * table[row]
        np.testing.assert_allclose(sums.numpy(), expected[:, batch.rows.numpy()], atol=1e-5, rtol=1e-5)
        num_reading += bool((sums > 0).any())
    assert num_reading > 10


def test_questions_read_what_serving_reads_at_their_time(tmp_path: Path) -> None:
    """The table of a log that ends at the question for its user, and only for this one. It has place for all followers;
    which of them a smaller table names does depend on later events."""
    log = drawn_log(tmp_path / "log")
    source, num_changed = source_of(log, tmp_path / "run", model__transitions=50), 0
    whole = TransitionCounts(log, rows_of(log), source.counts, 50).table(NUM_ITEMS + 1)
    for user, seen, recent, batch, sums in questions(log, source):
        counts = source.counts.copy()
        counts[user] = seen
        table = TransitionCounts(log, rows_of(log), counts, 50).table(NUM_ITEMS + 1)
        newest = torch.from_numpy(recent).unsqueeze(0)
        torch.testing.assert_close(sums, transition_sums(table, newest, batch.rows)[0], atol=1e-6, rtol=1e-6)
        num_changed += not torch.allclose(sums, transition_sums(whole, newest, batch.rows)[0], atol=1e-3)
    assert num_changed > 10


def test_memory_is_bounded_by_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few events give the same sums."""
    log = drawn_log(tmp_path / "log")
    once = questions(log, source_of(log, tmp_path / "run", data__tokens_per_batch=1000))
    monkeypatch.setattr("vista.examples.transitions.COMPARED_AT_ONCE", 1000)
    monkeypatch.setattr("vista.examples.transitions.EVENTS_PER_BLOCK", 20)
    blocks = questions(log, source_of(log, tmp_path / "run", data__tokens_per_batch=1000))
    assert len(once) == len(blocks) > 20
    assert all(torch.equal(one[-1], other[-1]) for one, other in zip(once, blocks, strict=True))
