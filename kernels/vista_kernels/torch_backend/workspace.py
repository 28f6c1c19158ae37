"""Buffers that the CPU passes reuse, so that hot loops never touch fresh memory.

A fresh buffer of a few megabytes costs a page fault for every 4 KB, which often takes longer than the arithmetic in it.
Each thread keeps one buffer per slot, as large as its largest use so far; windows bound that to a few megabytes. On
other devices torch's caching allocator does this already.
"""

from __future__ import annotations

import math
import threading
from typing import cast

import torch
from torch import Tensor

_WIDEST = torch.complex128
"""The widest elements that torch moves."""
_SLOTS = threading.local()


def scratch(slot: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialized tensor, valid until the same thread asks for the same slot again."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    size = math.prod(shape)
    key = (slot, dtype)
    held: dict[tuple[str, torch.dtype], Tensor] = _SLOTS.__dict__.setdefault("held", {})
    buffer = held.get(key)
    if buffer is None or buffer.numel() < size:
        # Never an inference tensor, because the buffer outlives inference mode.
        with torch.inference_mode(False):
            buffer = held[key] = torch.empty(size, dtype=dtype)
    return buffer[:size].view(shape)


def gathered(slot: str, x: Tensor, index: Tensor) -> Tensor:
    """Return rows x[index] in the slot."""
    rows = scratch(slot, (index.shape[0], *x.shape[1:]), x.dtype, x.device)
    return torch.index_select(x, 0, index, out=rows)


def put_rows(x: Tensor, index: Tensor, rows: Tensor) -> None:
    """Write x[index] = rows, both [n, ...], contiguous and of one dtype, in place."""
    x, rows = x.flatten(1), rows.flatten(1)
    item = x.element_size()
    if x.shape[1] * item % _WIDEST.itemsize == 0 and x.storage_offset() * item % _WIDEST.itemsize == 0:
        # torch copies a row element by element, so wide elements take half the time.
        x, rows = x.view(_WIDEST), rows.view(_WIDEST)
    x.index_copy_(0, index, rows)


def converted(slot: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x, contiguous and in `dtype`: x itself if it is that already, else a copy in the slot."""
    if x.dtype == dtype and x.is_contiguous():
        return x
    return scratch(slot, tuple(x.shape), dtype, x.device).copy_(x)


def activate(name: str, x: Tensor, out: Tensor) -> Tensor:
    """Write phi(x) to out, which may be x."""
    operator = torch.ops.aten.silu if name == "silu" else torch.ops.aten.relu
    return cast(Tensor, operator.out(x, out=out))


def activated(slot: str, name: str, x: Tensor) -> Tensor:
    """Return phi(x) of [n, H, L, D] in the slot, laid out as x; x itself for `identity`."""
    return x if name == "identity" else activate(name, x, _like(slot, x))


def scaled(slot: str, x: Tensor, factor: Tensor | None) -> Tensor:
    """Return x * factor, rounded once, in the slot (x may lie there itself); x itself for None."""
    if factor is None:
        return x
    return torch.mul(x, factor, out=_like(slot, x))


def multiplied(part: Tensor, a: Tensor, b: Tensor, slot: str = "product") -> Tensor:
    """Return a @ b of [n, H, L, D] and [n, H, D, E]: in `part` [n, L, H, E] if its layout allows, else in the slot."""
    out = part.transpose(1, 2)
    if out.dtype == a.dtype and a.shape[0] == 1 and not a.is_contiguous():
        for head in range(a.shape[1]):  # a batched product into a strided result is several times slower
            torch.mm(a[0, head], b[0, head], out=out[0, head])
        return out
    if not out.is_contiguous() or out.dtype != a.dtype:
        out = scratch(slot, tuple(out.shape), a.dtype, a.device)
    batched(a, b, out)
    return out


def finish(part: Tensor, result: Tensor, factor: Tensor | None = None) -> None:
    """Write result [n, H, L, E], times factor, to its place [n, L, H, E], unless it lies there already."""
    if factor is not None:
        result.mul_(factor)
    part = part.transpose(1, 2)
    if result.data_ptr() != part.data_ptr():
        part.copy_(result)


def batched(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write a @ b of [n, H, I, J] and [n, H, J, K] to contiguous out."""
    left, right, result = a.flatten(0, 1), b.flatten(0, 1), out.flatten(0, 1)
    if len(result) == 1:  # bmm would copy bfloat16 operands here
        torch.mm(left[0], right[0], out=result[0])
    else:
        torch.bmm(left, right, out=result)


def _like(slot: str, x: Tensor) -> Tensor:
    """Return the slot's tensor for a function of x [n, H, L, D], laid out as x: else torch's silu is not vectorized."""
    if x.is_contiguous():
        return scratch(slot, tuple(x.shape), x.dtype, x.device)
    n, heads, length, width = x.shape
    return scratch(slot, (n, length, heads, width), x.dtype, x.device).transpose(1, 2)
