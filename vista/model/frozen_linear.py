"""Linear maps whose weights no longer change: converted once, and laid out as the processor multiplies them best.

Letters: N inputs, O outputs.
"""

from __future__ import annotations

import copy
import logging
from functools import cache
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vista_kernels.torch_backend.precision import multiplies_bfloat16

logger = logging.getLogger(__name__)
Module = TypeVar("Module", bound=nn.Module)


def frozen(module: Module, dtype: torch.dtype) -> Module:
    """A copy of a module for inference, in eval mode, whose linear maps multiply in `dtype`; no parameter is shared.

    Args:
        dtype: float32 or bfloat16.
    """
    other = copy.copy(module)  # deepcopy takes 5 ms, of a refresh of few users a sixth
    other._parameters = {
        name: None if own is None else nn.Parameter(own.detach().clone(), requires_grad=False)
        for name, own in module._parameters.items()
    }
    other._buffers = dict(module._buffers)
    other._modules = {
        name: FrozenLinear(child, dtype) if isinstance(child, nn.Linear) else child and frozen(child, dtype)
        for name, child in module._modules.items()
    }
    other.training = False
    return other


class FrozenLinear(nn.Module):
    """What an `nn.Linear` was when this was made: takes inputs of any dtype, gives `dtype`."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = linear.weight.detach().to(dtype, copy=True)
        """[O, N]."""
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype, copy=True)
        self.packs = packs(dtype, self.weight.device)
        self._packed: dict[tuple[int, int], Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        """x [..., N] -> [..., O]."""
        return self._rows(x.to(self.weight.dtype), 0, len(self.weight))

    def parts(self, x: Tensor, count: int, first: int) -> tuple[Tensor, ...]:
        """x [..., N] -> the parts `first` … `count` - 1 of `count` equal parts of [..., O], of a map without bias."""
        x, size = x.to(self.weight.dtype), len(self.weight) // count
        if self.packs:
            return tuple(self._rows(x, part * size, size) for part in range(first, count))
        if x.device.type != "cpu":
            return self._rows(x, first * size, (count - first) * size).chunk(count - first, -1)
        # One batched product: two threads take [500, 256] @ [256, 1024] in 1.4 ms, and 1.8 ms as one matrix, which MKL
        # divides among them worse.
        weights = self.weight[first * size :].view(count - first, size, -1)
        rows = x.reshape(-1, x.shape[-1]).expand(count - first, -1, -1)
        products = torch.bmm(rows, weights.transpose(1, 2))
        return products.view(count - first, *x.shape[:-1], size).unbind(0)

    def _rows(self, x: Tensor, begin: int, size: int) -> Tensor:
        """Some of the outputs."""
        end = begin + size
        weight, bias = self.weight[begin:end], None if self.bias is None else self.bias[begin:end]
        if not self.packs:
            return F.linear(x, weight, bias)
        if (begin, end) not in self._packed:
            self._packed[begin, end] = torch.ops.mkldnn._reorder_linear_weight(weight)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed[begin, end], bias, "none", [], "")
        return product


@cache
def packs(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether matrices are laid out beforehand for oneDNN. By what the processor is, not by timing: so all processes
    that serve a model give the same bits.

    On AMD's processors with AVX-512, torch's MKL multiplies float32 with half of it: a packed product took 0.43 of
    the time (EPYC of Zen 5, [504, 256] @ [256, 1024] on one thread, torch 2.13); of bfloat16, which oneDNN multiplies
    in any case, 0.95, and 0.85 for few rows. A row's bits do not depend on the other rows.
    """
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    found = torch.cpu.get_capabilities()
    if dtype == torch.bfloat16:
        chosen = multiplies_bfloat16(device.type)
    else:
        chosen = dtype == torch.float32 and bool(found.get("avx512_f")) and "AMD" in str(found.get("cpu_name"))
    logger.info(
        "linear maps in %s on %s: %s", dtype, found.get("cpu_name"), "packed by oneDNN" if chosen else "torch's"
    )
    return chosen
