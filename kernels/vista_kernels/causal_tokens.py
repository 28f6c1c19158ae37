"""The arguments that every function of causal attention takes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from vista_kernels.segments import IntArray


class CausalTokens(NamedTuple):
    """Packed sequences, and the activation of their queries and keys."""

    q: Tensor
    """[T, H, D] queries."""
    k: Tensor
    """[T, H, D] keys."""
    v: Tensor
    """[T, H, E] values."""
    offsets: IntArray
    """[B+1] first token of each sequence, and T."""
    activation: str
    """phi, of queries and keys: "silu", "relu" or "identity"."""
