"""Neighbors of items and the sums over them, compared with loops over all events and all pairs."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.conftest import draw_neighbors, small_config
from tests.counters.counter_histories import only_items
from vista.arrays import Floats, Int
from vista.counters.counters import CounterSpec
from vista.examples.batch import Batch
from vista.examples.batch_source import BatchSource, ModelReads
from vista.examples.neighbors import (
    FOLDS,
    FOLLOWING_SCALE,
    FOLLOWING_SHRINKAGE,
    MIN_USERS,
    NUM_RECENT,
    NUM_SUMS,
    RECENT_DECAY,
    SHRINKAGE,
    SIMILAR_PRIOR,
    SIMILAR_SCALE,
    FoldedNeighbors,
    NeighborKind,
    Neighbors,
    NeighborSources,
    neighbor_sums,
)
from vista.log.event_log import EventLog

NUM_ITEMS, NUM_USERS = 20, 13
SIZES = [1, 4, 50]


def drawn_log(folder: Path, *, seed: int = 0, other_user: int | None = None, other_ends: bool = False) -> EventLog:
    """Users with 0 to 40 events, popular items first.

    Args:
        other_user: has other items.
        other_ends: the last two items of all users are others.
    """
    rng = np.random.default_rng(seed)
    lengths = np.array([40, 1, 3, 25, 0, 25, 30, 2, 40, 17, 9, 33, 21])
    user = np.repeat(np.arange(NUM_USERS), lengths)
    item = np.minimum(rng.geometric(0.15, len(user)) - 1, NUM_ITEMS - 1)
    if other_user is not None:
        item = np.where(user == other_user, NUM_ITEMS - 1 - item, item)
    if other_ends:
        last = np.isin(np.arange(len(user)), np.concatenate([np.cumsum(lengths) - 1, np.cumsum(lengths) - 2]))
        item = np.where(last, NUM_ITEMS - 1 - item, item)
    # One user has all items, so that all logs have the same vocabulary; training does not see them.
    user, item = np.append(user, np.full(NUM_ITEMS, 99)), np.append(item, np.arange(NUM_ITEMS))
    frame = {"user": user, "item": item, "timestamp": np.arange(len(user))}
    return EventLog.from_frame(frame, folder, time_unit="s")


def visible(log: EventLog) -> Int:
    """All events but each user's newest two, and none of the user who had all items."""
    counts = np.maximum(log.lengths - 2, 0)
    counts[log.users.rows([99])] = 0
    return counts


def rows_of(log: EventLog) -> Int:
    """Model rows: item 2 is unknown, and rows do not follow the log's order."""
    item = np.asarray(log.items.ids(np.arange(log.num_items)))
    return np.where(item == 2, 0, 1 + (item + 5) % NUM_ITEMS)


def looped(log: EventLog, counts: Int, rows: Int, left_out: int | None) -> tuple[Floats, Floats]:
    """float64 [V1, V1] weights of all pairs, 0 for none: similar and following, without the users of a fold.

    Counts of some folds are scaled up to all.
    """
    users, shared, follows = Counter[int](), Counter[tuple[int, int]](), Counter[tuple[int, int]]()
    for user in range(log.num_users):
        if left_out is not None and user % FOLDS == left_out:
            continue
        had = rows[log.slice(user, 0, int(counts[user])).item].tolist()
        distinct = {*had} - {0}
        users.update(distinct)
        shared.update((i, j) for i in distinct for j in distinct if i != j)
        follows.update((i, j) for i, j in pairwise(had) if i and j)
    scale = 1.0 if left_out is None else FOLDS / (FOLDS - 1)
    similar, following = np.zeros((2, NUM_ITEMS + 1, NUM_ITEMS + 1))
    for (i, j), c in shared.items():
        if c >= MIN_USERS:
            similar[i, j] = scale * c / (math.sqrt(scale * users[i] * scale * users[j]) + SHRINKAGE)
    leaves = Counter[int]()
    for (i, _), c in follows.items():
        leaves[i] += c
    for (i, j), c in follows.items():
        following[i, j] = math.log(1 + FOLLOWING_SCALE * scale * c / (scale * leaves[i] + FOLLOWING_SHRINKAGE))
    return similar, following


