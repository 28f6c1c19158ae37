"""Quasi-linear attention: bidirectional linear attention with an activated state. Targets read but never write.

Per sequence and head, with S the writing tokens (all but the last num_targets) and w a weight (1 unless given)::

    Z   = sum_{s in S} w_s phi1(k_s) v_s^T    n = sum_{s in S} w_s    A = phi2(Z c)    c = 1, or 1 / max(n, 1)^alpha
    o_s = phi1(q_s) A                                     s in S
    o_t = phi1(q_t) A + (phi1(q_t) . phi1(k_t)) v_t       targets t: the history and itself, no other target

Backward, given dO::

    dA = sum phi1(q)^T dO        dZ = dA * phi2'(Z c) c        dphi1(q) = dO A^T
    dphi1(k_s) = w_s v_s dZ^T    dv_s = w_s phi1(k_s) dZ
    targets: dphi1(q_t) += (dO_t . v_t) phi1(k_t)         dphi1(k_t) = (dO_t . v_t) phi1(q_t)
             dv_t = (phi1(q_t) . phi1(k_t)) dO_t

Layout: tokens packed as [T, H, D], sequences end to end, offsets int64 [B+1]. States are float32 (float64 for float64
tokens).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from vista_kernels import reference
from vista_kernels.arguments import (
    NORMALIZATIONS,
    check_activation,
    check_choice,
    check_offsets,
    check_tokens,
    check_weight,
    host_offsets,
)
from vista_kernels.backend import choose_backend, load_backend, needs_dispatch
from vista_kernels.qla_tokens import QLA_SCHEMA, QlaTokens
from vista_kernels.segments import IntArray, Segments
from vista_kernels.state_layout import empty_state
from vista_kernels.state_queries import StateQueries


def quasi_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    *,
    num_targets: Tensor | None = None,
    weight: Tensor | None = None,
    normalization: str = "none",
    alpha: float = 1.0,
    activation: str = "silu",
    state_activation: str = "silu",
    backend: str = "auto",
) -> Tensor:
    """Let every token read all writing tokens of its sequence: earlier ones, later ones and itself.

    The last num_targets[b] tokens of sequence b are targets: they read the writing tokens and themselves, write
    nothing, and do not see one another.

    Args:
        q: [T, H, D] queries, float64, float32, bfloat16 or float16.
        k: [T, H, D] keys, of q's dtype and device.
        v: [T, H, E] values, of q's dtype and device.
        offsets: [B+1] int64, where sequences begin; 0 first, T last. On q's device or the CPU (fastest on the CPU).
        num_targets: [B] int64, how many targets each sequence ends with; best on the CPU. None means no targets.
        weight: [T] or [T, H] float weights of the writing tokens. Those of targets are not read. No gradient.
        normalization: "none" (c = 1) or "length" (c = 1 / max(n, 1)^alpha).
        alpha: the exponent of "length".
        activation: phi1, of queries and keys: "silu", "relu" or "identity".
        state_activation: phi2, of the states.
        backend: "auto", "torch", "triton" or "reference".

    Returns:
        o [T, H, E] of v's dtype. q, k and v get gradients.

    Raises:
        ValueError: naming the argument and the shapes, if shapes, dtypes, devices, offsets or num_targets do not fit.
    """
    check_tokens(q=q, k=k, v=v)
    check_offsets(offsets, q.device)
    check_weight(weight, k)
    _check_num_targets(num_targets, offsets)
    check_choice("normalization", normalization, NORMALIZATIONS)
    check_activation("activation", activation)
    check_activation("state_activation", state_activation)
    weight = None if weight is None else weight.detach()
    chosen = choose_backend(backend, q.device)
    tokens = QlaTokens(q, k, v, offsets, num_targets, weight, normalization, alpha, activation, state_activation)
    if chosen == "reference":
        return reference.quasi_linear_attention(tokens).to(v.dtype)
    return (_qla_op(*tokens, chosen) if needs_dispatch(q, k, v) else _attend(tokens, chosen))[0]


@torch.library.custom_op(
    "vista_kernels::quasi_linear_attention",
    mutates_args=(),
    schema=f"({QLA_SCHEMA}, str backend) -> (Tensor, Tensor, Tensor)",
)
def _qla_op(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tokens, backend = arguments
    return _attend(QlaTokens(*tokens), backend)


def _attend(tokens: QlaTokens, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return o, and Z and n for backward (without rows if backward computes them again)."""
    segments, writers = _segments(tokens)
    run = load_backend(backend)
    z, n = empty_state(tokens.k, tokens.v, _num_kept(tokens, backend))
    out = tokens.v.new_empty(tokens.v.shape)
    if len(z) < len(segments):
        run.attend_short(tokens, segments, out)
        return out, z, n
    run.accumulate(tokens.writing(writers), z, n.zero_())
    run.read(StateQueries(tokens.q, z, n, segments, tokens.settings), out)
    if tokens.num_targets is not None:
        run.add_targets(tokens, _targets(segments, writers), out)
    return out, z, n


