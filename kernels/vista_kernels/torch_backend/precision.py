"""The dtype of matrix products: bfloat16 for bfloat16 tokens where the processor multiplies them, else wider."""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor

from vista_kernels.arguments import state_dtype

_LOG = logging.getLogger("vista_kernels")


def product_dtype(tokens: Tensor) -> torch.dtype:
    """Return the dtype in which products of `tokens` are taken.

    bfloat16 tokens stay so on GPUs and on CPUs that multiply them faster (`multiplies_bfloat16`); elsewhere they are
    widened to float32, as float16 is everywhere (its range is too small for states).
    """
    if tokens.dtype == torch.bfloat16 and multiplies_bfloat16(tokens.device.type):
        return torch.bfloat16
    return state_dtype(tokens.dtype)


@cache
def multiplies_bfloat16(device_type: str) -> bool:
    """Return whether products of bfloat16 are faster than of float32 on a kind of device: a GPU always, a CPU by what
    it is, never by timing.

    With AMX, or with avx512_bf16 on AMD's processors, they are 2 to 7 times as fast at a layer's shapes. Intel's
    avx512_bf16 alone is half as fast as float32 (a Sapphire Rapids whose AMX is masked: 70 to 80 GFLOP/s a core against
    100 to 160).
    """
    if device_type != "cpu":
        return device_type == "cuda"
    found = torch.cpu.get_capabilities()
    if found.get("amx_tile"):
        chosen, why = "bfloat16", "AMX"
    elif found.get("avx512_bf16") and "AMD" in str(found.get("cpu_name")):
        chosen, why = "bfloat16", "AMD's avx512_bf16"
    else:
        chosen, why = "float32", "neither AMX nor AMD's avx512_bf16 here"
    _LOG.info("products on this processor, where bfloat16 is allowed: %s (%s)", chosen, why)
    return chosen == "bfloat16"
