"""Quasi-linear attention of many short segments, tile by tile: their states are never all in memory.

A state holds D numbers for each number of a value, so where segments have fewer tokens than that, states would be most
of the bytes moved. Here a tile's states are formed, read and dropped; backward forms them again. There are no targets.
Shapes: tiles [n, H, L, D], states [n, H, D, E]; formulas in `quasi_linear_attention.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from vista_kernels.arguments import IntArray, state_dtype
from vista_kernels.state_layout import empty_state, length_scale
from vista_kernels.torch_backend import passes
from vista_kernels.torch_backend.activations import activate_gradient_
from vista_kernels.torch_backend.precision import product_dtype
from vista_kernels.torch_backend.segments import (
    PADDING_LIMIT,
    Tile,
    is_long,
    max_segments,
    max_window_tokens,
    pack_tile,
)
from vista_kernels.torch_backend.workspace import activated, batched, converted, put_rows, scaled, scratch

SLACK_TOKENS = 512
"""Padding that costs less than one more tile would."""


def attend_short(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: IntArray,
    lengths: IntArray,
    weight: Tensor | None,
    normalization: str,
    alpha: float,
    activation: str,
    state_activation: str,
    out: Tensor,
) -> None:
    """Write o_s = phi1(q_s) phi2(Z c) of all tokens."""
    dtype = product_dtype(q)
    for tile in _tiles(starts, lengths, q, v):
        factor = _key_factor(tile, weight, lengths, normalization, alpha, k)
        state = _state(_scaled_keys(activation, tile.heads("k", k, dtype), factor), tile.heads("v", v, dtype))
        rows = activated("rows", state_activation, state)
        _put(out, tile, _product("result", tile.activated("phi_q", activation, q, dtype), rows))
    for b in _long_segments(lengths, q, v):
        z, scale = _long_state(k, v, starts[b], lengths[b], weight, normalization, alpha, activation)
        passes.read(q, z, scale, starts[b], lengths[b], activation, state_activation, out)


def attend_short_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: IntArray,
    lengths: IntArray,
    weight: Tensor | None,
    normalization: str,
    alpha: float,
    activation: str,
    state_activation: str,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
) -> None:
    """Write dq, dk and dv of all tokens."""
    dtype = product_dtype(q)
    for tile in _tiles(starts, lengths, q, v):
        factor = _key_factor(tile, weight, lengths, normalization, alpha, k)
        raw, values = tile.heads("k", k, dtype), tile.heads("v", v, dtype)
        keys = _scaled_keys(activation, raw, factor)
        state = _state(keys, values)
        rows = activated("rows", state_activation, state)
        raw_query, grad = tile.heads("q", q, dtype), tile.heads("grad", grad_out, dtype)
        grad_query = _product("result", grad, rows.transpose(2, 3))
        activate_gradient_(activation, raw_query, grad_query)
        _put(grad_q, tile, grad_query)
        # Copies at padding read nothing.
        query = scaled("phi_q", activated("phi_q", activation, raw_query), tile.padding(dtype))
        grad_state = _product("grad state", query.transpose(2, 3), grad)
        activate_gradient_(state_activation, state, grad_state)
        _put(grad_v, tile, _product("result", keys, grad_state))
        grad_keys = _product("result", values, grad_state.transpose(2, 3))
        activate_gradient_(activation, raw, grad_keys)
        _put(grad_k, tile, scaled("weighted", grad_keys, factor))
    for b in _long_segments(lengths, q, v):
        z, scale = _long_state(k, v, starts[b], lengths[b], weight, normalization, alpha, activation)
        grad_z = torch.empty_like(z)
        options = activation, state_activation
        passes.read_backward(grad_out, q, z, scale, starts[b], lengths[b], *options, grad_q, grad_z)
        passes.accumulate_backward(grad_z, k, v, starts[b], lengths[b], weight, activation, grad_k, grad_v)


def _tiles(starts: IntArray, lengths: IntArray, q: Tensor, v: Tensor) -> Iterator[Tile]:
    """Tiles of short segments of like length, wherever these lie, so that little is padded: the shortest first."""
    heads, width, value_width = q.shape[1], q.shape[2], v.shape[2]
    token_elements = heads * max(width, value_width)
    max_rows, max_tokens = max_segments(token_elements * min(width, value_width)), max_window_tokens(token_elements)
    short = np.flatnonzero((lengths > 0) & ~is_long(lengths, token_elements))
    order = short[np.argsort(lengths[short], kind="stable")]
    sizes = lengths[order]
    first = 0
    while first < len(order):
        longest = sizes[first : first + max_rows]
        padded = longest * np.arange(1, len(longest) + 1)
        fits = (padded <= PADDING_LIMIT * np.cumsum(longest) + SLACK_TOKENS) & (padded <= max_tokens)
        last = first + max(1, len(fits) if fits.all() else int(np.argmin(fits)))
        yield pack_tile(starts, lengths, np.sort(order[first:last]), q.device)
        first = last


def _put(out: Tensor, tile: Tile, result: Tensor) -> None:
    """Write result [n, H, L, E] to the tile's tokens of out [T, H, E]."""
    turned = result.transpose(1, 2)
    if tile.index is None:
        out[tile.start : tile.start + tile.num * tile.length].view(turned.shape).copy_(turned)
        return
    rows = converted("turned", turned, out.dtype).flatten(0, 1)
    if tile.mask is None:
        put_rows(out, tile.index, rows)
    else:
        valid = tile.mask.flatten()
        put_rows(out, tile.index[valid], rows[valid])


