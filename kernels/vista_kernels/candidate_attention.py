"""Attention of candidates to a context that they share and to themselves. No candidate sees another.

Per request and head, for candidate i, with C context tokens::

    s_ij = scale q_i . k_j + bias_ij        e_i = scale q_i . own_k_i + own_bias_i
    o_i  = sum_j exp(s_ij - L_i) v_j + exp(e_i - L_i) own_v_i          L_i = log(sum_j exp(s_ij) + exp(e_i))

Forward is torch's SDPA over the context, which returns its log-sum-exp, with one term merged into it. Backward reads
the merged L and computes delta again: with p = exp(s - L) and delta_i = dO_i . o_i::

    dS_ij = p_ij (dO_i . v_j - delta_i)     dE_i = exp(e_i - L_i) (dO_i . own_v_i - delta_i)     dbias = dS
    dq = scale (dS k + dE own_k)            dk = scale dS^T q        dv = p^T dO

On a CPU SDPA's own backward returns no gradient of a bias. So dS is computed here, in portions of requests and
candidates that fit the cache (torch_backend/sdpa.py). Where a CPU multiplies bfloat16 faster than float32, up to
`sdpa.DIRECT_SCORES` bfloat16 scores are plain products with one softmax and torch's own backward: that beats portions
widened to float32.

Layout: [B, H, N, D]. Sums are float32 (float64 for float64 tokens).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vista_kernels import reference
from vista_kernels.backend import choose_backend, needs_dispatch
from vista_kernels.candidate_tokens import CANDIDATE_SCHEMA, CandidateTokens, check_candidates
from vista_kernels.state_layout import state_dtype
from vista_kernels.torch_backend import sdpa
from vista_kernels.torch_backend.precision import product_dtype

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""Of the tokens, bias and own_bias; the last two are empty where there is no bias."""


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


def is_direct(tokens: CandidateTokens) -> bool:
    """Return whether `attend_directly` is the faster form."""
    q = tokens.q
    if q.device.type != "cpu" or torch.compiler.is_compiling() or product_dtype(q) != torch.bfloat16:
        return False
    return tokens.num_scores <= sdpa.DIRECT_SCORES


def attend_directly(tokens: CandidateTokens) -> Tensor:
    """Return o by products in the tokens' dtype and a float32 softmax, differentiated by torch."""
    q, k, v, own_k, own_v, bias, own_bias, context_mask, _ = tokens
    scale = tokens.factor
    added = torch.zeros((), device=q.device) if bias is None else bias.float()
    if context_mask is not None:
        added = added + torch.where(context_mask, 0.0, sdpa.HIDDEN)[:, None, None]
    k = k.contiguous()  # torch would copy the transpose of a view of all heads' tokens, at several times the cost
    if torch.is_grad_enabled() or tokens.num_scores > sdpa.BUFFERED_SCORES:
        own = (q.float() * own_k).sum(-1) * scale
        own = own if own_bias is None else own + own_bias
        scores = torch.add(added, q @ k.transpose(-1, -2), alpha=scale)
        weights = torch.softmax(torch.cat([scores, own[..., None]], -1), -1).to(v.dtype)
        return weights[..., :-1] @ v + weights[..., -1:] * own_v
    weights, share = sdpa.direct_weights(q, k, own_k, added, own_bias, scale)
    return torch.addcmul(torch.matmul(weights, v), share, own_v)


def attend_in_portions(tokens: CandidateTokens, portion_elements: int | None = None) -> Tensor:
    """Return o by SDPA over portions of at most `portion_elements` scores and queries (None: by device)."""
    if portion_elements is None:
        on_cpu = tokens.q.device.type == "cpu"
        portion_elements = sdpa.PORTION_ELEMENTS if on_cpu else sdpa.PORTION_ELEMENTS_ON_GPU
    if needs_dispatch(*tokens):
        return _candidate_op(*tokens, portion_elements)[0]
    return _attend(tokens, portion_elements)[0]


