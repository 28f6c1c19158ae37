"""Item spaces, label rates, and pooled vectors in batches, compared with float64 formulas and loops over all events."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics.pairwise import cosine_similarity

from tests.conftest import small_config
from tests.counters.counter_histories import only_items
from tests.examples.test_item_statistics import visible
from vista.arrays import Floats, Int
from vista.config import SourceColumns
from vista.counters.counters import CounterSpec
from vista.examples.batch import Batch
from vista.examples.batch_source import BatchSource, ModelReads
from vista.examples.item_spaces import (
    COARSE,
    FOLDS,
    GRID,
    NUM_POOLED,
    RATE_PRIOR,
    USER_PRIOR,
    ItemRates,
    ItemSpaces,
    LabelResiduals,
    Pooled,
    PooledHistories,
    fold_of,
    pooled_vectors,
)
from vista.examples.item_statistics import CounterRequests, ItemStatistics
from vista.log.event_log import EventLog
from vista.runs.tracking import MetricsWriter
from vista.training.trainer import Trainer
from vista.training.warm_start import START_RMS

NUM_ITEMS, NUM_USERS, HIDDEN, LEAST_USERS = 24, 14, 2, 6
ROWS = np.where(np.arange(NUM_ITEMS) == 2, 0, np.arange(NUM_ITEMS) + 1)
"""The model rows of the items; one is unknown."""


def drawn_log(
    folder: Path, *, other_user: int | None = None, other_ends: bool = False, impressions: int = 0
) -> EventLog:
    """Users with 6 to 45 events of two groups of items that overlap.

    Args:
        other_user: has other items.
        other_ends: the newest HIDDEN events of all users have other items.
        impressions: per user, with two tasks.
    """
    rng = np.random.default_rng(3)
    users, items, shown = [], [], []
    for user in range(NUM_USERS):
        length = 6 + 3 * user
        history = user % 3 % 2 * 8 + rng.integers(0, 16, length)
        if user == other_user:
            history = NUM_ITEMS - 1 - history
        if other_ends:
            history[-HIDDEN:] = (history[-HIDDEN:] + 7) % NUM_ITEMS
        first = len(users)
        users += [user] * length
        items += history.tolist()
        shown += [
            (user, int(rng.integers(0, NUM_ITEMS)), first + int(rng.integers(1, length))) for _ in range(impressions)
        ]
    # One user has all items, so that all logs have the same vocabulary; training does not see them.
    users, items = [*users, *[99] * NUM_ITEMS], [*items, *range(NUM_ITEMS)]
    frame = {"user": users, "item": items, "timestamp": np.arange(len(users))}
    if not impressions:
        return EventLog.from_frame(frame, folder, time_unit="s")
    user, item, time = np.array(shown).T
    drawn = rng.random((len(shown), 2))
    table = {"user": user, "item": item, "timestamp": time, "click": drawn[:, 0] < 0.3, "like": drawn[:, 1] < 0.6}
    columns = SourceColumns(labels=["click", "like"])
    return EventLog.from_frame(frame, folder, time_unit="s", impressions=table, columns=columns)


def matrix_of(log: EventLog, counts: Int, left_out: int | None, stretch: int) -> Floats:
    """W by a loop, [stretches, 1 + NUM_ITEMS], without the users of a fold; items that too few users had are 0."""
    had, users = [], np.zeros(1 + NUM_ITEMS)
    for user, count in enumerate(counts.tolist()):
        if left_out is None or fold_of(np.asarray(user)) != left_out:
            rows = ROWS[log.slice(user, 0, count).item]
            users[np.unique(rows)] += 1
            had += [
                np.bincount(rows[low : low + stretch], minlength=len(users)) > 0 for low in range(0, count, stretch)
            ]
    matrix = np.array(had) * (users >= LEAST_USERS) * (np.arange(len(users)) > 0)
    return matrix / np.sqrt(np.maximum(matrix.sum(1, keepdims=True), 1)) / np.maximum(matrix.sum(0), 1) ** 0.25


@pytest.mark.parametrize("stretch", [10, 200])
def test_spaces_are_those_of_a_dense_svd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stretch: int) -> None:
    for name, value in (("STRETCH_EVENTS", stretch), ("BLOCK_EVENTS", 100), ("MIN_USERS", LEAST_USERS)):
        monkeypatch.setattr(f"vista.examples.item_spaces.{name}", value)
    log, dim = drawn_log(tmp_path / "log"), 5
    spaces = ItemSpaces(log, ROWS, visible(log), dim, seed=1)
    assert spaces.of_each.shape == (FOLDS + 1, 1 + NUM_ITEMS, dim) and spaces.of_each.dtype == np.float32
    for space, left_out in zip(spaces.of_each.astype(np.float64), (*range(FOLDS), None), strict=True):
        weighted = matrix_of(log, visible(log), left_out, stretch)
        known = weighted.any(0)
        assert 0 < known.sum() < NUM_ITEMS - 1  # one is unknown
        np.testing.assert_allclose(np.linalg.norm(space, axis=1), known, atol=1e-6)  # rounded to float32
        right = np.linalg.svd(weighted, full_matrices=False)[2][:dim].T
        # The SVD is one of float32 entries, by a few iterations: its singular values decay slowly here.
        np.testing.assert_allclose(
            cosine_similarity(space), cosine_similarity(np.where(known[:, None], right, 0)), atol=1e-3
        )
        assert (space / GRID == np.round(space / GRID)).all()
    np.testing.assert_array_equal(spaces.of_all(NUM_ITEMS + 4)[: 1 + NUM_ITEMS], spaces.of_each[-1])
    assert not spaces.of_all(NUM_ITEMS + 4)[1 + NUM_ITEMS :].any()
    np.testing.assert_array_equal(spaces.of_rows(np.array([5, 0])), np.hstack([*spaces.of_each[:FOLDS, [5, 0]]]))


def test_events_that_training_does_not_see_change_nothing(tmp_path: Path) -> None:
    log, other = drawn_log(tmp_path / "log"), drawn_log(tmp_path / "other", other_ends=True)
    one, two = (ItemSpaces(each, ROWS, visible(each), 4, seed=1).of_each for each in (log, other))
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, ItemSpaces(other, ROWS, other.lengths, 4, seed=1).of_each)


def test_questions_do_not_read_a_space_of_their_own_users(tmp_path: Path) -> None:
    """Another history of a user changes the spaces, but not the one that questions about the user's fold read."""
    log, other = drawn_log(tmp_path / "log"), drawn_log(tmp_path / "other", other_user=8)
    one, two = (ItemSpaces(each, ROWS, visible(each), 4, seed=1).of_each for each in (log, other))
    fold = int(fold_of(log.users.rows([8]))[0])
    np.testing.assert_array_equal(one[fold], two[fold])
    for changed in {*range(FOLDS + 1)} - {fold}:
        assert not np.array_equal(one[changed], two[changed])


