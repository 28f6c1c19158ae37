"""Inclusive decayed prefix sums of packed states: Z_i = exp(log_decay_i) Z_{i-1} + z_i in every sequence.

Shapes: z [N, H, D, E], n and log_decay [N, H], offsets [B+1], initial_z [B, H, D, E], initial_n [B, H].
One step handles the i-th row of all sequences at once. Long sequences are cut into pieces: the pieces' totals are
scanned first, and each piece then starts from the state before it. Decays are only ever multiplied as exp of
non-positive numbers, so -inf (forget all that came before) is exact and nothing overflows.
Backward is the reverse scan G_i = g_i + exp(log_decay_{i+1}) G_{i+1}: dz = G, and d initial_z = exp(log_decay_0) G_0.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from vista_kernels import reference
from vista_kernels.launch import choose_backend
from vista_kernels.segments import WINDOW_ELEMENTS, cut_segments
from vista_kernels.validation import IntArray, check_offsets, check_state, host_offsets, state_dtype
from vista_kernels.workspace import scratch

LONGEST = 128
"""Longer sequences are cut into pieces, at most this long."""


def scan_states(
    z: Tensor,
    n: Tensor,
    log_decay: Tensor,
    offsets: Tensor,
    *,
    initial_z: Tensor | None = None,
    initial_n: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return the states after each row of every sequence, Z_i = exp(log_decay_i) Z_{i-1} + z_i, and n likewise.

    With z and n from `accumulate_state` over blocks of events, row i is the state at the end of block i.

    Args:
        z: [N, H, D, E] float32 (or float64) contributions, sequences end to end.
        n: [N, H] contributions to the weight sum, of z's dtype.
        log_decay: [N, H] of z's dtype, at most 0, -inf allowed; what row i does to the state before it. No gradient.
        offsets: [B+1] int64 rows where sequences begin; 0 first, N last.
        initial_z: [B, H, D, E] state before each sequence's first row; None is zero.
        initial_n: [B, H] weight sum before it; None is zero.
        backend: "auto", "torch" or "reference".

    Returns:
        (Z [N, H, D, E], n [N, H]). z and initial_z get gradients; n, initial_n and log_decay get none.

    Raises:
        ValueError: if shapes, dtypes, devices, offsets or the sign of log_decay are wrong.
    """
    if z.dim() != 4:
        raise ValueError(f"z must be [N, H, D, E], got shape {list(z.shape)}")
    _check_scan(n, log_decay, offsets, initial_n, "z", z)
    check_state("initial_z", initial_z, (offsets.shape[0] - 1, *z.shape[1:]), z)
    n, log_decay = n.detach(), log_decay.detach()
    initial_n = None if initial_n is None else initial_n.detach()
    if choose_backend(backend, z.device) == "reference":
        states, counts = reference.scan_states(z, n, log_decay, offsets, initial_z=initial_z, initial_n=initial_n)
        return states.to(z.dtype), counts.to(z.dtype)
    states, counts = _scan_op(z, n, log_decay, offsets, initial_z, initial_n)
    return states, counts.detach()


