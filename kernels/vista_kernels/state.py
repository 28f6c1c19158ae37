"""Additive states of linear attention: writing tokens into them, and reading them with queries.

Per segment (a user, or a block of a user's events) and head, with w_s a weight (1 unless given)::

    accumulate_state:  Z = sum_s w_s phi(k_s) v_s^T  [D, E]     n = sum_s w_s
    read_state:        A = phi2(Z c)   o = phi1(q) A            c = 1, or 1 / max(n, 1)^alpha

`scan_states` turns the states of blocks into the states at the ends of blocks. Layout: tokens packed as [T, H, D],
segments end to end, offsets int64 [B+1]. States are float32 (float64 for float64 tokens). Backward computes activations
again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vista_kernels import reference
from vista_kernels.arguments import (
    NORMALIZATIONS,
    check_activation,
    check_choice,
    check_offsets,
    check_state,
    check_tokens,
    check_weight,
    host_offsets,
)
from vista_kernels.backend import choose_backend, load_backend, needs_dispatch
from vista_kernels.read_settings import ReadSettings
from vista_kernels.segments import Segments
from vista_kernels.state_layout import empty_state, state_dtype
from vista_kernels.state_queries import StateQueries
from vista_kernels.state_tokens import StateTokens


def accumulate_state(
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    *,
    weight: Tensor | None = None,
    initial_z: Tensor | None = None,
    initial_n: Tensor | None = None,
    activation: str = "silu",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Sum the tokens of each segment into a state: Z = initial_z + sum w phi(k) v^T, n = initial_n + sum w.

    Args:
        k: [T, H, D] keys, float64, float32, bfloat16 or float16.
        v: [T, H, E] values, of k's dtype and device.
        offsets: [B+1] int64, where segments begin; 0 first, T last. On k's device or the CPU (fastest on the CPU).
        weight: [T] or [T, H] float, such as a decay; -1 forgets a token. No gradient.
        initial_z: [B, H, D, E] state to add to; None is zero.
        initial_n: [B, H] weight sum to add to; None is zero. No gradient.
        activation: phi, "silu", "relu" or "identity".
        backend: "auto", "torch", "triton" or "reference".

    Returns:
        (Z [B, H, D, E], n [B, H]), float32 (float64 for float64 tokens). k, v and initial_z get gradients.

    Raises:
        ValueError: naming the argument and the shapes, if shapes, dtypes, devices or offsets do not fit.
    """
    check_tokens(k=k, v=v)
    check_offsets(offsets, k.device)
    check_weight(weight, k)
    num_segments = offsets.shape[0] - 1
    check_state("initial_z", initial_z, (num_segments, k.shape[1], k.shape[2], v.shape[2]), k)
    check_state("initial_n", initial_n, (num_segments, k.shape[1]), k)
    check_activation("activation", activation)
    weight = None if weight is None else weight.detach()
    initial_n = None if initial_n is None else initial_n.detach()
    chosen = choose_backend(backend, k.device)
    if chosen == "reference":
        dtype = state_dtype(k.dtype)
        z, n = reference.accumulate_state(
            k, v, offsets, weight=weight, initial_z=initial_z, initial_n=initial_n, activation=activation
        )
        return z.to(dtype), n.to(dtype)
    run = _accumulate_op if needs_dispatch(k, v, initial_z) else _accumulate
    z, n = run(k, v, offsets, weight, initial_z, initial_n, activation, chosen)
    return z, n.detach()


def read_state(
    q: Tensor,
    z: Tensor,
    n: Tensor,
    offsets: Tensor,
    *,
    normalization: str = "none",
    alpha: float = 1.0,
    activation: str = "silu",
    state_activation: str = "silu",
    backend: str = "auto",
) -> Tensor:
    """Read each segment's state with its queries: o = phi1(q) phi2(Z c).

    Args:
        q: [N, H, D] queries, float64, float32, bfloat16 or float16.
        z: [B, H, D, E] states, float32 (float64 for float64 queries).
        n: [B, H] weight sums, of z's dtype. No gradient.
        offsets: [B+1] int64: queries offsets[b] to offsets[b+1] read state b.
        normalization: "none" (c = 1) or "length" (c = 1 / max(n, 1)^alpha).
        alpha: the exponent of "length".
        activation: phi1, of the queries: "silu", "relu" or "identity".
        state_activation: phi2, of the states.
        backend: "auto", "torch", "triton" or "reference".

    Returns:
        o [N, H, E] of q's dtype. q and z get gradients.

    Raises:
        ValueError: naming the argument and the shapes, if shapes, dtypes, devices or offsets do not fit.
    """
    check_tokens(q=q)
    check_offsets(offsets, q.device)
    if z.dim() != 4:
        raise ValueError(f"z must be [B, H, D, E], got shape {list(z.shape)}")
    check_state("z", z, (offsets.shape[0] - 1, q.shape[1], q.shape[2], z.shape[3]), q)
    check_state("n", n, tuple(z.shape[:2]), q)
    check_choice("normalization", normalization, NORMALIZATIONS)
    check_activation("activation", activation)
    check_activation("state_activation", state_activation)
    n = n.detach()
    chosen = choose_backend(backend, q.device)
    if chosen == "reference":
        return reference.read_state(
            q,
            z,
            n,
            offsets,
            normalization=normalization,
            alpha=alpha,
            activation=activation,
            state_activation=state_activation,
        ).to(q.dtype)
    run = _read_op if needs_dispatch(q, z) else _read
    out: Tensor = run(q, z, n, offsets, *ReadSettings.of(normalization, alpha, activation, state_activation), chosen)
    return out


