"""The four passes over packed tokens that the operators consist of: accumulate and read, forward and backward.

Shapes: tokens [T, H, D] or [T, H, E], states [B, H, D, E], weight sums [B, H]; tiles head-major [n, H, L, D], as
batched matrix products take them. Each pass computes activations tile by tile, so its temporaries are bounded whatever
T is. Products are in the dtype of `precision.product_dtype`, states in float32 (float64 for float64 tokens).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from vista_kernels.read_settings import ReadSettings
from vista_kernels.segments import IntArray, Segments
from vista_kernels.torch_backend.activations import activate_gradient_
from vista_kernels.torch_backend.precision import product_dtype
from vista_kernels.torch_backend.tile import Tile
from vista_kernels.torch_backend.window import WINDOW_ELEMENTS, Window, plan_windows
from vista_kernels.torch_backend.workspace import activated, batched, converted, multiplied, scaled, scratch

ROUNDED = 256
"""Where products are bfloat16, sums over this many tokens are rounded to bfloat16 before they are added to a state."""


def accumulate(
    k: Tensor,
    v: Tensor,
    segments: Segments,
    weight: Tensor | None,
    z: Tensor,
    n: Tensor,
    activation: str,
    *,
    fresh: bool = True,
    window_elements: int = WINDOW_ELEMENTS,
) -> None:
    """Add sum_s w_s phi(k_s) v_s^T of each segment to z [B, H, D, E] and sum_s w_s to n [B, H], in place.

    `fresh` takes z as zero, whatever its memory holds.
    """
    dtype = product_dtype(k)
    if weight is None:
        n += torch.from_numpy(segments.lengths).to(device=n.device, dtype=n.dtype).unsqueeze(1)
    for window in _windows(segments, z, window_elements):
        # The first window of a segment overwrites its state. Later ones of a long segment, or new tokens, add to it.
        states = window.states("states", z) if fresh and window.is_first else None
        for tile in window.tiles:
            w = tile.weight(weight, z.dtype)  # without weights, what hides the padding, if any
            # Weighted keys are computed in the states' dtype and rounded once.
            keys = scaled("first", tile.activated("first", activation, k, dtype if weight is None else z.dtype), w)
            keys = converted("keys", keys, dtype) if keys.dtype != dtype else keys
            add_product(z, states, tile, keys.transpose(2, 3), tile.heads("second", v, dtype))
            if weight is not None and w is not None:
                _add_rows(n, tile, w.sum(2).squeeze(2))
        if states is not None:
            window.store_states(z, states)
    if fresh:
        _clear_empty(z, segments)


def accumulate_backward(
    grad_z: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    weight: Tensor | None,
    activation: str,
    grad_k: Tensor,
    grad_v: Tensor,
    *,
    window_elements: int = WINDOW_ELEMENTS,
) -> None:
    """Write dk = phi'(k) * w v dZ^T and dv = w phi(k) dZ of the segments' tokens to grad_k and grad_v."""
    dtype = product_dtype(k)
    for window in _windows(segments, grad_z, window_elements):
        buffer_k, buffer_v = window.buffer("grad_k", grad_k), window.buffer("grad_v", grad_v)
        for tile in window.tiles:
            raw = tile.heads("k", k, dtype)
            rows = converted("rows", tile.states_of(grad_z), dtype)  # [n, H, D, E]
            w = None if weight is None else tile.weight(weight, grad_z.dtype)
            part = tile.in_buffer(buffer_k)
            grad = multiplied(part, tile.heads("v", v, dtype), rows.transpose(2, 3))
            activate_gradient_(activation, raw, grad)
            finish(part, grad, w)
            part = tile.in_buffer(buffer_v)
            finish(part, multiplied(part, activated("phi_k", activation, raw), rows), w)
        window.store(grad_k, buffer_k)
        window.store(grad_v, buffer_v)


def read(
    q: Tensor,
    z: Tensor,
    n: Tensor,
    segments: Segments,
    settings: ReadSettings,
    out: Tensor,
    *,
    window_elements: int = WINDOW_ELEMENTS,
) -> None:
    """Write o = phi1(q) phi2(z * c) of the segments' queries to out [N, H, E]."""
    dtype, scale = product_dtype(q), settings.scale(n)
    for window in _windows(segments, z, window_elements):
        buffer = window.buffer("out", out)
        for tile in window.tiles:
            query = tile.activated("first", settings.activation, q, dtype)
            part = tile.in_buffer(buffer)
            finish(part, multiplied(part, query, _activated_states(z, scale, tile, settings, dtype), "second"))
        window.store(out, buffer)


