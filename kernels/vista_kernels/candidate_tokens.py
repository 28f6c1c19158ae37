"""The arguments of candidate attention, and their checks."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vista_kernels.arguments import check_alike, check_float


class CandidateTokens(NamedTuple):
    """Candidates, the context that they share, and what changes their scores."""

    q: Tensor
    """[B, H, Q, D] queries of the candidates."""
    k: Tensor
    """[B, H, C, D] keys of the context."""
    v: Tensor
    """[B, H, C, E] values of the context."""
    own_k: Tensor
    """[B, H, Q, D] keys of the candidates."""
    own_v: Tensor
    """[B, H, Q, E] values of the candidates."""
    bias: Tensor | None = None
    """Float, broadcastable to [B, H, Q, C], added to the scaled scores; of 4 axes once it is checked."""
    own_bias: Tensor | None = None
    """Float [H], or broadcastable to [B, H, Q], added to the candidates' own scores; of 3 axes once it is checked."""
    context_mask: Tensor | None = None
    """Bool [B, C]; False hides a token from all candidates."""
    scale: float | None = None
    """Factor of the scores; None is 1 / sqrt(D)."""

    @property
    def factor(self) -> float:
        """The number that scores are multiplied by."""
        return float(max(1, self.q.shape[3]) ** -0.5) if self.scale is None else self.scale

    @property
    def num_scores(self) -> int:
        """Scores of candidates against the context: B H Q C."""
        return self.q.shape[0] * self.q.shape[1] * self.q.shape[2] * self.k.shape[2]


CANDIDATE_SCHEMA = (
    "Tensor q, Tensor k, Tensor v, Tensor own_k, Tensor own_v, "
    "Tensor? bias, Tensor? own_bias, Tensor? context_mask, float? scale"
)
"""The fields of `CandidateTokens`, as torch.library takes them: the operators have no tuples."""


def check_candidates(tokens: CandidateTokens) -> CandidateTokens:
    """Check the arguments of `candidate_attention`. Return them with a bias of 4 axes and an own_bias of 3."""
    q, k, v, own_k, own_v, bias, own_bias, context_mask, scale = tokens
    for name, x in (("q", q), ("k", k), ("v", v), ("own_k", own_k), ("own_v", own_v)):
        if x.dim() != 4:
            raise ValueError(f"{name} must be [B, H, N, D], got shape {list(x.shape)}")
        check_float(name, x)
        check_alike(name, x, "q", q)
    batch, heads, num_queries, width = q.shape
    num_context = k.shape[2]
    if k.shape != (batch, heads, num_context, width):
        raise ValueError(f"k {list(k.shape)} does not fit q {list(q.shape)}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v {list(v.shape)} does not fit k {list(k.shape)}")
    if own_k.shape != q.shape:
        raise ValueError(f"own_k {list(own_k.shape)} does not fit q {list(q.shape)}")
    if own_v.shape != (batch, heads, num_queries, v.shape[3]):
        raise ValueError(f"own_v {list(own_v.shape)} does not fit q {list(q.shape)} and v {list(v.shape)}")
    if context_mask is not None:
        if context_mask.shape != (batch, num_context) or context_mask.dtype != torch.bool:
            got = f"{context_mask.dtype} {list(context_mask.shape)}"
            raise ValueError(f"context_mask must be bool [B, C] of k {list(k.shape)}, got {got}")
        if context_mask.device != q.device:
            raise ValueError(f"context_mask is on {context_mask.device}, q on {q.device}")
    if own_bias is not None and own_bias.dim() == 1:
        if own_bias.shape[0] != heads:
            raise ValueError(f"own_bias of one axis must be [H] of q {list(q.shape)}, got shape {list(own_bias.shape)}")
        own_bias = own_bias[:, None]
    if scale is not None and (not isinstance(scale, (int, float)) or not math.isfinite(scale)):
        raise ValueError(f"scale must be a finite number, got {scale!r}")
    return tokens._replace(
        bias=_broadcastable("bias", bias, (batch, heads, num_queries, num_context), q),
        own_bias=_broadcastable("own_bias", own_bias, (batch, heads, num_queries), q),
    )


def _broadcastable(name: str, x: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor | None:
    """Return x with leading axes of 1 up to the rank of `shape`, after checking that it broadcasts to it."""
    if x is None:
        return None
    check_float(name, x)
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device}, q on {like.device}")
    full = (1,) * (len(shape) - x.dim()) + tuple(x.shape)
    if len(full) != len(shape) or any(a not in (1, b) for a, b in zip(full, shape, strict=True)):
        raise ValueError(f"{name} must be broadcastable to {list(shape)}, got shape {list(x.shape)}")
    return x.reshape(full)
