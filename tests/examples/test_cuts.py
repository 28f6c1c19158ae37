"""Cuts and anchors: no label is in its own context, every event is a label once, and staleness follows the plan.

Event i of a packed batch is item i + 1, impression j is item T + 1 + j, the negatives are beyond both, and event k of a
chunk's trail is item 20,000 + 100 * chunk + k: so what a batch holds can be read back.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vista.arrays import Int
from vista.config.checks import Mixing
from vista.examples.batch import Batch, ChunkImpressions, Chunks, ChunkTimeline
from vista.examples.cuts import AnchorPlan, ChunkAnchors, CutPlan, cut_batch, draw_anchors
from vista.log.histories import DAY_MS, gap_bucket

NUM_TASKS = 2


def coded_chunks(lengths: list[int], impressions: list[tuple[int, int]], trail: int = 0) -> Chunks:
    """Chunks of the given lengths, each followed by `trail` events; impressions as (chunk, position), sorted."""
    total, shown = sum(lengths), len(impressions)
    owner, position = np.array(impressions, np.int64).reshape(-1, 2).T
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    parts = [
        np.append(np.arange(a, b) + 1, trail_items(chunk, trail)) for chunk, (a, b) in enumerate(pairwise(offsets))
    ]
    timeline = np.concatenate(parts)
    flags = np.arange(shown * NUM_TASKS).reshape(shown, NUM_TASKS)
    return Chunks(
        user=np.arange(len(lengths)) + 70,
        item=np.arange(total) + 1,
        action=np.arange(total) % 3,
        rating=np.arange(total, dtype=np.float32),
        gap=np.arange(total) % 7 + 1,
        clock=np.arange(total) * 10,
        offsets=offsets,
        timeline=ChunkTimeline(timeline, np.arange(len(timeline)) * 1000, offsets + trail * np.arange(len(offsets))),
        impressions=ChunkImpressions(
            chunk=owner,
            position=position,
            item=total + 1 + np.arange(shown),
            gap=np.arange(shown) % 5 + 1,
            label=(flags % 2).astype(np.float32),
            mask=flags % 3 > 0,
            time=np.arange(shown) * 1000,
        ),
    )


def trail_items(chunk: int, count: int) -> Int:
    """Items of the first `count` events after a chunk."""
    return 20_000 + 100 * chunk + np.arange(count)


def anchor_plan(**changes: Any) -> AnchorPlan:
    options = {
        "spacing": 4,
        "horizon_events": 5,
        "horizon_days": 0.0,
        "by_time": False,
        "use_time": True,
        "timeless_share": 0.3,
        "keeps_other_windows": True,
    }
    return AnchorPlan(**{**options, **changes})


def cut(chunks: Chunks, seed: int = 0, **changes: Any) -> Batch:
    options = {
        "mixing": Mixing.separable,
        "tail_len": 4,
        "label_spacing": 4,
        "windows_per_chunk": 0,
        "num_cuts": 2,
        "staleness_events": 6.0,
        "staleness_share": 0.3,
        "unknown_share": 0.0,
        "reconstruction_len": 5,
    }
    negatives = 10_000 + np.arange(3)
    plan = CutPlan(**{**options, **changes})
    return cut_batch(chunks, plan, np.random.default_rng(seed), negatives, np.zeros(3, np.float32))


def label_events(batch: Batch) -> Int:
    """[NW, W] packed event that is each position's label, -1 if there is none."""
    rows, label = batch.rows.numpy(), batch.labels.item.numpy()
    return np.where(label >= 0, rows[label] - 1, -1)


def anchor_labels(batch: Batch) -> list[Int]:
    """The sorted labels of each anchor, as model item rows."""
    assert batch.anchors is not None
    rows = batch.rows.numpy()
    return [np.sort(rows[label[label >= 0]]) for label in batch.anchors.item.numpy()]


def shown_impressions(batch: Batch) -> Int:
    """[NW, I] number of the impression in each place, -1 if there is none."""
    items = batch.rows.numpy()[batch.impressions.item.numpy()]
    return np.where(items > 0, items - 1 - len(batch.events.item), -1)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Chunks, int, dict[str, Any]]:
    lengths = draw(st.lists(st.integers(0, 30), min_size=1, max_size=5))
    places = [(chunk, position) for chunk, length in enumerate(lengths) for position in range(length + 1)]
    impressions = draw(st.lists(st.sampled_from(places), max_size=12))
    options = {
        "mixing": draw(st.sampled_from(Mixing)),
        "tail_len": draw(st.integers(1, 9)),
        "label_spacing": draw(st.integers(1, 7)),
        "windows_per_chunk": draw(st.sampled_from([0, 0, 1, 3])),
        "num_cuts": draw(st.integers(1, 3)),
        "staleness_share": draw(st.sampled_from([0.0, 0.4, 1.0])),
        "reconstruction_len": draw(st.integers(0, 8)),
        "anchors": draw(st.sampled_from([None, anchor_plan(), anchor_plan(by_time=True, keeps_other_windows=False)])),
    }
    return coded_chunks(lengths, sorted(impressions), draw(st.integers(0, 7))), draw(st.integers(0, 1000)), options


