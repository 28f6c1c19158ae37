"""Batches from a log: what a pass contains, what it must not contain, and that it is reproducible.

Event i of the log is item i, so a batch can be read back.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.conftest import model_config, small_config
from tests.counters.counter_histories import only_items
from vista.arrays import Int
from vista.config import DataConfig, FromEventsConfig, ModelConfig, OptimConfig, SourceColumns, TrainConfig
from vista.config.checks import Architecture, Decay, Split
from vista.counters.counters import CounterSpec
from vista.counters.keys import ItemKeys
from vista.errors import ConfigError
from vista.examples.batch import Batch
from vista.examples.batch_source import (
    BatchSource,
    Examination,
    ModelReads,
    NegativeSampler,
    StoredSummaries,
    VisibleImpressions,
    chunk_len,
    events_before,
    position_weights,
)
from vista.examples.item_statistics import item_counts
from vista.log.event_log import EventLog
from vista.log.histories import DAY_MS
from vista.log.splits import split_until, visible_counts

LENGTHS = [5, 1, 40, 2, 3, 17, 90]
MS = 1000


@dataclass(frozen=True)
class World:
    """A log and the data that it was made from; `shown_*` [N] are the user, time and item of impressions."""

    log: EventLog
    time: Int
    offsets: Int
    shown_user: Int
    shown_time: Int
    shown_item: Int


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    rng = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(LENGTHS)])
    user = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    # Seconds from 1000 to 1999, with ties; the last user is the only one with late events.
    time = np.concatenate([np.sort(rng.integers(1000, 1900 if u < 6 else 2000, n)) for u, n in enumerate(LENGTHS)])
    shown_user = np.sort(rng.integers(0, len(LENGTHS) + 1, 150))  # user 7 has impressions but no events
    shown_time = np.concatenate([np.sort(rng.integers(990, 2010, n)) for n in np.bincount(shown_user, minlength=8)])
    shown_item = np.arange(150) + len(time)
    log = EventLog.from_frame(
        {
            "user": np.append(user, 7),
            "item": np.append(np.arange(len(time)), 10_000),
            "timestamp": np.append(time, 3000),
        },
        tmp_path_factory.mktemp("batches") / "log",
        time_unit="s",
        impressions={"user": shown_user, "item": shown_item, "timestamp": shown_time, "click": rng.integers(0, 2, 150)},
        columns=SourceColumns(labels=["click"]),
    )
    return World(log, time * MS, offsets, shown_user, shown_time * MS, shown_item)


def source(
    world: World,
    *,
    model: dict[str, Any] | None = None,
    optim: dict[str, Any] | None = None,
    stored: StoredSummaries | None = None,
    keys: ItemKeys | None = None,
    **data: Any,
) -> BatchSource:
    options = {"tokens_per_batch": 64, "label_spacing": 4, "num_negatives": 8, "split": Split.leave_last_out} | data
    config = TrainConfig(
        model=model_config(**({"dim": 8, "num_heads": 2, "tail_len": 4} | (model or {}))),
        data=DataConfig(**options),
        optim=OptimConfig(**(optim or {})),
        seed=3,
    )
    return BatchSource(world.log, ModelReads(np.arange(world.log.num_items) + 1, keys=keys), config, stored)


def time_split(world: World, **data: Any) -> BatchSource:
    return source(world, split=Split.time, validation_from=str(1700 * MS), test_from=str(1800 * MS), **data)


def items(world: World, batch: Batch, rows: torch.Tensor) -> Int:
    """Raw item ids of a batch's rows; a row of 0 (unknown) is -1."""
    model_rows = batch.rows.numpy()[rows.numpy()]
    return np.where(model_rows > 0, world.log.items.ids(np.maximum(model_rows - 1, 0).ravel()).reshape(rows.shape), -1)


def labels(world: World, batch: Batch) -> Int:
    return items(world, batch, batch.labels.item)[batch.labels.item.numpy() >= 0]


def whole_pass(made: BatchSource, epoch: int = 0) -> list[Batch]:
    return [made.batch(epoch, index) for index in range(made.num_batches(epoch))]