def _attend(tokens: CandidateTokens, portion_elements: int) -> tuple[Tensor, Tensor]:
    """Return o, and L [B, H, Q] for backward."""
    q, k, v, own_k, own_v, bias, own_bias, context_mask, _ = tokens
    scale = tokens.factor
    out, lse = _empty_outputs(tokens)
    # SDPA on a GPU is fastest on 16-bit tokens. On a CPU without AMX it is slower on them than on widened ones.
    work = state_dtype(q.dtype) if q.device.type == "cpu" else q.dtype
    for rows in sdpa.row_portions(q, k, portion_elements):
        k_n, v_n = sdpa.widened("k", k[rows], work), sdpa.widened("v", v[rows], work)
        for part in sdpa.query_portions(rows, q, k, portion_elements):
            q_n = sdpa.widened("q", q[part], work)
            o, context = sdpa.attend(q_n, k_n, v_n, sdpa.mask(bias, context_mask, part, work), scale)
            own = sdpa.own_scores(q_n, own_k[part], own_bias, part, scale)
            torch.logaddexp(context, own, out=lse[part])
            share = own.sub_(lse[part]).exp_()[..., None]
            if out.dtype == work == share.dtype:
                torch.lerp(o, own_v[part], share, out=out[part])
            else:
                out[part] = o.to(share.dtype).lerp_(own_v[part].to(share.dtype), share)
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
def _candidate_backward_op(grad_out: Tensor, lse: Tensor, learned_bias: bool, *arguments: Any) -> Gradients:
    *fields, portion_elements = arguments
    tokens = CandidateTokens(*fields)
    q, k, v, own_k, own_v, bias, own_bias, context_mask, _ = tokens
    scale = tokens.factor
    work = state_dtype(q.dtype)
    grads = _empty_gradients(tokens, learned_bias)
    grad_q, grad_k, grad_v, grad_own_k, grad_own_v = grads[:5]
    grad_bias, grad_own_bias = (x.zero_() if x.dtype == work else x.new_zeros(x.shape, dtype=work) for x in grads[5:])
    for rows in sdpa.row_portions(q, k, portion_elements):
        k_n, v_n = (sdpa.widened(name, x[rows], work).flatten(0, 1) for name, x in (("k", k), ("v", v)))
        dk, dv = (sdpa.accumulator(name, x[rows], work).flatten(0, 1) for name, x in (("dk", grad_k), ("dv", grad_v)))
        for part in sdpa.query_portions(rows, q, k, portion_elements):
            q_n, do, own_k_n, own_v_n = (
                sdpa.like(name, x[part], work).copy_(x[part])  # copies, which are overwritten below
                for name, x in (("q", q), ("do", grad_out), ("own_k", own_k), ("own_v", own_v))
            )
            p = sdpa.scores(q_n, k_n, sdpa.mask(bias, context_mask, part, work), scale)
            sdpa.exp(p.sub_(lse[part][..., None]))
            own = sdpa.exp(sdpa.own_scores(q_n, own_k_n, own_bias, part, scale).sub_(lse[part]))
            total = p.sum(-1).add_(own)[..., None]
            do.div_(total)
            q_f, do_f, p_f = q_n.flatten(0, 1), do.flatten(0, 1), p.flatten(0, 1)
            torch.baddbmm(dv, p_f.transpose(1, 2), do_f, out=dv)
            ds_f = torch.bmm(do_f, v_n.transpose(1, 2), out=sdpa.like("ds", p_f, work)).mul_(p_f)
            ds = ds_f.view_as(p)
            de = torch.mul(do, own_v_n, out=own_v_n).sum(-1).mul_(own)
            delta = ds.sum(-1).add_(de).div_(total[..., 0])
            ds.addcmul_(p, delta[..., None], value=-1)
            de.addcmul_(own, delta, value=-1)
            if learned_bias:
                share = sdpa.part_of(grad_bias, part)
                share += ds.sum_to_size(share.shape)
            torch.baddbmm(dk, ds_f.transpose(1, 2), q_f, alpha=scale, out=dk)
            if own_bias is not None:
                share = sdpa.part_of(grad_own_bias, part)
                share += de.sum_to_size(share.shape)
            grad_own_v[part] = do.mul_(own[..., None])
            de = de.mul_(scale)[..., None]
            dq = own_k_n.mul_(de).flatten(0, 1)
            torch.baddbmm(dq, ds_f, k_n, alpha=scale, out=dq)
            grad_q[part] = dq.view_as(q_n)
            grad_own_k[part] = q_n.mul_(de)
        for grad, total in ((grad_k, dk), (grad_v, dv)):
            if grad.dtype != work:
                grad[rows] = total.view_as(grad[rows])
    return *grads[:5], grad_bias.to(grads[5].dtype), grad_own_bias.to(grads[6].dtype)


@_candidate_backward_op.register_fake
def _(grad_out: Tensor, lse: Tensor, learned_bias: bool, *arguments: Any) -> Gradients:
    return _empty_gradients(CandidateTokens(*arguments[:-1]), learned_bias)


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


def _empty_gradients(tokens: CandidateTokens, learned_bias: bool) -> Gradients:
    q, k, v, own_k, own_v, bias, own_bias, _, _ = tokens
    grads = _empty_like(q), k.new_empty(k.shape), v.new_empty(v.shape), _empty_like(own_k), _empty_like(own_v)
    biases = bias if learned_bias else None, own_bias
    grad_bias, grad_own_bias = (q.new_empty(0) if x is None else x.new_empty(x.shape) for x in biases)
    return *grads, grad_bias, grad_own_bias