def test_large_logs_read_some_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = drawn_log(tmp_path / "log")
    whole = ItemSpaces(log, ROWS, visible(log), 4, seed=1).of_each
    monkeypatch.setattr("vista.examples.item_spaces.MOST_EVENTS", 100)
    with caplog.at_level("INFO"):
        drawn = {ItemSpaces(log, ROWS, visible(log), 4, seed=seed).of_each.tobytes() for seed in range(4)}
    assert len(drawn) > 1 and whole.tobytes() not in drawn
    assert f"random users of {NUM_USERS}" in caplog.text


def test_long_histories_of_few_users_are_all_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = drawn_log(tmp_path / "log")
    whole = ItemSpaces(log, ROWS, visible(log), 4, seed=1).of_each
    monkeypatch.setattr("vista.examples.item_spaces.ENOUGH_EVENTS", 100)
    np.testing.assert_array_equal(ItemSpaces(log, ROWS, visible(log), 4, seed=1).of_each, whole)
    monkeypatch.setattr("vista.examples.item_spaces.ENOUGH_USERS", NUM_USERS // 4)
    assert not np.array_equal(ItemSpaces(log, ROWS, visible(log), 4, seed=1).of_each, whole)


def test_item_vectors_start_from_the_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all users; those of items without a vector are drawn."""
    monkeypatch.setattr("vista.examples.item_spaces.MIN_USERS", 10)
    config = small_config(drawn_log(tmp_path / "log"), tmp_path, model__pooled_dim=5, optim__table_rate=0.0)
    made = Trainer(config, EventLog.open(tmp_path / "log"))
    drawn = made.model.item_table.detach().clone()
    assert made.source.spaces is not None
    space = torch.from_numpy(made.source.spaces.of_all(1 + len(made.model.items)))
    made._start(MetricsWriter(tmp_path))
    table, known = made.model.item_table.detach(), space.any(1)
    assert 5 < known.sum() < NUM_ITEMS
    torch.testing.assert_close(table[known, :5], space[known] * START_RMS * 4)
    assert not table[known, 5:].any() and torch.equal(table[~known], drawn[~known])


def test_a_log_without_visible_events_has_empty_spaces(tmp_path: Path) -> None:
    log = drawn_log(tmp_path / "log")
    assert not ItemSpaces(log, ROWS, np.zeros(log.num_users, np.int64), 4, seed=1).of_each.any()


@settings(max_examples=25)
@given(data=st.data())
def test_pooled_vectors_equal_sums_over_events(data: st.DataObject) -> None:
    """And they are what serving computes from the sums of a record."""
    lengths = data.draw(st.lists(st.integers(0, 60), min_size=1, max_size=4))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    item, fold = rng.integers(0, 30, offsets[-1]), rng.integers(0, FOLDS, len(lengths))
    drawn = rng.normal(size=(FOLDS, 30, 5))
    spaces = np.round(drawn / np.linalg.norm(drawn, axis=2, keepdims=True) / GRID) * GRID
    spaces[:, ::9] = 0
    spaces = spaces.astype(np.float32)
    tail_len, history = data.draw(st.sampled_from([1, 5, 50])), rng.integers(0, len(lengths), 12)
    seen = (rng.random(12) * (np.array(lengths)[history] + 1)).astype(np.int64)
    covered = (rng.random(12) * (seen + 1)).astype(np.int64)
    tail_start = np.maximum(seen - rng.integers(0, tail_len + 1, 12), 0)
    requests = CounterRequests(history, covered, tail_start, seen, seen, np.zeros(12, np.bool_))
    weight = None
    if data.draw(st.booleans()):
        spaces = (np.round(spaces / COARSE) * COARSE).astype(np.float32)
        weight = (rng.integers(-4096, 4097, offsets[-1]) * COARSE).astype(np.float32)
    histories = PooledHistories(spaces, fold, item, offsets, weight)
    found = histories.at(requests, tail_len).reshape(12, len(Pooled), FOLDS, 5)
    asked = rng.integers(0, 30, 12)
    of_items = histories.of_items(requests, tail_len, asked)
    for row in range(12):
        own, others = fold[history[row]], 1 - fold[history[row]]
        space = spaces[own].astype(np.float64)
        events = np.arange(offsets[history[row]], offsets[history[row] + 1])
        added = events[max(covered[row], tail_start[row]) : seen[row]]
        recent = events[max(seen[row] - min(tail_len, NUM_POOLED), 0) : seen[row]]
        vectors = space[item] if weight is None else space[item] * weight.astype(np.float64)[:, None]
        for kind, chosen in enumerate((np.concatenate([events[: covered[row]], added]), recent)):
            total = vectors[chosen].sum(0)
            expected = total / max(np.linalg.norm(total), 1e-30)
            # float32 results of sums without rounding errors.
            np.testing.assert_allclose(found[row, kind, own], expected, atol=1e-7)
            np.testing.assert_allclose(of_items[row, kind], expected @ space[asked[row]], atol=1e-6)
        assert not found[row, :, others].any()
        sums = vectors[np.concatenate([events[: covered[row]], added])].sum(0)
        tail = np.concatenate([np.zeros(60, np.int64), item[recent]])[None, -max(tail_len, 1) :]
        tail[0, : tail.shape[1] - len(recent)] = 0
        of_tail = None
        if weight is not None:
            of_tail = np.concatenate([np.ones(60, np.float32), weight[recent]])[None, -max(tail_len, 1) :]
        served = pooled_vectors(spaces[own], sums[None], tail, of_tail)
        np.testing.assert_array_equal(served[0], found[row, :, own])


def test_spaces_of_labels_are_those_of_a_dense_svd(tmp_path: Path) -> None:
    """Of what the rates of items and users leave; events weigh what their action tells, minus the item's rate."""
    rng, num_users, dim = np.random.default_rng(0), 60, 3
    user, row = rng.integers(0, num_users, 2000), rng.integers(0, 12, 2000)
    label = (rng.random(2000) < 0.3 + 0.4 * (user % 2 == row % 2)).astype(np.float64)
    of_action = np.array([1.0, np.nan, 0.25])
    spaces = ItemSpaces(
        drawn_log(tmp_path / "log"),
        ROWS,
        np.zeros(NUM_USERS + 1, np.int64),  # events are not read
        dim,
        seed=1,
        num_rows=13,
        residuals=LabelResiduals(user, row, label, of_action),
    )
    assert spaces.weights is not None and spaces.of_each.shape == (FOLDS + 1, 13, dim)
    for number, left_out in enumerate((*range(FOLDS), None)):
        kept = np.ones(2000, np.bool_) if left_out is None else fold_of(user) != left_out
        mean, rate, shown = label[kept].mean(), np.zeros(13), np.zeros(13)
        for item in range(13):
            own = label[kept & (row == item)]
            shown[item] = len(own) + RATE_PRIOR
            rate[item] = (own.sum() + RATE_PRIOR * mean) / shown[item]
        matrix = np.zeros((num_users, 13))
        for one in range(num_users):
            own = np.flatnonzero(kept & (user == one))
            residual = label[own] - rate[row[own]]
            np.add.at(
                matrix[one], row[own], (residual - residual.sum() / (len(own) + USER_PRIOR)) / shown[row[own]] ** 0.5
            )
        matrix[:, 0] = 0
        right = np.linalg.svd(matrix, full_matrices=False)[2][:dim].T
        np.testing.assert_allclose(cosine_similarity(spaces.of_each[number]), cosine_similarity(right), atol=2e-3)
        expected = np.where(np.isnan(of_action), 0, of_action - rate[:, None])
        np.testing.assert_allclose(spaces.weights[number], expected, atol=COARSE)
        product = spaces.of_each[number, :, None].astype(np.float64) * spaces.weights[number][..., None]
        assert (product / GRID == np.round(product / GRID)).all() and (product == product.astype(np.float32)).all()
    alike = cosine_similarity(spaces.of_each[-1])[1:, 1:]  # users are better at either even or odd items
    assert alike[::2, ::2].mean() > alike[::2, 1::2].mean() + 0.5
    assert not spaces.weights_of_all(20)[13:].any()


@pytest.mark.parametrize(("told", "alone"), [(True, True), (False, True), (True, False)])
def test_labels_make_the_space_where_actions_tell_them(tmp_path: Path, *, told: bool, alone: bool) -> None:
    rng, n = np.random.default_rng(0), np.arange(600)
    user, item, right = n % 12, rng.integers(0, 20, 600), rng.random(600) < 0.6
    events = {"user": user, "item": item, "timestamp": 10 * n + 10, "action": np.where(right, "right", "wrong")}
    label = right if told else rng.random(600) < 0.6
    shown = {"user": user, "item": item, "timestamp": 10 * n + 9, "correct": label}
    shown["item"] = np.where(n % 7 == 0, (item + 1) % 20, item)  # not followed by an event of the item
    columns = SourceColumns(action="action", labels=["correct"])
    log = EventLog.from_frame(events, tmp_path / "log", time_unit="s", impressions=shown, columns=columns)
    config = small_config(log, tmp_path, model__pooled_dim=5, optim__next_weight=0.0 if alone else 1.0)
    made = Trainer(config, log)
    space, task = made.source.spaces, made.model.schema.residual_task
    assert space is not None and (task == "correct") == (space.weights is not None) == (told and alone)
    made._start(MetricsWriter(tmp_path))
    if task is None:
        assert made.model.item_space_weights is None
        return
    rows = made.model.item_rows(log.items.ids(np.arange(20)))
    counts = made.source.counts.tolist()
    known = np.concatenate([np.flatnonzero(user == one)[:count] for one, count in enumerate(counts)])
    mean, weights = right[known].mean(), made.model.item_space_weights
    assert weights is not None and log.actions == ["right", "wrong"]
    for one in range(20):
        own = right[known][shown["item"][known] == one]
        rate = (own.sum() + RATE_PRIOR * mean) / (len(own) + RATE_PRIOR)
        np.testing.assert_allclose(weights[rows[one]], [1 - rate, -rate], atol=COARSE)


def test_label_rates_equal_a_loop(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    item, user, mask = rng.integers(0, 6, 200), rng.integers(0, 9, 200), rng.random((200, 2)) < 0.7
    label = (rng.random((200, 2)) < [0.2, 0.6]).astype(np.float32)
    rates = ItemRates(item, label, mask, user, 8)
    assert rates.of_each.shape == (FOLDS + 1, 8, 2)
    for table, left_out in enumerate((*range(FOLDS), None)):
        scale = 1.0 if left_out is None else FOLDS / (FOLDS - 1)
        for task in range(2):
            own = mask[:, task] & (item > 0) & (True if left_out is None else fold_of(np.asarray(user)) != left_out)
            mean = (scale * label[own, task].sum() + 1) / (scale * own.sum() + 2)
            for row in range(8):
                one = own & (item == row)
                true = scale * label[one, task].sum() + RATE_PRIOR * mean
                rate = true / (scale * one.sum() + RATE_PRIOR)
                expected = np.log(rate / (1 - rate)) - np.log(mean / (1 - mean)) if row else 0.0
                np.testing.assert_allclose(rates.of_each[table, row, task], expected, atol=1e-6)
    users = np.array([3, 4])
    np.testing.assert_array_equal(rates.of_items(users, np.array([2, 2])), rates.of_each[fold_of(users), 2])
    other = label.copy()
    other[fold_of(user) == 0] = 1 - other[fold_of(user) == 0]
    changed = ItemRates(item, other, mask, user, 8)
    np.testing.assert_array_equal(changed.of_each[0], rates.of_each[0])  # what these users' questions read
    assert not np.array_equal(changed.of_each[1], rates.of_each[1])


@pytest.mark.parametrize("step", [1, 2, 3, 4, 8, 10, 100])
def test_every_nth_user_is_in_each_fold(step: int) -> None:
    """Users in such an order may have something in common, which questions must still learn from other users."""
    for first in range(step):
        share = np.bincount(fold_of(np.arange(first, first + 1000 * step, step)), minlength=FOLDS) / 1000
        assert (np.abs(share - 1 / FOLDS) < 0.1).all()


def test_statistics_of_single_items_are_those_as_of_the_time(tmp_path: Path) -> None:
    log = drawn_log(tmp_path / "log")
    statistics = ItemStatistics(log, ROWS, visible(log))
    times = np.arange(-5, len(log.items) * 40, 37) * 1000
    known, values = statistics.as_of(times, np.arange(1 + NUM_ITEMS))
    asked, rows = np.meshgrid(times, np.arange(1 + NUM_ITEMS), indexing="ij")
    index = np.searchsorted(known, asked.ravel(), side="right") - 1
    np.testing.assert_array_equal(statistics.of_items(asked.ravel(), rows.ravel()), values[index, rows.ravel()])


def source_of(log: EventLog, folder: Path, *, counters: bool, dim: int = 4) -> BatchSource:
    config = small_config(
        log,
        folder,
        model__counter_keys=["item"] if counters else [],
        model__pooled_dim=dim,
        optim__window_weight=float(counters),
    )
    keys = only_items(CounterSpec()) if counters else None
    return BatchSource(log, ModelReads(ROWS, keys=keys), config)


def batches(source: BatchSource) -> list[Batch]:
    return [source.batch(0, index) for index in range(source.num_batches(0))]


def test_batches_have_the_vectors_of_their_items_and_folds(tmp_path: Path) -> None:
    """A stretch of a user's history: pooled vectors lie in the columns of the space that does not know the user."""
    log = drawn_log(tmp_path / "log", impressions=5)
    for counters in (True, False):
        source, found = source_of(log, tmp_path / "run", counters=counters), 0
        assert source.spaces is not None and source.rates is not None and source.statistics is not None
        for batch in batches(source):
            assert batch.spaces is not None
            np.testing.assert_array_equal(batch.spaces.numpy(), source.spaces.of_rows(batch.rows.numpy()))
            if counters:
                assert batch.anchors is not None and batch.labels.pooled is None
                pooled, window = batch.anchors.pooled, batch.anchors.window
            else:
                pooled, window = batch.labels.pooled, torch.arange(len(batch.windows.chunk))
            assert pooled is not None
            user = batch.user[batch.windows.chunk[window]]
            by_fold = pooled.unflatten(-1, (FOLDS, 4)).movedim(-2, 0)
            for fold in range(FOLDS):
                assert not by_fold[fold][fold_of(np.asarray(user)) != fold].any()
                found += int(by_fold[fold].any(-1).sum())
        assert found > 50


def test_impressions_have_the_inputs_of_their_items(tmp_path: Path) -> None:
    log = drawn_log(tmp_path / "log", impressions=9)
    source, found = source_of(log, tmp_path / "run", counters=False), 0
    assert source.spaces is not None and source.rates is not None and source.statistics is not None
    for batch in batches(source):
        shown = batch.impressions
        assert shown.inputs is not None
        width = len(Pooled)
        for window, column in shown.mask.any(-1).nonzero().tolist():
            user, row = int(batch.user[batch.windows.chunk[window]]), int(batch.rows[shown.item[window, column]])
            inputs = shown.inputs[window, column].numpy()
            np.testing.assert_array_equal(inputs[-2:], source.rates.of_items(np.array([user]), np.array([row]))[0])
            # Its statistics are those as of one of the times.
            _, values = source.statistics.as_of(source.statistics.time, np.array([row]))
            assert (inputs[width:-2] == values[:, 0]).all(1).any()
            found += int(abs(inputs[: len(Pooled)]).max() > 0)
    assert found > 20


@pytest.mark.parametrize("counters", [True, False])
def test_later_events_change_no_question(tmp_path: Path, counters: bool) -> None:
    """Batches of logs that differ in hidden events are equal."""
    log, other = (drawn_log(tmp_path / str(ends), other_ends=ends, impressions=4) for ends in (False, True))
    one, two = (batches(source_of(each, tmp_path / "run", counters=counters)) for each in (log, other))
    for a, b in zip(one, two, strict=True):
        first, second = a.tensors(), b.tensors()
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
