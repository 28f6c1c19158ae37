"""The four passes over packed tokens that the operators are made of: accumulate and read, forward and backward.

Shapes: tokens [T, H, D] or [T, H, E], states [B, H, D, E], counts [B, H]; tiles head-major [n, H, L, D], as batched
matrix products want them. Each pass recomputes activations tile by tile, so its temporaries are bounded whatever T is.
Products are in the dtype of `precision.product_dtype`, states in float32 (float64 for float64 tokens).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from vista_kernels.arguments import IntArray
from vista_kernels.torch_backend.activations import activate_gradient_
from vista_kernels.torch_backend.precision import product_dtype
from vista_kernels.torch_backend.segments import WINDOW_ELEMENTS, Tile, Window, place, plan
from vista_kernels.torch_backend.workspace import activated, batched, converted, multiplied, scaled, scratch

ROUNDED = 256
"""Tokens whose sum is rounded to bfloat16 before it is added to a state, where products are bfloat16."""


def accumulate(
    k: Tensor,
    v: Tensor,
    starts: IntArray,
    lengths: IntArray,
    weight: Tensor | None,
    z: Tensor,
    n: Tensor,
    activation: str,
    *,
    fresh: bool = True,
) -> None:
    """Add sum_s w_s phi(k_s) v_s^T of each segment to z [B, H, D, E] and sum_s w_s to n [B, H], in place.

    `fresh` says that z is to be taken as zero; its memory may hold anything.
    """
    dtype = product_dtype(k)
    if weight is None:
        n += torch.from_numpy(lengths).to(device=n.device, dtype=n.dtype).unsqueeze(1)
    for window in _windows(starts, lengths, k, z):
        # The first window of a segment overwrites its state; later ones of a long segment, or new tokens, add to it.
        states = window.states("states", z) if fresh and window.is_first else None
        for tile in window.tiles:
            w = tile.weight(weight, z.dtype)  # without weights, what hides padding, if there is some
            keys = weighted_keys(tile, activation, k, w, dtype if weight is None else z.dtype)
            add_product(z, states, tile, keys.transpose(2, 3), tile.heads("second", v, dtype))
            if weight is not None and w is not None:
                _add_rows(n, tile, w.sum(2).squeeze(2))
        if states is not None:
            window.store_states(z, states)
    if fresh:
        _clear_empty(z, lengths)


def accumulate_backward(
    grad_z: Tensor,
    k: Tensor,
    v: Tensor,
    starts: IntArray,
    lengths: IntArray,
    weight: Tensor | None,
    activation: str,
    grad_k: Tensor,
    grad_v: Tensor,
) -> None:
    """Write dk = phi'(k) * w v dZ^T and dv = w phi(k) dZ of the segments' tokens to grad_k and grad_v."""
    dtype = product_dtype(k)
    for window in _windows(starts, lengths, k, grad_z):
        buffer_k, buffer_v = window.buffer("grad_k", grad_k), window.buffer("grad_v", grad_v)
        for tile in window.tiles:
            raw = tile.heads("k", k, dtype)
            rows = converted("rows", tile_rows(grad_z, tile), dtype)  # [n, H, D, E]
            w = None if weight is None else tile.weight(weight, grad_z.dtype)
            part = place(tile, buffer_k)
            grad = multiplied(part, tile.heads("v", v, dtype), rows.transpose(2, 3))
            activate_gradient_(activation, raw, grad)
            finish(part, grad, w)
            part = place(tile, buffer_v)
            finish(part, multiplied(part, activated("phi_k", activation, raw), rows), w)
        window.store(grad_k, buffer_k)
        window.store(grad_v, buffer_v)


def read(
    q: Tensor,
    z: Tensor,
    scale: Tensor | None,
    starts: IntArray,
    lengths: IntArray,
    activation: str,
    state_activation: str,
    out: Tensor,
) -> None:
    """Write o = phi1(q) phi2(z * c) of the segments' queries to out [N, H, E]; scale is c [B, H] or None for 1."""
    dtype = product_dtype(q)
    for window in _windows(starts, lengths, q, z):
        buffer = window.buffer("out", out)
        for tile in window.tiles:
            query = tile.activated("first", activation, q, dtype)
            part = place(tile, buffer)
            finish(part, multiplied(part, query, _activated_states(z, scale, tile, state_activation, dtype), "second"))
        window.store(out, buffer)


