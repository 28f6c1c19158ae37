"""States of histories and of ranges of them (separable mixing), computed in passes of bounded size.

A token depends on its own event and on the r events before it (`reach`), so a state is a sum over events. Memory does
not grow with the length of a history. Letters: B users or ranges, T packed events, M model dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from vista.arrays import Int, offsets_of
from vista.config.checks import Decay, Mixing
from vista.errors import ConfigError
from vista.examples.batch import decay_clock
from vista.log.histories import Histories, concatenated, history_gaps, ranges, token_groups
from vista.model.summarizer import Summarizer, SummaryState, exchange, merge_states
from vista.model.vista_model import VistaModel

SLICE_LEN = 8192
"""Most events in one pass over a long history; they bound the memory that a pass takes."""
SLICE_ELEMENTS = 1 << 19
"""Numbers (events x M) in one pass: 2 MB in float32, so that the intermediates of a pass stay in the cache.

Measured on two cores of an EPYC, separable, two layers: 8192 events are best for M=64, 4096 for 128, 2048 for 256, a
fifth faster than 16,384. Fewer than 1024 events lose more to the overhead of calls than they save.
"""
GPU_SLICE_LEN = 65_536
"""Most events in one pass on a GPU, which needs more of them to be busy (not measured)."""
MOST_STATE_BYTES = 1 << 29
"""Limit on the states that `GrowingStates` keeps."""
RANGES_PER_PASS = 256
"""Most ranges in one pass of `sum_of_ranges`, which holds a state for each."""


def reach(model: VistaModel) -> int:
    """r: how many events before its own a token depends on."""
    return model.stage1.conv_width - 1 + model.stage1.has_gap


def default_slice_len(model: VistaModel) -> int:
    """Events in one pass over the histories of this model."""
    if model.device.type != "cpu":
        return GPU_SLICE_LEN
    return min(SLICE_LEN, max(1024, SLICE_ELEMENTS // model.config.dim))


def separable_summarizer(model: VistaModel) -> Summarizer:
    """The model's summarizer. Raises ConfigError if the model's mixing is not separable, or it has no summaries."""
    if model.summarizer is None or model.stage1.mixing is not Mixing.separable:
        raise ConfigError(
            "model.mixing: only separable mixing has states; recompute bidirectional summaries from whole histories"
        )
    return model.summarizer


@torch.inference_mode()
def history_states(model: VistaModel, histories: Histories, slice_len: int | None = None) -> SummaryState:
    """States of packed histories, float32.

    Args:
        model: in eval mode.
        histories: items as model rows (`VistaModel.item_rows`).
        slice_len: events per pass; None takes `default_slice_len`.

    Raises:
        ConfigError: if the model's mixing is not separable.
    """
    summarizer = separable_summarizer(model)
    slice_len = default_slice_len(model) if slice_len is None else slice_len
    groups = []
    for group in token_groups(histories.lengths, slice_len):
        part = histories.select_users(group.start, group.stop)
        if part.num_events <= slice_len:
            groups.append(range_states(model, part, np.zeros(part.num_users, np.int64)))
        else:
            bounds = np.array([0, part.num_events], np.int64)
            clock = clock_after(model, part)
            groups.append(sum_of_ranges(model, part, bounds[:1], bounds[1:], clock, slice_len))
    if not groups:
        return summarizer.empty_state(0)
    return SummaryState(*(torch.cat([getattr(g, field.name) for g in groups]) for field in fields(SummaryState)))


@torch.inference_mode()
def range_states(model: VistaModel, histories: Histories, num_context: Int, start: Int | None = None) -> SummaryState:
    """States of ranges of histories. The first `num_context` events of each only give context to the others.

    Args:
        model: in eval mode.
        histories: packed ranges, context included.
        num_context: int64 [B]; `reach(model)`, or all events before the range if there are fewer.
        start: int64 [B] position of each range's first event (context included) in its history; None means 0.
    """
    summarizer = separable_summarizer(model)
    start = np.zeros(histories.num_users, np.int64) if start is None else start
    events, inside, clock = embed(model, histories, start)
    tokens = summarizer.tokens(events, inside)
    keep = np.arange(histories.num_events) - np.repeat(histories.offsets[:-1] + num_context, histories.lengths) >= 0
    offsets = histories.offsets - offsets_of(num_context)
    if not keep.all():
        kept = torch.from_numpy(np.flatnonzero(keep)).to(model.device)
        tokens, clock = tokens[kept], clock[kept]
    return summarizer.segment_states(tokens, clock, torch.from_numpy(offsets).to(model.device))


@torch.inference_mode()
def long_range_state(model: VistaModel, history: Histories, num_context: int, start: int) -> SummaryState:
    """Like `range_states` for one long range (B = 1), in passes of bounded size."""
    bounds = np.array([num_context, history.num_events], np.int64)
    state = sum_of_ranges(model, history, bounds[:1], bounds[1:], clock_after(model, history))
    return replace(state, clock=state.clock + start) if model.stage1.decay is Decay.position else state


@torch.inference_mode()
def appended_states(
    model: VistaModel, states: SummaryState, histories: Histories, num_context: Int, start: Int
) -> SummaryState:
    """States with the terms added of the events that follow those that they cover.

    Args:
        states: of B histories.
        histories, num_context, start: the new events, as in `range_states`.
    """
    if histories.num_users == 1 and histories.num_events > default_slice_len(model):
        terms = long_range_state(model, histories, int(num_context[0]), int(start[0]))
    else:
        terms = range_states(model, histories, num_context, start)
    return merge_states(states, terms, separable_summarizer(model).decay_rate)


class GrowingStates:
    """States of users whose summaries are asked for at one time after the other: each call reads the new events alone.
    Users whose states exceed MOST_STATE_BYTES are computed from all their events in each call."""

    def __init__(self, model: VistaModel, num_users: int) -> None:
        """
        Args:
            model: with separable mixing and without a history limit; it is used in eval mode.
            num_users: of the log.
        """
        self._model, summarizer = model, separable_summarizer(model)
        self._state = summarizer.empty_state(0)
        self._row, self._covered = np.full(num_users, -1, np.int64), np.zeros(num_users, np.int64)
        self._limit = MOST_STATE_BYTES // (4 * max(summarizer.empty_state(1).z.numel(), 1))

    @classmethod
    def of(cls, model: VistaModel, num_users: int) -> GrowingStates | None:
        """None for a model whose summaries have no states, or that has no summaries."""
        has_states = model.stage1.mixing is Mixing.separable and model.stage1.history_limit == 0
        return cls(model, num_users) if model.summarizer is not None and has_states else None

    @torch.inference_mode()
    def summarize(self, users: Int, histories: Histories) -> Tensor:
        """Summaries float32 [B, S, M] of histories.

        Args:
            users: int64 [B] distinct rows of the log.
            histories: theirs, with items as model rows; each begins with the events of earlier calls.
        """
        new = users[self._row[users] < 0][: max(self._limit - len(self._state.n), 0)]
        self._row[new] = len(self._state.n) + np.arange(len(new))
        summarizer = separable_summarizer(self._model)
        names = [field.name for field in fields(SummaryState)]
        empty = summarizer.empty_state(len(new))
        self._state = SummaryState(
            *(torch.cat([getattr(each, name) for each in (self._state, empty)]) for name in names)
        )
        covered, counts = self._covered[users], histories.lengths
        start = covered - np.minimum(reach(self._model), covered)
        summaries = [summarizer.empty_state(0).n.new_zeros(0, self._model.config.num_seeds, self._model.config.dim)]
        for part in token_groups(counts - start, default_slice_len(self._model)):
            rows = self._row[users[part]]
            kept = torch.from_numpy(np.flatnonzero(rows >= 0))
            places = torch.from_numpy(rows[rows >= 0])
            before = summarizer.empty_state(len(rows))
            for name in names:
                getattr(before, name)[kept] = getattr(self._state, name)[places]
            events = histories.select_users(part.start, part.stop).select(start[part], counts[part])
            after = appended_states(self._model, before, events, (covered - start)[part], start[part])
            for name in names:
                getattr(self._state, name)[places] = getattr(after, name)[kept]
            summaries.append(summarizer.read(after.z, after.n).float())
        known = self._row[users] >= 0
        self._covered[users[known]] = counts[known]
        return torch.cat(summaries)


def sum_of_ranges(
    model: VistaModel, history: Histories, starts: Int, stops: Int, clock: Tensor, slice_len: int | None = None
) -> SummaryState:
    """The sum of the terms of some events of a history (B = 1).

    Args:
        starts, stops: int64 [B] ranges [starts[i], stops[i]) of events; the events before a range are its context.
        clock: int64 [1] that the sum is seen from.
        slice_len: events per pass; None takes `default_slice_len`.
    """
    summarizer = separable_summarizer(model)
    size = default_slice_len(model) if slice_len is None else slice_len
    slices = -(-(stops - starts) // size)
    start = np.repeat(starts, slices) + ranges(0, slices) * size
    context = np.minimum(reach(model), start)
    counts = np.minimum(start + size, np.repeat(stops, slices)) - start + context
    ends = np.cumsum(counts)
    total = summarizer.empty_state(1).seen_from(clock, summarizer.decay_rate)
    begin = 0
    while begin < len(start):
        limit = ends[begin] - counts[begin] + size
        end = min(max(begin + 1, int(np.searchsorted(ends, limit, side="right"))), begin + RANGES_PER_PASS)
        first, count = (start - context)[begin:end], counts[begin:end]
        part = history.at(ranges(first, count), offsets_of(count))
        terms = range_states(model, part, context[begin:end], first)
        terms = terms.seen_from(clock.expand(end - begin), summarizer.decay_rate).total()
        total = merge_states(total, terms, summarizer.decay_rate)
        begin = end
    return total


def embed(model: VistaModel, histories: Histories, start: Int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Event embeddings [T, M], positions int64 [T] within their range, and decay clock int64 [T] of packed ranges.

    Args:
        model: its encoder and item table are used.
        histories: items as model rows, features with the model's codes.
        start: int64 [B] position of each range's first event in its history; None means 0.
    """
    device = model.device
    offsets = histories.offsets
    inside = ranges(0, histories.lengths)
    timestamp = np.asarray(histories.timestamp)
    gap = np.zeros(len(timestamp), np.int64) if model.encoder.gap is None else history_gaps(timestamp, offsets)
    if model.stage1.decay is Decay.position:
        clock = inside if start is None else inside + np.repeat(start, histories.lengths)
    else:
        clock = decay_clock(model.stage1.decay, timestamp)
    rating = None
    if histories.rating is not None and model.encoder.rating is not None:
        rating = torch.from_numpy(np.array(histories.rating, np.float32)).to(device)
    items = torch.from_numpy(histories.item.astype(np.int64)).to(device)
    events = model.encoder(
        model.item_vectors(items),
        torch.from_numpy(histories.action.astype(np.int64)).to(device),
        torch.from_numpy(gap).to(device),
        rating,
        model.encoded_events(histories.features, histories.num_events),
    )
    return events, torch.from_numpy(inside).to(device), torch.from_numpy(np.array(clock)).to(device)