def _long_segments(lengths: IntArray, q: Tensor, v: Tensor) -> Iterator[slice]:
    for b in np.flatnonzero(is_long(lengths, q.shape[1] * max(q.shape[2], v.shape[2]))).tolist():
        yield slice(b, b + 1)


def _long_state(
    k: Tensor,
    v: Tensor,
    starts: IntArray,
    lengths: IntArray,
    weight: Tensor | None,
    normalization: str,
    alpha: float,
    activation: str,
) -> tuple[Tensor, Tensor | None]:
    """Return Z [1, H, D, E] and c [1, H] of one segment."""
    z, n = empty_state(k, v, 1)
    passes.accumulate(k, v, starts, lengths, weight, z, n.zero_(), activation)
    return z, length_scale(n, normalization, alpha)


def _key_factor(
    tile: Tile, weight: Tensor | None, lengths: IntArray, normalization: str, alpha: float, k: Tensor
) -> Tensor | None:
    """Return w c [n, H or 1, L or 1, 1], 0 at padding: a key has fewer numbers to scale than a state."""
    if normalization == "none" and weight is None:
        return tile.padding(product_dtype(k))
    dtype = state_dtype(k.dtype)
    w = tile.weight(weight, dtype)
    if normalization == "none":
        return w
    if weight is None or w is None:
        n = passes.tile_rows(torch.from_numpy(lengths).to(k.device), tile).to(dtype).view(-1, 1, 1, 1)
    else:
        n = w.sum(2, keepdim=True)
    c = length_scale(n, normalization, alpha)
    return c if w is None or c is None else c * w


def _scaled_keys(activation: str, raw: Tensor, factor: Tensor | None) -> Tensor:
    """Return phi(raw) factor [n, H, L, D], reckoned in the factor's dtype and rounded once."""
    wide = raw if factor is None else converted("keys wide", raw, factor.dtype)
    return converted("keys", scaled("phi_k", activated("phi_k", activation, wide), factor), raw.dtype)


def _state(keys: Tensor, values: Tensor) -> Tensor:
    """Return Z c [n, H, D, E] in the slot "state"."""
    return _product("state", keys.transpose(2, 3), values)


def _product(slot: str, a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b of [n, H, D, L] and [n, H, L, E] in the slot."""
    out = scratch(slot, (*a.shape[:3], b.shape[3]), a.dtype, a.device)
    batched(a, b, out)
    return out