def dense(neighbors: Neighbors, kind: NeighborKind, first: int = 0) -> Floats:
    """float64 [V1, V1] weights of the tables from row `first` on; every neighbor is named once."""
    found = np.zeros((NUM_ITEMS + 1, NUM_ITEMS + 1))
    for row in range(NUM_ITEMS + 1):
        item, weight = (table[kind, first + row].numpy() for table in (neighbors.item, neighbors.weight))
        filled = item > 0
        assert (np.diff(weight) <= 0).all() and (weight[~filled] == 0).all() and (weight[filled] > 0).all()
        assert len({*item[filled].tolist()}) == filled.sum()
        found[row, item[filled]] = weight[filled]
    return found


def strongest(weights: Floats, size: int) -> Floats:
    """Only the `size` largest weights of each row."""
    rank = np.argsort(np.argsort(-weights, axis=1, kind="stable"), axis=1)
    return np.where(rank < size, weights, 0)


@settings(max_examples=12)
@given(seed=st.integers(0, 99), size=st.sampled_from(SIZES), pairs=st.sampled_from([1, 100, 10**6]))
def test_tables_equal_loops_over_all_pairs(
    tmp_path_factory: pytest.TempPathFactory, seed: int, size: int, pairs: int
) -> None:
    log = drawn_log(tmp_path_factory.mktemp("log") / "log", seed=seed)
    counts, rows = visible(log), rows_of(log)
    made = FoldedNeighbors(log, rows, counts, size, pairs_at_once=pairs)
    tables = [(None, made.of_all(NUM_ITEMS + 1), 0)]
    firsts = made.first_rows(torch.arange(FOLDS)).tolist()
    tables += [(fold, made.of_each, first) for fold, first in enumerate(firsts)]
    for left_out, neighbors, first in tables:
        for kind, expected in zip(NeighborKind, looped(log, counts, rows, left_out), strict=True):
            # Equal weights tie in float32, too: both are the same expression of small integers in float64.
            ordered = expected.astype(np.float32).astype(np.float64)
            np.testing.assert_allclose(dense(neighbors, kind, first), strongest(ordered, size), rtol=1e-6)
    more = made.of_all(NUM_ITEMS + 4)
    assert more.item.shape == (2, NUM_ITEMS + 4, size) and not more.item[:, NUM_ITEMS + 1 :].any()


def test_long_histories_count_with_their_newest_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = drawn_log(tmp_path / "log")
    counts, rows = visible(log), rows_of(log)
    monkeypatch.setattr("vista.examples.neighbors.MOST_EVENTS", 10)
    made = FoldedNeighbors(log, rows, counts, 50).of_all(NUM_ITEMS + 1)
    short = np.zeros((NUM_ITEMS + 1, NUM_ITEMS + 1))
    for user in range(log.num_users):
        stop = int(counts[user])
        had = sorted({*rows[log.slice(user, max(stop - 10, 0), stop).item].tolist()} - {0})
        short[np.ix_(had, had)] += 1
    expected = (short >= MIN_USERS) & ~np.eye(NUM_ITEMS + 1, dtype=bool)
    np.testing.assert_array_equal(dense(made, NeighborKind.similar) > 0, expected)


