"""States of histories and of ranges of them (separable mixing), computed in passes of bounded size.

A token depends on its own event and on the r events before it (`reach`), so a state is a sum over events. Memory does
not grow with the length of a history. Letters: B users or ranges, T packed events, M model dim.
"""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import torch
from torch import Tensor

from vista.arrays import Int, offsets_of
from vista.config.choices import Decay, Mixing
from vista.errors import ConfigError
from vista.examples.chunks import decay_clock
from vista.log.histories import Histories, history_gaps, ranges, token_groups
from vista.model.summarizer import Summarizer
from vista.model.summary_state import SummaryState, merge_states
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
RANGES_PER_PASS = 256
"""Most ranges in one pass of `sum_of_ranges`, which holds a state for each."""


def reach(model: VistaModel) -> int:
    """r: how many events before its own a token depends on."""
    return model.config.conv_width - 1 + (model.encoder.gap is not None)


def covered_lengths(model: VistaModel, lengths: Int) -> Int:
    """How many events of histories of some lengths their summaries cover: all but those left to the tail."""
    return np.maximum(lengths - model.config.summary_lag, 0)


def covered_events(model: VistaModel, histories: Histories) -> Histories:
    """The events of histories that their summaries cover."""
    return histories.select(np.zeros_like(histories.lengths), covered_lengths(model, histories.lengths))


def default_slice_len(model: VistaModel) -> int:
    """Events in one pass over the histories of this model."""
    if model.device.type != "cpu":
        return GPU_SLICE_LEN
    return min(SLICE_LEN, max(1024, SLICE_ELEMENTS // model.config.dim))


def separable_summarizer(model: VistaModel) -> Summarizer:
    """The model's summarizer.

    Raises:
        ConfigError: if the model's mixing is not separable, or it has no summaries.
    """
    if model.summarizer is None or model.config.mixing is not Mixing.separable:
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
    interest = model.interests(torch.from_numpy(histories.item.astype(np.int64)).to(model.device))
    keep = np.arange(histories.num_events) - np.repeat(histories.offsets[:-1] + num_context, histories.lengths) >= 0
    offsets = histories.offsets - offsets_of(num_context)
    if not keep.all():
        kept = torch.from_numpy(np.flatnonzero(keep)).to(model.device)
        tokens, clock = tokens[kept], clock[kept]
        interest = None if interest is None else interest[kept]
    return summarizer.segment_states(tokens, clock, torch.from_numpy(offsets).to(model.device), interest)


@torch.inference_mode()
def long_range_state(model: VistaModel, history: Histories, num_context: int, start: int) -> SummaryState:
    """Like `range_states` for one long range (B = 1), in passes of bounded size."""
    bounds = np.array([num_context, history.num_events], np.int64)
    state = sum_of_ranges(model, history, bounds[:1], bounds[1:], clock_after(model, history))
    return replace(state, clock=state.clock + start) if model.config.decay is Decay.position else state


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
        *model.encoded_events(histories.features, histories.num_events),
    )
    return events, torch.from_numpy(inside).to(device), torch.from_numpy(np.array(clock)).to(device)


def clock_after(model: VistaModel, history: Histories) -> Tensor:
    """int64 [1]: the clock that the state of this history (B = 1) is seen from, that of its newest event."""
    if history.num_events == 0:
        newest = 0
    elif model.config.decay is Decay.position:
        newest = history.num_events - 1
    else:
        newest = int(history.timestamp[-1])
    return torch.tensor([newest], device=model.device)