@settings(max_examples=40, deadline=None)
@given(cases())
@example((coded_chunks([0, 0], []), 0, {}))
@example((coded_chunks([0], [(0, 0)]), 0, {}))
def test_no_label_is_in_its_own_context(case: tuple[Chunks, int, dict[str, Any]]) -> None:
    chunks, seed, options = case
    batch = cut(chunks, seed, **options)
    label, shown = label_events(batch), shown_impressions(batch)
    W, L = label.shape[1], batch.windows.tail_index.shape[1]
    stop, start = (
        batch.cuts.stop.numpy()[batch.windows.cut.numpy()],
        batch.cuts.start.numpy()[batch.windows.cut.numpy()],
    )
    for window, tail in enumerate(batch.windows.tail_index.numpy()):
        # (first event that must not be seen, columns of the tail that are seen)
        asked = [(event, L - W + 1 + column) for column, event in enumerate(label[window]) if event >= 0]
        for anchor in np.flatnonzero(batch.anchors.window == window) if batch.anchors else ():
            event = anchor_labels(batch)[anchor].min() - 1
            asked.append((event, L - W + 1 + int(batch.anchors.position[anchor])))
        for place, impression in enumerate(shown[window]):
            if impression >= 0:
                chunk = chunks.impressions.chunk[impression]
                event = chunks.offsets[chunk] + chunks.impressions.position[impression]
                asked.append((event, L - W + 1 + int(batch.impressions.position[window, place])))
        for event, seen in asked:
            visible = tail[: max(seen, 0)]
            visible = visible[visible >= 0]
            assert start[window] <= stop[window] <= event, "the summary covers the label"
            assert (visible < event).all(), "the tail holds the label"
            # The tail holds the newest events before the label, of this chunk only.
            newest = np.arange(max(start[window], event - max(seen, 0)), event)
            np.testing.assert_array_equal(visible, newest)


@settings(max_examples=40, deadline=None)
@given(cases())
def test_cuts_cover_the_events_that_they_name(case: tuple[Chunks, int, dict[str, Any]]) -> None:
    chunks, seed, options = case
    batch = cut(chunks, seed, **options)
    segment_offsets, bounds = batch.cuts.segment_offsets.numpy(), batch.cuts.chunk_offsets.numpy()
    # Segments cover the chunks without overlap.
    np.testing.assert_array_equal(segment_offsets[bounds], chunks.offsets)
    assert (np.diff(segment_offsets) > 0).all()
    assert np.diff(segment_offsets).max(initial=0) <= batch.labels.item.shape[1]
    for segment, start, stop in zip(batch.cuts.segment, batch.cuts.start, batch.cuts.stop, strict=True):
        assert start in chunks.offsets
        if segment < 0:
            assert start == stop
        else:
            assert segment_offsets[segment + 1] == stop
            owner = np.searchsorted(bounds, int(segment), side="right") - 1
            assert chunks.offsets[owner] == start
    first, length = batch.reconstruction.start, batch.reconstruction.length
    read = batch.reconstruction.cut
    assert (length > 0).all() and (length <= options.get("reconstruction_len", 5)).all()
    assert len(read) or not options.get("reconstruction_len", 5) or not (batch.cuts.stop > batch.cuts.start).any()
    assert (first >= batch.cuts.start[read]).all() and (first + length <= batch.cuts.stop[read]).all()


@settings(max_examples=40, deadline=None)
@given(cases())
def test_every_event_and_impression_is_a_label_once(case: tuple[Chunks, int, dict[str, Any]]) -> None:
    chunks, seed, options = case
    batch = cut(chunks, seed, **{**options, "windows_per_chunk": 0})
    label, shown = label_events(batch), shown_impressions(batch)
    if options.get("anchors") is None or options["anchors"].keeps_other_windows:
        np.testing.assert_array_equal(np.sort(label[label >= 0]), np.arange(len(chunks.item)))
    np.testing.assert_array_equal(np.sort(shown[shown >= 0]), np.arange(len(chunks.impressions.item)))
    kept = shown >= 0
    np.testing.assert_array_equal(batch.impressions.label.numpy()[kept], chunks.impressions.label[shown[kept]])
    np.testing.assert_array_equal(batch.impressions.mask.numpy()[kept], chunks.impressions.mask[shown[kept]])
    assert not batch.impressions.mask.numpy()[~kept].any()
    np.testing.assert_array_equal(batch.rows.numpy()[batch.negatives.item.numpy()], 10_000 + np.arange(3))