def test_events_that_training_does_not_see_change_nothing(tmp_path: Path) -> None:
    log, other = drawn_log(tmp_path / "log"), drawn_log(tmp_path / "other", other_ends=True)
    one, two = (FoldedNeighbors(each, rows_of(each), visible(each), 50) for each in (log, other))
    seen = FoldedNeighbors(other, rows_of(other), other.lengths, 50)
    for a, b, c in zip(*(of.of_each.tables for of in (one, two, seen)), strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.fixture
def neighbors() -> Neighbors:
    """Drawn ones of 30 items, 6 each."""
    shape = len(NeighborKind), 31, 6
    made = Neighbors(torch.zeros(shape, dtype=torch.int32), torch.zeros(shape))
    draw_neighbors(made)
    return made


def drawn_sources(num_requests: int, num_counted: int, seed: int = 0) -> NeighborSources:
    generator = torch.Generator().manual_seed(seed)
    counted = torch.rand(num_requests, 31, generator=generator).argsort(1)[:, :num_counted]
    return NeighborSources(counted, torch.randint(0, 31, (num_requests, NUM_RECENT), generator=generator))


def looped_sums(neighbors: Neighbors, sources: NeighborSources) -> Tensor:
    """float64 [B, K, V1]."""
    sums = torch.zeros(len(sources.counted), NUM_SUMS, 31, dtype=torch.float64)
    for request, (counted, recent) in enumerate(zip(sources.counted.tolist(), sources.recent.tolist(), strict=True)):
        read = [(0, row, 0, 1.0) for row in counted]
        read += [(1, row, min(back, 1) + 1, RECENT_DECAY**back) for back, row in enumerate(recent)]
        for kind, row, place, factor in read:
            pairs = zip(neighbors.item[kind, row].tolist(), neighbors.weight[kind, row].tolist(), strict=True)
            for item, weight in pairs:
                sums[request, place, item] += factor * weight
        of_similar(sums[request, 0], sum(float(neighbors.weight[0, row].double().sum()) for row in counted))
    return sums


def of_similar(sums: Tensor, total: float) -> None:
    """Replace the sums of similar items by what the heads read."""
    sums.mul_(SIMILAR_SCALE / (total + SIMILAR_PRIOR)).log1p_()


@pytest.mark.parametrize("num_counted", [0, 1, 25])
@pytest.mark.parametrize("num_requests", [1, 4])
def test_sums_equal_loops_over_all_neighbors(neighbors: Neighbors, num_requests: int, num_counted: int) -> None:
    sources = drawn_sources(num_requests, num_counted)
    sums = neighbor_sums(neighbors, sources, range(31))
    # At most 31 float32 terms below 1.
    torch.testing.assert_close(sums.double(), looped_sums(neighbors, sources), atol=1e-5, rtol=1e-5)
    assert sums.shape == (num_requests, NUM_SUMS, 31) and sums.dtype == torch.float32


@pytest.mark.parametrize("num_counted", [2, 25], ids=["searched", "looked up"])
def test_sums_of_candidates_are_those_of_all_items(neighbors: Neighbors, num_counted: int) -> None:
    """To the bit, in any order, with repeats, and for one request alone."""
    sources = drawn_sources(3, num_counted)
    whole = neighbor_sums(neighbors, sources, range(31))
    for some in (torch.tensor([7, 0, 30, 7, 3]), torch.arange(31), torch.zeros(0, dtype=torch.int64)):
        assert torch.equal(neighbor_sums(neighbors, sources, some), whole[..., some])
    of_requests = torch.randint(0, 31, (3, 50))
    expected = whole.gather(2, of_requests.unsqueeze(1).expand(-1, NUM_SUMS, -1))
    assert torch.equal(neighbor_sums(neighbors, sources, of_requests), expected)
    assert torch.equal(neighbor_sums(neighbors, sources, range(4, 9)), whole[..., 4:9])
    assert torch.equal(neighbor_sums(neighbors, sources.select(slice(1, 2)), range(31)), whole[1:2])


def test_sources_are_the_counted_items_and_the_newest_events() -> None:
    counted, tail = np.array([[3, 5, -1], [-1, -1, -1]]), np.array([[0, *range(1, 10)], np.zeros(10, int)])
    sources = NeighborSources.of(counted, tail, torch.device("cpu"))
    assert sources.counted.tolist() == [[3, 5, 0], [0, 0, 0]]
    assert sources.recent.tolist() == [[9, 8, 7, 6, 5, 4, 3, 2], [0] * 8]
    short = NeighborSources.of(counted, tail[:, -1:], torch.device("cpu"))
    assert short.recent.tolist() == [[9], [0]]


def source_of(log: EventLog, folder: Path, size: int = 50) -> BatchSource:
    config = small_config(log, folder, model__counters=True, model__neighbors=size, optim__window_weight=1.0)
    return BatchSource(log, ModelReads(rows_of(log), keys=only_items(CounterSpec())), config)


def batches(source: BatchSource) -> list[Batch]:
    return [source.batch(0, index) for index in range(source.num_batches(0))]


def test_batches_have_the_sums_of_other_users(tmp_path: Path) -> None:
    """From what questions show: the items that they count, and the events of the tail."""
    log = drawn_log(tmp_path / "log")
    source, num_asked = source_of(log, tmp_path / "run"), 0
    tables = [[torch.from_numpy(w) for w in looped(log, source.counts, rows_of(log), f)] for f in range(FOLDS)]
    for batch in batches(source):
        assert batch.anchors is not None and batch.anchors.neighbors is not None
        assert batch.anchors.counters is not None
        for anchor, sums in enumerate(batch.anchors.neighbors):
            window = int(batch.anchors.window[anchor])
            user = int(batch.user[batch.windows.chunk[window]])
            counted = batch.anchors.counters.item[anchor]
            similar, following = tables[user % FOLDS]
            expected = torch.zeros(NUM_SUMS, NUM_ITEMS + 1, dtype=torch.float64)
            expected[0] = similar[batch.rows[counted[counted >= 0]]].sum(0)
            of_similar(expected[0], float(expected[0].sum()))
            tail_len = batch.windows.tail_index.shape[1]
            seen = tail_len - batch.labels.item.shape[1] + 1 + batch.anchors.position[anchor]
            event = batch.windows.tail_index[window, :seen]
            if event[-1] >= 0:  # the tail of an early position is short, but the chunk has the events before it
                begin = int(batch.events.offsets[batch.windows.chunk[window]])
                stop = int(event[-1]) + 1
                event = torch.arange(max(stop - min(NUM_RECENT, tail_len), begin), stop)
                for back, item in enumerate(batch.rows[batch.events.item[event.flip(0)]].tolist()):
                    expected[min(back, 1) + 1] += RECENT_DECAY**back * following[item]
            num_asked += int((sums[1] > 0).any())
            torch.testing.assert_close(sums.double(), expected[:, batch.rows], atol=1e-5, rtol=1e-5)
    assert num_asked > 10


def test_questions_do_not_read_their_own_users(tmp_path: Path) -> None:
    """Another history of a user changes the tables, but not those that questions about the user's fold read."""
    log, other = drawn_log(tmp_path / "log"), drawn_log(tmp_path / "other", other_user=8)
    one, two = (FoldedNeighbors(each, rows_of(each), visible(each), 50) for each in (log, other))
    user = torch.from_numpy(log.users.rows([8]))
    first, last = int(one.first_rows(user)), int(one.first_rows(user)) + NUM_ITEMS + 1
    for a, b in zip(one.of_each.tables, two.of_each.tables, strict=True):
        assert torch.equal(a[:, first:last], b[:, first:last]) and not torch.equal(a, b)
    assert not torch.equal(one.of_all(NUM_ITEMS + 1).weight, two.of_all(NUM_ITEMS + 1).weight)


def test_without_neighbors_batches_have_no_sums(tmp_path: Path) -> None:
    log = drawn_log(tmp_path / "log")
    made = batches(source_of(log, tmp_path / "run", 0))
    assert made and all(batch.anchors is not None and batch.anchors.neighbors is None for batch in made)
