"""Attention of candidates to a context that they share and to themselves. No candidate sees another.

Per request and head, for candidate i, with C context tokens::

    s_ij = scale q_i . k_j + bias_ij        e_i = scale q_i . own_k_i + own_bias_i
    o_i  = sum_j exp(s_ij - L_i) v_j + exp(e_i - L_i) own_v_i          L_i = log(sum_j exp(s_ij) + exp(e_i))

Forward is torch's SDPA over the context, which returns its log-sum-exp, with one term merged into it. Backward reads
the merged L and computes delta again: with p = exp(s - L) and delta_i = dO_i . o_i::

    dS_ij = p_ij (dO_i . v_j - delta_i)     dE_i = exp(e_i - L_i) (dO_i . own_v_i - delta_i)     dbias = dS
    dq = scale (dS k + dE own_k)            dk = scale dS^T q        dv = p^T dO

The computation is in torch_backend: `candidate_portions.py` has these passes, and `direct_candidates.py` plain products
for bfloat16 on CPUs.

Layout: [B, H, N, D]. Sums are float32 (float64 for float64 tokens).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vista_kernels import reference
from vista_kernels.backend import choose_backend, needs_dispatch
from vista_kernels.candidate_gradients import CandidateGradients
from vista_kernels.candidate_tokens import CANDIDATE_SCHEMA, CandidateTokens, check_candidates
from vista_kernels.state_layout import state_dtype
from vista_kernels.torch_backend.candidate_portions import (
    attend_portions,
    attend_portions_backward,
    default_portion,
)
from vista_kernels.torch_backend.direct_candidates import attend_directly, is_direct


def candidate_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    *,
    bias: Tensor | None = None,
    own_bias: Tensor | None = None,
    context_mask: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Let every candidate attend to its request's context and to itself: o = softmax([q k^T, q . own_k]) [v; own_v].

    A candidate that sees no context token, or has none (C = 0), returns own_v.

    Args:
        q: [B, H, Q, D] queries of the candidates, float64, float32, bfloat16 or float16.
        k: [B, H, C, D] keys of the context, of q's dtype and device, as are the following.
        v: [B, H, C, E] values of the context.
        own_k: [B, H, Q, D] keys of the candidates.
        own_v: [B, H, Q, E] values of the candidates.
        bias: float, broadcastable to [B, H, Q, C], added to the scaled scores; -inf hides a token.
        own_bias: float [H], or broadcastable to [B, H, Q], added to the candidates' own scores.
        context_mask: bool [B, C]; False hides a token from all candidates. None hides no token.
        scale: factor of the scores; None is 1 / sqrt(D).
        backend: "auto", "torch" or "reference".

    Returns:
        o [B, H, Q, E] of v's dtype. All float arguments get gradients, a broadcast bias in its own shape.

    Raises:
        ValueError: naming the argument and the shapes, if shapes, dtypes or devices do not fit, or for "triton".
    """
    tokens = check_candidates(CandidateTokens(q, k, v, own_k, own_v, bias, own_bias, context_mask, scale))
    if choose_backend(backend, q.device, sdpa=True) == "reference":
        return reference.candidate_attention(tokens).to(v.dtype)
    return attend_directly(tokens) if is_direct(tokens) else attend_in_portions(tokens)


def attend_in_portions(tokens: CandidateTokens, portion_elements: int | None = None) -> Tensor:
    """Return o by SDPA over portions of at most `portion_elements` scores and queries (None: by device)."""
    if portion_elements is None:
        portion_elements = default_portion(tokens.q.device)
    dispatched = needs_dispatch(*tokens)
    out, _ = _candidate_op(*tokens, portion_elements) if dispatched else _attend(tokens, portion_elements)
    return out


def _attend(tokens: CandidateTokens, portion_elements: int) -> tuple[Tensor, Tensor]:
    """Return o, and L [B, H, Q] for backward."""
    out, lse = _empty_outputs(tokens)
    attend_portions(tokens, portion_elements, out, lse)
    return out, lse


@torch.library.custom_op(
    "vista_kernels::candidate_attention",
    mutates_args=(),
    schema=f"({CANDIDATE_SCHEMA}, int portion_elements) -> (Tensor, Tensor)",
)
def _candidate_op(*arguments: Any) -> tuple[Tensor, Tensor]:
    *fields, portion_elements = arguments
    return _attend(CandidateTokens(*fields), portion_elements)


@_candidate_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _empty_outputs(CandidateTokens(*arguments[:-1]))


@torch.library.custom_op(
    "vista_kernels::candidate_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad_out, Tensor lse, bool learned_bias, {CANDIDATE_SCHEMA}, int portion_elements) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _candidate_backward_op(grad_out: Tensor, lse: Tensor, learned_bias: bool, *arguments: Any) -> tuple[Tensor, ...]:
    """Return the gradients of the tokens and the biases, empty for a bias that has none."""
    *fields, portion_elements = arguments
    tokens = CandidateTokens(*fields)
    grads = _empty_gradients(tokens, learned_bias)
    attend_portions_backward(grad_out, lse, tokens, portion_elements, grads)
    return _without_none(grads)


@_candidate_backward_op.register_fake
def _(grad_out: Tensor, lse: Tensor, learned_bias: bool, *arguments: Any) -> tuple[Tensor, ...]:
    return _without_none(_empty_gradients(CandidateTokens(*arguments[:-1]), learned_bias))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.scale, ctx.portion_elements = inputs
    ctx.save_for_backward(output[1], *tensors)


def _backward(ctx, grad_out, grad_lse):  # type: ignore[no-untyped-def]
    lse, *tensors = ctx.saved_tensors
    learned_bias, has_own_bias = ctx.needs_input_grad[5], tensors[6] is not None
    settings = ctx.scale, ctx.portion_elements
    *grads, bias, own_bias = _candidate_backward_op(grad_out, lse, learned_bias, *tensors, *settings)
    return *grads, bias if learned_bias else None, own_bias if has_own_bias else None, None, None, None


_candidate_op.register_autograd(_backward, setup_context=_setup_context)


def _empty_like(x: Tensor) -> Tensor:
    """Return an uninitialized [B, H, N, E] whose memory is [B, N, H, E], the layout of projections."""
    return x.new_empty((x.shape[0], x.shape[2], x.shape[1], x.shape[3])).transpose(1, 2)


def _empty_outputs(tokens: CandidateTokens) -> tuple[Tensor, Tensor]:
    q = tokens.q
    return _empty_like(tokens.own_v), q.new_empty(q.shape[:3], dtype=state_dtype(q.dtype))


def _empty_gradients(tokens: CandidateTokens, learned_bias: bool) -> CandidateGradients:
    q, k, v, own_k, own_v, bias, own_bias, _, _ = tokens
    return CandidateGradients(
        _empty_like(q),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        _empty_like(own_k),
        _empty_like(own_v),
        bias.new_empty(bias.shape) if bias is not None and learned_bias else None,
        None if own_bias is None else own_bias.new_empty(own_bias.shape),
    )


def _without_none(grads: CandidateGradients) -> tuple[Tensor, ...]:
    """Return the gradients as an operator does: empty tensors in place of None."""
    return tuple(grads.q.new_empty(0) if x is None else x for x in grads)
