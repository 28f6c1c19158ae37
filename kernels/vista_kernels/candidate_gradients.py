"""The gradients that backward of candidate attention writes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class CandidateGradients(NamedTuple):
    """Gradients of the tensors of `CandidateTokens` of the same names, of their shapes and dtypes."""

    q: Tensor
    k: Tensor
    v: Tensor
    own_k: Tensor
    own_v: Tensor
    bias: Tensor | None
    """None where the bias is constant, or there is none."""
    own_bias: Tensor | None
    """None where there is no own_bias."""