def test_features_travel_with_their_events() -> None:
    chunks = coded_chunks([9, 0, 14], [(0, 0), (0, 9), (2, 5)])
    batch = cut(chunks)
    np.testing.assert_array_equal(batch.rows.numpy()[batch.events.item.numpy()], chunks.item)
    np.testing.assert_array_equal(batch.user.numpy(), chunks.user)
    for name in ("action", "rating", "gap", "clock", "offsets"):
        np.testing.assert_array_equal(getattr(batch.events, name).numpy(), getattr(chunks, name))
    label, gap = label_events(batch), batch.labels.gap.numpy()
    known = (label >= 0) & ~np.isin(label, chunks.offsets[:-1])
    timeless = (gap == 0).all(1)
    assert 0 < timeless.sum() < len(gap), "some requests have no time, but most have one"
    np.testing.assert_array_equal(gap[known & ~timeless[:, None]], chunks.gap[label[known & ~timeless[:, None]]])
    assert not gap[~known].any(), "first events and padding have no gap"
    shown = shown_impressions(batch)
    with_clock = (shown >= 0) & ~timeless[:, None]
    np.testing.assert_array_equal(batch.impressions.gap.numpy()[with_clock], chunks.impressions.gap[shown[with_clock]])


@settings(max_examples=50, deadline=None)
@given(cases(), st.booleans())
def test_the_labels_of_an_anchor_are_the_events_from_its_place_on(
    case: tuple[Chunks, int, dict[str, Any]], by_time: bool
) -> None:
    chunks, seed, options = case
    batch = cut(chunks, seed, **{**options, "anchors": anchor_plan(by_time=by_time)})
    labels, timeline, lengths = anchor_labels(batch), chunks.timeline, np.diff(chunks.offsets)
    assert timeline is not None
    places: list[list[int]] = [[] for _ in lengths]
    for label in labels:
        event = label.min() - 1
        chunk = int(np.searchsorted(chunks.offsets, event, side="right")) - 1
        first = timeline.offsets[chunk] + event - chunks.offsets[chunk]
        window = timeline.item[first : min(first + 5, timeline.offsets[chunk + 1])]
        np.testing.assert_array_equal(label, np.sort(window))
        places[chunk].append(event - chunks.offsets[chunk])
    for place, length in zip(places, lengths, strict=True):
        assert len(place) == math.ceil(length / 4) and place == sorted(place)
        parts = (np.arange(len(place)) * length / max(len(place), 1)).astype(int)
        assert by_time or (parts <= place).all(), "one anchor in each part"


def test_anchors_change_no_other_draw() -> None:
    chunks = coded_chunks([400, 30, 300], [(0, 3), (2, 9)], trail=7)
    without, batch = cut(chunks, 1), cut(chunks, 1, anchors=anchor_plan())
    added = {f"anchors.{name}" for name in ("window", "position", "gap", "item", "next_item", "time")}
    assert batch.tensors().keys() - without.tensors().keys() == added
    in_trail = batch.rows >= 20_000
    assert in_trail.any() and not in_trail[batch.events.item].any(), "the trail holds labels only"
    for name, tensor in without.tensors().items():
        other = batch.tensors()[name]
        if name == "rows":
            assert torch.equal(tensor, other[~in_trail])
        else:
            assert torch.equal(tensor, other), name


