"""The dtype of matrix products: bfloat16 for bfloat16 tokens where that is faster, else wider."""

from __future__ import annotations

import torch
from torch import Tensor

from vista_kernels.processor import multiplies_bfloat16
from vista_kernels.state_layout import state_dtype


def product_dtype(tokens: Tensor) -> torch.dtype:
    """Return the dtype in which tokens are multiplied.

    bfloat16 tokens stay bfloat16 on GPUs and on processors that multiply it faster than float32. Elsewhere they are
    widened to float32. float16 tokens are always widened, because their range is too small for states.
    """
    if tokens.dtype == torch.bfloat16 and multiplies_bfloat16(tokens.device.type):
        return torch.bfloat16
    return state_dtype(tokens.dtype)
