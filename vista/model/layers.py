"""Layers that the stages are built of. Letters: N tokens, T packed tokens, M model dim, H heads, D head dim."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vista_kernels.processor import processor

# Linear maps with constant weights: converted once, and laid out as the processor multiplies them fastest.
#
# Letters: N inputs, O outputs.

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


Block = TypeVar("Block", bound=nn.Module)

VECTOR = 32
"""Number of float32 values that torch computes at once: two registers of up to 512 bits."""
SHARE = 1 << 15
"""Number of values up to which torch uses a single thread; a multiple of `VECTOR`."""


def module_list(modules: Sequence[Block]) -> Sequence[Block]:
    """An nn.ModuleList, typed as a sequence of its modules."""
    return cast("Sequence[Block]", nn.ModuleList(modules))


def norm(dim: int, eps: float = 1e-5) -> nn.LayerNorm:
    """Layer norm without bias. (On CPUs torch fuses LayerNorm, but not RMSNorm.)"""
    return nn.LayerNorm(dim, eps, bias=False)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[..., M] -> [..., H, D], a view."""
    return x.view(*x.shape[:-1], num_heads, x.shape[-1] // num_heads)


def linear_parts(
    x: Tensor, linear: nn.Module, count: int, first: int = 0, activation: Callable[[Tensor], Tensor] = lambda x: x
) -> tuple[Tensor, ...]:
    """Parts `first` … `count` - 1 of the activated output [..., O] of a linear map without bias, cut into `count` equal
    parts."""
    if isinstance(linear, FrozenLinear):
        return linear.parts(x, count, first, activation)
    assert isinstance(linear, nn.Linear)
    weight = linear.weight
    return activation(F.linear(x, weight[first * (len(weight) // count) :])).chunk(count - first, -1)


def silu(x: Tensor) -> Tensor:
    """SiLU. At a request on a CPU, a value gets the same bits wherever it lies.

    torch computes the last values of a tensor, or of a thread's share of it, one by one, and their last bit can differ.
    So values are padded to whole vectors and, if there are several threads, cut into shares of one thread.
    """
    if torch.is_grad_enabled() or x.dtype is not torch.float32 or x.device.type != "cpu":
        return F.silu(x)
    count = x.numel()
    if count % VECTOR == 0 and (count <= SHARE or torch.get_num_threads() == 1):
        return F.silu(x.contiguous())
    shares = torch.split(F.pad(x.flatten(), (0, -count % VECTOR)), SHARE)
    return torch.cat([F.silu(share) for share in shares])[:count].view(x.shape)


class SiLU(nn.Module):
    """`silu` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        return silu(x)


class Dropout(nn.Module):
    """Dropout whose mask costs one byte per element on CPUs.

    torch draws a 64-bit number per element there, which took a third of a training step. On CPUs `p` is rounded to
    1/256, and the remaining elements are scaled by the rounded value, so the mean is kept (in bfloat16 within its
    rounding, 0.4 %).
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        threshold = min(max(1, round(self.p * 256)), 255)
        words = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None)  # all 64 bits
        random = words.view(torch.uint8)[: x.numel()].view(x.shape)
        # 0 or 1 by clamping, because torch's comparisons of bytes and conversions of bools are not vectorized.
        kept = random.clamp_(threshold - 1, threshold).sub_(threshold - 1)
        return x * kept.to(x.dtype).mul_(256 / (256 - threshold))


FEED_FORWARD_RATIO = 2.0
"""Hidden width of feed-forward blocks, divided by dim."""


class FeedForward(nn.Module):
    """Pre-norm gated feed-forward block (SwiGLU) with its residual."""

    def __init__(self, dim: int, dropout: float, ratio: float = FEED_FORWARD_RATIO) -> None:
        super().__init__()
        hidden = max(8, int(dim * ratio))
        self.norm = norm(dim)
        self.up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., M] -> [..., M]."""
        gate, value = linear_parts(self.norm(x), self.up, 2)
        update: Tensor = self.dropout(self.down(F.silu(gate) * value))
        return x + update


class GatedOutput(nn.Module):
    """Output of an attention layer: norm per head, linear gate (SGLU, TransNormerLLM), projection, residual."""

    def __init__(self, dim: int, num_heads: int, dropout: float, eps: float = 1e-5) -> None:
        super().__init__()
        self.head_norm = norm(dim // num_heads, eps)
        self.out = nn.Linear(dim, dim, bias=False)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, heads: Tensor, gate: Tensor) -> Tensor:
        """x [N, M] residual stream, heads [N, H, D] attention output, gate [N, M] -> [N, M]."""
        # On a GPU torch normalizes bfloat16 only with bfloat16 weights; autocast widens the norm there too.
        heads = heads if x.device.type == "cpu" else heads.to(x.dtype)
        update: Tensor = self.dropout(self.out(self.head_norm(heads).flatten(-2) * gate))
        return x + update


class CausalConvolution(nn.Module):
    """Depthwise convolution over an event and the w-1 events of the same user before it, with its residual."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.randn(width, dim) * (0.5 / width**0.5))

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """x [T, M] packed tokens, position int64 [T] of each token in its history -> [T, M]."""
        y = x * self.weight[0]
        for back in range(1, min(self.width, len(x))):
            shifted = F.pad(x[:-back], (0, 0, back, 0))
            # Filled, not multiplied by 0, so that a NaN stays with its own user.
            if x.device.type == "cpu":  # takes a fifth of the time; on a GPU nonzero would wait for the device
                shifted = shifted.index_fill(0, (position < back).nonzero().squeeze(-1), 0.0)
            else:
                shifted = torch.where((position >= back).unsqueeze(-1), shifted, 0.0)
            y = y + shifted * self.weight[back]
        return x + y
