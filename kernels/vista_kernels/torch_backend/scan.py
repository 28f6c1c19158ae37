"""The scan of the torch backend: all sequences side by side, row after row.

One step handles the i-th row of all sequences at once. Long sequences are cut into chunks: the chunks' totals are
scanned first, and each chunk then starts from the state before it. Decays are multiplied as exp of non-positive
numbers only, so -inf (forget all that came before) is exact and nothing overflows.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from vista_kernels.segments import IntArray, Segments, cut_segments
from vista_kernels.torch_backend.window import WINDOW_ELEMENTS
from vista_kernels.torch_backend.workspace import scratch

MAX_UNCUT = 128
"""Longer sequences are cut into chunks, of at most this many rows."""


def scan_rows(
    x: Tensor,
    decay: Tensor | None,
    offsets: IntArray,
    initial: Tensor | None,
    *,
    descending: bool = False,
    decay_after: bool = False,
    max_uncut: int = MAX_UNCUT,
    window_elements: int = WINDOW_ELEMENTS,
) -> tuple[Tensor, Tensor]:
    """Scan the rows x [N, H, F] of every sequence, as `Backend.scan_rows` says.

    Args:
        max_uncut: rows of the longest sequence that is not cut into chunks.
        window_elements: numbers of the rows that are scanned side by side.
    """
    segments = Segments.from_offsets(offsets)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    flags = (descending, decay_after)
    longest = int(segments.lengths.max(initial=0))
    if longest <= max_uncut:
        return out, _scan_chunks(x, decay, segments, initial, flags, out, window_elements)
    # A chunk is affine in the carry that enters it: scan the chunks' totals and decays, then each chunk from its carry.
    chunk_offsets, chunks = cut_segments(offsets, min(max_uncut, max(16, math.isqrt(longest))))
    totals = _scan_chunks(x, decay, chunks, None, flags, None, window_elements)
    chunk_decay = None
    if decay is not None:
        ones = decay.new_ones((len(chunks), decay.shape[1], 1))
        zeros = decay.new_zeros(1, 1, 1).expand(*decay.shape, 1)
        chunk_decay = _scan_chunks(zeros, decay, chunks, ones, flags, None, window_elements).squeeze(2)
    carried, last = scan_rows(
        totals,
        chunk_decay,
        chunk_offsets,
        initial,
        descending=descending,
        max_uncut=max_uncut,
        window_elements=window_elements,
    )
    entering = entering_carry(carried, chunk_offsets, initial, descending=descending)
    _scan_chunks(x, decay, chunks, entering, flags, out, window_elements)
    return out, last


def entering_carry(carried: Tensor, offsets: IntArray, initial: Tensor | None, *, descending: bool) -> Tensor:
    """Return the carry that enters each row: the result of its neighbor, or the sequence's initial one."""
    filled = np.flatnonzero(np.diff(offsets))
    border = (offsets[1:] - 1 if descending else offsets[:-1])[filled]
    entering = carried.roll(-1 if descending else 1, 0)
    border_rows = torch.from_numpy(border).to(carried.device)
    if initial is None:
        return entering.index_fill_(0, border_rows, 0)
    entering[border_rows] = initial.index_select(0, torch.from_numpy(filled).to(carried.device))
    return entering


def _scan_chunks(
    x: Tensor,
    decay: Tensor | None,
    chunks: Segments,
    initial: Tensor | None,
    flags: tuple[bool, bool],
    out: Tensor | None,
    window_elements: int,
) -> Tensor:
    """Scan each chunk on its own and return the last carries [P, H, F]. The chunks lie end to end, in order."""
    last = x.new_zeros((len(chunks), *x.shape[1:])) if initial is None else initial.clone()
    filled = np.flatnonzero(chunks.lengths)
    ends = np.cumsum(chunks.lengths[filled])
    max_rows = window_elements // max(1, x.shape[1] * x.shape[2])
    first = 0
    while first < len(filled):
        done = int(ends[first] - chunks.lengths[filled[first]])
        stop = max(int(np.searchsorted(ends, done + max_rows, side="right")), first + 1)
        members = filled[first:stop]
        _scan_group(x, decay, chunks[members], members, flags, out, last)
        first = stop
    return last


def _scan_group(
    x: Tensor,
    decay: Tensor | None,
    chunks: Segments,
    members: IntArray,
    flags: tuple[bool, bool],
    out: Tensor | None,
    last: Tensor,
) -> None:
    """Scan neighboring chunks (none empty), row after row, all side by side. `last` holds and receives their carries.

    The rows are first brought into the order in which they are visited, longest chunk first, so that a step is one
    operation on a slice: rows 0 of all chunks, then rows 1 of those that have one, and so on.
    """
    descending, decay_after = flags
    starts, lengths = chunks.starts, chunks.lengths
    order = np.argsort(-lengths, kind="stable")
    sizes, steps = lengths[order], np.arange(lengths.max())
    rows = (starts + lengths - 1)[order, None] - steps if descending else starts[order, None] + steps
    active = sizes[:, None] > steps
    visits = rows.T[active.T]
    bounds = np.concatenate([[0], np.cumsum(active.sum(0))])
    index = torch.from_numpy(visits).to(x.device)
    visited = scratch("scan", (len(visits), *x.shape[1:]), x.dtype, x.device)
    torch.index_select(x, 0, index, out=visited)
    decays = None if decay is None else decay.index_select(0, index).unsqueeze(2)
    entry = last.index_select(0, torch.from_numpy(members[order]).to(x.device))
    begin, end = 0, len(order)
    _add_carry(visited[:end], entry, None if decays is None or decay_after else decays[:end])
    for following in bounds[2:].tolist():
        num = following - end
        used = None if decays is None else decays[begin : begin + num] if decay_after else decays[end:following]
        _add_carry(visited[end:following], visited[begin : begin + num], used)
        begin, end = end, following
    places = np.empty_like(order)
    places[order] = bounds[sizes - 1] + np.arange(len(order))  # of each chunk's last visited row
    index = torch.from_numpy(places).to(x.device)
    carry = visited.index_select(0, index)
    last[torch.from_numpy(members).to(x.device)] = (
        carry.mul_(decays[index]) if decays is not None and decay_after else carry
    )
    if out is not None:
        start, stop = int(starts[0]), int(starts[-1] + lengths[-1])
        inverse = np.empty_like(visits)
        inverse[visits - start] = np.arange(len(visits))
        torch.index_select(visited, 0, torch.from_numpy(inverse).to(x.device), out=out[start:stop])


def _add_carry(rows: Tensor, carry: Tensor, decay: Tensor | None) -> None:
    if decay is None:
        rows.add_(carry)
    else:
        torch.addcmul(rows, carry, decay, out=rows)
