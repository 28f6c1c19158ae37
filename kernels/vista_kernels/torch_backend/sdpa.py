"""Parts of candidate attention: torch's SDPA with its log-sum-exp, scores, masks, and portions that stay in cache.

Letters: n requests of a portion, H heads, r candidates of a portion, C context tokens, D and E widths.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from vista_kernels.state_layout import state_dtype
from vista_kernels.torch_backend.workspace import scratch

HIDDEN = -1e9
"""Added to the scores of tokens outside a `context_mask`."""

Part = tuple[slice, slice, slice]
"""Requests, heads (all) and candidates of a portion."""


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Return attention to the context alone [n, H, r, E], 0 where all is hidden, and its log-sum-exp [n, H, r]."""
    shape, width = (*q.shape[:3], k.shape[2]), v.shape[3]
    if 0 in shape:
        return q.new_zeros((*shape[:3], width)), q.new_full(shape[:3], -torch.inf, dtype=state_dtype(q.dtype))
    expanded = None if mask is None else mask.expand(shape)
    if q.device.type == "cpu":
        padded = max(q.shape[3], width)  # it takes keys and values of one width
        q, k, v = (x if x.shape[3] == padded else F.pad(x, (0, padded - x.shape[3])) for x in (q, k, v))
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=expanded, scale=scale)
    elif q.dtype == torch.float64:
        s = scores(q, k.flatten(0, 1), mask, scale)
        lse = s.logsumexp(-1)
        o = torch.bmm(exp(s.sub_(lse[..., None])).flatten(0, 1), v.flatten(0, 1)).view(*shape[:3], width)
    else:
        # It takes widths that are multiples of 8, and a mask whose rows begin at multiples of 8.
        q, k, v = (F.pad(x, (0, -x.shape[3] % 8)) if x.shape[3] % 8 else x for x in (q, k, v))
        if expanded is not None and shape[3] % 8:
            expanded = F.pad(expanded, (0, -shape[3] % 8))[..., : shape[3]]
        o, lse, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, expanded, True, scale=scale)
        lse = lse[..., : shape[2]]
    # What SDPA returns where -inf hides the whole context is undefined (on a CPU it is zeros, and 0 for the log).
    if mask is not None and (q.device.type != "cpu" or bool((lse == 0).any())):
        hidden = (mask.amax(-1) == -torch.inf).expand(shape[:3])
        o, lse = o.masked_fill(hidden[..., None], 0), lse.masked_fill(hidden, -torch.inf)
    return o[..., :width], lse


def scores(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Return scale q k^T + mask [n, H, r, C] in a buffer, for k [n H, C, D]."""
    result = scratch("candidates.scores", (*q.shape[:3], k.shape[1]), q.dtype, q.device)
    if mask is not None:
        result.copy_(mask)
    flat = result.flatten(0, 1)
    torch.baddbmm(flat, q.flatten(0, 1), k.transpose(1, 2), beta=float(mask is not None), alpha=scale, out=flat)
    return result


def own_scores(q: Tensor, own_k: Tensor, own_bias: Tensor | None, part: Part, scale: float) -> Tensor:
    """Return e [n, H, r] of a portion, in the dtype of sums."""
    dtype = state_dtype(q.dtype)
    own = torch.mul(widened("own", q, dtype), own_k, out=like("product", q, dtype)).sum(-1).mul_(scale)
    return own if own_bias is None else own.add_(part_of(own_bias, part))


def exp(x: Tensor) -> Tensor:
    """Return exp(x) in place, 0 below exp(-86): MKL takes twenty times as long where exp underflows."""
    return torch.threshold_(x.clamp_(min=-86).exp_(), 1e-37, 0)


def mask(bias: Tensor | None, context_mask: Tensor | None, part: Part, dtype: torch.dtype) -> Tensor | None:
    """Return what is added to the scores of a portion, broadcastable to [n, H, r, C]."""
    added = None if bias is None else part_of(bias, part).to(dtype)
    if context_mask is None:
        return added
    hidden = torch.where(context_mask[part[0]], 0.0, HIDDEN).to(dtype)[:, None, None]
    if added is None:
        return hidden
    shape = (hidden.shape[0], *added.shape[1:3], hidden.shape[3])
    return torch.add(added, hidden, out=scratch("candidates.mask", shape, dtype, added.device))


def part_of(x: Tensor, part: Part) -> Tensor:
    """Return the portion of a tensor [B or 1, ·, Q or 1, ...]."""
    rows, heads, queries = part
    return x[rows if x.shape[0] > 1 else slice(None), heads, queries if x.shape[2] > 1 else slice(None)]


def row_portions(q: Tensor, k: Tensor, portion_elements: int) -> Iterator[slice]:
    """Return ranges of requests, of one request at least."""
    step = max(1, _max_candidates(q, k, portion_elements) // max(1, q.shape[2]))
    return (slice(start, start + step) for start in range(0, q.shape[0], step))


def query_portions(rows: slice, q: Tensor, k: Tensor, portion_elements: int) -> Iterator[Part]:
    """Return the portions of a range of requests: more than one only if a single request is too large."""
    step = max(1, _max_candidates(q, k, portion_elements))
    return ((rows, slice(None), slice(start, start + step)) for start in range(0, q.shape[2], step))


def _max_candidates(q: Tensor, k: Tensor, portion_elements: int) -> int:
    """Return how many candidates a portion may have."""
    return portion_elements // max(1, q.shape[1] * (k.shape[2] + q.shape[3]))


def widened(slot: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x in `dtype`: x itself if it has that dtype, else in a buffer."""
    return x if x.dtype == dtype else like(slot, x, dtype).copy_(x)


def accumulator(slot: str, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Return zeros to sum a gradient in: the gradient itself, or a buffer if its dtype is lower."""
    return (grad if grad.dtype == dtype else like(slot, grad, dtype)).zero_()


def like(slot: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an uninitialized buffer of x's shape, valid until the next call for the same slot."""
    return scratch(f"candidates.{slot}", tuple(x.shape), dtype, x.device)
