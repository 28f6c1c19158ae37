"""How tiles add their products to the states of a batch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vista_kernels.segments import IntArray, Segments
from vista_kernels.torch_backend.tile import Tile
from vista_kernels.torch_backend.workspace import batched, scratch

ROUNDED = 256
"""Where products are bfloat16, sums over this many tokens are rounded to bfloat16 before they are added to a state."""


def add_product(z: Tensor, states: Tensor | None, tile: Tile, a: Tensor, b: Tensor) -> None:
    """Write a [n, H, D, L] @ b [n, H, L, E] to the tile's part of `states`, or add it to z's rows if that is None."""
    target = None if states is None else states[tile.state_place : tile.state_place + tile.num]
    if a.dtype != z.dtype:
        total = _rounded_sum(a, b, z.dtype)
        if target is None:
            add_rows(z, tile, total)
        else:
            target.copy_(total)
    elif target is not None:
        batched(a, b, target)
    elif isinstance(tile.rows, slice):
        z[tile.rows].flatten(0, 1).baddbmm_(a.flatten(0, 1), b.flatten(0, 1))
    else:
        total = scratch("sum", (*a.shape[:3], b.shape[3]), a.dtype, a.device)
        batched(a, b, total)
        add_rows(z, tile, total)


def add_rows(x: Tensor, tile: Tile, part: Tensor) -> None:
    """Add part to the tile's rows of x [B, ...], in place."""
    if isinstance(tile.rows, slice):
        x[tile.rows] += part
    else:
        x[tile.rows] = x[tile.rows] + part


def clear_empty(z: Tensor, segments: Segments) -> None:
    """Zero the states of empty segments, which no window writes."""
    empty: IntArray = np.flatnonzero(segments.lengths == 0)
    if len(empty):
        z.index_fill_(0, torch.from_numpy(empty).to(z.device), 0)


def _rounded_sum(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a @ b [n, H, D, E] of bfloat16 a [n, H, D, L] and b [n, H, L, E], sums of ROUNDED tokens added in `dtype`.

    torch cannot multiply bfloat16 matrices into a float32 result on CPUs. The result is bfloat16 if there is one sum.
    """
    n, heads, width, length = a.shape
    whole = length - length % ROUNDED
    if 0 < whole < length:
        first, rest = (a[..., :whole], b[:, :, :whole]), (a[..., whole:], b[:, :, whole:])
        # A copy, because the second call writes to the same slot.
        return _rounded_sum(*first, dtype).to(dtype, copy=True) + _rounded_sum(*rest, dtype)
    parts = max(1, length // ROUNDED)
    shape = (n * heads * parts, length // parts)
    left = a.transpose(2, 3).reshape(*shape, width).transpose(1, 2)
    out = scratch("sum", (1, shape[0], width, b.shape[3]), a.dtype, a.device)
    batched(left.unsqueeze(0), b.reshape(*shape, b.shape[3]).unsqueeze(0), out)
    sums = out.view(n, heads, parts, width, b.shape[3])
    return sums[:, :, 0] if parts == 1 else sums.sum(2, dtype=dtype)
