"""What states look like, for operators and backends alike."""

from __future__ import annotations

from torch import Tensor

from vista_kernels.validation import state_dtype


def length_scale(n: Tensor, normalization: str, alpha: float) -> Tensor | None:
    """Return c = 1 / max(n, 1)^alpha [B, H] for "length" and None (c = 1) for "none"."""
    return None if normalization == "none" else n.clamp(min=1).pow(-alpha)


def empty_state(k: Tensor, v: Tensor, num_segments: int) -> tuple[Tensor, Tensor]:
    """Return uninitialised states [B, H, D, E] and counts [B, H] for tokens k and v."""
    dtype = state_dtype(k.dtype)
    z = k.new_empty((num_segments, k.shape[1], k.shape[2], v.shape[2]), dtype=dtype)
    return z, k.new_empty((num_segments, k.shape[1]), dtype=dtype)
