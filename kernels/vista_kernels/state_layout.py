"""What states look like and how segments are cut, for operators and backends alike."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from vista_kernels.arguments import IntArray, state_dtype


def length_scale(n: Tensor, normalization: str, alpha: float) -> Tensor | None:
    """Return c = 1 / max(n, 1)^alpha [B, H] for "length" and None (c = 1) for "none"."""
    return None if normalization == "none" else n.clamp(min=1).pow(-alpha)


def empty_state(k: Tensor, v: Tensor, num_segments: int) -> tuple[Tensor, Tensor]:
    """Return uninitialised states [B, H, D, E] and counts [B, H] for tokens k and v."""
    dtype = state_dtype(k.dtype)
    z = k.new_empty((num_segments, k.shape[1], k.shape[2], v.shape[2]), dtype=dtype)
    return z, k.new_empty((num_segments, k.shape[1]), dtype=dtype)


def cut_segments(offsets: IntArray, size: int) -> tuple[IntArray, IntArray, IntArray]:
    """Cut segments into pieces of at most `size`: each segment's first piece [B+1], the pieces' starts and lengths."""
    pieces = -(-np.diff(offsets) // size)
    piece_offsets = np.concatenate([[0], np.cumsum(pieces)])
    within = np.arange(piece_offsets[-1]) - np.repeat(piece_offsets[:-1], pieces)
    starts = np.repeat(offsets[:-1], pieces) + within * size
    return piece_offsets, starts, np.minimum(size, np.repeat(offsets[1:], pieces) - starts)
