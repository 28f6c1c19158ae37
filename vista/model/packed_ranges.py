"""Ranges of packed tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def packed_ranges(start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of N ranges [start, stop), end to end; positions within their range; and offsets int64 [N+1]."""
    lengths = stop - start
    offsets = F.pad(lengths.cumsum(0), (1, 0))
    position = torch.arange(int(offsets[-1]), device=start.device) - offsets[:-1].repeat_interleave(lengths)
    return position + start.repeat_interleave(lengths), position, offsets
