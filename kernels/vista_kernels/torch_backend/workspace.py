"""Buffers that the CPU passes reuse, so that hot loops never touch fresh memory.

A fresh buffer of some megabytes costs a page fault for every 4 KB, often more time than the arithmetic done in it.
Each thread keeps one buffer a slot, as large as the largest use so far; windows bound that to a few megabytes. On other
devices the caching allocator does this already.
"""

from __future__ import annotations

import math
import threading
from typing import cast

import torch
from torch import Tensor

_SLOTS = threading.local()


def scratch(slot: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialised tensor, valid until the same thread asks for the same slot again."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    size = math.prod(shape)
    key = (slot, dtype)
    held: dict[tuple[str, torch.dtype], Tensor] = _SLOTS.__dict__.setdefault("held", {})
    buffer = held.get(key)
    if buffer is None or buffer.numel() < size:
        # Not an inference tensor even if made in inference mode: it outlives that mode.
        with torch.inference_mode(False):
            buffer = held[key] = torch.empty(size, dtype=dtype)
    return buffer[:size].view(shape)


def loaded(slot: str, x: Tensor, index: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return rows x[index] (all of x for None) in `dtype`: x itself where nothing is to be done, else in the slot."""
    if index is not None:
        rows = scratch(slot, (index.shape[0], *x.shape[1:]), x.dtype, x.device)
        x = torch.index_select(x, 0, index, out=rows)
    if x.dtype == dtype:
        return x
    return scratch(slot, tuple(x.shape), dtype, x.device).copy_(x)


def activated(slot: str, name: str, x: Tensor) -> Tensor:
    """Return phi(x) in the slot; for `identity` x itself."""
    if name == "identity":
        return x
    out = scratch(slot, tuple(x.shape), x.dtype, x.device)
    operator = torch.ops.aten.silu if name == "silu" else torch.ops.aten.relu
    return cast(Tensor, operator.out(x, out=out))


def scaled(slot: str, x: Tensor, factor: Tensor | None) -> Tensor:
    """Return x * factor in the slot (x may lie there itself); x itself for None."""
    if factor is None:
        return x
    return torch.mul(x, factor, out=scratch(slot, tuple(x.shape), x.dtype, x.device))


def multiplied(slot: str, a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b of [n, I, J] and [n, J, K] in the slot."""
    out = scratch(slot, (a.shape[0], a.shape[1], b.shape[2]), a.dtype, a.device)
    return torch.bmm(a, b, out=out)
