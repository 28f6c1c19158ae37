"""The arguments that every function that sums tokens into states takes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from vista_kernels.segments import Segments


class StateTokens(NamedTuple):
    """Tokens that segments sum into states: Z = sum_s w_s phi(k_s) v_s^T and n = sum_s w_s."""

    k: Tensor
    """[T, H, D] keys."""
    v: Tensor
    """[T, H, E] values."""
    segments: Segments
    """B segments of the tokens. Tokens in no segment are not read."""
    weight: Tensor | None
    """[T] or [T, H] float; None is 1."""
    activation: str
    """phi, of keys: "silu", "relu" or "identity"."""
