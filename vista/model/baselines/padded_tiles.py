"""Padded tiles of packed histories of similar length, which are processed at once.

Letters: n histories of a tile, L events, C entries (such as candidates) per history.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vista.arrays import Int

TILE_TOKENS = 2048
"""Most tokens in a tile (a longer history is a tile of its own), so that a tile stays in the cache."""


@dataclass(frozen=True, slots=True)
class PaddedTile:
    """Histories of similar length."""

    rows: Tensor
    """int64 [n] histories."""
    index: Tensor
    """int64 [n, L] packed events."""
    valid: Tensor
    """bool [n, L]: False after a history's last event."""

    def entries(self, owner: Tensor) -> tuple[Tensor, Tensor] | None:
        """The entries of each of the tile's histories, padded; None if there are none.

        Args:
            owner: int64 [N] history of each entry, sorted.

        Returns:
            (int64 [n, C] indices into `owner`, bool [n, C]: False in the padding).
        """
        first = torch.searchsorted(owner, self.rows)
        count = torch.searchsorted(owner, self.rows, right=True) - first
        width = int(count.max())
        if width == 0:
            return None
        steps = torch.arange(width, device=owner.device)
        valid = steps < count[:, None]
        return torch.where(valid, first[:, None] + steps, 0), valid


def tiles(offsets: Int, device: torch.device, max_tokens: int = TILE_TOKENS) -> Iterator[PaddedTile]:
    """Tiles that cover all histories. Those without events come in tiles [n, 0].

    Args:
        offsets: int64 [B+1] of packed histories.
        max_tokens: most tokens in a tile; a longer history is a tile of its own.
    """
    lengths = np.diff(offsets)
    order = np.argsort(lengths, kind="stable")
    first = 0
    while first < len(order):
        longest = lengths[order[first:]]
        fits = longest * np.arange(1, len(longest) + 1) <= max_tokens
        last = first + max(1, len(fits) if fits.all() else int(np.argmin(fits)))
        rows = order[first:last]
        steps = np.arange(int(lengths[rows].max()))
        index = offsets[rows][:, None] + np.minimum(steps, lengths[rows][:, None] - 1)
        valid = steps < lengths[rows][:, None]
        yield PaddedTile(*(torch.from_numpy(x).to(device) for x in (rows, np.where(valid, index, 0), valid)))
        first = last
