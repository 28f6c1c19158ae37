"""How states are read: o = phi1(q) phi2(Z c) with c = 1 / max(n, 1)^exponent."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ReadSettings(NamedTuple):
    """The activations and the normalization of a read."""

    activation: str
    """phi1, of queries (and keys): "silu", "relu" or "identity"."""
    state_activation: str
    """phi2, of states."""
    exponent: float
    """0 for c = 1."""

    @classmethod
    def of(cls, normalization: str, alpha: float, activation: str, state_activation: str) -> ReadSettings:
        """Return the settings of the public functions' arguments of these names."""
        return cls(activation, state_activation, 0.0 if normalization == "none" else alpha)

    def scale(self, n: Tensor) -> Tensor | None:
        """Return c, of the shape of the weight sums n. None stands for 1."""
        return n.clamp(min=1).pow(-self.exponent) if self.exponent else None
