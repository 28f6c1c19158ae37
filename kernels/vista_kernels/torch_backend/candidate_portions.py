"""Candidate attention by SDPA, in portions of requests and candidates; formulas in `candidate_attention.py`.

On a CPU SDPA's own backward returns no gradient of a bias. So dS is computed here, in portions that fit the cache.
Letters: n requests of a portion, H heads, r candidates of a portion, C context tokens, D and E widths. Names: `x_n` is
the portion of x in the dtype of sums, and `x_f` its view with requests and heads in one axis, as products take it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vista_kernels.candidate_gradients import CandidateGradients
from vista_kernels.candidate_tokens import CandidateTokens
from vista_kernels.state_layout import state_dtype
from vista_kernels.torch_backend import sdpa

PORTION_ELEMENTS, PORTION_ELEMENTS_ON_GPU = 1 << 19, 1 << 26
"""Numbers of scores and queries that a portion may hold: 2 MB of float32 on a CPU."""


def default_portion(device: torch.device) -> int:
    """Return the number of scores and queries of a portion on this device."""
    return PORTION_ELEMENTS if device.type == "cpu" else PORTION_ELEMENTS_ON_GPU


def attend_portions(tokens: CandidateTokens, portion_elements: int, out: Tensor, lse: Tensor) -> None:
    """Write o to out [B, H, Q, E], and L to lse [B, H, Q] for backward."""
    q, k, v, own_k, own_v, bias, own_bias, context_mask, _ = tokens
    scale = tokens.factor
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


def attend_portions_backward(
    grad_out: Tensor, lse: Tensor, tokens: CandidateTokens, portion_elements: int, grads: CandidateGradients
) -> None:
    """Write the gradients, given dO and L."""
    q, k, v = tokens[:3]
    scale, work = tokens.factor, state_dtype(q.dtype)
    bias_sum, own_bias_sum = _bias_sum(grads.bias, work), _bias_sum(grads.own_bias, work)
    for rows in sdpa.row_portions(q, k, portion_elements):
        k_f, v_f = (sdpa.widened(name, x[rows], work).flatten(0, 1) for name, x in (("k", k), ("v", v)))
        dk_f = sdpa.accumulator("dk", grads.k[rows], work).flatten(0, 1)
        dv_f = sdpa.accumulator("dv", grads.v[rows], work).flatten(0, 1)
        for part in sdpa.query_portions(rows, q, k, portion_elements):
            q_n, do_n, own_k_n, own_v_n = (
                sdpa.like(name, x[part], work).copy_(x[part])  # copies, because each is overwritten at its last use
                for name, x in (("q", q), ("do", grad_out), ("own_k", tokens.own_k), ("own_v", tokens.own_v))
            )
            p, own_p, total = _weights(tokens, part, q_n, k_f, own_k_n, lse)
            do_n.div_(total)
            do_f, p_f = do_n.flatten(0, 1), p.flatten(0, 1)
            torch.baddbmm(dv_f, p_f.transpose(1, 2), do_f, out=dv_f)
            ds_f = torch.bmm(do_f, v_f.transpose(1, 2), out=sdpa.like("ds", p_f, work)).mul_(p_f)
            ds = ds_f.view_as(p)
            own_products = torch.mul(do_n, own_v_n, out=own_v_n)  # in the memory of own_v
            de = own_products.sum(-1).mul_(own_p)
            delta = ds.sum(-1).add_(de).div_(total[..., 0])
            ds.addcmul_(p, delta[..., None], value=-1)
            de.addcmul_(own_p, delta, value=-1)
            _add_to_bias(bias_sum, part, ds)
            _add_to_bias(own_bias_sum, part, de)
            torch.baddbmm(dk_f, ds_f.transpose(1, 2), q_n.flatten(0, 1), alpha=scale, out=dk_f)
            scaled_de = de.mul_(scale)[..., None]
            dq = own_k_n.mul_(scaled_de)  # in the memory of own_k
            dq_f = dq.flatten(0, 1)
            torch.baddbmm(dq_f, ds_f, k_f, alpha=scale, out=dq_f)
            grads.q[part] = dq
            grads.own_k[part] = q_n.mul_(scaled_de)  # in the memory of q
            grads.own_v[part] = do_n.mul_(own_p[..., None])  # in the memory of dO
        for grad, total_f in ((grads.k, dk_f), (grads.v, dv_f)):
            if grad.dtype != work:
                grad[rows] = total_f.view_as(grad[rows])
    for bias, wide in ((grads.bias, bias_sum), (grads.own_bias, own_bias_sum)):
        if bias is not None and wide is not None and bias is not wide:
            bias.copy_(wide)


def _weights(
    tokens: CandidateTokens, part: sdpa.Part, q_n: Tensor, k_f: Tensor, own_k_n: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return exp(s - L) [n, H, r, C] and exp(e - L) [n, H, r], and their sum [n, H, r, 1].

    The sum is 1 but for the rounding of L, so the gradients are divided by it.
    """
    scale = tokens.factor
    p = sdpa.scores(q_n, k_f, sdpa.mask(tokens.bias, tokens.context_mask, part, q_n.dtype), scale)
    sdpa.exp(p.sub_(lse[part][..., None]))
    own_p = sdpa.exp(sdpa.own_scores(q_n, own_k_n, tokens.own_bias, part, scale).sub_(lse[part]))
    return p, own_p, p.sum(-1).add_(own_p)[..., None]


def _bias_sum(grad: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return zeros to sum the gradient of a bias in: the gradient itself, or a new tensor if its dtype is lower."""
    if grad is None:
        return None
    return grad.zero_() if grad.dtype == dtype else grad.new_zeros(grad.shape, dtype=dtype)


def _add_to_bias(total: Tensor | None, part: sdpa.Part, gradient: Tensor) -> None:
    """Add the gradient of a portion's scores to that of the bias, summed over the axes on which it is broadcast."""
    if total is not None:
        portion = sdpa.part_of(total, part)
        portion += gradient.sum_to_size(portion.shape)
