"""Candidates in whole tiles of `ROW_TILE` rows, so that their scores do not depend on each other.

C candidates, C' the same in whole tiles.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vista.arrays import Int
from vista.model.inference import ROW_TILE
from vista.model.ranking_model import UNKNOWN_ITEM

Cells = tuple[slice, slice]
"""A range of users and a range of their candidates."""


def rectangles(lengths: Int, pairs: int) -> Iterator[Cells]:
    """Rectangles of about `pairs` pairs, in whole tiles of columns, that cover the first lengths[b] columns of user b.

    The lengths ascend, so that the users who have a column are the last ones.
    """
    start, longest = 0, int(lengths.max(initial=0))
    while start < longest:
        first = int(np.searchsorted(lengths, start, side="right"))
        step = max(1, pairs // (len(lengths) - first) // ROW_TILE) * ROW_TILE
        yield slice(first, len(lengths)), slice(start, min(start + step, longest))
        start += step


def take(table: Tensor, rows: Tensor | None, users: slice, columns: slice) -> Tensor:
    """Rows of a table, padded with the unknown item's row to whole tiles: [C', width] or [users, C', width]."""
    if rows is None and (columns.stop - columns.start) % ROW_TILE == 0:
        return table[columns]
    part = tiles(rows, users, columns).to(table.device)
    return table.index_select(0, part.flatten()).view(*part.shape, -1)  # four times as fast as table[part]


def tiles(rows: Tensor | None, users: slice, columns: slice) -> Tensor:
    """Model rows int64 [C'] or [users, C'], padded with the unknown item to whole tiles."""
    if rows is None:
        part = torch.arange(columns.start, columns.stop)
    else:
        part = rows[columns] if rows.ndim == 1 else rows[users, columns]
    return F.pad(part, (0, -part.shape[-1] % ROW_TILE), value=UNKNOWN_ITEM)
