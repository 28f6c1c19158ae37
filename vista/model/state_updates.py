"""States of histories (separable mixing): made in one pass, appended to, merged, changed by late or forgotten events.

A token depends on its own event and on the r events before it (`reach`). So a state is a sum over events: new events
are added, and an event that leaves or comes late exchanges its own term and those of up to r followers. All that is
embedded of a history are the events whose terms change and r before them, at memory that does not grow with its length.

Letters: B users, T packed events, M model dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from vista.config.choices import Decay, Mixing
from vista.errors import ConfigError
from vista.examples.chunks import decay_clock
from vista.log.gaps import history_gaps
from vista.log.histories import Histories, ranges, token_groups
from vista.model.summarizer import Summarizer
from vista.model.summary_state import SummaryState, exchange, merge
from vista.model.vista_model import VistaModel

Int = NDArray[np.int64]
SLICE_LEN = 8192
"""Events of one pass over a long history at most; memory is bounded by it."""
SLICE_ELEMENTS = 1 << 19
"""Numbers (events x M) of one pass: 2 MB in float32, so that the passes' intermediates stay in the cache.

Measured on two cores of an EPYC, separable, two layers: 8192 events are best for M=64, 4096 for 128, 2048 for 256, a
fifth faster than 16,384; fewer than 1024 cost more in calls than they save.
"""
GPU_SLICE_LEN = 65_536
"""The same on a GPU, which needs that many to be filled (not measured on one)."""
RANGES_PER_PASS = 256
"""Ranges whose states are held at once when terms are exchanged."""


def reach(model: VistaModel) -> int:
    """r: how many events before its own a token depends on."""
    return model.config.conv_width - 1 + (model.encoder.gap is not None)


def slice_len(model: VistaModel) -> int:
    """Events of one pass over this model's histories."""
    if model.device.type != "cpu":
        return GPU_SLICE_LEN
    return min(SLICE_LEN, max(1024, SLICE_ELEMENTS // model.config.dim))


@torch.inference_mode()
def history_states(model: VistaModel, histories: Histories) -> SummaryState:
    """States of packed histories: float32, at memory that does not grow with a history's length.

    Args:
        model: in eval mode.
        histories: items as model rows (`VistaModel.item_rows`).

    Raises:
        ConfigError: if the model's mixing is not separable.
    """
    summarizer = _separable(model)
    groups, limit = [], slice_len(model)
    for group in token_groups(histories.lengths, limit):
        part = histories.select_users(group.start, group.stop)
        if part.num_events <= limit:
            groups.append(range_states(model, part, np.zeros(part.num_users, np.int64)))
        else:
            whole = np.array([0, part.num_events], np.int64)
            groups.append(_terms(model, part, whole[:1], whole[1:], _clock_after(model, part)))
    if not groups:
        return summarizer.empty_state(0)
    return SummaryState(
        *(torch.cat([getattr(g, name) for g in groups]) for name in ("z", "n", "removed", "clock", "num_events"))
    )


@torch.inference_mode()
def range_states(model: VistaModel, histories: Histories, num_context: Int, start: Int | None = None) -> SummaryState:
    """States of ranges of histories, each with `num_context` events before it that only lend their context.

    Args:
        model: in eval mode.
        histories: packed ranges, context included.
        num_context: int64 [B]; `reach(model)`, or all there are before a range.
        start: int64 [B] position in its history of each range's first event (context included); None means 0.
    """
    summarizer = _separable(model)
    start = np.zeros(histories.num_users, np.int64) if start is None else start
    events, inside, clock = embed(model, histories, start)
    tokens = summarizer.tokens(events, inside)
    keep = np.arange(histories.num_events) - np.repeat(histories.offsets[:-1] + num_context, histories.lengths) >= 0
    offsets = histories.offsets - np.concatenate([[0], np.cumsum(num_context)])
    if not keep.all():
        kept = torch.from_numpy(np.flatnonzero(keep)).to(model.device)
        tokens, clock = tokens[kept], clock[kept]
    return summarizer.segment_states(tokens, clock, torch.from_numpy(offsets).to(model.device))


@torch.inference_mode()
def long_range_state(model: VistaModel, history: Histories, num_context: int, start: int) -> SummaryState:
    """As `range_states` of one range (B = 1), at memory that does not grow with it."""
    bounds = np.array([num_context, history.num_events], np.int64)
    state = _terms(model, history, bounds[:1], bounds[1:], _clock_after(model, history))
    return replace(state, clock=state.clock + start) if model.config.decay is Decay.position else state


@torch.inference_mode()
def append(model: VistaModel, state: SummaryState, history: Histories, num_context: int) -> SummaryState:
    """Add new events to the state of one user in time proportional to the new events.

    Args:
        model: in eval mode.
        state: of the user's events before `history`'s new ones (N = 1).
        history: B = 1; its first `num_context` events are old ones: `reach(model)` of them, or all there are.
        num_context: how many.
    """
    start = np.array([int(state.num_events[0]) - num_context], np.int64)
    new = range_states(model, history, np.array([num_context], np.int64), start)
    return merge(state, new, _separable(model).decay_rate)


@torch.inference_mode()
def merge_states(model: VistaModel, first: SummaryState, second: SummaryState) -> SummaryState:
    """States of users whose disjoint events two machines have summed up.

    Args:
        model: in eval mode.
        first, second: of the same N users; the later events' terms computed with the `reach(model)` events before them
            (`range_states`).

    Raises:
        ConfigError: decay by position allows append only.
    """
    _refuse_positions(model, "merging states")
    return merge(first, second, _separable(model).decay_rate)


@torch.inference_mode()
def merge_histories(
    model: VistaModel, states: Sequence[SummaryState], parts: Sequence[Histories]
) -> tuple[SummaryState, Histories]:
    """The state of one user's whole history from the states of its parts, each made without the others.

    The terms of events that have other events before them in the whole than in their part are made anew: those at the
    seams, or wherever the parts interleave.

    Args:
        model: in eval mode.
        states: of `parts` (N = 1 each).
        parts: B = 1 each; disjoint events, items as model rows. Events of one time stand in the parts' order.

    Returns:
        (state, history) of the whole.

    Raises:
        ConfigError: decay by position allows append only.
        ValueError: a state is not of its part.
    """
    _refuse_positions(model, "merging states")
    summarizer, r = _separable(model), reach(model)
    for state, part in zip(states, parts, strict=True):
        if state.num_events.tolist() != [part.num_events]:
            raise ValueError(f"state: of {state.num_events.tolist()} events, but its history has {part.num_events}")
    whole, places = _interleaved(parts)
    clock = _clock_after(model, whole)
    total, old = summarizer.empty_state(1), summarizer.empty_state(1)
    moved = np.zeros(whole.num_events, np.bool_)
    for state, part, place in zip(states, parts, places, strict=True):
        total = merge(total, state, summarizer.decay_rate)
        own = np.arange(part.num_events)
        before = np.minimum(r, own)
        moved_here = (place - place[own - before] != before) | ((before < r) & (place != own))
        moved[place[moved_here]] = True
        old = merge(old, _terms(model, part, *_runs(moved_here), clock), summarizer.decay_rate)
    new = _terms(model, whole, *_runs(moved), clock)
    changed = exchange(total, old, new, clock, summarizer.decay_rate)
    return (history_states(model, whole) if bool(changed.needs_recomputation()[0]) else changed), whole


@torch.inference_mode()
def forget_events(model: VistaModel, state: SummaryState, history: Histories, gone: ArrayLike) -> SummaryState:
    """The state of a history as if some of its events had never been.

    Recomputed from what remains where subtraction would lose too many digits (`SummaryState.needs_recomputation`).

    Args:
        model: in eval mode.
        state: of `history` (N = 1).
        history: B = 1, all events that the state holds, the forgotten ones included; items as model rows.
        gone: int [G] rising positions in `history`.

    Raises:
        ConfigError: decay by position allows append only.
        ValueError: `gone` does not fit, or the state is not of this history.
    """
    _refuse_positions(model, "forgetting events")
    marked = _checked(gone, "gone", history, state, int(state.num_events[0]))
    left = _without(history, marked)
    full_ranges, left_ranges = _touched(marked, reach(model), history.num_events)
    return _exchanged(model, state, (history, *full_ranges), (left, *left_ranges))


@torch.inference_mode()
def insert_events(model: VistaModel, state: SummaryState, history: Histories, late: ArrayLike) -> SummaryState:
    """The state of a history into which events came late, anywhere.

    Args:
        model: in eval mode.
        state: of `history` without the late events (N = 1).
        history: B = 1, all events, the late ones included; items as model rows.
        late: int [G] rising positions in `history`.

    Raises:
        ConfigError: decay by position allows append only.
        ValueError: `late` does not fit, or the state is not of this history.
    """
    _refuse_positions(model, "late events")
    marked = _checked(late, "late", history, state, int(state.num_events[0]) + np.size(np.asarray(late)))
    before = _without(history, marked)
    full_ranges, before_ranges = _touched(marked, reach(model), history.num_events)
    return _exchanged(model, state, (before, *before_ranges), (history, *full_ranges))


def embed(model: VistaModel, histories: Histories, start: Int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Event embeddings [T, M], positions int64 [T] within their range, and decay clock int64 [T] of packed ranges.

    Args:
        model: its encoder and item table are used.
        histories: items as model rows.
        start: int64 [B] position in its history of each range's first event; None means 0.
    """
    device = model.device
    offsets = histories.offsets
    inside = ranges(0, histories.lengths)
    timestamp = np.asarray(histories.timestamp)
    gap = np.zeros(len(timestamp), np.int64) if model.encoder.gap is None else history_gaps(timestamp, offsets)
    if model.config.decay is Decay.position:
        clock = inside if start is None else inside + np.repeat(start, histories.lengths)
    else:
        clock = decay_clock(model.config.decay, timestamp)
    rating = None
    if histories.rating is not None and model.encoder.rating is not None:
        rating = torch.from_numpy(np.array(histories.rating, np.float32)).to(device)
    items = torch.from_numpy(histories.item.astype(np.int64)).to(device)
    events = model.encoder(
        model.item_vectors(items),
        torch.from_numpy(histories.action.astype(np.int64)).to(device),
        torch.from_numpy(gap).to(device),
        rating,
    )
    return events, torch.from_numpy(inside).to(device), torch.from_numpy(np.array(clock)).to(device)


# Inside ---------------------------------------------------------------------------------------------------------------

_Part = tuple[Histories, Int, Int]
"""A history (B = 1) and ranges of it, [starts[i], stops[i])."""


def _terms(model: VistaModel, history: Histories, starts: Int, stops: Int, clock: Tensor) -> SummaryState:
    """The sum of what the events of some ranges of a history (B = 1) write, seen from `clock` int64 [1]."""
    summarizer = _separable(model)
    size = slice_len(model)
    pieces = -(-(stops - starts) // size)
    start = np.repeat(starts, pieces) + ranges(0, pieces) * size
    context = np.minimum(reach(model), start)
    counts = np.minimum(start + size, np.repeat(stops, pieces)) - start + context
    ends = np.cumsum(counts)
    total = summarizer.empty_state(1).seen_from(clock, summarizer.decay_rate)
    begin = 0
    while begin < len(start):
        limit = ends[begin] - counts[begin] + size
        end = min(max(begin + 1, int(np.searchsorted(ends, limit, side="right"))), begin + RANGES_PER_PASS)
        first, count = (start - context)[begin:end], counts[begin:end]
        part = _picked(history, ranges(first, count), np.concatenate([[0], np.cumsum(count)]).astype(np.int64))
        found = range_states(model, part, context[begin:end], first)
        found = found.seen_from(clock.expand(end - begin), summarizer.decay_rate).total()
        total = merge(total, found, summarizer.decay_rate)
        begin = end
    return total


def _exchanged(model: VistaModel, state: SummaryState, old: _Part, new: _Part) -> SummaryState:
    summarizer = _separable(model)
    clock = torch.maximum(_clock_after(model, old[0]), _clock_after(model, new[0]))
    changed = exchange(
        state,
        _terms(model, *old, clock),
        _terms(model, *new, clock),
        _clock_after(model, new[0]),
        summarizer.decay_rate,
    )
    return history_states(model, new[0]) if bool(changed.needs_recomputation()[0]) else changed


def _interleaved(parts: Sequence[Histories]) -> tuple[Histories, list[Int]]:
    """Histories (B = 1 each) as one in time order, and where each one's events went."""
    rating = None if any(part.rating is None for part in parts) else np.concatenate([p.rating for p in parts])
    times = np.concatenate([np.asarray(part.timestamp) for part in parts])
    order = np.argsort(times, kind="stable")
    end_to_end = Histories(
        np.concatenate([part.item for part in parts]),
        times,
        np.concatenate([part.action for part in parts]),
        rating,
        np.array([0, len(times)], np.int64),
    )
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    bounds = np.cumsum([part.num_events for part in parts])[:-1]
    return _picked(end_to_end, order, end_to_end.offsets), np.split(place, bounds)


def _runs(marked: NDArray[np.bool_]) -> tuple[Int, Int]:
    """(starts, stops) of the runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], marked, [False]]).astype(np.int8)))
    return edges[::2], edges[1::2]


def _touched(marked: Int, r: int, num_events: int) -> tuple[tuple[Int, Int], tuple[Int, Int]]:
    """Ranges of events whose terms change when those at the `marked` positions leave or come: they and r after each.

    Returns:
        (starts, stops) in the history with the marked events, and the same ranges in the history without them.
    """
    new_run = np.diff(marked, prepend=-r - 2) > max(r, 1)
    starts = marked[new_run]
    stops = np.minimum(marked[np.roll(new_run, -1)] + 1 + r, num_events)
    without = [bounds - np.searchsorted(marked, bounds) for bounds in (starts, stops)]
    return (starts, stops), (without[0], without[1])


def _clock_after(model: VistaModel, history: Histories) -> Tensor:
    """int64 [1]: the moment that a state of this history (B = 1) is seen from."""
    if history.num_events == 0:
        newest = 0
    elif model.config.decay is Decay.position:
        newest = history.num_events - 1
    else:
        newest = int(history.timestamp[-1])
    return torch.tensor([newest], device=model.device)


def _picked(history: Histories, index: Int, offsets: Int) -> Histories:
    rating = None if history.rating is None else history.rating[index]
    return Histories(history.item[index], history.timestamp[index], history.action[index], rating, offsets)


def _without(history: Histories, positions: Int) -> Histories:
    kept = np.delete(np.arange(history.num_events), positions)
    return _picked(history, kept, np.array([0, len(kept)], np.int64))


def _checked(positions: ArrayLike, name: str, history: Histories, state: SummaryState, expected: int) -> Int:
    marked = np.asarray(positions)
    num_events = history.num_events
    if marked.ndim != 1 or (marked.size and marked.dtype.kind not in "iu"):
        raise ValueError(f"{name}: needs a vector of integer positions, got {marked.dtype} of shape {marked.shape}")
    marked = marked.astype(np.int64)
    if marked.size and (marked[0] < 0 or marked[-1] >= num_events or (np.diff(marked) <= 0).any()):
        raise ValueError(f"{name}: positions must rise within [0, {num_events}), got {marked[:6].tolist()} …")
    if history.num_users != 1 or len(state.num_events) != 1 or expected != num_events:
        raise ValueError(
            f"state: of {state.num_events.tolist()} events, but history has {num_events} ({name}: {len(marked)} of "
            "them); give one user's state and all of its events"
        )
    return marked


def _separable(model: VistaModel) -> Summarizer:
    if model.summarizer is None or model.config.mixing is not Mixing.separable:
        raise ConfigError(
            "model.mixing: only separable mixing has states; bidirectional summaries are recomputed in full"
        )
    return model.summarizer


def _refuse_positions(model: VistaModel, what: str) -> None:
    if model.config.decay is Decay.position:
        raise ConfigError(
            f"model.decay=position: {what} would change the positions of other events, so it allows append only; "
            "recompute the state from the log, or train with model.decay=time or none"
        )
