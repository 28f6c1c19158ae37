"""What refresh, scorer and validation ask of a trained model. No gradients, no padding of histories, NumPy in.

Letters: B users, T packed events, S seeds, L tail length, C candidates, M model dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vista.config import Mixing
from vista.data.cuts import decay_clock
from vista.data.histories import Histories
from vista.errors import ConfigError
from vista.model.embedding import UNKNOWN_GAP, gap_bucket, history_gaps
from vista.model.recommender import Recommender
from vista.model.summary_state import SummaryState, merge
from vista.model.target_attention import Context

Int = NDArray[np.int64]
SLICE_LEN = 16_384
"""Events of one pass over a long history; memory is bounded by it whatever the history's length."""


def reach(model: Recommender) -> int:
    """r: how many events before its own a token depends on."""
    return model.config.conv_width - 1 + (model.encoder.gap is not None)


def newest(histories: Histories, limit: int) -> Histories:
    """At most the newest `limit` events of each history; 0 means all."""
    if limit == 0 or histories.num_events == 0 or int(histories.lengths.max()) <= limit:
        return histories
    return histories.select(np.maximum(histories.lengths - limit, 0), histories.lengths)


@torch.inference_mode()
def summarize(model: Recommender, histories: Histories) -> Tensor:
    """Summaries of packed histories.

    Args:
        model: in eval mode.
        histories: items as model rows (`Recommender.item_rows`).

    Returns:
        float32 [B, S, M]; an empty history gets what the seeds alone give.
    """
    histories = newest(histories, model.config.history_limit)
    if model.summarizer is None:
        return torch.zeros(histories.num_users, 0, model.config.dim, device=model.device)
    if model.config.mixing is Mixing.separable:
        state = history_states(model, histories)
        return model.summarizer.read(state.z, state.n).float()
    events, position, _ = _embed(model, histories)
    offsets = torch.from_numpy(histories.offsets).to(model.device)
    return model.summarizer.summarize_set(model.summarizer.tokens(events, position), offsets).float()


@torch.inference_mode()
def history_states(model: Recommender, histories: Histories) -> SummaryState:
    """States of packed histories (separable mixing): float32, at memory that does not grow with a history's length."""
    summarizer = model.summarizer
    if summarizer is None or model.config.mixing is not Mixing.separable:
        raise ConfigError("model.mixing: only separable mixing has states; bidirectional summaries are recomputed in full")
    groups, begin = [], 0
    lengths = histories.lengths
    while begin < histories.num_users:
        end, tokens = begin + 1, int(lengths[begin])
        while end < histories.num_users and tokens + lengths[end] <= SLICE_LEN:
            tokens += int(lengths[end])
            end += 1
        if tokens <= SLICE_LEN:
            part = histories.select_users(begin, end)
            groups.append(range_states(model, part, np.zeros(end - begin, np.int64)))
        else:
            groups.append(_long_state(model, histories.slice(begin)))
        begin = end
    if not groups:
        return summarizer.empty_state(0)
    return SummaryState(
        *(torch.cat([getattr(g, name) for g in groups]) for name in ("z", "n", "removed", "clock", "num_events"))
    )


@torch.inference_mode()
def append(model: Recommender, state: SummaryState, history: Histories, num_context: int) -> SummaryState:
    """Add new events to the state of one user in time proportional to the new events.

    Args:
        state: of the user's events before `history`'s new ones (N = 1).
        history: B = 1; its first `num_context` events are old ones: `reach(model)` of them, or all there are.
    """
    assert model.summarizer is not None
    start = np.array([int(state.num_events[0]) - num_context], np.int64)
    new = range_states(model, history, np.array([num_context], np.int64), start)
    return merge(state, new, model.summarizer.decay_rate)


@torch.inference_mode()
def range_states(model: Recommender, histories: Histories, num_context: Int, start: Int | None = None) -> SummaryState:
    """States of ranges of histories, each with `num_context` events before it that only lend their context.

    Args:
        histories: packed ranges, context included.
        num_context: int64 [B].
        start: int64 [B] position in its history of each range's first event; None means 0.
    """
    summarizer = model.summarizer
    assert summarizer is not None
    start = np.zeros(histories.num_users, np.int64) if start is None else start
    events, position, clock = _embed(model, histories, start)
    tokens = summarizer.tokens(events, position)
    keep = np.arange(histories.num_events) - np.repeat(histories.offsets[:-1] + num_context, histories.lengths) >= 0
    offsets = histories.offsets - np.concatenate([[0], np.cumsum(num_context)])
    if not keep.all():
        kept = torch.from_numpy(np.flatnonzero(keep)).to(model.device)
        tokens, clock = tokens[kept], clock[kept]
    return summarizer.segment_states(tokens, clock, torch.from_numpy(offsets).to(model.device))


def _long_state(model: Recommender, history: Histories) -> SummaryState:
    assert model.summarizer is not None
    state = model.summarizer.empty_state(1)
    for begin in range(0, history.num_events, SLICE_LEN):
        context = min(reach(model), begin)
        part = history.slice(0, begin - context, min(begin + SLICE_LEN, history.num_events))
        state = append(model, state, part, context)
    return state


