"""The arguments that every function that reads states takes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from vista_kernels.read_settings import ReadSettings
from vista_kernels.segments import Segments


class StateQueries(NamedTuple):
    """Queries, the states that they read, and how: o = phi1(q) phi2(Z c)."""

    q: Tensor
    """[N, H, D] queries."""
    z: Tensor
    """[B, H, D, E] states."""
    n: Tensor
    """[B, H] weight sums."""
    segments: Segments
    """B segments of the queries: those of segment b read state b."""
    settings: ReadSettings
