"""Block sizes and launches of kernels. Plain Python, without autotuning.

Autotuning would need a GPU, would make results depend on timing, and would measure in the middle of a training step.
The tables below let every kernel compile without register spills and within the shared memory of each device
(`python -m scripts.benchmarks.compile_kernels` lists both). They have not been tuned on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from vista_kernels.segments import IntArray
from vista_kernels.triton_backend.accelerator import Accelerator

MAX_WIDTH = 128
"""Widest head: registers hold the keys and values of one head's tokens, and its state."""
MAX_BLOCK_T = 64
"""Most tokens of a block. Inside a block, addresses are 32-bit offsets from its first token."""
_Row = tuple[int, int, int, int | None]
# By kernel and `whole` (32 stands for smaller widths too): longest block of tokens, block of the other width, warps,
# and the registers that a thread may use on capability 9.0, where the compiler takes more than it needs.
_SHORT: dict[str, dict[int, _Row]] = {
    "accumulate_fwd": {32: (64, 64, 4, None), 64: (64, 64, 4, 168), 128: (32, 64, 8, None)},
    "accumulate_bwd": {32: (64, 64, 4, None), 64: (32, 64, 8, None), 128: (16, 64, 8, None)},
    "read_fwd": {32: (64, 64, 4, None), 64: (64, 64, 4, None), 128: (32, 64, 8, None)},
    "read_bwd": {32: (64, 64, 4, None), 64: (32, 64, 8, 128), 128: (16, 64, 8, None)},
    "causal": {32: (16, 64, 2, None), 64: (16, 64, 4, None), 128: (16, 64, 8, None)},
}
_FLOAT32: dict[str, dict[int, _Row]] = {
    "accumulate_fwd": {32: (32, 32, 4, None), 64: (16, 32, 4, None), 128: (16, 32, 8, None)},
    "accumulate_bwd": {32: (32, 32, 4, None), 64: (16, 32, 4, None), 128: (16, 32, 8, None)},
    "read_fwd": {32: (32, 32, 4, None), 64: (16, 32, 4, None), 128: (16, 32, 8, None)},
    "read_bwd": {32: (16, 32, 4, None), 64: (16, 32, 4, None), 128: (16, 32, 8, None)},
    "causal": {32: (16, 32, 4, None), 64: (16, 32, 8, None), 128: (16, 32, 8, None)},
}
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True, slots=True)
class Blocks:
    """Block sizes and launch options of one kernel."""

    block_t: int
    whole: int
    """Block of the head's width that a program holds whole."""
    part: int
    """Block of the other width. Several programs (or steps) share a wide one."""
    dtype: torch.dtype
    precision: str
    num_warps: int
    num_stages: int
    max_registers: int | None

    @property
    def constants(self) -> dict[str, Any]:
        """Compile-time constants of the kernel."""
        return {"BLOCK_T": self.block_t, "DTYPE": _DTYPES[self.dtype], "PRECISION": self.precision}

    @property
    def options(self) -> dict[str, Any]:
        """Launch options."""
        limit = {} if self.max_registers is None else {"maxnreg": self.max_registers}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **limit}


def check_tokens(**tokens: Tensor) -> None:
    """Check that the named token tensors [T, H, width] have dtypes and widths that the kernels take."""
    for name, x in tokens.items():
        if x.dtype not in _DTYPES:
            raise ValueError(
                f"{name} is {x.dtype}: backend 'triton' takes float32, bfloat16 and float16; use backend='torch'"
            )
        if not 1 <= x.shape[2] <= MAX_WIDTH:
            raise ValueError(f"{name} {list(x.shape)} must have a last dimension of 1 to {MAX_WIDTH} for 'triton'")
        if (min(x.shape[0], MAX_BLOCK_T) - 1) * x.stride(0) + (x.shape[2] - 1) * x.stride(2) >= 2**31:
            raise ValueError(
                f"{name} {list(x.shape)} has strides {x.stride()}, too wide for 'triton': make it contiguous"
            )


def padded(width: int) -> int:
    """Return the width of the block that holds a head: a power of two, and at least 16 for tensor cores."""
    return max(16, int(triton.next_power_of_2(width)))


def choose(kernel: str, device: Accelerator, dtype: torch.dtype, whole: int, part: int, mean_length: float) -> Blocks:
    """Choose the blocks of a kernel over tokens, for heads of width `whole` by `part` and segments of that mean length.

    A block as short as the usual segment wastes no products on padding. A longer one has more bytes in flight.
    """
    block_whole = padded(whole)
    table = _FLOAT32 if dtype == torch.float32 else _SHORT
    longest, block_part, num_warps, max_registers = table[kernel][max(32, block_whole)]
    if device.kind == "hip" and block_whole > 64:
        longest, block_part = 16, 32  # a program has 64 KB of shared memory on AMD
    if whole % 16 or part % 16:
        longest = 16  # unaligned rows are loaded number by number, which takes many registers
    if device.capability != 90:
        max_registers = None
    block_t = max(16, min(longest, int(triton.next_power_of_2(max(1, round(mean_length))))))
    block_part = min(padded(part), block_part)
    # Steps over the other width load parts of the state, and must not hold parts for the next block of tokens as well.
    num_stages = 1 if kernel == "accumulate_bwd" and block_part < part else 2
    return Blocks(block_t, block_whole, block_part, dtype, device.precision, num_warps, num_stages, max_registers)


def launch(kernel: Any, num_programs: int, *args: object, **constants: Any) -> None:
    """Run a kernel on a grid of one axis, unless there are no programs.

    The first axis holds 2^31 - 1 programs, the others 65535. Heads vary fastest, so that programs that run together
    read neighboring addresses.
    """
    if num_programs >= 2**31:
        raise ValueError(f"{kernel.__name__}: {num_programs} programs are more than a grid holds; split the batch")
    if num_programs:
        device = next(x.device for x in args if isinstance(x, Tensor))
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            kernel[(num_programs,)](*args, **constants)


def to_device(arrays: Sequence[IntArray], device: torch.device) -> list[Tensor]:
    """Copy int64 arrays to a device, all in one transfer, and return them as tensors of their shapes."""
    flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))
    if device.type == "cuda":
        flat = flat.pin_memory()  # from pageable memory the host would wait for the copy, and thus for the GPU
    flat = flat.to(device, non_blocking=True)
    parts = flat.split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]