def scan_counts(
    n: Tensor, log_decay: Tensor, offsets: Tensor, *, initial_n: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Return only the weight sums [N, H] that `scan_states` would: n_i = exp(log_decay_i) n_{i-1} + (n's row i)."""
    _check_scan(n, log_decay, offsets, initial_n, "n", n)
    empty = n.new_empty((*n.shape, 0, 0))
    return scan_states(empty, n, log_decay, offsets, initial_n=initial_n, backend=backend)[1]


def _check_scan(
    n: Tensor, log_decay: Tensor, offsets: Tensor, initial_n: Tensor | None, name: str, like: Tensor
) -> None:
    if n.dim() != 2:
        raise ValueError(f"n must be [N, H], got shape {list(n.shape)}")
    if like.dtype != state_dtype(like.dtype):
        raise ValueError(f"{name} must be float32 or float64, got {like.dtype}")
    check_offsets(offsets, like.device)
    check_state("n", n, tuple(like.shape[:2]), like)
    check_state("log_decay", log_decay, tuple(n.shape), like)
    check_state("initial_n", initial_n, (offsets.shape[0] - 1, n.shape[1]), like)


@torch.library.custom_op("vista_kernels::scan_states", mutates_args=())
def _scan_op(
    z: Tensor, n: Tensor, log_decay: Tensor, offsets: Tensor, initial_z: Tensor | None, initial_n: Tensor | None
) -> tuple[Tensor, Tensor]:
    host = host_offsets(offsets, z.shape[0])
    if bool((log_decay > 0).any()):
        raise ValueError(f"log_decay {list(log_decay.shape)} must be at most 0, got {float(log_decay.max())}")
    decay = log_decay.exp()
    counts = scan_rows(n.unsqueeze(2), decay, host, _column(initial_n))[0].squeeze(2)
    if z[:1].numel() == 0:
        return torch.empty_like(z, memory_format=torch.contiguous_format), counts
    initial = None if initial_z is None else initial_z.flatten(2)
    return scan_rows(z.flatten(2), decay, host, initial)[0].view(z.shape), counts


@_scan_op.register_fake
def _(
    z: Tensor, n: Tensor, log_decay: Tensor, offsets: Tensor, initial_z: Tensor | None, initial_n: Tensor | None
) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), n.new_empty(n.shape)


@torch.library.custom_op("vista_kernels::scan_states_backward", mutates_args=())
def _scan_backward_op(grad: Tensor, log_decay: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Return dz [N, H, D, E] and d initial_z [B, H, D, E]."""
    host = host_offsets(offsets, grad.shape[0])
    rows, first = scan_rows(grad.flatten(2), log_decay.exp(), host, None, descending=True, decay_after=True)
    return rows.view(grad.shape), first.view(len(host) - 1, *grad.shape[1:])


@_scan_backward_op.register_fake
def _(grad: Tensor, log_decay: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    return grad.new_empty(grad.shape), grad.new_empty((offsets.shape[0] - 1, *grad.shape[1:]))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, _, log_decay, offsets, initial_z, _ = inputs
    ctx.save_for_backward(log_decay, offsets)
    ctx.has_initial = initial_z is not None


def _backward(ctx, grad_z, grad_n):  # type: ignore[no-untyped-def]
    log_decay, offsets = ctx.saved_tensors
    rows, first = _scan_backward_op(grad_z, log_decay, offsets)
    return rows, None, None, None, first if ctx.has_initial else None, None


_scan_op.register_autograd(_backward, setup_context=_setup_context)


def scan_rows(
    x: Tensor,
    decay: Tensor | None,
    offsets: IntArray,
    initial: Tensor | None,
    *,
    descending: bool = False,
    decay_after: bool = False,
) -> tuple[Tensor, Tensor]:
    """Scan the rows x [N, H, F] of every sequence, a carry c [H, F] passing from row to row.

    With s_i the result of row i, s_i = x_i + decay_i c and then c = s_i; with `decay_after`, s_i = x_i + c and then
    c = decay_i s_i. Decay [N, H] lies in [0, 1]; None is 1. `descending` visits each sequence from its last row to its
    first. So descending with decay_after is the gradient of the plain scan.

    Returns:
        The results [N, H, F], and the last carry of each sequence [B, H, F] (`initial`, or zero, where it is empty).
    """
    lengths = np.diff(offsets)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    flags = (descending, decay_after)
    longest = int(lengths.max(initial=0))
    if longest <= LONGEST:
        return out, _scan_pieces(x, decay, offsets[:-1], lengths, initial, flags, out)
    # A piece is affine in the carry that enters it: scan the pieces' totals and decays, then each piece from its carry.
    piece_offsets, starts, sizes = cut_segments(offsets, min(LONGEST, max(16, math.isqrt(longest))))
    totals = _scan_pieces(x, decay, starts, sizes, None, flags, None)
    piece_decay = None
    if decay is not None:
        ones = decay.new_ones((len(starts), decay.shape[1], 1))
        zeros = decay.new_zeros(1, 1, 1).expand(*decay.shape, 1)
        piece_decay = _scan_pieces(zeros, decay, starts, sizes, ones, flags, None).squeeze(2)
    carried, last = scan_rows(totals, piece_decay, piece_offsets, initial, descending=descending)
    entering = entering_carry(carried, piece_offsets, initial, descending=descending)
    _scan_pieces(x, decay, starts, sizes, entering, flags, out)
    return out, last


def entering_carry(carried: Tensor, offsets: IntArray, initial: Tensor | None, *, descending: bool) -> Tensor:
    """Return the carry that enters each row: the result of its neighbour, or the sequence's initial one."""
    filled = np.flatnonzero(np.diff(offsets))
    border = (offsets[1:] - 1 if descending else offsets[:-1])[filled]
    entering = carried.roll(-1 if descending else 1, 0)
    border_rows = torch.from_numpy(border).to(carried.device)
    if initial is None:
        return entering.index_fill_(0, border_rows, 0)
    entering[border_rows] = initial.index_select(0, torch.from_numpy(filled).to(carried.device))
    return entering


def _scan_pieces(
    x: Tensor,
    decay: Tensor | None,
    starts: IntArray,
    lengths: IntArray,
    initial: Tensor | None,
    flags: tuple[bool, bool],
    out: Tensor | None,
) -> Tensor:
    """Scan each piece on its own and return the last carries [P, H, F]; pieces lie end to end, in order."""
    last = x.new_zeros((len(starts), *x.shape[1:])) if initial is None else initial.clone()
    filled = np.flatnonzero(lengths)
    ends = np.cumsum(lengths[filled])
    max_rows = WINDOW_ELEMENTS // max(1, x.shape[1] * x.shape[2])
    first = 0
    while first < len(filled):
        done = int(ends[first] - lengths[filled[first]])
        stop = max(int(np.searchsorted(ends, done + max_rows, side="right")), first + 1)
        members = filled[first:stop]
        _scan_group(x, decay, starts[members], lengths[members], members, flags, out, last)
        first = stop
    return last


def _scan_group(
    x: Tensor,
    decay: Tensor | None,
    starts: IntArray,
    lengths: IntArray,
    members: IntArray,
    flags: tuple[bool, bool],
    out: Tensor | None,
    last: Tensor,
) -> None:
    """Scan neighbouring pieces (none empty), row after row, all side by side; `last` holds and receives their carries.

    The rows are first brought into the order in which they are visited, longest piece first, so that a step is one
    operation on a slice: rows 0 of all pieces, then rows 1 of those that have one, and so on.
    """
    descending, decay_after = flags
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
    places[order] = bounds[sizes - 1] + np.arange(len(order))  # of each piece's last visited row
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


def _column(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.unsqueeze(2)
