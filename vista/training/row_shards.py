"""Tensors whose rows are divided among ranks, and a safetensors file that they are written to in pieces."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vista.model.sharded_table import ShardedTable

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of dtypes in safetensors."""


@dataclass(frozen=True, slots=True)
class RowShards:
    """A tensor with a row per row of a sharded table."""

    table: ShardedTable
    own: Tensor
    """[n, ...] rows of this rank."""
    dtype: torch.dtype
    """In the file."""

    @property
    def shape(self) -> list[int]:
        """[N, ...]"""
        return [self.table.shape[0], *self.own.shape[1:]]

    def pieces(self) -> Iterator[Tensor]:
        """All rows in order, some at a time, at rank 0. The other ranks send theirs while they iterate."""
        for piece in self.table.pieces(self.own):
            yield piece.to(self.dtype)


def write_tensors(path: Path, tensors: Mapping[str, Tensor | RowShards]) -> None:
    """Write a safetensors file at rank 0, while the other ranks call `send_rows` with the same names.

    Only pieces of sharded tensors are in memory at once.
    """
    header, end = {}, 0
    for name, tensor in _in_order(tensors):
        begin, end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in _in_order(tensors):
            for piece in tensor.pieces() if isinstance(tensor, RowShards) else [tensor.detach().cpu()]:
                file.write(piece.contiguous().flatten().view(torch.uint8).numpy().data)


def send_rows(tensors: Mapping[str, Tensor | RowShards]) -> None:
    """Send this rank's rows of sharded tensors to rank 0, which calls `write_tensors`."""
    for _, tensor in _in_order(tensors):
        if isinstance(tensor, RowShards):
            for _ in tensor.pieces():
                pass


def _in_order(tensors: Mapping[str, Tensor | RowShards]) -> list[tuple[str, Tensor | RowShards]]:
    """Those of wide dtypes first, so that all are aligned."""
    return sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