def visible_events(world: World) -> Int:
    """Leave-last-out: all but the last two events of users with at least three."""
    hidden = [n - 2 if n >= 3 else n for n in LENGTHS]
    return np.concatenate([world.offsets[u] + np.arange(n) for u, n in enumerate(hidden)] + [[10_000]])


def test_items_that_training_never_shows_are_negatives_too(world: World) -> None:
    """Nothing else would keep their random vectors out of the top of users' lists."""
    rows = np.arange(world.log.num_items) + 5  # the vocabulary has four more items than the log
    config = TrainConfig(
        model=ModelConfig(dim=8, num_heads=2, tail_len=4),
        data=DataConfig(tokens_per_batch=8192, label_spacing=4, num_negatives=10**6),
    )
    batch = BatchSource(world.log, ModelReads(rows), config).batch(0, 0)
    assert batch.rows[batch.negatives.item].tolist() == list(range(1, world.log.num_items + 5))


@pytest.mark.parametrize("strength", [1.0, 0.75, 0.0])
def test_logq_strength_changes_nothing_but_the_adjustment(world: World, strength: float) -> None:
    rows = np.arange(world.log.num_items) // 3 + 1  # three items of the log share one row of the model

    def tensors(optim: OptimConfig) -> dict[str, torch.Tensor]:
        data = DataConfig(tokens_per_batch=64, label_spacing=4, num_negatives=8)
        model = ModelConfig(dim=8, num_heads=2, tail_len=4)
        return (
            BatchSource(world.log, ModelReads(rows), TrainConfig(model=model, data=data, optim=optim))
            .batch(0, 0)
            .tensors()
        )

    plain, adjusted = tensors(OptimConfig()), tensors(OptimConfig(logq_strength=strength))
    adjustment = adjusted.pop("logit_adjustment", None)
    assert adjusted.keys() == plain.keys() and all(adjusted[name].equal(plain[name]) for name in adjusted)
    if strength == 1:
        assert adjustment is None
        return
    visible = world.log.items.rows(visible_events(world))  # event i is item i
    events = np.maximum(np.bincount(rows[visible], minlength=rows.max() + 1), 1)
    used = adjusted["rows"].numpy()
    assert len(np.unique(events[used])) > 2
    expected = (1 - strength) * np.log(events[used] / events[1:].sum())
    assert adjustment is not None and adjustment.dtype == torch.float32
    np.testing.assert_allclose(adjustment.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({}, 16384),
        ({"chunk_len": 16}, 16),
        ({"chunk_len": 1}, 1),
        ({"model": {"history_limit": 7}}, 7),
        ({"model": {"architecture": "sasrec", "history_limit": 7}}, 8),  # the last event is only a label
        ({"tokens_per_batch": 1}, 16384),
    ],
    ids=str,
)
def test_a_pass_labels_every_visible_event_once(world: World, options: dict[str, Any], limit: int) -> None:
    made = source(world, **options)
    for epoch in (0, 1):
        batches = whole_pass(made, epoch)
        labeled = np.concatenate([labels(world, batch) for batch in batches])
        np.testing.assert_array_equal(np.sort(labeled), visible_events(world))
        assert max(int(batch.events.offsets.diff().max()) for batch in batches) == min(limit, max(LENGTHS) - 2)
        for batch in batches:
            lengths = batch.events.offsets.diff()
            assert len(batch.events.item) <= options.get("tokens_per_batch", 64) or len(lengths) == 1


def test_chunks_of_models_that_only_rank_may_be_longer_than_their_limit() -> None:
    assert chunk_len(TrainConfig(model=model_config(Architecture.din, history_limit=7))) == DataConfig().chunk_len


def test_hidden_events_are_nowhere(world: World) -> None:
    """Their items may be negatives, like all items, but neither context nor labels."""
    hidden = np.setdiff1d(np.arange(len(world.time)), visible_events(world))
    late = np.flatnonzero(world.time >= 1700 * MS)
    options = {"optim": WITH_WINDOWS, "chunk_len": 16}
    for made, unseen in ((source(world, **options), hidden), (time_split(world, **options), late)):
        for batch in whole_pass(made):
            assert not np.isin(items(world, batch, batch.events.item), unseen).any()
            assert not np.isin(labels(world, batch), unseen).any()
            for _, label in asked_anchors(world, batch):
                assert not np.isin(label, unseen).any()


WITH_WINDOWS = {"window_weight": 1.0}