@_qla_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *fields, backend = arguments
    tokens = QlaTokens(*fields)
    return tokens.v.new_empty(tokens.v.shape), *empty_state(tokens.k, tokens.v, _num_kept(tokens, backend))


@torch.library.custom_op(
    "vista_kernels::quasi_linear_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad_out, Tensor z, Tensor n, {QLA_SCHEMA}, str backend) -> (Tensor, Tensor, Tensor)",
)
def _qla_backward_op(grad_out: Tensor, z: Tensor, n: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv."""
    *fields, backend = arguments
    tokens = QlaTokens(*fields)
    segments, writers = _segments(tokens)
    run = load_backend(backend)
    grads = _empty_gradients(tokens)
    grad_q, grad_k, grad_v = grads
    if len(z) < len(segments):
        run.attend_short_backward(grad_out, tokens, segments, *grads)
        return grads
    grad_z = z.new_empty(z.shape)
    run.read_backward(grad_out, StateQueries(tokens.q, z, n, segments, tokens.settings), grad_q, grad_z)
    # First the writers' rows of grad_k and grad_v, then those of the targets.
    run.accumulate_backward(grad_z, tokens.writing(writers), grad_k, grad_v)
    if tokens.num_targets is not None:
        run.add_targets_backward(grad_out, tokens, _targets(segments, writers), *grads)
    return grads


@_qla_backward_op.register_fake
def _(grad_out: Tensor, z: Tensor, n: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_gradients(QlaTokens(*arguments[:-1]))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    tensors, ctx.options = inputs[:6], inputs[6:]
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)  # Z has no gradient, and zeros for it would be as large as all states


def _backward(ctx, grad_out, grad_z, grad_n):  # type: ignore[no-untyped-def]
    no_gradients = [None] * (len(ctx.needs_input_grad) - 3)
    if grad_out is None:
        return None, None, None, *no_gradients
    *tensors, z, n = ctx.saved_tensors
    return *_qla_backward_op(grad_out, z, n, *tensors, *ctx.options), *no_gradients


_qla_op.register_autograd(_backward, setup_context=_setup_context)


def _check_num_targets(num_targets: Tensor | None, offsets: Tensor) -> None:
    if num_targets is None:
        return
    if num_targets.dim() != 1 or num_targets.shape[0] != offsets.shape[0] - 1:
        raise ValueError(
            f"num_targets must be [B], one per sequence of offsets {list(offsets.shape)}, got {list(num_targets.shape)}"
        )
    if num_targets.dtype != torch.int64:
        raise ValueError(f"num_targets must be int64, got {num_targets.dtype}")


def _empty_gradients(tokens: QlaTokens) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = tokens[:3]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _num_kept(tokens: QlaTokens, backend: str) -> int:
    """Return how many states the operator keeps for backward: all, or none if they would outweigh the tokens."""
    num_segments = tokens.offsets.shape[0] - 1
    short = num_segments * tokens.k.shape[2] > tokens.k.shape[0]
    return 0 if backend == "torch" and tokens.num_targets is None and short else num_segments


def _segments(tokens: QlaTokens) -> tuple[Segments, Segments]:
    """Return the sequences, and the part of each that writes."""
    segments = Segments.from_offsets(host_offsets(tokens.offsets, tokens.q.shape[0]))
    if tokens.num_targets is None:
        return segments, segments
    targets: IntArray = tokens.num_targets.numpy(force=True)
    wrong = np.flatnonzero((targets < 0) | (targets > segments.lengths))
    if len(wrong):
        b = int(wrong[0])
        raise ValueError(
            f"num_targets must lie in 0..length: sequence {b} has {segments.lengths[b]} tokens, {targets[b]} targets"
        )
    return segments, Segments(segments.starts, segments.lengths - targets)


def _targets(segments: Segments, writers: Segments) -> IntArray:
    """Return the token numbers of the targets."""
    counts = segments.lengths - writers.lengths
    before = np.concatenate([[0], np.cumsum(counts)])
    tokens: IntArray = np.arange(before[-1]) + np.repeat(segments.starts + writers.lengths - before[:-1], counts)
    return tokens
