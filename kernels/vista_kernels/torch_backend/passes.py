"""The four passes over packed tokens that the operators are made of: accumulate and read, forward and backward.

Shapes: tokens [T, H, D] or [T, H, E], states [B, H, D, E], counts [B, H], tiles [n, L, H, D].
Each pass recomputes activations tile by tile, so its temporaries are bounded whatever T is. Sums are float32 (float64
for float64 tokens).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from vista_kernels.torch_backend.activations import activate_gradient_
from vista_kernels.torch_backend.segments import WINDOW_ELEMENTS, Tile, Window, place, plan
from vista_kernels.torch_backend.workspace import activated, multiplied, scaled, scratch
from vista_kernels.validation import IntArray


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
    dtype = z.dtype
    if weight is None:
        n += torch.from_numpy(lengths).to(device=n.device, dtype=n.dtype).unsqueeze(1)
    for window in _windows(starts, lengths, k, z):
        states = window.states("states", z) if fresh and window.is_first else None
        for tile in window.tiles:
            written = activated("phi_k", activation, tile.load("k", k, dtype))
            w = tile.load_weight(weight, dtype)
            written = scaled("phi_k", written, w).permute(0, 2, 3, 1)
            add_product(z, states, tile, written, tile.load("v", v, dtype).transpose(1, 2))
            if weight is not None and w is not None:
                _add_rows(n, tile, w.sum(1).squeeze(2))
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
    dtype = grad_z.dtype
    for window in _windows(starts, lengths, k, grad_z):
        buffer_k, buffer_v = window.buffer("grad_k", grad_k, dtype), window.buffer("grad_v", grad_v, dtype)
        for tile in window.tiles:
            raw = tile.load("k", k, dtype)
            rows = tile_rows(grad_z, tile)  # [n, H, D, E]
            w = None if weight is None else tile.load_weight(weight, dtype)
            part_k, part_v = place(tile, buffer_k), place(tile, buffer_v)
            product(part_k.transpose(1, 2), tile.load("v", v, dtype).transpose(1, 2), rows.transpose(2, 3))
            activate_gradient_(activation, raw, part_k)
            product(part_v.transpose(1, 2), activated("phi_k", activation, raw).transpose(1, 2), rows)
            if w is not None:
                part_k.mul_(w)
                part_v.mul_(w)
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
    for window in _windows(starts, lengths, q, z):
        buffer = window.buffer("out", out, z.dtype)
        for tile in window.tiles:
            query = activated("phi_q", activation, tile.load("q", q, z.dtype)).transpose(1, 2)
            product(place(tile, buffer).transpose(1, 2), query, _read_rows(z, scale, tile, state_activation))
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
    dtype = z.dtype
    for window in _windows(starts, lengths, q, z):
        states = window.states("states", grad_z) if window.is_first else None
        buffer = window.buffer("grad_q", grad_q, dtype)
        for tile in window.tiles:
            raw, grad = tile.load("q", q, dtype), tile.load("grad", grad_out, dtype).transpose(1, 2)
            part = place(tile, buffer)
            rows = _read_rows(z, scale, tile, state_activation)
            product(part.transpose(1, 2), grad, rows.transpose(2, 3))
            activate_gradient_(activation, raw, part)
            query = scaled("phi_q", activated("phi_q", activation, raw), tile.padding(dtype))
            add_product(grad_z, states, tile, query.permute(0, 2, 3, 1), grad)
        window.store(grad_q, buffer)
        if states is not None:
            window.store_states(grad_z, states)
    _clear_empty(grad_z, lengths)
    step = max(1, WINDOW_ELEMENTS // max(1, z[:1].numel()))
    for first in range(0, len(z), step):
        part_z, part_grad = z[first : first + step], grad_z[first : first + step]
        c = None if scale is None else scale[first : first + step, :, None, None]
        activate_gradient_(state_activation, scaled("scaled", part_z, c), part_grad)
        if c is not None:
            part_grad.mul_(c)


def tile_rows(x: Tensor, tile: Tile) -> Tensor:
    """Return the tile's rows of x [B, ...]: a view where they are neighbours."""
    return x[tile.rows] if isinstance(tile.rows, slice) else x.index_select(0, tile.rows)


def add_product(z: Tensor, states: Tensor | None, tile: Tile, a: Tensor, b: Tensor) -> None:
    """Write a [n, H, D, L] @ b [n, H, L, E] to the tile's part of `states`; where that is None, add it to z's rows."""
    if states is not None:
        product(states[tile.state_place : tile.state_place + tile.num], a, b)
    elif isinstance(tile.rows, slice):
        product(z[tile.rows], a, b, add=True)
    else:
        rows = z.index_select(0, tile.rows)
        product(rows, a, b, add=True)
        z[tile.rows] = rows


def product(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> None:
    """Write a @ b to out, or add it; all are [n, H, ...] views, batched over the larger of n and H.

    MKL's batched product takes strided operands as they are, but is several times slower into a strided result. So
    either the result is copied from a buffer, or, where they are smaller, the operands are copied to one.
    """
    beta = 1 if add else 0
    if out.is_contiguous() and out.shape[0] >= out.shape[1] and a.numel() + b.numel() < 2 * out.numel():
        left, right = (_flat(slot, x) for slot, x in (("left", a), ("right", b)))
        out.flatten(0, 1).baddbmm_(left, right, beta=beta)
        return
    axis = 0 if out.shape[0] < out.shape[1] else 1
    for part, left, right in zip(out.unbind(axis), a.unbind(axis), b.unbind(axis), strict=True):
        if part.is_contiguous():
            part.baddbmm_(left, right, beta=beta)
        elif add:
            part.add_(multiplied("product", left, right))
        else:
            part.copy_(multiplied("product", left, right))


def _clear_empty(z: Tensor, lengths: IntArray) -> None:
    """Zero the states of segments that no window will write."""
    empty = np.flatnonzero(lengths == 0)
    if len(empty):
        z.index_fill_(0, torch.from_numpy(empty).to(z.device), 0)


def _flat(slot: str, x: Tensor) -> Tensor:
    """Return x [n, H, I, J] as [n * H, I, J], copied to the slot; whichever of I and J is dense in x stays so."""
    dense = x if x.stride(3) == 1 else x.transpose(2, 3)
    copy = scratch(slot, tuple(dense.shape), x.dtype, x.device).copy_(dense).flatten(0, 1)
    return copy if dense is x else copy.transpose(1, 2)


def _read_rows(z: Tensor, scale: Tensor | None, tile: Tile, state_activation: str) -> Tensor:
    """Return A = phi2(Z c) of the tile's rows [n, H, D, E]."""
    c = None if scale is None else tile_rows(scale, tile)[:, :, None, None]
    return activated("state", state_activation, scaled("scaled", tile_rows(z, tile), c))


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