def asked_anchors(world: World, batch: Batch) -> list[tuple[int, Int]]:
    """(packed event after the anchor's newest visible one, labels as events of the log) of each anchor."""
    anchors = batch.anchors
    assert anchors is not None
    W = batch.labels.item.shape[1]
    tail = batch.windows.tail_index[anchors.window, batch.windows.tail_index.shape[1] - W + anchors.position]
    raw = items(world, batch, anchors.item)
    return [
        (int(newest) + 1, np.sort(label[known]))
        for newest, label, known in zip(tail, raw, (anchors.item >= 0).numpy(), strict=True)
    ]


@pytest.mark.parametrize("chunk_len", [16384, 16])
@pytest.mark.parametrize("by_time", [True, False])
def test_anchors_ask_about_the_next_visible_events(world: World, by_time: bool, chunk_len: int) -> None:
    """Also beyond their chunk, but never beyond what training may see."""
    options = {"optim": WITH_WINDOWS, "chunk_len": chunk_len, "horizon_events": 6, "anchor_spacing": 3}
    made = time_split(world, **options) if by_time else source(world, **options)
    ends = world.offsets[:-1] + made.counts[world.log.users.rows(np.arange(len(LENGTHS)))]
    owner, beyond, sizes = np.repeat(np.arange(len(LENGTHS)), LENGTHS), 0, []
    for batch in whole_pass(made):
        events = items(world, batch, batch.events.item)
        for place, label in asked_anchors(world, batch):
            first = label[0]
            if first >= len(world.time):
                continue  # the only event of user 7
            np.testing.assert_array_equal(label, np.arange(first, min(first + 6, ends[owner[first]])))
            # The newest event that the anchor sees is the one before its labels, or it sees none.
            assert place == 0 or events[place - 1] == first - 1
            beyond += not np.isin(label, events).all()
            sizes.append(len(label))
    assert (beyond > 0) == (chunk_len == 16)
    assert len(sizes) > 20 and min(sizes) < 6 == max(sizes)


def test_questions_per_event_do_not_depend_on_the_length_of_chunks(world: World) -> None:
    """So architectures that cut histories differently train on as many questions."""
    chunks = []
    for model in ({}, {"architecture": Architecture.hstu, "history_limit": 20}):
        batches = whole_pass(source(world, model=model, optim=WITH_WINDOWS, anchor_spacing=4))
        num_events = sum(len(batch.events.item) for batch in batches)
        num_asked = sum(len(asked_anchors(world, batch)) for batch in batches)
        chunks.append(sum(len(batch.user) for batch in batches))
        assert num_events == len(visible_events(world))
        assert num_events / 4 <= num_asked < num_events / 4 + chunks[-1], "rounded up once per chunk"
    assert chunks[0] < chunks[1]


@pytest.mark.parametrize("chunk_len", [7, 1000])
@pytest.mark.parametrize("since", [None, 1400 * MS])
def test_counted_items_are_those_of_the_record_and_the_tail(world: World, since: int | None, chunk_len: int) -> None:
    """Every event has an item of its own. Counters cover the whole history, also of a chunk that begins late."""
    stored = None if since is None else StoredSummaries(since, lambda users: np.zeros((len(users), 2, 8), np.float32))
    spec, gaps = CounterSpec(keys=(1000,)), 0
    options = {"optim": WITH_WINDOWS, "model": {"counter_keys": ["item"]}}
    options |= {"chunk_len": chunk_len, "staleness_share": 0.5, "anchor_spacing": 2}
    made = time_split(world, stored=stored, keys=only_items(spec), **options)
    for batch in whole_pass(made):
        anchors = batch.anchors
        assert anchors is not None and anchors.counters is not None
        for row, window in enumerate(anchors.window.tolist()):
            counted = items(world, batch, anchors.counters.item[row][anchors.counters.item[row] >= 0])
            event = int(items(world, batch, anchors.next_item[[row]])[0])
            user = int(np.searchsorted(world.offsets, event, side="right")) - 1
            start = int(world.offsets[user])
            tail = batch.windows.tail_index[window]
            tail = items(world, batch, batch.events.item[tail[tail >= 0]])
            if since is None:
                cut, label = int(batch.windows.cut[window]), batch.labels.item[window]
                oldest = items(world, batch, batch.events.item[batch.cuts.start[[cut]]])
                counted_until = int(oldest[0]) + int(batch.cuts.stop[cut] - batch.cuts.start[cut])
                first = min(counted_until, int(items(world, batch, label[label >= 0]).min()))
            else:
                first = start + int((world.time[start : world.offsets[user + 1]] < since).sum())
            expected = {*range(start, first), *(item for item in tail if first <= item < event)}
            assert set(counted) == expected
            assert int(anchors.counters.num_events[row]) == len(expected)
            gaps += len(expected) < event - start
    assert gaps > 3 or chunk_len == 7, "events between a record and the tail are not counted"


