"""Quasi-linear attention of many short segments, tile by tile: their states are never all in memory.

A state holds D numbers for each number of a value. So where segments have fewer than D tokens, most of the bytes moved
would be states. Here a tile's states are computed, read and dropped, and backward computes them again. There are no
targets. Shapes: tiles [n, H, L, D], states [n, H, D, E]; formulas in `quasi_linear_attention.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from vista_kernels.qla_tokens import QlaTokens
from vista_kernels.segments import Segments
from vista_kernels.state_layout import empty_state, state_dtype
from vista_kernels.state_queries import StateQueries
from vista_kernels.torch_backend.accumulate import accumulate, accumulate_backward
from vista_kernels.torch_backend.activations import activate_gradient_
from vista_kernels.torch_backend.precision import product_dtype
from vista_kernels.torch_backend.read import read, read_backward
from vista_kernels.torch_backend.tile import Tile
from vista_kernels.torch_backend.window import (
    PADDING_LIMIT,
    WINDOW_ELEMENTS,
    is_long,
    max_segments,
    max_window_tokens,
    pack_tile,
)
from vista_kernels.torch_backend.workspace import activated, batched, converted, put_rows, scaled, scratch

SLACK_TOKENS = 512
"""Tokens of padding that cost less than another tile."""


def attend_short(tokens: QlaTokens, segments: Segments, out: Tensor, *, window_elements: int = WINDOW_ELEMENTS) -> None:
    """Write o_s = phi1(q_s) phi2(Z c) of all tokens."""
    q, k, v = tokens[:3]
    dtype, activation, settings = product_dtype(q), tokens.activation, tokens.settings
    for tile in _tiles(segments, q, v, window_elements):
        factor = _key_factor(tile, tokens, segments)
        state = _state(_scaled_keys(activation, tile.heads("k", k, dtype), factor), tile.heads("v", v, dtype))
        rows = activated("rows", settings.state_activation, state)
        _put(out, tile, _product("result", tile.activated("phi_q", activation, q, dtype), rows))
    for one in _long_segments(segments, q, v, window_elements):
        z, n = _long_state(tokens, one, window_elements)
        read(StateQueries(q, z, n, one, settings), out, window_elements=window_elements)


def attend_short_backward(
    grad_out: Tensor,
    tokens: QlaTokens,
    segments: Segments,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    *,
    window_elements: int = WINDOW_ELEMENTS,
) -> None:
    """Write dq, dk and dv of all tokens."""
    q, k, v = tokens[:3]
    dtype, activation, settings = product_dtype(q), tokens.activation, tokens.settings
    for tile in _tiles(segments, q, v, window_elements):
        factor = _key_factor(tile, tokens, segments)
        raw, values = tile.heads("k", k, dtype), tile.heads("v", v, dtype)
        keys = _scaled_keys(activation, raw, factor)
        state = _state(keys, values)
        rows = activated("rows", settings.state_activation, state)
        raw_query, grad = tile.heads("q", q, dtype), tile.heads("grad", grad_out, dtype)
        grad_query = _product("result", grad, rows.transpose(2, 3))
        activate_gradient_(activation, raw_query, grad_query)
        _put(grad_q, tile, grad_query)
        # Copies at padding read nothing.
        query = scaled("phi_q", activated("phi_q", activation, raw_query), tile.padding(dtype))
        grad_state = _product("grad state", query.transpose(2, 3), grad)
        activate_gradient_(settings.state_activation, state, grad_state)
        _put(grad_v, tile, _product("result", keys, grad_state))
        grad_keys = _product("result", values, grad_state.transpose(2, 3))
        activate_gradient_(activation, raw, grad_keys)
        _put(grad_k, tile, scaled("weighted", grad_keys, factor))
    for one in _long_segments(segments, q, v, window_elements):
        z, n = _long_state(tokens, one, window_elements)
        grad_z, size = torch.empty_like(z), {"window_elements": window_elements}
        read_backward(grad_out, StateQueries(q, z, n, one, settings), grad_q, grad_z, **size)
        accumulate_backward(grad_z, tokens.writing(one), grad_k, grad_v, **size)


def _tiles(segments: Segments, q: Tensor, v: Tensor, window_elements: int) -> Iterator[Tile]:
    """Yield tiles of short segments of similar length, wherever they lie, so that little is padded; shortest first."""
    heads, width, value_width = q.shape[1], q.shape[2], v.shape[2]
    token_elements = heads * max(width, value_width)
    max_rows = max_segments(token_elements * min(width, value_width), window_elements)
    max_tokens = max_window_tokens(token_elements, window_elements)
    lengths = segments.lengths
    short = np.flatnonzero((lengths > 0) & ~is_long(lengths, token_elements, window_elements))
    order = short[np.argsort(lengths[short], kind="stable")]
    sizes = lengths[order]
    first = 0
    while first < len(order):
        longest = sizes[first : first + max_rows]
        padded = longest * np.arange(1, len(longest) + 1)
        fits = (padded <= PADDING_LIMIT * np.cumsum(longest) + SLACK_TOKENS) & (padded <= max_tokens)
        last = first + max(1, len(fits) if fits.all() else int(np.argmin(fits)))
        yield pack_tile(segments, np.sort(order[first:last]), q.device)
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


def _long_segments(segments: Segments, q: Tensor, v: Tensor, window_elements: int) -> Iterator[Segments]:
    """Yield the long segments, one at a time."""
    token_elements = q.shape[1] * max(q.shape[2], v.shape[2])
    for b in np.flatnonzero(is_long(segments.lengths, token_elements, window_elements)).tolist():
        yield segments[b : b + 1]


def _long_state(tokens: QlaTokens, one: Segments, window_elements: int) -> tuple[Tensor, Tensor]:
    """Return Z [1, H, D, E] and n [1, H] of one segment."""
    z, n = empty_state(tokens.k, tokens.v, 1)
    accumulate(tokens.writing(one), z, n.zero_(), window_elements=window_elements)
    return z, n


def _key_factor(tile: Tile, tokens: QlaTokens, segments: Segments) -> Tensor | None:
    """Return w c [n, H or 1, L or 1, 1], 0 at padding. Keys are scaled, because they have fewer numbers than states."""
    k, weight, settings = tokens.k, tokens.weight, tokens.settings
    if not settings.exponent and weight is None:
        return tile.padding(product_dtype(k))
    dtype = state_dtype(k.dtype)
    w = tile.weight(weight, dtype)
    if not settings.exponent:
        return w
    if weight is None or w is None:
        n = tile.states_of(torch.from_numpy(segments.lengths).to(k.device)).to(dtype).view(-1, 1, 1, 1)
    else:
        n = w.sum(2, keepdim=True)
    c = settings.scale(n)
    return c if w is None or c is None else c * w


def _scaled_keys(activation: str, raw: Tensor, factor: Tensor | None) -> Tensor:
    """Return phi(raw) factor [n, H, L, D], computed in the factor's dtype and rounded once."""
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
