"""Shapes and dtypes of states, for operators and backends."""

from __future__ import annotations

import torch
from torch import Tensor


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that states of tokens are summed in: float32, or float64 for float64 tokens."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_state(k: Tensor, v: Tensor, num_segments: int) -> tuple[Tensor, Tensor]:
    """Return uninitialized states [B, H, D, E] and weight sums [B, H] for tokens k and v."""
    dtype = state_dtype(k.dtype)
    z = k.new_empty((num_segments, k.shape[1], k.shape[2], v.shape[2]), dtype=dtype)
    return z, k.new_empty((num_segments, k.shape[1]), dtype=dtype)