def test_anchors_after_stored_summaries_ask_about_later_events(world: World) -> None:
    since = 1400 * MS
    stored = StoredSummaries(since, lambda users: np.zeros((len(users), 2, 8), np.float32))
    labels = [
        label
        for batch in whole_pass(time_split(world, stored=stored, optim=WITH_WINDOWS, anchor_spacing=4))
        for _, label in asked_anchors(world, batch)
    ]
    assert len(labels) > 10
    for label in labels:
        assert (world.time[label] >= since).all() and (world.time[label] < 1700 * MS).all()


def test_the_mean_number_of_labels_is_that_of_all_anchors(world: World) -> None:
    made = source(world, optim=WITH_WINDOWS, horizon_events=6)
    batches = whole_pass(made)
    assert len(batches) <= 16
    sizes = [len(label) for batch in batches for _, label in asked_anchors(world, batch)]
    measured = [batch.anchors.mean_labels for batch in batches if batch.anchors]
    assert measured == pytest.approx([np.mean(sizes)] * len(batches))
    assert source(world).batch(0, 0).anchors is None, "without the window loss there are none"


def test_a_horizon_in_days_needs_times(tmp_path: Path) -> None:
    frame = {"user": np.repeat(np.arange(4), 5), "item": np.arange(20)}
    log = EventLog.from_frame(frame, tmp_path / "log", columns=SourceColumns(timestamp=None))
    data = DataConfig(horizon_days=7, tokens_per_batch=64, num_negatives=8)
    config = TrainConfig(data=data, optim=OptimConfig(**WITH_WINDOWS))
    with pytest.raises(ConfigError, match=r"data\.horizon_days: .* has no times; set it to 0"):
        BatchSource(log, ModelReads(np.arange(20) + 1), config)
    config.data.horizon_days = 0.0
    anchors = BatchSource(log, ModelReads(np.arange(20) + 1), config).batch(0, 0).anchors
    assert anchors is not None and len(anchors.window) and not anchors.gap.any()


def test_a_batch_depends_only_on_seed_epoch_and_index(world: World) -> None:
    made = source(world, unknown_share=0.2, optim=WITH_WINDOWS)
    forwards = whole_pass(made)
    assert all(batch.events.hidden is not None for batch in forwards)
    again = source(world, unknown_share=0.2, optim=WITH_WINDOWS)
    again.batch(1, 0)
    for index in reversed(range(again.num_batches(0))):
        one, two = forwards[index].tensors(), again.batch(0, index).tensors()
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    other = whole_pass(made, 1)
    assert any(not torch.equal(a.events.offsets, b.events.offsets) for a, b in zip(forwards, other, strict=False))


def shown_positions(world: World, batches: list[Batch]) -> dict[int, tuple[int, int, int, int]]:
    """{impressed item: (user row, events it may see in its chunk, the newest of them or -1, its gap)} of a pass."""
    positions = {}
    for batch in batches:
        shown, event = items(world, batch, batch.impressions.item), items(world, batch, batch.events.item)
        W, L = batch.labels.item.shape[1], batch.windows.tail_index.shape[1]
        start = batch.cuts.start[batch.windows.cut].numpy()
        for window, place in np.argwhere(batch.impressions.mask.numpy().any(-1)):
            seen = L - W + 1 + int(batch.impressions.position[window, place])
            tail = batch.windows.tail_index[window, : max(seen, 0)].numpy()
            newest = int(tail[-1]) if len(tail) else -1
            end = int(batch.windows.tail_index[window, -1]) + 1
            position = end - W + 1 + int(batch.impressions.position[window, place]) - int(start[window]) if end else 0
            item = int(shown[window, place])
            assert item not in positions, "an impression is used once"
            chunk = np.searchsorted(batch.events.offsets.numpy(), start[window], side="right") - 1
            gap = int(batch.impressions.gap[window, place])
            user = int(batch.user[min(chunk, len(batch.user) - 1)])  # arbitrary for a chunk without events
            positions[item] = (user, position, int(event[newest]) if newest >= 0 else -1, gap)
    return positions