def clock_after(model: VistaModel, history: Histories) -> Tensor:
    """int64 [1]: the clock that the state of this history (B = 1) is seen from, that of its newest event."""
    if history.num_events == 0:
        newest = 0
    elif model.stage1.decay is Decay.position:
        newest = history.num_events - 1
    else:
        newest = int(history.timestamp[-1])
    return torch.tensor([newest], device=model.device)


# States that are merged, or changed by removed or late events, without recomputing the whole history.
#
# An event that leaves or comes late changes its own term and those of up to r = `reach` events after it. Only these are
# embedded, with the r events before them. (New events at the end are added with `range_states` and `merge_states`.)

_Ranges = tuple[Histories, Int, Int]
"""A history (B = 1) and ranges [starts[i], stops[i]) of its events."""


@torch.inference_mode()
def merge_histories(
    model: VistaModel, states: Sequence[SummaryState], parts: Sequence[Histories]
) -> tuple[SummaryState, Histories]:
    """The state of one user's whole history, from the states of its parts, each computed without the others.

    Events that follow other events in the whole history than in their part get new terms: those next to a seam, or
    wherever the parts interleave. So do events that were left to the tail of their part, but not to that of the whole.

    Args:
        model: in eval mode.
        states: of `parts` (N = 1 each).
        parts: B = 1 each; disjoint events, items as model rows. Events with equal times keep the order of the parts.

    Returns:
        (state, history) of the whole.

    Raises:
        ConfigError: if the model decays by position, which allows appending only.
        ValueError: if a state does not belong to its part.
    """
    _refuse_decay_by_position(model, "merging states")
    summarizer, r = separable_summarizer(model), reach(model)
    whole, places = _interleaved(parts)
    for state, part in zip(states, parts, strict=True):
        if state.num_events.tolist() != [part.num_events]:
            raise ValueError(f"state: covers {state.num_events.tolist()} events, but its history has {part.num_events}")
    clock = clock_after(model, whole)
    total, old = summarizer.empty_state(1), summarizer.empty_state(1)
    moved = np.ones(whole.num_events, np.bool_)
    for state, part, place in zip(states, parts, places, strict=True):
        total = merge_states(total, state, summarizer.decay_rate)
        own = np.arange(part.num_events)
        before = np.minimum(r, own)
        moved_here = (place - place[own - before] != before) | ((before < r) & (place != own))
        moved[place] = moved_here
        old = merge_states(old, sum_of_ranges(model, part, *_runs(moved_here), clock), summarizer.decay_rate)
    new = sum_of_ranges(model, whole, *_runs(moved), clock)
    changed = exchange(total, old, new, clock, summarizer.decay_rate)
    return (history_states(model, whole) if bool(changed.needs_recomputation()[0]) else changed), whole


