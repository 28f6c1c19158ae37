"""Causal linear attention with decay, in chunks: linear in the length of a history.

Letters: n histories, L events, H heads, D width of keys, E width of values.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 64
"""Events whose pairs are held at once."""


def decayed_attention(query: Tensor, key: Tensor, value: Tensor, clock: Tensor) -> Tensor:
    """o_t = Σ_{s <= t} exp(c_s - c_t) (q_t · k_s) v_s.

    Args:
        query, key: [n, L, H, D]; value: [n, L, H, E].
        clock: [n, L, H] c, not falling within a history. Where it falls, as in padding, the difference counts as 0.

    Returns:
        [n, L, H, E].
    """
    n, length, heads, width = key.shape
    state = key.new_zeros(n, heads, width, value.shape[-1])
    before = clock[:, :1]
    out = []
    for start in range(0, length, CHUNK):
        part = slice(start, start + CHUNK)
        q, k, v, c = query[:, part], key[:, part], value[:, part], clock[:, part]
        # All exponents are at most 0, so nothing overflows.
        apart = torch.exp(-(c[:, :, None] - c[:, None]).clamp(min=0))
        causal = torch.ones(c.shape[1], c.shape[1], dtype=torch.bool, device=c.device).tril()
        score = torch.einsum("nqhd,nshd->nqsh", q, k) * apart * causal[..., None]
        carried = torch.exp(-(c - before).clamp(min=0))[..., None] * torch.einsum("nqhd,nhde->nqhe", q, state)
        out.append(torch.einsum("nqsh,nshe->nqhe", score, v) + carried)
        last = c[:, -1:]
        kept = torch.exp(-(last - before).clamp(min=0))[:, 0, :, None, None]
        fading = torch.exp(-(last - c).clamp(min=0))[..., None]
        state = state * kept + torch.einsum("nshd,nshe->nhde", k * fading, v)
        before = last
    return torch.cat(out, 1)
