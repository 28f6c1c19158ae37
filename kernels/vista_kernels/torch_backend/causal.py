"""Causal linear attention of the torch backend: chunks of a few dozen tokens, whose states are scanned.

Backward is one pass from the front (dQ) and one from the back (dK, dV); formulas in `causal_linear_attention.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from vista_kernels.causal_tokens import CausalTokens
from vista_kernels.segments import IntArray, cut_segments
from vista_kernels.torch_backend.activations import activate_gradient_
from vista_kernels.torch_backend.precision import product_dtype
from vista_kernels.torch_backend.scan import entering_carry, scan_rows
from vista_kernels.torch_backend.state_sums import add_product
from vista_kernels.torch_backend.window import WINDOW_ELEMENTS, Window, plan_windows
from vista_kernels.torch_backend.workspace import activated, converted, finish, multiplied, scaled, scratch

CHUNK_NARROW, CHUNK_WIDE = 32, 64
"""Most tokens of a chunk, for heads up to 32 wide and for wider ones (as measured)."""


def causal_attention(
    tokens: CausalTokens, carry: Tensor, out: Tensor, *, window_elements: int = WINDOW_ELEMENTS
) -> None:
    """Write o_t = phi(q_t) Z_t, and turn carry [B, H, D, E] from the state before a sequence into that after it."""
    q, k, v, _, activation = tokens
    dtype = product_dtype(q)
    for part in _parts(tokens, window_elements):
        before = part.scan(_totals(part, k, v, activation, carry.dtype), carry, descending=False)
        buffer = part.window.buffer("out", out)
        for tile in part.window.tiles:
            query = tile.activated("phi_q", activation, q, dtype)
            keys = tile.activated("phi_k", activation, k, dtype)
            states = converted("rows", tile.states_of(before), dtype)
            _write_sum(tile.in_buffer(buffer), (_scores(query, keys), tile.heads("v", v, dtype)), (query, states))
        part.window.store(out, buffer)


def causal_attention_backward(
    grad_out: Tensor,
    tokens: CausalTokens,
    initial_z: Tensor | None,
    grad_carry: Tensor,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    *,
    window_elements: int = WINDOW_ELEMENTS,
) -> None:
    """Write dq, dk and dv, and turn grad_carry from the gradient of the last states into that of the first."""
    carry = torch.zeros_like(grad_carry) if initial_z is None else initial_z.clone()
    for part in _parts(tokens, window_elements):
        _backward_from_front(part, grad_out, tokens, carry, grad_q)
    for part in _parts(tokens, window_elements, descending=True):
        _backward_from_back(part, grad_out, tokens, grad_carry, grad_k, grad_v)


class _Part:
    """One window of chunks, and the sequences [first, last) that they belong to."""

    def __init__(self, window: Window, chunk_offsets: IntArray, window_elements: int) -> None:
        first_chunk = window.rows.start
        self.num = sum(tile.num for tile in window.tiles)
        tiles = tuple(replace(tile, rows=_shifted(tile.rows, first_chunk)) for tile in window.tiles)
        self.window = replace(window, tiles=tiles, rows=slice(0, self.num))
        first = int(np.searchsorted(chunk_offsets, first_chunk, side="right")) - 1
        last = int(np.searchsorted(chunk_offsets, first_chunk + self.num, side="left"))
        self.sequences = slice(first, last)
        self.offsets: IntArray = np.clip(chunk_offsets[first : last + 1] - first_chunk, 0, self.num)
        self.window_elements = window_elements

    def scan(self, totals: Tensor, carry: Tensor, *, descending: bool) -> Tensor:
        """Return the state that enters each chunk, and move `carry` [B, H, D, E] past this part, in place."""
        initial = carry[self.sequences].flatten(2)
        states, last = scan_rows(
            totals.flatten(2),
            None,
            self.offsets,
            initial,
            descending=descending,
            window_elements=self.window_elements,
        )
        entering = entering_carry(states, self.offsets, initial, descending=descending).view(totals.shape)
        carry[self.sequences] = last.view(len(last), *carry.shape[1:])
        return entering


def _backward_from_front(part: _Part, grad_out: Tensor, tokens: CausalTokens, carry: Tensor, grad_q: Tensor) -> None:
    q, k, v, _, activation = tokens
    dtype = product_dtype(q)
    before = part.scan(_totals(part, k, v, activation, carry.dtype), carry, descending=False)
    buffer = part.window.buffer("grad_q", grad_q)
    for tile in part.window.tiles:
        grad, value = tile.heads("grad", grad_out, dtype), tile.heads("v", v, dtype)
        keys = tile.activated("phi_k", activation, k, dtype)
        states = converted("rows", tile.states_of(before), dtype)
        products = (_scores(grad, value), keys), (grad, states.transpose(2, 3))
        _write_sum(tile.in_buffer(buffer), *products, activation, tile.heads("q", q, dtype))
    part.window.store(grad_q, buffer)


def _backward_from_back(
    part: _Part, grad_out: Tensor, tokens: CausalTokens, carry: Tensor, grad_k: Tensor, grad_v: Tensor
) -> None:
    q, k, v, _, activation = tokens
    dtype = product_dtype(q)
    after = part.scan(_totals(part, q, grad_out, activation, carry.dtype), carry, descending=True)
    buffer_k, buffer_v = part.window.buffer("grad_k", grad_k), part.window.buffer("grad_v", grad_v)
    for tile in part.window.tiles:
        # A token's gradient sums over the tokens after it, so the copies at padding must hold no gradient.
        grad = scaled("masked", tile.heads("grad", grad_out, dtype), tile.padding(dtype))
        value, raw = tile.heads("v", v, dtype), tile.heads("k", k, dtype)
        query = tile.activated("phi_q", activation, q, dtype)
        keys = activated("phi_k", activation, raw)
        rows = converted("rows", tile.states_of(after), dtype)
        products = (_scores(grad, value).transpose(2, 3), query), (value, rows.transpose(2, 3))
        _write_sum(tile.in_buffer(buffer_k), *products, activation, raw)
        _write_sum(tile.in_buffer(buffer_v), (_scores(query, keys).transpose(2, 3), grad), (keys, rows))
    part.window.store(grad_k, buffer_k)
    part.window.store(grad_v, buffer_v)


def _totals(part: _Part, k: Tensor, v: Tensor, activation: str, dtype: torch.dtype) -> Tensor:
    """Return phi(K)^T V of every chunk [P, H, D, E] in `dtype`."""
    totals = scratch("totals", (part.num, k.shape[1], k.shape[2], v.shape[2]), dtype, k.device)
    states = part.window.states("states", totals)
    for tile in part.window.tiles:
        keys = tile.activated("phi_k", activation, k, product_dtype(k))
        keys = scaled("phi_k", keys, tile.padding(keys.dtype))
        add_product(totals, states, tile, keys.transpose(2, 3), tile.heads("v", v, keys.dtype))
    part.window.store_states(totals, states)
    return totals


def _parts(tokens: CausalTokens, window_elements: int, *, descending: bool = False) -> Iterator[_Part]:
    """Cut the sequences into chunks, and these into windows. The longest sequence is cut evenly."""
    q, _, v, offsets, _ = tokens
    heads, width, value_width = q.shape[1], q.shape[2], v.shape[2]
    limit = CHUNK_NARROW if width <= 32 else CHUNK_WIDE
    longest = max(1, int(np.diff(offsets).max(initial=1)))
    chunk_offsets, chunks = cut_segments(offsets, -(-longest // -(-longest // limit)))
    for window in plan_windows(
        chunks,
        token_elements=heads * max(width, value_width, limit),
        state_elements=heads * width * value_width,
        device=q.device,
        descending=descending,
        window_elements=window_elements,
    ):
        yield _Part(window, chunk_offsets, window_elements)


def _scores(a: Tensor, b: Tensor) -> Tensor:
    """Return tril(a @ b^T) [n, H, L, L] of a, b [n, H, L, D]."""
    out = scratch("scores", (*a.shape[:3], b.shape[2]), a.dtype, a.device)
    torch.bmm(a.flatten(0, 1), b.flatten(0, 1).transpose(1, 2), out=out.flatten(0, 1))
    return out.tril_()


def _write_sum(
    part: Tensor,
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor, Tensor],
    activation: str = "identity",
    raw: Tensor | None = None,
) -> None:
    """Write the sum of two products [n, H, L, E], times phi'(raw) if raw is given, to part [n, L, H, E]."""
    result = multiplied(part, *first)
    result.flatten(0, 1).baddbmm_(*(x.flatten(0, 1) for x in second))
    if raw is not None:
        activate_gradient_(activation, raw, result)
    finish(part, result)


def _shifted(rows: slice | Tensor, by: int) -> slice | Tensor:
    return slice(rows.start - by, rows.stop - by) if isinstance(rows, slice) else rows - by
