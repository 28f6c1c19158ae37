"""Causal linear attention without softmax: o_t = phi(q_t) Z_t with Z_t = initial_z + sum_{s <= t} phi(k_s) v_s^T.

Layout: tokens packed as [T, H, D], sequences end to end, offsets int64 [B+1]. Sequences are cut into pieces. With Z the
state before a piece, and the piece's tokens as rows of Q = phi(q), K = phi(k), V and dO::

    O  = tril(Q K^T) V + Q Z                     Z' = Z + K^T V
    dQ = tril(dO V^T) K + dO Z^T
    dK = tril(dO V^T)^T Q + V R^T                R  = gradient of the state after the piece
    dV = tril(Q K^T)^T dO + K R                  R' = R + Q^T dO

so backward is one pass from the front (dQ) and one from the back (dK, dV), and stores nothing. Sums are float32
(float64 for float64 tokens).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from vista_kernels import reference
from vista_kernels.activations import activate_gradient_
from vista_kernels.launch import choose_backend
from vista_kernels.passes import add_product, product, tile_rows
from vista_kernels.scan import entering_carry, scan_rows
from vista_kernels.segments import Window, cut_segments, place, plan
from vista_kernels.validation import (
    IntArray,
    check_activation,
    check_offsets,
    check_state,
    check_tokens,
    host_offsets,
    state_dtype,
)
from vista_kernels.workspace import activated, scaled, scratch

PIECE_NARROW, PIECE_WIDE = 32, 64
"""Tokens of a piece, at most, for heads up to 32 wide and for wider ones (by measurement)."""


def causal_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    *,
    initial_z: Tensor | None = None,
    activation: str = "silu",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Let every token read the tokens of its sequence up to and with itself.

    Args:
        q: [T, H, D] queries, float64, float32, bfloat16 or float16.
        k: [T, H, D] keys, of q's dtype and device.
        v: [T, H, E] values, likewise.
        offsets: [B+1] int64 where sequences begin; 0 first, T last. On q's device or the CPU (fastest on the CPU).
        initial_z: [B, H, D, E] state before each sequence, float32 (float64 for float64 tokens); None is zero.
        activation: phi, of queries and keys: "silu", "relu" or "identity".
        backend: "auto", "torch" or "reference".

    Returns:
        (o [T, H, E] of v's dtype, the state after each sequence [B, H, D, E] of initial_z's). All but offsets get
        gradients, through both results.

    Raises:
        ValueError: naming the argument and the shapes, if shapes, dtypes, devices or offsets do not fit.
    """
    check_tokens(q=q, k=k, v=v)
    check_offsets(offsets, q.device)
    check_state("initial_z", initial_z, (offsets.shape[0] - 1, q.shape[1], q.shape[2], v.shape[2]), q)
    check_activation("activation", activation)
    if choose_backend(backend, q.device) == "reference":
        out, final = reference.causal_linear_attention(q, k, v, offsets, initial_z=initial_z, activation=activation)
        return out.to(v.dtype), final.to(state_dtype(v.dtype))
    out, final = _causal_op(q, k, v, offsets, initial_z, activation)
    return out, final