def test_windows_with_nothing_to_train_are_left_out() -> None:
    chunks = coded_chunks([400, 300], [(0, 17), (1, 150)])
    batch = cut(chunks, 2, anchors=anchor_plan(spacing=150, keeps_other_windows=False))
    assert batch.anchors is not None
    used = np.union1d(batch.anchors.window, np.flatnonzero(batch.impressions.mask.numpy().any((1, 2))))
    np.testing.assert_array_equal(used, np.arange(len(batch.windows.cut)))
    drawn = cut(chunks, 2, windows_per_chunk=1, anchors=anchor_plan(spacing=150))
    assert 2 < len(drawn.windows.cut) <= 2 * (1 + 3), "anchors add their windows to those that are drawn"


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_staleness_has_the_planned_share_and_mean(share: float) -> None:
    spacing, mean = 4, 40.0
    chunks = coded_chunks([4000, 3999], [])
    batch = cut(chunks, 1, label_spacing=spacing, staleness_events=mean, staleness_share=share)
    begin = np.where((label := label_events(batch)) >= 0, label, len(chunks.item)).min(1)
    late = begin >= 500  # an earlier window cannot be that stale
    late &= ~((begin >= 4000) & (begin < 4500))
    lag = begin[late] - batch.cuts.stop.numpy()[batch.windows.cut.numpy()][late]
    assert (lag >= 0).all()
    assert abs((lag > 0).mean() - share) < 0.05
    assert ((lag == 0).any()) == (share < 1), "unless all are stale, some summaries are fresh"
    if share:
        # Rounded up to whole windows, which adds half a window.
        assert lag[lag > 0].mean() == pytest.approx(mean + spacing / 2, rel=0.15)


def test_hiding_a_share_of_events_changes_nothing_else() -> None:
    chunks = coded_chunks([4000, 3999], [(0, 3), (1, 9)])
    without, batch = cut(chunks, 1), cut(chunks, 1, unknown_share=0.2)
    assert without.events.hidden is None and batch.events.hidden is not None
    assert float(batch.events.hidden.float().mean()) == pytest.approx(0.2, abs=0.02)
    assert batch.tensors().keys() - without.tensors().keys() == {"events.hidden"}
    for name, tensor in without.tensors().items():
        assert torch.equal(batch.tensors()[name], tensor), name


def test_bidirectional_windows_read_the_newest_of_few_cuts() -> None:
    chunks = coded_chunks([400, 300], [])
    batch = cut(chunks, 3, mixing=Mixing.bidirectional, num_cuts=2)
    cuts = list(zip(batch.cuts.start.tolist(), batch.cuts.stop.tolist(), strict=True))
    assert len(cuts) == len(set(cuts)) <= 2 * (2 + 1)
    begin = np.where((label := label_events(batch)) >= 0, label, len(chunks.item)).min(1)
    for window, cut_index in enumerate(batch.windows.cut.tolist()):
        start, stop = cuts[cut_index]
        assert stop == max(s for c, s in cuts if c == start and s <= begin[window])


def test_windows_per_chunk_bounds_the_windows_and_keeps_impressions() -> None:
    chunks = coded_chunks([400, 5, 300], [(0, 17), (0, 388), (2, 150)])
    for seed in range(20):
        batch = cut(chunks, seed, windows_per_chunk=3)
        owner = np.searchsorted(batch.cuts.start.numpy()[batch.windows.cut.numpy()], chunks.offsets[1:])
        assert (np.diff(owner, prepend=0) <= 3).all()
        shown = shown_impressions(batch)
        assert set(shown[shown >= 0].tolist()) == {0, 1, 2}


def timed_chunks(times: list[Int], items: list[Int], lengths: list[int], lead: Int | None = None) -> Chunks:
    """Chunks of the first `lengths` events of histories with these times and items; the others are their trail."""
    offsets = np.concatenate([[0], np.cumsum([len(time) for time in times])])
    timeline = ChunkTimeline(np.concatenate(items), np.concatenate(times), offsets)
    return replace(coded_chunks(lengths, []), timeline=timeline, lead=lead)


def random_chunks(seed: int, lead: Int | None = None) -> Chunks:
    """Four histories with equal times, repeated items, and unknown items."""
    rng = np.random.default_rng(seed)
    sizes, lengths = [30, 4, 0, 18], [20, 4, 0, 9]
    times = [np.sort(rng.integers(0, 15, size)) * DAY_MS for size in sizes]
    return timed_chunks(times, [rng.integers(0, 9, size) for size in sizes], lengths, lead)


def draw(chunks: Chunks, seed: int = 0, **changes: Any) -> ChunkAnchors:
    return draw_anchors(chunks, anchor_plan(**changes), np.random.default_rng(seed))


def of_chunk(chunks: Chunks, chunk: int) -> tuple[Int, Int, int]:
    """(times, items) of a chunk and its trail, and the number of events of the chunk."""
    timeline = chunks.timeline
    assert timeline is not None
    part = slice(timeline.offsets[chunk], timeline.offsets[chunk + 1])
    return timeline.time[part], timeline.item[part], int(np.diff(chunks.offsets)[chunk])


