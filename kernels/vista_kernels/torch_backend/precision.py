"""The dtype of matrix products: bfloat16 for bfloat16 tokens where the processor multiplies them, else wider."""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor

from vista_kernels.validation import state_dtype

_LOG = logging.getLogger("vista_kernels")


def product_dtype(tokens: Tensor) -> torch.dtype:
    """Return the dtype in which products of `tokens` are taken.

    bfloat16 tokens stay so on GPUs and on CPUs with AMX or avx512_bf16, where they are 2 to 7 times as fast as float32;
    elsewhere they are widened to float32, as float16 is everywhere (its range is too small for states).
    """
    if tokens.dtype == torch.bfloat16 and multiplies_bfloat16(tokens.device.type):
        return torch.bfloat16
    return state_dtype(tokens.dtype)


@cache
def multiplies_bfloat16(device_type: str) -> bool:
    """Return whether products of bfloat16 are fast on a kind of device: a CPU by its instructions, never by timing, a
    GPU always."""
    if device_type != "cpu":
        return device_type == "cuda"
    instructions = {"AMX": torch.cpu._is_amx_tile_supported(), "avx512_bf16": torch.cpu._is_avx512_bf16_supported()}
    found = [name for name, present in instructions.items() if present]
    chosen = f"bfloat16 ({found[0]})" if found else "float32 (neither AMX nor avx512_bf16 here)"
    _LOG.info("products on this processor, where bfloat16 is allowed: %s", chosen)
    return bool(found)
