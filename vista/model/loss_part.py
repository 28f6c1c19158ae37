"""One of the losses of a batch."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class LossPart:
    """One loss of a batch."""

    mean: Tensor
    """Scalar."""
    count: Tensor | int
    """Number of labels that it is the mean of."""
