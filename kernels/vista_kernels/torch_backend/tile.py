"""A tile: segments of similar length that one batched matrix product takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vista_kernels.torch_backend.workspace import activate, converted, gathered, scratch


@dataclass(frozen=True, slots=True)
class Tile:
    """n segments (or chunks of them) padded to L tokens each, and where they lie.

    Padding repeats a token of the same segment and has weight 0, so that nothing, NaN included, crosses segments.
    """

    num: int
    length: int
    rows: slice | Tensor
    """Which segments of the batch these are."""
    start: int
    """First token, where the tile is a view."""
    place: int
    """First row of this tile in the window's padded buffer."""
    state_place: int = 0
    """First row of this tile in the window's buffer of states."""
    index: Tensor | None = None
    """[n * L] token at each place; None for a view."""
    mask: Tensor | None = None
    """[n, L] bool, False at padding; None where nothing is padded."""

    def heads(self, slot: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the tile's rows of x [T, H, D] as [n, H, L, D] in `dtype`: contiguous, or a view of one segment.

        MKL multiplies strided heads as they are. Long segments come from memory, so a copy would cost as much as the
        product. bfloat16 is the exception: its products of strided heads take twice the time.
        """
        rows = self._rows(slot, x)
        heads = rows.transpose(1, 2)
        if dtype == x.dtype and heads.stride(3) == 1 and self._takes_strided(dtype):
            return heads
        return converted(slot, heads, dtype)

    def activated(self, slot: str, name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return phi(x) of `heads`, where x itself is not needed."""
        if name == "identity":
            return self.heads(slot, x, dtype)
        rows, owned = self._rows(slot, x), self.index is not None
        if rows.dtype != dtype:
            rows, owned = converted(f"{slot} dense", rows, dtype), True
        # Tokens are read from memory in their own order, and transposed to heads in the cache.
        dense = activate(name, rows, rows if owned else scratch(f"{slot} dense", tuple(rows.shape), dtype, x.device))
        heads = dense.transpose(1, 2)
        return heads if self._takes_strided(dtype) else converted(slot, heads, dtype)

    def weight(self, weight: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Return the tokens' weights [n, H or 1, L, 1], 0 at padding; None if all are 1."""
        padding = self.padding(dtype)
        if weight is None:
            return padding
        rows = self._rows("weight", weight.view(len(weight), -1)).transpose(1, 2).unsqueeze(3).to(dtype)
        return rows if padding is None else rows * padding

    def padding(self, dtype: torch.dtype) -> Tensor | None:
        """Return [n, 1, L, 1], 1 at tokens and 0 at padding; None where nothing is padded."""
        return None if self.mask is None else self.mask.to(dtype)[:, None, :, None]

    def in_buffer(self, buffer: Tensor) -> Tensor:
        """Return the tile's part of a window's padded buffer as [n, L, ...]."""
        return self._tiled(buffer[self.place : self.place + self.num * self.length])

    def states_of(self, x: Tensor) -> Tensor:
        """Return the tile's rows of x [B, ...]: a view where they are neighbors."""
        return x[self.rows] if isinstance(self.rows, slice) else x.index_select(0, self.rows)

    def _takes_strided(self, dtype: torch.dtype) -> bool:
        return self.num == 1 and dtype != torch.bfloat16

    def _rows(self, slot: str, x: Tensor) -> Tensor:
        """Return [n, L, ...]: a view where possible, else gathered."""
        if self.index is None:
            return self._tiled(x[self.start : self.start + self.num * self.length])
        return self._tiled(gathered(f"{slot} gathered", x, self.index))

    def _tiled(self, rows: Tensor) -> Tensor:
        """Return [n * L, ...] as [n, L, ...], whatever the strides."""
        stride = rows.stride()
        return rows.as_strided((self.num, self.length, *rows.shape[1:]), (self.length * stride[0], *stride))