@pytest.mark.parametrize("chunk_len", [16384, 16])
def test_impressions_see_the_events_strictly_before_them(world: World, chunk_len: int) -> None:
    made = time_split(world, chunk_len=chunk_len)
    positions = shown_positions(world, whole_pass(made))
    expected = np.flatnonzero(world.shown_time < 1700 * MS)
    assert sorted(positions) == (expected + len(world.time)).tolist()
    gaps = 0
    for number in expected:
        user, time = world.shown_user[number], world.shown_time[number]
        where = world.log.users.rows([user])[0]
        row, position, newest, gap = positions[number + len(world.time)]
        if user == 7:
            assert (position, newest, gap) == (0, -1, 0), "a user without events before"
            continue
        assert row == where or newest < 0
        before = world.time[world.offsets[user] : world.offsets[user + 1]] < time
        assert newest == (world.offsets[user] + before.sum() - 1 if before.any() else -1)
        if chunk_len > 100:
            assert position == before.sum()
        if newest >= 0 and gap:  # some windows have no time
            gaps += 1
            assert gap == 1 + int(np.log2(1 + (time - world.time[newest]) // MS))
    assert gaps > 40


@pytest.mark.parametrize("options", [{}, {"chunk_len": 16}, {"label_spacing": 1}], ids=str)
def test_with_stored_summaries_labels_lie_after_the_covered_events(world: World, options: dict[str, Any]) -> None:
    """Each window reads the summary of its own user, and a tail that may begin before them."""
    since = 1400 * MS
    stored = StoredSummaries(since, lambda users: np.tile(users[:, None, None].astype(np.float32), (1, 2, 8)))
    made = time_split(world, stored=stored, **options)
    batches = whole_pass(made)
    expected = np.flatnonzero((world.time >= since) & (world.time < 1700 * MS))
    np.testing.assert_array_equal(np.sort(np.concatenate([labels(world, b) for b in batches])), expected)
    owner = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    where = world.log.users.rows(np.arange(8))
    first = np.array([(world.time[owner == user] < since).sum() for user in range(len(LENGTHS))])
    shown = []
    for batch in batches:
        event, label = items(world, batch, batch.events.item), items(world, batch, batch.labels.item)
        W, L = batch.labels.item.shape[1], batch.windows.tail_index.shape[1]
        number = event - world.offsets[owner[event]]
        assert (number >= first[owner[event]] - L).all(), "histories are not read again"
        assert batch.stored_summary is not None and len(batch.cuts.stop) == len(batch.reconstruction.cut) == 0
        read = batch.stored_summary[batch.windows.cut, 0, 0].numpy()
        impression = items(world, batch, batch.impressions.item) - len(world.time)
        questions = [(w, j, label[w, j]) for w, j in np.argwhere(batch.labels.item.numpy() >= 0)]
        for w, place in np.argwhere(batch.impressions.mask.numpy().any(-1)):
            number_shown = impression[w, place]
            shown.append(number_shown)
            user = world.shown_user[number_shown]
            before = (
                (world.time[world.offsets[user] :][: LENGTHS[user]] < world.shown_time[number_shown]).sum()
                if user < 7
                else 0
            )
            questions.append((w, int(batch.impressions.position[w, place]), (user, before)))
        for w, j, asked in questions:
            user, before = asked if isinstance(asked, tuple) else (owner[asked], asked - world.offsets[owner[asked]])
            assert read[w] == where[user]
            index = batch.windows.tail_index[w, : L - W + 1 + j].numpy()
            newest = world.offsets[min(user, 6)] + np.arange(max(0, before - len(index)), before)
            np.testing.assert_array_equal(event[index[index >= 0]], newest)
    assert sorted(shown) == np.flatnonzero((world.shown_time >= since) & (world.shown_time < 1700 * MS)).tolist()
    assert len(shown) > 30 and 7 in world.shown_user[shown]


def test_a_store_without_a_label_after_it_is_refused(world: World) -> None:
    stored = StoredSummaries(1700 * MS, lambda users: np.zeros((len(users), 1, 8), np.float32))
    with pytest.raises(ConfigError, match=r"store: was refreshed with until=1700000, and no label .* an earlier until"):
        time_split(world, stored=stored)


def test_leave_last_out_hides_impressions_of_the_hidden_events(world: World) -> None:
    """After the last visible event, impressions show items of hidden events, the labels of validation and test."""
    positions = shown_positions(world, whole_pass(source(world)))
    for number, (user, time) in enumerate(zip(world.shown_user, world.shown_time, strict=True)):
        item = number + len(world.time)
        if user == 7:
            assert item in positions, "this user has no hidden events"
            continue
        length = LENGTHS[user]
        visible = world.time[world.offsets[user] :][: length - 2 if length >= 3 else length]
        hidden = length >= 3 and time > visible[-1]
        assert (item in positions) == (not hidden)
    assert len(positions) < len(world.shown_user)


def test_features_follow_the_configuration(world: World) -> None:
    made = source(world, chunk_len=10)
    for batch in whole_pass(made):
        event = items(world, batch, batch.events.item)
        first = batch.events.offsets[:-1].numpy()
        seconds = np.diff(world.time[np.minimum(event, len(world.time) - 1)], prepend=0) // MS
        expected = 1 + np.log2(1 + np.maximum(seconds, 0)).astype(int)
        expected[first[batch.events.offsets.diff().numpy() > 0]] = 0
        np.testing.assert_array_equal(batch.events.gap.numpy(), expected)
        known = event < len(world.time)
        np.testing.assert_array_equal(batch.events.clock.numpy()[known], world.time[event[known]])
        assert batch.events.rating is None
    for batch in whole_pass(source(world, model={"ignore": ["times"]})):
        assert not batch.events.gap.any() and not batch.labels.gap.any() and not batch.impressions.gap.any()
    by_position = {"decay": Decay.position, "decay_horizons": [1.0, 2.0]}
    for batch in whole_pass(source(world, model=by_position)):
        assert (batch.events.clock.diff() == 1).all()


def test_unknown_items_of_the_vocabulary_are_row_0(world: World) -> None:
    """A log may hold items that the model's own vocabulary lacks."""
    rows = np.arange(world.log.num_items) + 1
    rows[:5] = 0
    config = TrainConfig(model=ModelConfig(dim=8, num_heads=2), data=DataConfig(tokens_per_batch=4096, num_negatives=8))
    batch = BatchSource(world.log, ModelReads(rows), config).batch(0, 0)
    assert (batch.rows[batch.events.item] == 0).sum() == np.isin(np.arange(5), visible_events(world)).sum() > 0
    # They are neither labels nor negatives.
    assert batch.labels.item.min() == -1 and not (batch.rows[batch.labels.item[batch.labels.item >= 0]] == 0).any()
    assert not (batch.rows[batch.negatives.item] == 0).any()


def test_events_before(world: World) -> None:
    times = world.time[world.offsets[2] : world.offsets[3]]
    asked = np.concatenate([times, times + 1, [0, 2**60]])
    counts = events_before(world.log, 2, asked, 40)
    np.testing.assert_array_equal(counts, (times[None] < asked[:, None]).sum(1))
    assert events_before(world.log, 2, np.array([2**60]), 10).tolist() == [10]


COUNTS = np.array([0, 1, 4, 0, 9, 100, 2, 50, 7, 0, 30], np.int64)


@pytest.mark.parametrize(("power", "num_negatives"), [(0.0, 3), (0.5, 1), (1.0, 7)])
def test_weights_are_unbiased(power: float, num_negatives: int) -> None:
    """The expected weight of each item (0 if it is not drawn) is 1, so the expected sum is the number of items."""
    sampler = NegativeSampler(COUNTS, num_negatives=num_negatives, power=power)
    rng = np.random.default_rng(0)
    passes = 3000
    total, squares = np.zeros(len(COUNTS)), np.zeros(len(COUNTS))
    for _ in range(passes):
        items, log_weight = sampler.draw(rng)
        weight = np.zeros(len(COUNTS))
        weight[items] = np.exp(log_weight.astype(np.float64))
        total += weight
        squares += weight**2
    mean = total / passes
    error = np.sqrt(np.maximum(squares / passes - mean**2, 0) / passes)
    occurring = COUNTS > 0
    assert not mean[~occurring].any(), "items that never occur are never drawn"
    assert (np.abs(mean - 1)[occurring] < 5 * error[occurring] + 1e-6).all()


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_draws_are_distinct_sorted_and_limited_in_number(power: float) -> None:
    sampler = NegativeSampler(np.arange(2000), num_negatives=300, power=power)
    for seed in range(20):
        items, log_weight = sampler.draw(np.random.default_rng(seed))
        assert items.dtype == np.int64 and log_weight.dtype == np.float32
        assert (np.diff(items) > 0).all() and items[0] > 0
        assert len(items) == len(log_weight) and len(items) <= 300
        assert power or len(items) == 300


def test_power_draws_in_proportion_to_frequency() -> None:
    sampler = NegativeSampler(COUNTS, num_negatives=1, power=1.0)
    rng = np.random.default_rng(1)
    drawn = np.bincount([sampler.draw(rng)[0][0] for _ in range(6000)], minlength=len(COUNTS))
    expected = COUNTS / COUNTS.sum()
    assert np.abs(drawn / 6000 - expected).max() < 5 * np.sqrt(0.25 / 6000)


@pytest.mark.parametrize("power", [0.0, 0.7])
@pytest.mark.parametrize("num_negatives", [8, 1000])
def test_enough_negatives_include_every_item_once(power: float, num_negatives: int) -> None:
    sampler = NegativeSampler(COUNTS, num_negatives=num_negatives, power=power)
    items, log_weight = sampler.draw(np.random.default_rng(0))
    np.testing.assert_array_equal(items, np.flatnonzero(COUNTS))
    assert not log_weight.any()


def test_a_log_without_items_is_refused() -> None:
    with pytest.raises(ValueError, match="no item occurs in training"):
        NegativeSampler(np.zeros(4, np.int64), num_negatives=2, power=0.0)


NUM_ITEMS = 2000


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> EventLog:
    """300 users with Zipf-distributed items; the first user has them all, so that row r is item r."""
    rng = np.random.default_rng(0)
    items = np.concatenate([np.arange(NUM_ITEMS), rng.zipf(1.2, 30_000) % NUM_ITEMS])
    users = np.concatenate([np.zeros(NUM_ITEMS, np.int64), rng.integers(1, 300, 30_000)])
    folder = tmp_path_factory.mktemp("frequency") / "log"
    return EventLog.from_frame({"user": users, "item": items}, folder, columns=SourceColumns(timestamp=None))


def some_counts(log: EventLog, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, log.lengths + 1)


@pytest.mark.parametrize("block_events", [1, 5000, 1 << 22])
def test_exact_counts_equal_a_plain_loop(log: EventLog, block_events: int) -> None:
    counts = some_counts(log, 1)
    expected = np.zeros(NUM_ITEMS, np.int64)
    for row in range(log.num_users):
        np.add.at(expected, log.slice(row, 0, counts[row]).item, 1)
    np.testing.assert_array_equal(item_counts(log, counts, block_events=block_events), expected)


@pytest.mark.parametrize(
    "split",
    [
        {"split": Split.leave_last_out},
        {"split": Split.time, "validation_from": "1970-01-25", "test_from": "1970-02-05"},
    ],
)
def test_labels_that_hidden_events_decide_are_not_trained(tmp_path: Path, split: dict[str, Any]) -> None:
    """With all hidden events of another item, the trained labels of `again` are the same."""
    rng, days = np.random.default_rng(0), FromEventsConfig(again_days=3.0)
    user, day = np.repeat(np.arange(20), 40), np.sort(rng.integers(0, 40, (20, 40))).ravel()
    frame = {"user": user, "item": rng.integers(0, 4, 800), "timestamp": DAY_MS * day}
    config, trained = TrainConfig(data=DataConfig(**split)), []
    for name in ("as it is", "changed"):
        log = EventLog.from_frame(frame, tmp_path / name, time_unit="ms", from_events=days)
        counts = visible_counts(log, split_until(config.data, "train"))
        shown = VisibleImpressions.of(log, np.arange(4) + 1, counts, config, ["again"], None).shown
        trained.append((shown.chunk, shown.time, shown.label[:, 0]))
        place = np.arange(800) - 40 * user
        frame["item"] = np.where(place >= counts[user], 9 + place, frame["item"])
    assert all(np.array_equal(one, other) for one, other in zip(*trained, strict=True))
    assert 0 < trained[0][2].sum() < len(trained[0][2])


class TestExamination:
    def test_weights_of_positions_are_relative_to_the_first_and_recovered(self) -> None:
        rng = np.random.default_rng(0)
        count, looks = 200_000, np.array([1.0, 0.6, 0.35, 0.2])
        item = rng.integers(0, 300, count)
        rate = rng.random(300) * 0.6
        # Items with a high rate are mostly at the top: a position's raw click rate is not its weight.
        position = np.clip(np.rint(3 - 3 * rate[item] / 0.6 + rng.standard_normal(count)), 0, 3).astype(int)
        clicked = rng.random(count) < rate[item] * looks[position]
        weights = position_weights((position + 1).astype(np.float32), item, clicked)
        assert weights[1] == 1 and (weights <= 1).all() and (weights > 0).all()
        np.testing.assert_allclose(weights[1:5], looks, atol=0.02)
        assert (weights[5:] == weights[4]).all()
        raw = [clicked[position == place].mean() for place in range(4)]
        assert raw[3] / raw[0] < looks[3] - 0.05, "without items, the estimate is biased"

    @pytest.mark.parametrize("column", ["propensity", "position"])
    def test_batches_say_how_likely_users_looked(self, tmp_path: Path, column: str) -> None:
        log = listed_log(tmp_path, column)
        config = small_config(
            log,
            tmp_path / "run",
            optim__examined_tasks=["click"],
            data__split=Split.time,
            data__validation_from="1970-01-01T00:13:00",
            data__test_from="1970-01-01T00:15:00",
        )
        source = BatchSource(log, ModelReads(np.arange(1, log.num_items + 1)), config)
        batches = [source.batch(0, index).impressions for index in range(source.num_batches(0))]
        examined = np.concatenate([batch.examined[batch.mask.any(-1)].numpy() for batch in batches])  # type: ignore[index]
        assert len(examined) and (examined[:, 1] == 1).all(), "the task buy is not corrected"
        expected = {1.0, 0.5, 0.25} if column == "propensity" else None
        found = set(examined[:, 0].tolist())
        assert found == expected if expected else max(found) == 1 and len(found) == 3

    def test_what_it_needs_is_named(self, tmp_path: Path) -> None:
        log = listed_log(tmp_path, "other")
        for changes, message in (
            ({"optim__examined_tasks": ["click"]}, "neither 'propensity' nor 'position' among the numbers"),
            ({"optim__examined_tasks": ["like"]}, "'like' is not a trained task; these are: click, buy"),
        ):
            with pytest.raises(ConfigError, match=r"optim\.examined_tasks: .*" + message):
                config = small_config(log, tmp_path / "run", **changes)
                Examination.of(log, config.optim.examined_tasks, config.data, ["click", "buy"])


def listed_log(folder: Path, column: str) -> EventLog:
    """Users with 30 events, and lists of three items whose places or propensities are a column of this name."""
    rng = np.random.default_rng(1)
    user, time = np.repeat(np.arange(8), 30), np.tile(np.arange(30) * 30, 8)
    events = {"user": user, "item": rng.integers(0, 12, 240), "timestamp": time}
    place = np.tile(np.arange(3), 240)
    looks = 0.5**place
    shown = {
        "user": np.repeat(user, 3),
        "item": rng.integers(0, 12, 720),
        "timestamp": np.repeat(time, 3) + 5,
        "click": rng.random(720) < 0.8 * looks,
        "buy": rng.random(720) < 0.5,
        column: 1.0 + place if column == "position" else looks,
    }
    columns = SourceColumns(labels=["click", "buy"])
    return EventLog.from_frame(
        events, folder / "log", time_unit="s", columns=columns, impressions=shown, request_numbers=[column]
    )
