"""Causal linear attention without softmax: o_t = phi(q_t) Z_t with Z_t = initial_z + sum_{s <= t} phi(k_s) v_s^T.

Layout: tokens packed as [T, H, D], sequences end to end, offsets int64 [B+1]. Sequences are cut into chunks. With Z the
state before a chunk, and its tokens as the rows of Q = phi(q), K = phi(k), V and dO::

    O  = tril(Q K^T) V + Q Z                     Z' = Z + K^T V
    dQ = tril(dO V^T) K + dO Z^T
    dK = tril(dO V^T)^T Q + V R^T                R  = gradient of the state after the chunk
    dV = tril(Q K^T)^T dO + K R                  R' = R + Q^T dO

So backward is one pass from the front (dQ) and one from the back (dK, dV), and stores nothing. Sums are float32
(float64 for float64 tokens).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vista_kernels import reference
from vista_kernels.arguments import (
    check_activation,
    check_offsets,
    check_state,
    check_tokens,
    host_offsets,
)
from vista_kernels.backend import choose_backend, load_backend, needs_dispatch
from vista_kernels.causal_tokens import CausalTokens
from vista_kernels.state_layout import empty_state, state_dtype


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
    """Let every token read the tokens of its sequence up to and including itself.

    Args:
        q: [T, H, D] queries, float64, float32, bfloat16 or float16.
        k: [T, H, D] keys, of q's dtype and device.
        v: [T, H, E] values, of q's dtype and device.
        offsets: [B+1] int64, where sequences begin; 0 first, T last. On q's device or the CPU (fastest on the CPU).
        initial_z: [B, H, D, E] state before each sequence, float32 (float64 for float64 tokens); None is zero.
        activation: phi, of queries and keys: "silu", "relu" or "identity".
        backend: "auto", "torch", "triton" or "reference".

    Returns:
        (o [T, H, E] of v's dtype, the state after each sequence [B, H, D, E]: float32, or float64 for float64 tokens).
        The state is Z of `accumulate_state` with the same activation. All tensors but offsets get gradients, through
        both results.

    Raises:
        ValueError: naming the argument and the shapes, if shapes, dtypes, devices or offsets do not fit.
    """
    check_tokens(q=q, k=k, v=v)
    check_offsets(offsets, q.device)
    check_state("initial_z", initial_z, (offsets.shape[0] - 1, q.shape[1], q.shape[2], v.shape[2]), q)
    check_activation("activation", activation)
    chosen = choose_backend(backend, q.device)
    if chosen == "reference":
        out, final = reference.causal_linear_attention(q, k, v, offsets, initial_z=initial_z, activation=activation)
        return out.to(v.dtype), final.to(state_dtype(v.dtype))
    run = _causal_op if needs_dispatch(q, k, v, initial_z) else _causal
    out, final = run(q, k, v, offsets, initial_z, activation, chosen)
    return out, final


def _causal(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, initial_z: Tensor | None, activation: str, backend: str
) -> tuple[Tensor, Tensor]:
    tokens = CausalTokens(q, k, v, host_offsets(offsets, q.shape[0]), activation)
    out, final = _empty_outputs(k, v, offsets)
    final.zero_() if initial_z is None else final.copy_(initial_z)
    load_backend(backend).causal_attention(tokens, final, out)
    return out, final


_causal_op = torch.library.custom_op("vista_kernels::causal_linear_attention", mutates_args=())(_causal)


@_causal_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty_outputs(k, v, offsets)


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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dq, dk, dv and d initial_z."""
    tokens = CausalTokens(q, k, v, host_offsets(offsets, q.shape[0]), activation)
    grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    grad_initial = grad_final.clone(memory_format=torch.contiguous_format)
    load_backend(backend).causal_attention_backward(grad_out, tokens, initial_z, grad_initial, *grads)
    return *grads, grad_initial


@_causal_backward_op.register_fake
def _(
    grad_out: Tensor, grad_final: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), grad_final.new_empty(grad_final.shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, activation, backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = activation, backend


def _backward(ctx, grad_out, grad_final):  # type: ignore[no-untyped-def]
    *tensors, initial_z = ctx.saved_tensors
    *grads, grad_initial = _causal_backward_op(grad_out, grad_final, *tensors, initial_z, *ctx.options)
    return *grads, None, None if initial_z is None else grad_initial, None, None


_causal_op.register_autograd(_backward, setup_context=_setup_context)


def _empty_outputs(k: Tensor, v: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), empty_state(k, v, offsets.shape[0] - 1)[0]
