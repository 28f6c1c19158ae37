"""Linear maps with constant weights: converted once, and laid out as the processor multiplies them fastest.

Letters: N inputs, O outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vista_kernels.processor import processor

Module = TypeVar("Module", bound=nn.Module)


def frozen(module: Module, dtype: torch.dtype) -> Module:
    """Return a copy of a module for inference, in eval mode, whose linear maps multiply in `dtype`.

    The copy shares no parameter with the module.

    Args:
        dtype: float32 or bfloat16.
    """
    other = copy.copy(module)  # deepcopy takes 5 ms, a sixth of a refresh of few users
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
    """A copy of an `nn.Linear` whose weights never change. Inputs may have any dtype; outputs have `dtype`."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = linear.weight.detach().to(dtype, copy=True)
        """[O, N]."""
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype, copy=True)
        self.packs = self.weight.device.type == "cpu" and dtype in processor().packed_dtypes
        """oneDNN multiplies packed weights. A row of the result then has the same bits whatever the other rows are."""
        self._packed: dict[tuple[int, int], Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        """x [..., N] -> [..., O]."""
        return self._rows(x.to(self.weight.dtype), 0, len(self.weight))

    def parts(self, x: Tensor, count: int, first: int, activation: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        """Cut the outputs [..., O] into `count` equal parts and return those from `first` on. The map has no bias.

        Args:
            x: [..., N] inputs.
            activation: of each output, applied to as many at once as lie together.
        """
        x, size = x.to(self.weight.dtype), len(self.weight) // count
        if self.packs:
            return tuple(activation(self._rows(x, part * size, size)) for part in range(first, count))
        if x.device.type != "cpu":
            return activation(self._rows(x, first * size, (count - first) * size)).chunk(count - first, -1)
        # One batched product: two threads take [500, 256] @ [256, 1024] in 1.4 ms. As one matrix it takes 1.8 ms,
        # because MKL divides that less evenly between threads.
        weights = self.weight[first * size :].view(count - first, size, -1)
        rows = x.reshape(-1, x.shape[-1]).expand(count - first, -1, -1)
        products = torch.bmm(rows, weights.transpose(1, 2))
        return activation(products).view(count - first, *x.shape[:-1], size).unbind(0)

    def _rows(self, x: Tensor, begin: int, size: int) -> Tensor:
        """Return outputs `begin` to `begin + size` - 1."""
        end = begin + size
        weight, bias = self.weight[begin:end], None if self.bias is None else self.bias[begin:end]
        if not self.packs:
            return F.linear(x, weight, bias)
        if (begin, end) not in self._packed:
            self._packed[begin, end] = torch.ops.mkldnn._reorder_linear_weight(weight)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed[begin, end], bias, "none", [], "")
        return product