def read_backward(
    grad_out: Tensor,
    q: Tensor,
    z: Tensor,
    scale: Tensor | None,
    starts: IntArray,
    lengths: IntArray,
    activation: str,
    state_activation: str,
    grad_q: Tensor,
    grad_z: Tensor,
) -> None:
    """Write dq to grad_q, and dz = phi2'(z * c) * c * sum phi1(q)^T dO to grad_z."""
    dtype = product_dtype(q)
    for window in _windows(starts, lengths, q, z):
        states = window.states("states", grad_z) if window.is_first else None
        buffer = window.buffer("grad_q", grad_q)
        for tile in window.tiles:
            raw, grad = tile.heads("q", q, dtype), tile.heads("grad", grad_out, dtype)
            rows = _activated_states(z, scale, tile, state_activation, dtype)
            part = place(tile, buffer)
            grad_query = multiplied(part, grad, rows.transpose(2, 3))
            activate_gradient_(activation, raw, grad_query)
            finish(part, grad_query)
            query = scaled("phi_q", activated("phi_q", activation, raw), tile.padding(dtype))
            add_product(grad_z, states, tile, query.transpose(2, 3), grad)
        window.store(grad_q, buffer)
        if states is not None:
            window.store_states(grad_z, states)
    # grad_z holds dA = sum phi1(q)^T dO by now.
    step = max(1, WINDOW_ELEMENTS // max(1, z[:1].numel()))
    for first in range(0, len(z), step):
        part_z, part_grad = z[first : first + step], grad_z[first : first + step]
        c = None if scale is None else scale[first : first + step, :, None, None]
        activate_gradient_(state_activation, scaled("scaled", part_z, c), part_grad)
        if c is not None:
            part_grad.mul_(c)
    _clear_empty(grad_z, lengths)  # what nobody reads has no gradient, even where it is not finite


def weighted_keys(tile: Tile, activation: str, k: Tensor, w: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return w phi(k) [n, H, L, D], reckoned in `dtype` and rounded once to that of products."""
    keys = scaled("first", tile.activated("first", activation, k, dtype), w)
    return converted("keys", keys, product_dtype(k)) if keys.dtype != product_dtype(k) else keys


def tile_rows(x: Tensor, tile: Tile) -> Tensor:
    """Return the tile's rows of x [B, ...]: a view where they are neighbours."""
    return x[tile.rows] if isinstance(tile.rows, slice) else x.index_select(0, tile.rows)


def add_product(z: Tensor, states: Tensor | None, tile: Tile, a: Tensor, b: Tensor) -> None:
    """Write a [n, H, D, L] @ b [n, H, L, E] to the tile's part of `states`; where that is None, add it to z's rows."""
    target = None if states is None else states[tile.state_place : tile.state_place + tile.num]
    if a.dtype != z.dtype:
        total = _rounded_sum(a, b, z.dtype)
        if target is None:
            _add_rows(z, tile, total)
        else:
            target.copy_(total)
    elif target is not None:
        batched(a, b, target)
    elif isinstance(tile.rows, slice):
        z[tile.rows].flatten(0, 1).baddbmm_(a.flatten(0, 1), b.flatten(0, 1))
    else:
        total = scratch("sum", (*a.shape[:3], b.shape[3]), a.dtype, a.device)
        batched(a, b, total)
        _add_rows(z, tile, total)


def _rounded_sum(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a @ b [n, H, D, E] of bfloat16 a [n, H, D, L] and b [n, H, L, E], sums of ROUNDED tokens added in `dtype`.

    torch has no product of bfloat16 matrices into float32 on CPUs. The result is bfloat16 where there is one sum.
    """
    n, heads, width, length = a.shape
    whole = length - length % ROUNDED
    if 0 < whole < length:
        first, rest = (a[..., :whole], b[:, :, :whole]), (a[..., whole:], b[:, :, whole:])
        # A copy, for the second call writes to the same slot.
        return _rounded_sum(*first, dtype).to(dtype, copy=True) + _rounded_sum(*rest, dtype)
    parts = max(1, length // ROUNDED)
    shape = (n * heads * parts, length // parts)
    left = a.transpose(2, 3).reshape(*shape, width).transpose(1, 2)
    out = scratch("sum", (1, shape[0], width, b.shape[3]), a.dtype, a.device)
    batched(left.unsqueeze(0), b.reshape(*shape, b.shape[3]).unsqueeze(0), out)
    sums = out.view(n, heads, parts, width, b.shape[3])
    return sums[:, :, 0] if parts == 1 else sums.sum(2, dtype=dtype)


def finish(part: Tensor, result: Tensor, factor: Tensor | None = None) -> None:
    """Put result [n, H, L, E], times factor, into its place [n, L, H, E]; it may lie there already."""
    if factor is not None:
        result.mul_(factor)
    part = part.transpose(1, 2)
    if result.data_ptr() != part.data_ptr():
        part.copy_(result)


def _clear_empty(z: Tensor, lengths: IntArray) -> None:
    """Zero the states of segments that no window will write."""
    empty = np.flatnonzero(lengths == 0)
    if len(empty):
        z.index_fill_(0, torch.from_numpy(empty).to(z.device), 0)


def _activated_states(z: Tensor, scale: Tensor | None, tile: Tile, state_activation: str, dtype: torch.dtype) -> Tensor:
    """Return A = phi2(Z c) of the tile's rows [n, H, D, E]."""
    c = None if scale is None else tile_rows(scale, tile)[:, :, None, None]
    state = activated("state", state_activation, scaled("scaled", tile_rows(z, tile), c))
    return converted("rows", state, dtype)


def _add_rows(x: Tensor, tile: Tile, part: Tensor) -> None:
    if isinstance(tile.rows, slice):
        x[tile.rows] += part
    else:
        x[tile.rows] = x[tile.rows] + part


def _windows(starts: IntArray, lengths: IntArray, tokens: Tensor, z: Tensor) -> Iterator[Window]:
    heads, width, value_width = z.shape[1:]
    return plan(
        starts,
        lengths,
        token_elements=heads * max(width, value_width),
        state_elements=heads * width * value_width,
        device=tokens.device,
    )
