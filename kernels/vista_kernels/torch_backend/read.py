"""Reading states by queries, and its backward; formulas in `state.py`, shapes and dtypes in `accumulate.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from vista_kernels.read_settings import ReadSettings
from vista_kernels.state_queries import StateQueries
from vista_kernels.torch_backend.activations import activate_gradient_
from vista_kernels.torch_backend.precision import product_dtype
from vista_kernels.torch_backend.state_sums import add_product, clear_empty
from vista_kernels.torch_backend.tile import Tile
from vista_kernels.torch_backend.window import WINDOW_ELEMENTS, plan_state_windows
from vista_kernels.torch_backend.workspace import activated, converted, finish, multiplied, scaled


def read(queries: StateQueries, out: Tensor, *, window_elements: int = WINDOW_ELEMENTS) -> None:
    """Write o = phi1(q) phi2(z * c) of the segments' queries to out [N, H, E]."""
    q, z, n, segments, settings = queries
    dtype, scale = product_dtype(q), settings.scale(n)
    for window in plan_state_windows(segments, z, window_elements):
        buffer = window.buffer("out", out)
        for tile in window.tiles:
            query = tile.activated("first", settings.activation, q, dtype)
            part = tile.in_buffer(buffer)
            finish(part, multiplied(part, query, _activated_states(z, scale, tile, settings, dtype), "second"))
        window.store(out, buffer)


def read_backward(
    grad_out: Tensor,
    queries: StateQueries,
    grad_q: Tensor,
    grad_z: Tensor,
    *,
    window_elements: int = WINDOW_ELEMENTS,
) -> None:
    """Write dq to grad_q, and dz = phi2'(z * c) * c * sum phi1(q)^T dO to grad_z."""
    q, z, n, segments, settings = queries
    dtype, scale, activation = product_dtype(q), settings.scale(n), settings.activation
    for window in plan_state_windows(segments, z, window_elements):
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
    clear_empty(grad_z, segments)  # a state that nobody reads has no gradient, even if it is not finite


def _activated_states(
    z: Tensor, scale: Tensor | None, tile: Tile, settings: ReadSettings, dtype: torch.dtype
) -> Tensor:
    """Return A = phi2(Z c) of the tile's rows [n, H, D, E]."""
    c = None if scale is None else tile.states_of(scale)[:, :, None, None]
    state = activated("state", settings.state_activation, scaled("scaled", tile.states_of(z), c))
    return converted("rows", state, dtype)