@torch.inference_mode()
def remove_events(model: VistaModel, state: SummaryState, history: Histories, gone: ArrayLike) -> SummaryState:
    """The state of a history as if some of its events had never happened.

    It is recomputed from the remaining events if subtraction would lose too many digits
    (`SummaryState.needs_recomputation`).

    Args:
        model: in eval mode.
        state: of `history` (N = 1).
        history: B = 1, all events that the state covers, including those to remove; items as model rows.
        gone: int [G] ascending positions in `history`.

    Raises:
        ConfigError: if the model decays by position, which allows appending only.
        ValueError: if `gone` does not fit, or the state does not belong to this history.
    """
    _refuse_decay_by_position(model, "forgetting events")
    marked = _checked(gone, "gone", history, state, int(state.num_events[0]))
    left = _without(history, marked)
    full_ranges, left_ranges = _touched(marked, reach(model), history.num_events)
    return _exchanged(model, state, (history, *full_ranges), (left, *left_ranges))


@torch.inference_mode()
def insert_events(model: VistaModel, state: SummaryState, history: Histories, late: ArrayLike) -> SummaryState:
    """The state of a history into which events came late, at any position.

    Args:
        model: in eval mode.
        state: of `history` without the late events (N = 1).
        history: B = 1, all events, including the late ones; items as model rows.
        late: int [G] ascending positions in `history`.

    Raises:
        ConfigError: if the model decays by position, which allows appending only.
        ValueError: if `late` does not fit, or the state does not belong to this history.
    """
    _refuse_decay_by_position(model, "late events")
    marked = _checked(late, "late", history, state, int(state.num_events[0]) + np.size(np.asarray(late)))
    before = _without(history, marked)
    full_ranges, before_ranges = _touched(marked, reach(model), history.num_events)
    return _exchanged(model, state, (before, *before_ranges), (history, *full_ranges))


