"""How summary rows become bytes: float32, float16, and FBGEMM's int8 and int4 rows (docs/reference/file-formats.md).

N rows, d values per row.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from vista.config.choices import Codec

CODEC_NUMBERS = {Codec.float32: 0, Codec.int8: 1, Codec.float16: 2, Codec.int4: 3}
SCALE_DTYPE_NUMBERS = {Codec.float32: 0, Codec.int8: 1, Codec.float16: 0, Codec.int4: 2}
"""0: no scale; 1: float32 scale and bias per row; 2: float16 scale and bias per row."""


class CodecError(ValueError):
    """A row cannot be stored."""

    def __init__(self, row: int, reason: str) -> None:
        super().__init__(f"row {row} {reason}")
        self.row = row
        self.reason = reason


def row_bytes(codec: Codec, dim: int) -> int:
    """Bytes of one row of d = `dim` values."""
    match codec:
        case Codec.float32:
            return 4 * dim
        case Codec.float16:
            return 2 * dim
        case Codec.int8:
            return dim + 8
        case Codec.int4:
            return (dim + 1) // 2 + 4


def quantize_rows(rows: NDArray[np.float32], codec: Codec) -> NDArray[np.uint8]:
    """Encode rows as they are stored.

    Args:
        rows: [N, d] float32, contiguous.

    Returns:
        [N, row_bytes(codec, d)] uint8.

    Raises:
        CodecError: a value is not finite, or a value, scale or bias overflows the type that the codec stores it in.
    """
    _require_finite(rows, "holds NaN or infinity")
    match codec:
        case Codec.float32:
            return rows.astype("<f4", copy=False).view(np.uint8)
        case Codec.float16:
            halves: NDArray[np.float16] = torch.from_numpy(rows).half().numpy()
            _require_finite(halves, "has a value that overflows float16 (largest 65504); store it as int8 or float32")
            return halves.view(np.uint8)
        case Codec.int8:
            packed: NDArray[np.uint8] = torch.ops.quantized.embedding_bag_byte_prepack(torch.from_numpy(rows)).numpy()
            scales = packed[:, rows.shape[1] :].copy().view("<f4")
            _require_finite(scales, "has a range of values that overflows float32; store it as float32")
            return packed
        case Codec.int4:
            return _pack_nibbles(rows)


def dequantize_rows(packed: NDArray[np.uint8], codec: Codec, dim: int) -> NDArray[np.float32]:
    """Decode stored rows: [N, row_bytes(codec, d)] uint8, contiguous (FBGEMM does not check) -> [N, d] float32.

    For int8 and int4, value = q * scale + bias, rounded once if the processor has a fused multiply-add.
    """
    match codec:
        case Codec.float32:
            return packed.view("<f4")
        case Codec.float16:
            halves: NDArray[np.float32] = torch.from_numpy(packed.view("<f2")).float().numpy()
            return halves
        case Codec.int8:
            rows: NDArray[np.float32] = torch.ops.quantized.embedding_bag_byte_unpack(torch.from_numpy(packed)).numpy()
            return rows
        case Codec.int4:
            rows = torch.ops.quantized.embedding_bag_4bit_unpack(torch.from_numpy(packed)).numpy()
            return rows if rows.shape[1] == dim else np.ascontiguousarray(rows[:, :dim])


def _pack_nibbles(rows: NDArray[np.float32]) -> NDArray[np.uint8]:
    dim = rows.shape[1]
    if dim % 2:  # FBGEMM needs an even number of values; a copy of the last one changes neither scale nor bias.
        rows = np.concatenate([rows, rows[:, -1:]], axis=1)
    packed: NDArray[np.uint8] = torch.ops.quantized.embedding_bag_4bit_prepack(torch.from_numpy(rows)).numpy()
    if dim % 2:
        packed[:, dim // 2] &= 0x0F
    scales = packed[:, (dim + 1) // 2 :].copy().view("<f2")
    _require_finite(
        scales, "has a minimum or range that overflows float16 (largest 65504); store it as int8 or float32"
    )
    return packed


def _require_finite(values: NDArray[np.floating], reason: str) -> None:
    finite = np.isfinite(values)
    if not finite.all():
        raise CodecError(int(np.flatnonzero(~finite.all(axis=1))[0]), reason)