@torch.library.custom_op("vista_kernels::causal_linear_attention", mutates_args=())
def _causal_op(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, initial_z: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    host = host_offsets(offsets, q.shape[0])
    out, final = _empty_outputs(q, v, offsets)
    final.zero_() if initial_z is None else final.copy_(initial_z)
    dtype = final.dtype
    for part in _parts(host, q, v):
        before = part.scan(_totals(part, k, v, activation, dtype), final, descending=False)
        buffer = part.window.buffer("out", out, dtype)
        for tile in part.window.tiles:
            query = activated("phi_q", activation, tile.load("q", q, dtype)).transpose(1, 2)
            keys = activated("phi_k", activation, tile.load("k", k, dtype)).transpose(1, 2)
            result = place(tile, buffer).transpose(1, 2)
            product(result, _scores(query, keys), tile.load("v", v, dtype).transpose(1, 2))
            product(result, query, tile_rows(before, tile), add=True)
        part.window.store(out, buffer)
    return out, final


@_causal_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, initial_z: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    return _empty_outputs(q, v, offsets)


@torch.library.custom_op("vista_kernels::causal_linear_attention_backward", mutates_args=())
def _causal_backward_op(
    grad_out: Tensor,
    grad_final: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    initial_z: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dq, dk, dv and d initial_z."""
    host = host_offsets(offsets, q.shape[0])
    grad_q, grad_k, grad_v = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    carry = torch.zeros_like(grad_final) if initial_z is None else initial_z.clone()
    for part in _parts(host, q, v):
        _backward_from_front(part, grad_out, q, k, v, carry, activation, grad_q)
    grad_initial = grad_final.clone(memory_format=torch.contiguous_format)
    for part in reversed(list(_parts(host, q, v))):
        _backward_from_back(part, grad_out, q, k, v, grad_initial, activation, grad_k, grad_v)
    return grad_q, grad_k, grad_v, grad_initial


@_causal_backward_op.register_fake
def _(
    grad_out: Tensor,
    grad_final: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    initial_z: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), grad_final.new_empty(grad_final.shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, activation = inputs
    ctx.save_for_backward(*tensors)
    ctx.activation = activation


def _backward(ctx, grad_out, grad_final):  # type: ignore[no-untyped-def]
    q, k, v, offsets, initial_z = ctx.saved_tensors
    grad_q, grad_k, grad_v, grad_initial = _causal_backward_op(
        grad_out, grad_final, q, k, v, offsets, initial_z, ctx.activation
    )
    return grad_q, grad_k, grad_v, None, None if initial_z is None else grad_initial, None


_causal_op.register_autograd(_backward, setup_context=_setup_context)


class _Part:
    """One window of pieces, and the sequences [first, last) that they belong to."""

    def __init__(self, window: Window, first_piece: int, piece_offsets: IntArray) -> None:
        self.num = sum(tile.num for tile in window.tiles)
        tiles = tuple(replace(tile, rows=_shifted(tile.rows, first_piece)) for tile in window.tiles)
        self.window = replace(window, tiles=tiles, rows=slice(0, self.num))
        first = int(np.searchsorted(piece_offsets, first_piece, side="right")) - 1
        last = int(np.searchsorted(piece_offsets, first_piece + self.num, side="left"))
        self.sequences = slice(first, last)
        self.offsets: IntArray = np.clip(piece_offsets[first : last + 1] - first_piece, 0, self.num)

    def scan(self, totals: Tensor, carry: Tensor, *, descending: bool) -> Tensor:
        """Return the state that enters each piece, and move `carry` [B, H, D, E] past this part, in place."""
        initial = carry[self.sequences].flatten(2)
        states, last = scan_rows(totals.flatten(2), None, self.offsets, initial, descending=descending)
        entering = entering_carry(states, self.offsets, initial, descending=descending).view(totals.shape)
        carry[self.sequences] = last.view(-1, *carry.shape[1:])
        return entering


def _backward_from_front(
    part: _Part, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, carry: Tensor, activation: str, grad_q: Tensor
) -> None:
    dtype = carry.dtype
    before = part.scan(_totals(part, k, v, activation, dtype), carry, descending=False)
    buffer = part.window.buffer("grad_q", grad_q, dtype)
    for tile in part.window.tiles:
        grad = tile.load("grad", grad_out, dtype).transpose(1, 2)
        value = tile.load("v", v, dtype).transpose(1, 2)
        keys = activated("phi_k", activation, tile.load("k", k, dtype)).transpose(1, 2)
        piece = place(tile, buffer)
        product(piece.transpose(1, 2), _scores(grad, value), keys)
        product(piece.transpose(1, 2), grad, tile_rows(before, tile).transpose(2, 3), add=True)
        activate_gradient_(activation, tile.load("q", q, dtype), piece)
    part.window.store(grad_q, buffer)


def _backward_from_back(
    part: _Part,
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    carry: Tensor,
    activation: str,
    grad_k: Tensor,
    grad_v: Tensor,
) -> None:
    dtype = carry.dtype
    after = part.scan(_totals(part, q, grad_out, activation, dtype), carry, descending=True)
    buffer_k, buffer_v = part.window.buffer("grad_k", grad_k, dtype), part.window.buffer("grad_v", grad_v, dtype)
    for tile in part.window.tiles:
        # A token's gradient sums over the tokens after it, so copies at padding must hold no gradient.
        grad = scaled("grad", tile.load("grad", grad_out, dtype), tile.padding(dtype)).transpose(1, 2)
        value, raw = tile.load("v", v, dtype).transpose(1, 2), tile.load("k", k, dtype)
        query = activated("phi_q", activation, tile.load("q", q, dtype)).transpose(1, 2)
        keys = activated("phi_k", activation, raw).transpose(1, 2)
        rows = tile_rows(after, tile)
        piece_k, piece_v = place(tile, buffer_k), place(tile, buffer_v)
        product(piece_k.transpose(1, 2), _scores(grad, value).transpose(2, 3), query)
        product(piece_k.transpose(1, 2), value, rows.transpose(2, 3), add=True)
        activate_gradient_(activation, raw, piece_k)
        product(piece_v.transpose(1, 2), _scores(query, keys).transpose(2, 3), grad)
        product(piece_v.transpose(1, 2), keys, rows, add=True)
    part.window.store(grad_k, buffer_k)
    part.window.store(grad_v, buffer_v)


def _totals(part: _Part, k: Tensor, v: Tensor, activation: str, dtype: torch.dtype) -> Tensor:
    """Return phi(K)^T V of every piece [P, H, D, E]."""
    totals = scratch("totals", (part.num, k.shape[1], k.shape[2], v.shape[2]), dtype, k.device)
    states = part.window.states("states", totals)
    for tile in part.window.tiles:
        keys = scaled("phi_k", activated("phi_k", activation, tile.load("k", k, dtype)), tile.padding(dtype))
        add_product(totals, states, tile, keys.permute(0, 2, 3, 1), tile.load("v", v, dtype).transpose(1, 2))
    part.window.store_states(totals, states)
    return totals


def _parts(offsets: IntArray, q: Tensor, v: Tensor) -> Iterator[_Part]:
    """Cut the sequences into pieces, and these into windows; the longest sequence is cut evenly."""
    heads, width, value_width = q.shape[1], q.shape[2], v.shape[2]
    limit = PIECE_NARROW if width <= 32 else PIECE_WIDE
    longest = max(1, int(np.diff(offsets).max(initial=1)))
    piece_offsets, starts, sizes = cut_segments(offsets, -(-longest // -(-longest // limit)))
    first_piece = 0
    for window in plan(
        starts,
        sizes,
        token_elements=heads * max(width, value_width, limit),
        state_elements=heads * width * value_width,
        device=q.device,
    ):
        part = _Part(window, first_piece, piece_offsets)
        first_piece += part.num
        yield part


def _empty_outputs(q: Tensor, v: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    shape = (offsets.shape[0] - 1, q.shape[1], q.shape[2], v.shape[2])
    return v.new_empty(v.shape), v.new_empty(shape, dtype=state_dtype(v.dtype))


def _scores(a: Tensor, b: Tensor) -> Tensor:
    """Return tril(a @ b^T) [n, H, L, L] of a, b [n, H, L, D]."""
    out = scratch("scores", (*a.shape[:2], a.shape[2], b.shape[2]), a.dtype, a.device)
    product(out, a, b.transpose(2, 3))
    return out.tril_()


def _shifted(rows: slice | Tensor, by: int) -> slice | Tensor:
    return slice(rows.start - by, rows.stop - by) if isinstance(rows, slice) else rows - by
