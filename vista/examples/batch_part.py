"""A rank's part of a training batch: some of its chunks, and all that belongs to them.

All ranks of a job make the same batch and train different chunks of it. So a batch, its negatives, and all its random
draws do not depend on the number of ranks. Letters: B chunks of the whole batch; others as in `vista.examples.batch`.
"""

from __future__ import annotations

import heapq
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vista.arrays import Int
from vista.examples.batch import Batch, BatchCuts, BatchImpressions, BatchReconstruction, BatchWindows


def chunk_work(batch: Batch) -> Int:
    """int64 [B]: the events of each chunk, which stage 1 reads, and its label positions, which stage 2 reads."""
    positions = np.bincount(batch.windows.chunk.numpy(), minlength=len(batch.user)) * batch.labels.item.shape[1]
    work: Int = batch.events.offsets.diff().numpy() + positions
    return work


def balanced_parts(work: Int, num_parts: int) -> list[Int]:
    """Divide chunks into parts of about equal work: the largest first, each to the part with the least so far.

    Args:
        work: from `chunk_work`.

    Returns:
        `num_parts` arrays of sorted chunks, int64; some are empty if there are fewer chunks than parts.
    """
    loads, parts = [(0, part) for part in range(num_parts)], [list[int]() for _ in range(num_parts)]
    for chunk in np.argsort(-work, kind="stable").tolist():
        load, part = heapq.heappop(loads)
        parts[part].append(chunk)
        heapq.heappush(loads, (load + int(work[chunk]), part))
    return [np.sort(np.array(part, np.int64)) for part in parts]


def batch_part(batch: Batch, chunks: Int) -> Batch:
    """The part of a batch with some of its chunks, sorted, at least one.

    `rows`, `user`, and the negatives stay those of the whole batch: its items share one sparse gradient, and its users
    are left out of the factors that it reads.
    """
    own, events = torch.from_numpy(chunks), batch.events
    new_chunk = _new_index(own, len(batch.user))
    event, offsets = _ranges(events.offsets, own)
    shift = offsets[:-1] - events.offsets[own]  # of packed events, by chunk of the part

    window = (new_chunk[batch.windows.chunk] >= 0).nonzero().squeeze(-1)
    chunk = new_chunk[batch.windows.chunk[window]]
    cuts, cut, cut_chunk = _cuts(batch, own, window, chunk, shift)
    new_cut = _new_index(cut, len(batch.cuts.segment)) if batch.stored_summary is None else new_chunk
    tail = batch.windows.tail_index[window]
    anchors = batch.anchors
    if anchors is not None:
        new_window = _new_index(window, len(batch.windows.chunk))[anchors.window]
        anchor = (new_window >= 0).nonzero().squeeze(-1)
        counters = anchors.counters
        if counters is not None:
            counters = replace(
                counters,
                item=counters.item[anchor],
                codes=counters.codes[anchor],
                num_events=counters.num_events[anchor],
            )
        anchors = replace(
            anchors,
            window=new_window[anchor],
            position=anchors.position[anchor],
            gap=anchors.gap[anchor],
            item=anchors.item[anchor],
            next_item=anchors.next_item[anchor],
            counters=counters,
        )
    users = batch.user_features
    return replace(
        batch,
        events=replace(
            events,
            item=events.item[event],
            action=events.action[event],
            rating=_rows(events.rating, event),
            gap=events.gap[event],
            clock=events.clock[event],
            offsets=offsets,
            hidden=_rows(events.hidden, event),
            entry=_rows(events.entry, event),
            dense=_rows(events.dense, event),
        ),
        cuts=cuts,
        windows=BatchWindows(
            chunk,
            new_cut[batch.windows.cut[window]],
            torch.where(tail >= 0, tail + shift[chunk].unsqueeze(1), -1),
        ),
        labels=replace(batch.labels, item=batch.labels.item[window], gap=batch.labels.gap[window]),
        impressions=_impressions(batch.impressions, window),
        reconstruction=_reconstruction(batch.reconstruction, new_cut, shift[cut_chunk]),
        anchors=anchors,
        user_features=None if users is None else replace(users, entry=users.entry[own], dense=users.dense[own]),
        stored_summary=_rows(batch.stored_summary, own),
    )


def _cuts(batch: Batch, own: Tensor, window: Tensor, chunk: Tensor, shift: Tensor) -> tuple[BatchCuts, Tensor, Tensor]:
    """Cuts of the part; int64 [NC'] which of the batch's cuts they are; and the chunks of the part that they lie in.

    window: int64 [NW'] windows of the batch; chunk: their chunks of the part.
    """
    cuts = batch.cuts
    segment, chunk_offsets = _ranges(cuts.chunk_offsets, own)
    lengths = cuts.segment_offsets.diff()[segment]
    # Every cut is read by at least one window.
    cut_chunk = torch.full_like(cuts.segment, -1)
    if batch.stored_summary is None:
        cut_chunk[batch.windows.cut[window]] = chunk
    cut = (cut_chunk >= 0).nonzero().squeeze(-1)
    cut_chunk = cut_chunk[cut]
    of_segments = chunk_offsets[:-1] - cuts.chunk_offsets[own]
    old = cuts.segment[cut]
    kept = BatchCuts(
        segment_offsets=_offsets(lengths),
        chunk_offsets=chunk_offsets,
        segment=torch.where(old >= 0, old + of_segments[cut_chunk], -1),
        start=cuts.start[cut] + shift[cut_chunk],
        stop=cuts.stop[cut] + shift[cut_chunk],
    )
    return kept, cut, cut_chunk


def _impressions(shown: BatchImpressions, window: Tensor) -> BatchImpressions:
    return BatchImpressions(
        item=shown.item[window],
        position=shown.position[window],
        gap=shown.gap[window],
        label=shown.label[window],
        mask=shown.mask[window],
        codes=_rows(shown.codes, window),
        entry=_rows(shown.entry, window),
        dense=_rows(shown.dense, window),
    )


def _reconstruction(part: BatchReconstruction, new_cut: Tensor, shift: Tensor) -> BatchReconstruction:
    """new_cut: int64 [NC] cuts of the part, or -1; shift: int64 [NC'] of packed events, by cut of the part."""
    cut = new_cut[part.cut]
    kept = (cut >= 0).nonzero().squeeze(-1)
    return BatchReconstruction(cut[kept], part.start[kept] + shift[cut[kept]], part.length[kept])


def _ranges(offsets: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Packed indices of the ranges `own`, end to end, and their new offsets."""
    lengths = offsets.diff()[own]
    new = _offsets(lengths)
    return torch.arange(int(new[-1])) + (offsets[own] - new[:-1]).repeat_interleave(lengths), new


def _offsets(lengths: Tensor) -> Tensor:
    return F.pad(lengths.cumsum(0), (1, 0))


def _new_index(own: Tensor, total: int) -> Tensor:
    """int64 [total]: the place of each index in `own`, or -1."""
    places = torch.full((total,), -1)
    places[own] = torch.arange(len(own))
    return places


def _rows(values: Tensor | None, index: Tensor) -> Tensor | None:
    return None if values is None else values[index]
