"""Writing tokens into states, and its backward; formulas in `state.py`.

Shapes: tokens [T, H, D] or [T, H, E], states [B, H, D, E], weight sums [B, H]; tiles head-major [n, H, L, D], as
batched matrix products take them. Activations are computed tile by tile, so temporaries are bounded whatever T is.
Products are in the dtype of `precision.product_dtype`, states in float32 (float64 for float64 tokens).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vista_kernels.state_tokens import StateTokens
from vista_kernels.torch_backend.activations import activate_gradient_
from vista_kernels.torch_backend.precision import product_dtype
from vista_kernels.torch_backend.state_sums import add_product, add_rows, clear_empty
from vista_kernels.torch_backend.window import WINDOW_ELEMENTS, plan_state_windows
from vista_kernels.torch_backend.workspace import activated, converted, finish, multiplied, scaled


def accumulate(
    tokens: StateTokens, z: Tensor, n: Tensor, *, fresh: bool = True, window_elements: int = WINDOW_ELEMENTS
) -> None:
    """Add sum_s w_s phi(k_s) v_s^T of each segment to z [B, H, D, E] and sum_s w_s to n [B, H], in place.

    `fresh` takes z as zero, whatever its memory holds.
    """
    k, v, segments, weight, activation = tokens
    dtype = product_dtype(k)
    if weight is None:
        n += torch.from_numpy(segments.lengths).to(device=n.device, dtype=n.dtype).unsqueeze(1)
    for window in plan_state_windows(segments, z, window_elements):
        # The first window of a segment overwrites its state. Later ones of a long segment, or new tokens, add to it.
        states = window.states("states", z) if fresh and window.is_first else None
        for tile in window.tiles:
            w = tile.weight(weight, z.dtype)  # without weights, what hides the padding, if any
            # Weighted keys are computed in the states' dtype and rounded once.
            keys = scaled("first", tile.activated("first", activation, k, dtype if weight is None else z.dtype), w)
            keys = converted("keys", keys, dtype) if keys.dtype != dtype else keys
            add_product(z, states, tile, keys.transpose(2, 3), tile.heads("second", v, dtype))
            if weight is not None and w is not None:
                add_rows(n, tile, w.sum(2).squeeze(2))
        if states is not None:
            window.store_states(z, states)
    if fresh:
        clear_empty(z, segments)


def accumulate_backward(
    grad_z: Tensor,
    tokens: StateTokens,
    grad_k: Tensor,
    grad_v: Tensor,
    *,
    window_elements: int = WINDOW_ELEMENTS,
) -> None:
    """Write dk = phi'(k) * w v dZ^T and dv = w phi(k) dZ of the segments' tokens to grad_k and grad_v."""
    k, v, segments, weight, activation = tokens
    dtype = product_dtype(k)
    for window in plan_state_windows(segments, grad_z, window_elements):
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
