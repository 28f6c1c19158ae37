"""States that are merged, or changed by removed or late events, without recomputing the whole history.

An event that leaves or comes late changes its own term and those of up to r = `reach` events after it. Only these are
embedded, with the r events before them. (New events at the end are added with `range_states` and `merge_states`.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from vista.arrays import Int
from vista.config.choices import Decay
from vista.errors import ConfigError
from vista.log.histories import Histories, concatenated
from vista.model.history_states import (
    clock_after,
    covered_events,
    history_states,
    reach,
    separable_summarizer,
    sum_of_ranges,
)
from vista.model.summary_state import SummaryState, exchange, merge_states
from vista.model.vista_model import VistaModel

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
        states: of the events of `parts` that summaries cover (N = 1 each).
        parts: B = 1 each; disjoint events, items as model rows. Events with equal times keep the order of the parts.

    Returns:
        (state, history) of the whole; the state is of the events that a summary covers.

    Raises:
        ConfigError: if the model decays by position, which allows appending only.
        ValueError: if a state does not belong to its part.
    """
    _refuse_decay_by_position(model, "merging states")
    summarizer, r = separable_summarizer(model), reach(model)
    whole, places = _interleaved(parts)
    covered, covered_parts = covered_events(model, whole), [covered_events(model, part) for part in parts]
    for state, part in zip(states, covered_parts, strict=True):
        if state.num_events.tolist() != [part.num_events]:
            raise ValueError(f"state: covers {state.num_events.tolist()} events, but its history has {part.num_events}")
    clock = clock_after(model, covered)
    total, old = summarizer.empty_state(1), summarizer.empty_state(1)
    moved = np.ones(covered.num_events, np.bool_)
    for state, part, places_of_part in zip(states, covered_parts, places, strict=True):
        total = merge_states(total, state, summarizer.decay_rate)
        own = np.arange(part.num_events)
        place = places_of_part[: part.num_events]
        before = np.minimum(r, own)
        moved_here = (place - place[own - before] != before) | ((before < r) & (place != own))
        moved[place] = moved_here
        old = merge_states(old, sum_of_ranges(model, part, *_runs(moved_here), clock), summarizer.decay_rate)
    new = sum_of_ranges(model, covered, *_runs(moved), clock)
    changed = exchange(total, old, new, clock, summarizer.decay_rate)
    return (history_states(model, covered) if bool(changed.needs_recomputation()[0]) else changed), whole


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
    if model.config.decay is Decay.position:
        raise ConfigError(
            f"model.decay=position: {what} would change the positions of other events, so it allows appending only; "
            "recompute the state from the log, or train with model.decay=time or none"
        )
