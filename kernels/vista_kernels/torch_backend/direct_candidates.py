"""Candidate attention by plain products and one softmax; formulas in `candidate_attention.py`.

Where a CPU multiplies bfloat16 faster than float32, this beats portions widened to float32. Letters as in `sdpa.py`.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from vista_kernels.candidate_tokens import CandidateTokens
from vista_kernels.torch_backend import sdpa
from vista_kernels.torch_backend.precision import product_dtype
from vista_kernels.torch_backend.workspace import scratch

DIRECT_SCORES = 1 << 24
"""Up to this many scores, bfloat16 products on a CPU save more time than portions do."""

BUFFERED_SCORES = 1 << 20
"""Up to this many scores, direct products use buffers: 10 MB per thread."""


def is_direct(tokens: CandidateTokens) -> bool:
    """Return whether `attend_directly` is the faster form."""
    q = tokens.q
    if q.device.type != "cpu" or torch.compiler.is_compiling() or product_dtype(q) != torch.bfloat16:
        return False
    return tokens.num_scores <= DIRECT_SCORES


def attend_directly(tokens: CandidateTokens) -> Tensor:
    """Return o by products in the tokens' dtype and a float32 softmax, differentiated by torch.

    NaN fills the weights of a poisoned candidate, and its output and gradient are NaN by its own share. Products with
    the context get 0 for them: with AMX, a product whose inner size is not a multiple of 32 reads the beginning of the
    next row times 0 (torch 2.13), so the candidate before it would be poisoned too.
    """
    q, k, v, own_k, own_v, bias, own_bias, context_mask, _ = tokens
    scale = tokens.factor
    added = torch.zeros((), device=q.device) if bias is None else bias.float()
    if context_mask is not None:
        added = added + torch.where(context_mask, 0.0, sdpa.HIDDEN)[:, None, None]
    k = k.contiguous()  # torch would copy the transpose of a view of all heads' tokens, at several times the cost
    if torch.is_grad_enabled() or tokens.num_scores > BUFFERED_SCORES:
        own = (q.float() * own_k).sum(-1) * scale
        own = own if own_bias is None else own + own_bias
        products = q @ k.transpose(-1, -2)
        if products.requires_grad:
            products.register_hook(partial(torch.nan_to_num, nan=0.0))  # type: ignore[no-untyped-call]
        scores = torch.add(added, products, alpha=scale)
        weights = torch.softmax(torch.cat([scores, own[..., None]], -1), -1).to(v.dtype)
        return torch.nan_to_num(weights[..., :-1], nan=0.0) @ v + weights[..., -1:] * own_v
    weights, share = _weights(q, k, own_k, added, own_bias, scale)
    return torch.addcmul(torch.matmul(weights, v), share, own_v)


def _weights(
    q: Tensor, k: Tensor, own_k: Tensor, added: Tensor, own_bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Return softmax weights of the context [n, H, r, C], in a buffer, and of the candidate itself [n, H, r, 1].

    Both are of q's dtype; scores are summed and exponentiated in float32. `added` is broadcastable to [n, H, r, C].
    """
    context = k.shape[2]
    products = scratch("candidates.products", (*q.shape[:3], context), q.dtype, q.device)
    torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), out=products.flatten(0, 1))
    every = scratch("candidates.scores", (*q.shape[:3], context + 1), torch.float32, q.device)
    torch.add(added, products, alpha=scale, out=every[..., :context])
    every[..., context] = sdpa.own_scores(q, own_k, own_bias, (slice(None),) * 3, scale)
    weights = torch.softmax(every, -1, out=sdpa.like("weights", every, torch.float32))
    return torch.nan_to_num_(products.copy_(weights[..., :context]), nan=0.0), weights[..., context:].to(q.dtype)
