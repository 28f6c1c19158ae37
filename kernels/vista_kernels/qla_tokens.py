"""The arguments that every function of quasi-linear attention takes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from vista_kernels.read_settings import ReadSettings
from vista_kernels.segments import Segments
from vista_kernels.state_tokens import StateTokens


class QlaTokens(NamedTuple):
    """Packed sequences, whose last tokens may be targets, and how they attend."""

    q: Tensor
    """[T, H, D] queries."""
    k: Tensor
    """[T, H, D] keys."""
    v: Tensor
    """[T, H, E] values."""
    offsets: Tensor
    """[B+1] int64 first token of each sequence, and T."""
    num_targets: Tensor | None = None
    """[B] int64; None means no targets."""
    weight: Tensor | None = None
    """[T] or [T, H] float, of the writing tokens; None is 1."""
    normalization: str = "none"
    """c: 1 for "none", 1 / max(n, 1)^alpha for "length"."""
    alpha: float = 1.0
    """The exponent of "length"."""
    activation: str = "silu"
    """phi1, of queries and keys: "silu", "relu" or "identity"."""
    state_activation: str = "silu"
    """phi2, of states."""

    @property
    def settings(self) -> ReadSettings:
        """How the tokens read states."""
        return ReadSettings.of(self.normalization, self.alpha, self.activation, self.state_activation)

    def writing(self, segments: Segments) -> StateTokens:
        """Return the tokens of these segments, which write states."""
        return StateTokens(self.k, self.v, segments, self.weight, self.activation)


QLA_SCHEMA = (
    "Tensor q, Tensor k, Tensor v, Tensor offsets, Tensor? num_targets, Tensor? weight, "
    "str normalization, float alpha, str activation, str state_activation"
)
"""The fields of `QlaTokens`, as torch.library takes them: the operators have no tuples."""