def _accumulate(
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    weight: Tensor | None,
    initial_z: Tensor | None,
    initial_n: Tensor | None,
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    segments = Segments.from_offsets(host_offsets(offsets, k.shape[0]))
    z, n = empty_state(k, v, len(segments))
    n.zero_() if initial_n is None else n.copy_(initial_n)
    if initial_z is not None:
        z.copy_(initial_z)
    tokens = StateTokens(k, v, segments, weight, activation)
    load_backend(backend).accumulate(tokens, z, n, fresh=initial_z is None)
    return z, n


_accumulate_op = torch.library.custom_op("vista_kernels::accumulate_state", mutates_args=())(_accumulate)


@_accumulate_op.register_fake
def _(k: Tensor, v: Tensor, offsets: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty_state(k, v, offsets.shape[0] - 1)


@torch.library.custom_op("vista_kernels::accumulate_state_backward", mutates_args=())
def _accumulate_backward_op(
    grad_z: Tensor, k: Tensor, v: Tensor, offsets: Tensor, weight: Tensor | None, activation: str, backend: str
) -> tuple[Tensor, Tensor]:
    """Return dk and dv."""
    tokens = StateTokens(k, v, Segments.from_offsets(host_offsets(offsets, k.shape[0])), weight, activation)
    grads = k.new_empty(k.shape), v.new_empty(v.shape)
    load_backend(backend).accumulate_backward(grad_z.contiguous(), tokens, *grads)
    return grads


@_accumulate_backward_op.register_fake
def _(grad_z: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return k.new_empty(k.shape), v.new_empty(v.shape)


def _accumulate_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    k, v, offsets, weight, initial_z, _, *ctx.options = inputs
    ctx.save_for_backward(k, v, offsets, weight)
    ctx.has_initial = initial_z is not None


def _accumulate_backward(ctx, grad_z, grad_n):  # type: ignore[no-untyped-def]
    grads = _accumulate_backward_op(grad_z, *ctx.saved_tensors, *ctx.options)
    return *grads, None, None, grad_z if ctx.has_initial else None, None, None, None


_accumulate_op.register_autograd(_accumulate_backward, setup_context=_accumulate_setup)


def _read(
    q: Tensor,
    z: Tensor,
    n: Tensor,
    offsets: Tensor,
    activation: str,
    state_activation: str,
    exponent: float,
    backend: str,
) -> Tensor:
    segments = Segments.from_offsets(host_offsets(offsets, q.shape[0]))
    out = q.new_empty((q.shape[0], q.shape[1], z.shape[3]))
    queries = StateQueries(q, z, n, segments, ReadSettings(activation, state_activation, exponent))
    load_backend(backend).read(queries, out)
    return out


_read_op = torch.library.custom_op("vista_kernels::read_state", mutates_args=())(_read)


@_read_op.register_fake
def _(q: Tensor, z: Tensor, *_: Any) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1], z.shape[3]))


@torch.library.custom_op("vista_kernels::read_state_backward", mutates_args=())
def _read_backward_op(
    grad_out: Tensor,
    q: Tensor,
    z: Tensor,
    n: Tensor,
    offsets: Tensor,
    activation: str,
    state_activation: str,
    exponent: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return dq and dz."""
    segments = Segments.from_offsets(host_offsets(offsets, q.shape[0]))
    queries = StateQueries(q, z, n, segments, ReadSettings(activation, state_activation, exponent))
    grads = q.new_empty(q.shape), z.new_empty(z.shape)
    load_backend(backend).read_backward(grad_out, queries, *grads)
    return grads


@_read_backward_op.register_fake
def _(grad_out: Tensor, q: Tensor, z: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), z.new_empty(z.shape)


def _read_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:]


def _read_backward(ctx, grad_out):  # type: ignore[no-untyped-def]
    grads = _read_backward_op(grad_out, *ctx.saved_tensors, *ctx.options)
    return *grads, *[None] * (len(ctx.needs_input_grad) - 2)


_read_op.register_autograd(_read_backward, setup_context=_read_setup)