def read_backward(
    grad_out: Tensor,
    q: Tensor,
    z: Tensor,
    n: Tensor,
    segments: Segments,
    settings: ReadSettings,
    grad_q: Tensor,
    grad_z: Tensor,
    *,
    window_elements: int = WINDOW_ELEMENTS,
) -> None:
    """Write dq to grad_q, and dz = phi2'(z * c) * c * sum phi1(q)^T dO to grad_z."""
    dtype, scale, activation = product_dtype(q), settings.scale(n), settings.activation
    for window in _windows(segments, z, window_elements):
        states = window.states("states", grad_z) if window.is_first else None
        buffer = window.buffer("grad_q", grad_q)
        for tile in window.tiles:
            raw, grad = tile.heads("q", q, dtype), tile.heads("grad", grad_out, dtype)
            rows = _activated_states(z, scale, tile, settings, dtype)
            part = tile.in_buffer(buffer)
            grad_query = multiplied(part, grad, rows.transpose(2, 3))
            activate_gradient_(activation, raw, grad_query)
            finish(part, grad_query)
            query = scaled("phi_q", activated("phi_q", activation, raw), tile.padding(dtype))
            add_product(grad_z, states, tile, query.transpose(2, 3), grad)
        window.store(grad_q, buffer)
        if states is not None:
            window.store_states(grad_z, states)
    # By now grad_z holds dA = sum phi1(q)^T dO.
    step = max(1, window_elements // max(1, z[:1].numel()))
    for first in range(0, len(z), step):
        part_z, part_grad = z[first : first + step], grad_z[first : first + step]
        c = None if scale is None else scale[first : first + step, :, None, None]
        activate_gradient_(settings.state_activation, scaled("scaled", part_z, c), part_grad)
        if c is not None:
            part_grad.mul_(c)
    _clear_empty(grad_z, segments)  # a state that nobody reads has no gradient, even if it is not finite


def add_product(z: Tensor, states: Tensor | None, tile: Tile, a: Tensor, b: Tensor) -> None:
    """Write a [n, H, D, L] @ b [n, H, L, E] to the tile's part of `states`, or add it to z's rows if that is None."""
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


def finish(part: Tensor, result: Tensor, factor: Tensor | None = None) -> None:
    """Write result [n, H, L, E], times factor, to its place [n, L, H, E], unless it lies there already."""
    if factor is not None:
        result.mul_(factor)
    part = part.transpose(1, 2)
    if result.data_ptr() != part.data_ptr():
        part.copy_(result)


def _rounded_sum(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a @ b [n, H, D, E] of bfloat16 a [n, H, D, L] and b [n, H, L, E], sums of ROUNDED tokens added in `dtype`.

    torch cannot multiply bfloat16 matrices into a float32 result on CPUs. The result is bfloat16 if there is one sum.
    """
    n, heads, width, length = a.shape
    whole = length - length % ROUNDED
    if 0 < whole < length:
        first, rest = (a[..., :whole], b[:, :, :whole]), (a[..., whole:], b[:, :, whole:])
        # A copy, because the second call writes to the same slot.
        return _rounded_sum(*first, dtype).to(dtype, copy=True) + _rounded_sum(*rest, dtype)
    parts = max(1, length // ROUNDED)
    shape = (n * heads * parts, length // parts)
    left = a.transpose(2, 3).reshape(*shape, width).transpose(1, 2)
    out = scratch("sum", (1, shape[0], width, b.shape[3]), a.dtype, a.device)
    batched(left.unsqueeze(0), b.reshape(*shape, b.shape[3]).unsqueeze(0), out)
    sums = out.view(n, heads, parts, width, b.shape[3])
    return sums[:, :, 0] if parts == 1 else sums.sum(2, dtype=dtype)


def _clear_empty(z: Tensor, segments: Segments) -> None:
    """Zero the states of empty segments, which no window writes."""
    empty: IntArray = np.flatnonzero(segments.lengths == 0)
    if len(empty):
        z.index_fill_(0, torch.from_numpy(empty).to(z.device), 0)


def _activated_states(
    z: Tensor, scale: Tensor | None, tile: Tile, settings: ReadSettings, dtype: torch.dtype
) -> Tensor:
    """Return A = phi2(Z c) of the tile's rows [n, H, D, E]."""
    c = None if scale is None else tile.states_of(scale)[:, :, None, None]
    state = activated("state", settings.state_activation, scaled("scaled", tile.states_of(z), c))
    return converted("rows", state, dtype)


def _add_rows(x: Tensor, tile: Tile, part: Tensor) -> None:
    if isinstance(tile.rows, slice):
        x[tile.rows] += part
    else:
        x[tile.rows] = x[tile.rows] + part


def _windows(segments: Segments, z: Tensor, window_elements: int) -> Iterator[Window]:
    heads, width, value_width = z.shape[1:]
    return plan_windows(
        segments,
        token_elements=heads * max(width, value_width),
        state_elements=heads * width * value_width,
        device=z.device,
        window_elements=window_elements,
    )