def _exchanged(model: VistaModel, state: SummaryState, old: _Ranges, new: _Ranges) -> SummaryState:
    summarizer = separable_summarizer(model)
    clock = torch.maximum(clock_after(model, old[0]), clock_after(model, new[0]))
    changed = exchange(
        state,
        sum_of_ranges(model, *old, clock),
        sum_of_ranges(model, *new, clock),
        clock_after(model, new[0]),
        summarizer.decay_rate,
    )
    return history_states(model, new[0]) if bool(changed.needs_recomputation()[0]) else changed


def _interleaved(parts: Sequence[Histories]) -> tuple[Histories, list[Int]]:
    """Histories (B = 1 each) merged by time, and for each part the positions of its events in the result."""
    end_to_end = concatenated(parts)
    order = np.argsort(end_to_end.timestamp, kind="stable")
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    bounds = np.cumsum([part.num_events for part in parts])[:-1]
    return end_to_end.at(order, np.array([0, len(order)], np.int64)), np.split(place, bounds)


def _runs(marked: NDArray[np.bool_]) -> tuple[Int, Int]:
    """(starts, stops) of the runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], marked, [False]]).astype(np.int8)))
    return edges[::2], edges[1::2]


def _touched(marked: Int, r: int, num_events: int) -> tuple[tuple[Int, Int], tuple[Int, Int]]:
    """Ranges of the events whose terms change if those at `marked` leave or arrive: these and the r after each.

    Returns:
        (starts, stops) in the history with the marked events, and the same ranges in the history without them.
    """
    new_run = np.diff(marked, prepend=-r - 2) > max(r, 1)
    starts = marked[new_run]
    stops = np.minimum(marked[np.roll(new_run, -1)] + 1 + r, num_events)
    without = [bounds - np.searchsorted(marked, bounds) for bounds in (starts, stops)]
    return (starts, stops), (without[0], without[1])


def _without(history: Histories, positions: Int) -> Histories:
    kept = np.delete(np.arange(history.num_events), positions)
    return history.at(kept, np.array([0, len(kept)], np.int64))


def _checked(positions: ArrayLike, name: str, history: Histories, state: SummaryState, expected: int) -> Int:
    marked = np.asarray(positions)
    num_events = history.num_events
    if marked.ndim != 1 or (marked.size and marked.dtype.kind not in "iu"):
        raise ValueError(f"{name}: needs a vector of integer positions, got {marked.dtype} of shape {marked.shape}")
    marked = marked.astype(np.int64)
    if marked.size and (marked[0] < 0 or marked[-1] >= num_events or (np.diff(marked) <= 0).any()):
        raise ValueError(f"{name}: positions must ascend within [0, {num_events}), got {marked[:6].tolist()} …")
    if history.num_users != 1 or len(state.num_events) != 1 or expected != num_events:
        raise ValueError(
            f"state: covers {state.num_events.tolist()} events, but history has {num_events} ({name}: {len(marked)} of "
            "them); pass the state of one user and all events of that user"
        )
    return marked


def _refuse_decay_by_position(model: VistaModel, what: str) -> None:
    if model.stage1.decay is Decay.position:
        raise ConfigError(
            f"model.decay=position: {what} would change the positions of other events, so it allows appending only; "
            "recompute the state from the log, or train with model.decay=time or none"
        )