@pytest.mark.parametrize("lead", [None, np.array([3, 1, 0, 9])], ids=["whole", "lead"])
@pytest.mark.parametrize("days", [0.0, 2.0])
@pytest.mark.parametrize("by_time", [False, True])
def test_labels_are_the_distinct_known_items_of_the_window(by_time: bool, days: float, lead: Int | None) -> None:
    """Days count from the request, or without a time of request from the newest event before it."""
    checked = 0
    for seed in range(60):
        chunks = random_chunks(seed, lead)
        drawn = draw(chunks, seed, horizon_events=6, horizon_days=days, by_time=by_time)
        assert (np.diff(drawn.chunk) >= 0).all()
        for chunk, position, asked, item in zip(drawn.chunk, drawn.position, drawn.time, drawn.item, strict=True):
            time, items, length = of_chunk(chunks, chunk)
            assert (0 if lead is None else lead[chunk]) <= position < length
            begin = asked if by_time or position == 0 else time[position - 1]
            assert begin <= asked <= time[position]
            window = [items[k] for k in range(position, min(position + 6, len(items)))]
            if days:
                window = [i for k, i in enumerate(window) if time[position + k] < begin + days * DAY_MS]
            np.testing.assert_array_equal(item[item > 0], sorted(set(window) - {0}))
            assert item.any(), "an anchor without a label is left out"
            checked += 1
    assert checked > 150


def test_request_times_are_uniform_and_positions_follow_from_them() -> None:
    """A long gap is hit as often as it is long, and no request divides events of equal times."""
    time = np.array([0, 0, 10, 10, 10, 20, 100, 100]) * DAY_MS
    chunks = timed_chunks([time], [np.arange(8) + 1], [8])
    drawn = [draw(chunks, seed, spacing=2, by_time=True, timeless_share=0.0) for seed in range(1000)]
    position = np.concatenate([each.position for each in drawn])
    assert set(position.tolist()) <= {0, 2, 5, 6}, "events strictly before the request"
    share = np.bincount(position, minlength=7) / len(position)
    np.testing.assert_allclose(share[[2, 5, 6]], [0.1, 0.1, 0.8], atol=0.01)
    gap = np.concatenate([each.gap for each in drawn])
    # From 20 days on, most requests come more than 16 days after the newest event.
    assert (gap[position > 0] > 0).all() and (gap[position == 0] == 0).all()
    late = gap[position == 6]
    assert late.max() == gap_bucket(np.array(80 * DAY_MS)) and np.median(late) > gap_bucket(np.array(16 * DAY_MS))


def test_positions_are_uniform_and_requests_come_with_the_next_event() -> None:
    time = np.array([0, 0, 10, 10, 10, 20, 100, 100]) * DAY_MS
    chunks = timed_chunks([time], [np.arange(8) + 1], [8])
    drawn = [draw(chunks, seed, spacing=8, timeless_share=0.0) for seed in range(2000)]
    position, gap = (np.concatenate([getattr(each, name) for each in drawn]) for name in ("position", "gap"))
    np.testing.assert_allclose(np.bincount(position) / len(position), 1 / 8, atol=0.03)
    expected = gap_bucket(np.diff(time, prepend=0))[position]
    np.testing.assert_array_equal(gap, np.where(position > 0, expected, 0))
    every = draw(chunks, spacing=1)
    assert every.position.tolist() == list(range(8)), "one per label position"


def test_no_request_lies_among_the_events_that_are_context_only() -> None:
    """Event 1 is context, and has the time of the first label."""
    for days, places in (([0, 5, 5, 5], []), ([0, 5, 5, 5, 6], [4])):
        chunks = timed_chunks([np.array(days) * DAY_MS], [np.arange(len(days)) + 1], [len(days)], lead=np.array([2]))
        drawn = [draw(chunks, seed, spacing=1, by_time=True) for seed in range(20)]
        assert {place for each in drawn for place in each.position.tolist()} == set(places)


def test_some_requests_have_no_time() -> None:
    chunks = random_chunks(3)
    share = np.mean([(draw(chunks, seed, timeless_share=0.5).gap[1:] == 0).mean() for seed in range(300)])
    assert 0.45 < share < 0.65  # and anchors before the first event have none
    assert not draw(chunks, use_time=False, timeless_share=0.0).gap.any()
    assert not draw(chunks, timeless_share=1.0).gap.any()


def test_chunks_without_events_have_no_anchors() -> None:
    none = np.zeros(0, np.int64)
    for by_time in (False, True):
        drawn = draw(timed_chunks([none, none], [none, none], [0, 0]), by_time=by_time)
        assert len(drawn.chunk) == len(drawn.position) == len(drawn.gap) == len(drawn.item) == 0