def _embed(model: Recommender, histories: Histories, start: Int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Event embeddings [T, M], positions int64 [T] in the history, and decay clock int64 [T]."""
    device = model.device
    offsets = histories.offsets
    first = np.zeros(histories.num_users, np.int64) if start is None else start
    position = np.arange(histories.num_events) - np.repeat(offsets[:-1] - first, histories.lengths)
    timestamp = np.asarray(histories.timestamp)
    if model.encoder.gap is None:
        gap = np.zeros(histories.num_events, np.int64)
    else:
        gap = history_gaps(timestamp, offsets)
    clock = position if model.config.decay.value == "position" else decay_clock(model.config.decay, timestamp)
    rating = None
    if histories.rating is not None and model.encoder.rating is not None:
        rating = torch.from_numpy(np.array(histories.rating, np.float32)).to(device)
    items = torch.from_numpy(histories.item.astype(np.int64)).to(device)
    events = model.encoder(
        model.item_table[items],
        torch.from_numpy(histories.action.astype(np.int64)).to(device),
        torch.from_numpy(gap).to(device),
        rating,
    )
    # A range that starts inside its history has context in front, so the convolution may not look before the range.
    inside = position - np.repeat(first, histories.lengths)
    return events, torch.from_numpy(inside).to(device), torch.from_numpy(np.array(clock)).to(device)


@dataclass(frozen=True, slots=True)
class PaddedTail:
    """The newest events of B users, right-aligned: item (model rows), action, gap int64 [B, L]; valid bool [B, L];
    last_time int64 [B] of the newest event (meaningless where there is none)."""

    item: Int
    action: Int
    gap: Int
    valid: NDArray[np.bool_]
    last_time: Int


def pad_tail(model: Recommender, item: NDArray[Any], time: Int, action: NDArray[Any], offsets: Int) -> PaddedTail:
    """Right-align packed newest events; of more than tail_len events the newest are taken.

    Args:
        item: [T] model rows; time: int64 [T] ms; action: [T]; offsets: int64 [B+1].
    """
    length = model.config.tail_len
    index = offsets[1:, None] - length + np.arange(length)
    valid = index >= offsets[:-1, None]
    index = np.where(valid, index, 0)
    if len(item) == 0:
        zeros = np.zeros(index.shape, np.int64)
        return PaddedTail(zeros, zeros, zeros, valid, np.zeros(len(index), np.int64))
    times = time[index]
    gap = np.zeros(index.shape, np.int64)
    if model.encoder.gap is not None:
        known = valid[:, 1:] & valid[:, :-1]
        gap[:, 1:] = np.where(known, gap_bucket(np.diff(times, axis=1)), UNKNOWN_GAP)
    last_time = time[np.maximum(offsets[1:] - 1, 0)]
    return PaddedTail(
        np.where(valid, item[index], 0).astype(np.int64),
        np.where(valid, action[index], 0).astype(np.int64),
        gap,
        valid,
        last_time,
    )


@torch.inference_mode()
def request_context(model: Recommender, summary: Tensor, tail: PaddedTail) -> Context:
    """Keys and values that all candidates of a request share: summary [B, S, M] and tail."""
    device = model.device
    vectors = model.item_table[torch.from_numpy(tail.item).to(device)]
    action, gap = torch.from_numpy(tail.action).to(device), torch.from_numpy(tail.gap).to(device)
    stage = model.target_attention
    return stage.encode_context(
        stage.encode_summary(summary.to(device)), model.encoder(vectors, action, gap), torch.from_numpy(tail.valid).to(device)
    )


def request_gap(model: Recommender, now: Int | None, tail: PaddedTail) -> Tensor | None:
    """[B, 1, M] embeddings of the time from the tail's newest event to the request; unknown without `now` or tail."""
    if model.encoder.gap is None:
        return None
    bucket = np.zeros(len(tail.last_time), np.int64)
    if now is not None:
        bucket = np.where(tail.valid.any(1), gap_bucket(now - tail.last_time), UNKNOWN_GAP)
    return model.encoder.gap_vectors(torch.from_numpy(bucket[:, None]).to(model.device))


@torch.inference_mode()
def user_vectors(model: Recommender, context: Context, gap: Tensor | None) -> Tensor:
    """Unit vectors [B, M] of the retrieval head."""
    seen = torch.full((1,), model.config.tail_len, device=model.device)
    return model.user_vectors(len(context.tail_valid), gap, seen, context)[:, 0]


@torch.inference_mode()
def item_vectors(model: Recommender) -> Tensor:
    """Unit vectors [V, M] of the vocabulary's items, in the order of its rows (the unknown item is left out)."""
    return F.normalize(model.item_table[1:], dim=-1)


@torch.inference_mode()
def candidate_logits(model: Recommender, context: Context, gap: Tensor | None, candidates: Tensor) -> Tensor:
    """Task logits [B, C, num_tasks] of candidates int64 [B, C] (model rows)."""
    seen = torch.full((candidates.shape[1],), model.config.tail_len, device=model.device)
    gap = None if gap is None else gap.expand(-1, candidates.shape[1], -1)
    return model.candidate_logits(model.item_table[candidates], gap, seen, context)
