"""Layers that the stages are built of. Letters: N tokens, T packed tokens, M model dim, H heads, D head dim."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from enum import IntEnum
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vista.counters.counters import MAX_CODE, CounterSpec
from vista.examples.item_spaces import Pooled
from vista.examples.transitions import TransitionSum
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


def norm(dim: int) -> nn.LayerNorm:
    """Layer norm without bias. (On CPUs torch fuses LayerNorm, but not RMSNorm.)"""
    return nn.LayerNorm(dim, bias=False)


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

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        hidden = max(8, int(dim * FEED_FORWARD_RATIO))
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

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.head_norm = norm(dim // num_heads)
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


# Scores of counted items, which are the items that a user's counters hold.
#
# Items that are not counted have the score c_i = cos(u, v_i)/T + β(u)·z_i, where z_i are the item's statistics
# (`StatisticsTerm`). A counted item i has the logit
#
#     s_i = h(x_i, c_i, z_i, log n) + g(u)
#
# where x_i are the codes of its counters and of those of its categories, and n is the number of the user's events. If
# the model knows transitions, the user's sums over them (`vista.examples.transitions`) follow in z_i, and then the
# cosines with the user's pooled vectors (`vista.examples.item_spaces`), if it has them. Both kinds of items share one
# softmax: h ranks the counted items among themselves, and the gate g says how much of what this user does next is a
# return. The score is an input of h and not a term, so that item vectors need not explain returns.
#
# Letters: B requests, S counted slots, F' values per item: F per field (`CounterSpec`), M model dim, Z statistics.

HIDDEN = 64


class CountedItemHead(nn.Module):
    """A network over the counters of each item, and a gate over the user vector. It is called without autocast. Before
    training, all counted items of a user have the same logit, the gate's bias."""

    def __init__(self, num_values: int, dim: int, num_statistics: int, dropout: float = 0.0) -> None:
        """
        Args:
            num_values: F'.
            dim: M.
            num_statistics: Z.
            dropout: share of the requests that training scores without `score`. Item vectors are fitted to the labels
                that this head learns from, so it would trust cosines more than later windows justify.
        """
        super().__init__()
        self.dropout = dropout
        last = nn.Linear(HIDDEN, 1, bias=False)  # the gate has the bias
        first = nn.Linear(num_values + num_statistics + 2, HIDDEN)
        self.network = nn.Sequential(first, SiLU(), nn.Linear(HIDDEN, HIDDEN), SiLU(), last)
        self.gate = nn.Linear(dim, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(self, codes: Tensor, score: Tensor, statistics: Tensor, num_events: Tensor, user: Tensor) -> Tensor:
        """Logits of counted items.

        Args:
            codes: uint8 [B, S, F'] from `UserCounters.of_counted_items`, as of the requests.
            score: [B, S] what the items would score without counters: the inner product of the user's and the item's
                retrieval vectors, divided by the temperature.
            statistics: [B, S, Z] of the items (`ItemStatistics`), as of the requests; and what follows them.
            num_events: int64 [B] events that the counters cover: those of the record, and the newer ones that were
                added to them.
            user: [B, M] unit vectors, with which retrieval vectors begin.

        Returns:
            float32 [B, S] (or the dtype of the weights if that is wider), on the scale of `score`.
        """
        if self.training and self.dropout:
            score = score * (torch.rand(len(score), 1, device=score.device) >= self.dropout)
        return self.from_counters(codes, score, statistics, num_events) + self.from_user(user).unsqueeze(1)

    def from_counters(self, codes: Tensor, score: Tensor, statistics: Tensor, num_events: Tensor) -> Tensor:
        """[B, S]: the network h. Arguments as in `forward`."""
        dtype = self.gate.weight.dtype
        # In float64, so that the bits do not depend on the other users of a request.
        size = (num_events.double().log1p() - 6).unsqueeze(1).expand_as(score)
        # Constants that bring typical values near 0 ± 1.
        inputs = codes.to(dtype) / 8 - 2, (score / 5).unsqueeze(-1), statistics, size.unsqueeze(-1)
        logit: Tensor = self.network(torch.cat([x.to(dtype) for x in inputs], -1)).squeeze(-1)
        return logit

    def from_user(self, user: Tensor) -> Tensor:
        """[B]: the gate g. user: [B, M] unit vectors."""
        # User vectors have length 1; this brings their entries near 0 ± 1, like the network's inputs.
        entries = user.double() * math.sqrt(user.shape[-1])
        # In float64, so that the bits do not depend on the other users of a request.
        logit = F.linear(entries, self.gate.weight.double(), self.gate.bias.double())
        return logit.squeeze(-1).to(self.gate.weight.dtype)

    @torch.no_grad()
    def start(self, returning_share: float, num_counted: Tensor, log_others: Tensor) -> None:
        """Set the gate's bias before training: the mean probability of all counted items is their share of the labels.

        Args:
            returning_share: share of the labels of such requests that are counted items, between 0 and 1.
            num_counted: int64 [n] counted items of each request, at least 1.
            log_others: [n] log of the sum of e^s over the other items of the catalog.
        """
        log_odds = num_counted.double().log() - log_others.double()  # of the counted items, with a bias of 0
        low, high = -log_odds.max() - 50, -log_odds.min() + 50
        for _ in range(60):
            bias = (low + high) / 2
            is_below = (log_odds + bias).sigmoid().mean() < returning_share
            low, high = torch.where(is_below, bias, low), torch.where(is_below, high, bias)
        self.gate.bias.copy_(low)


# How labeled tasks read what is known of a user and a candidate without attention: the user's counters of the
# candidate, its cosines to the user's pooled vectors, and the statistics and label rates of the item.
#
# There are two maps. A linear map of the codes is added to the candidate's vector, so that the counters affect what the
# candidate attends to. Because it is linear, serving computes it as a sum of table rows. A network adds to the logits:
# whether an item is due depends on the ratio of its gap to its mean gap, which a linear map cannot compute. The network
# also reads the user's number of events, because a count gives the mean gap only together with it.
#
# Letters: G fields, F values per key (`CounterSpec`). A candidate has G * F + 1 codes (`UserCounters.of_pairs`) and I
# inputs (`BatchImpressions.inputs`).


class CandidateHead(nn.Module):
    """A linear map of a candidate's codes to vectors, and a network to logits; both are 0 before training."""

    input_scale: Tensor
    """float32 [I]."""

    def __init__(self, spec: CounterSpec | None, width: int, num_tasks: int, input_scale: Sequence[float] = ()) -> None:
        """
        Args:
            spec: what is counted; None without counters.
            width: of the vectors.
            num_tasks: number of labeled tasks.
            input_scale: I factors that bring typical inputs near 0 ± 1.
        """
        super().__init__()
        self.num_columns = spec.num_columns if spec else 0
        self.num_values = num_values = spec.num_fields * spec.num_columns if spec else 0
        self.register_buffer("input_scale", torch.tensor(input_scale), persistent=False)
        self.added = nn.Linear(2 * num_values + spec.num_fields, width, bias=False) if spec else None
        if self.added is not None:
            nn.init.zeros_(self.added.weight)
        size = (num_values + 1 if spec else 0) + len(input_scale)
        last = nn.Linear(HIDDEN, num_tasks, bias=False)  # the head of the tasks has the bias
        self.network = nn.Sequential(nn.Linear(size, HIDDEN), SiLU(), nn.Linear(HIDDEN, HIDDEN), SiLU(), last)
        nn.init.zeros_(last.weight)

    def forward(self, codes: Tensor) -> Tensor:
        """Codes uint8 [..., G * F + 1], 0 for candidates that are not counted -> [..., width]; 0 for these."""
        assert self.added is not None
        level = codes[..., :-1].to(self.added.weight.dtype) / MAX_CODE
        added: Tensor = self.added(torch.cat([level, level.square(), self._is_counted(codes).to(level.dtype)], -1))
        return added

    def logits(self, codes: Tensor | None, inputs: Tensor | None = None) -> Tensor:
        """What is added to the logits of candidates, [..., num_tasks]; 0 for one without counters if I is 0.

        Args:
            codes: uint8 [..., G * F + 1]; None without counters.
            inputs: float32 [..., I]; None if I is 0.
        """
        parts = []
        if codes is not None:  # constants that bring typical values near 0 ± 1
            parts.append(codes.to(self.input_scale.dtype) / 8 - 2)
        if inputs is not None:
            parts.append(inputs * self.input_scale)
        logits: Tensor = self.network(torch.cat(parts, -1))
        if inputs is not None or codes is None:
            return logits
        return logits * self._is_counted(codes).any(-1, keepdim=True)

    def _is_counted(self, codes: Tensor) -> Tensor:
        """bool [..., G]: the fields that count the candidate, whose first code is at least 1."""
        return codes[..., : -1 : self.num_columns] > 0


# How much a user's next items follow what all users do: how popular items are, and which of them are on the rise.
#
# Cosines to one user vector can hardly say "popular items" and "these similar items" at once. With this term the score
# of item i is (cos(u, v_i) + β(u)·T z_i) / T, where z_i are the Z statistics of the item. That is an inner product of
# longer vectors, so rankings and nearest-neighbor indexes need no change. T multiplies the items' part and not the
# users', so that an index does not take items for neighbors by their statistics alone.
#
# The sums over transitions (`vista.examples.transitions`) have weights too, the last ones of a user vector. They are
# not the same for all users, so they are added to the inner product, in which items have 0 in their place.
#
# The pooled vectors m_j of a user (`vista.examples.item_spaces`) have weights as well. Their cosines with the vector
# s_i of the item add Σ_j w_j(u) m_j·s_i to the score, which is an inner product with T s_i too.

START_POOLED = 2.0
"""Weight of `Pooled.all` before training."""
START_GAIN = 0.1
"""Scale of unit user vectors before training. Cosines to vectors that are not trained yet would otherwise disturb what
is known without them, which is fitted first (epoch 0)."""


class StatisticsTerm(nn.Module):
    """The weights β(u) and w(u), linear functions of the unit user vector.

    They start at 1 for the first statistic, the events of all time, and for what follows the newest event, at
    START_POOLED for the vector of all events, and at 0 for others: where cosines to the user vector say nothing, items
    have about the probability that they have among all users with such a history.
    """

    def __init__(self, dim: int, num_statistics: int, *, num_sums: int = 0, num_pooled: int = 0) -> None:
        """
        Args:
            dim: M.
            num_statistics: Z.
            num_sums: sums over transitions, NUM_SUMS or 0.
            num_pooled: pooled vectors, J or 0.
        """
        super().__init__()
        self.num_sums, self.num_pooled = num_sums, num_pooled
        num_others = num_statistics + num_sums
        self.gain = nn.Parameter(torch.tensor(START_GAIN))
        self.weight = nn.Linear(dim, num_others + num_pooled)
        nn.init.zeros_(self.weight.weight)
        nn.init.zeros_(self.weight.bias)
        with torch.no_grad():
            if num_statistics:
                self.weight.bias[0] = 1.0
            if num_sums:
                self.weight.bias[num_statistics + TransitionSum.newest] = 1.0
            if num_pooled:
                self.weight.bias[num_others + Pooled.all] = START_POOLED

    def forward(self, unit: Tensor, pooled: Tensor | None = None) -> Tensor:
        """Retrieval vectors [..., M'] of users: the unit vector, Σ_j w_j(u) m_j, and β(u).

        Args:
            unit: [..., M] unit user vectors.
            pooled: [..., J, r] pooled vectors; None without.
        """
        with torch.autocast(unit.device.type, enabled=False):
            unit = self.gain * unit.to(self.weight.weight.dtype)
            weights = self.weights(unit)
            if not self.num_pooled:
                return torch.cat([unit, weights], -1)
            assert pooled is not None
            others, of_pooled = torch.split(weights, [weights.shape[-1] - self.num_pooled, self.num_pooled], -1)
            return torch.cat([unit, (of_pooled.unsqueeze(-1) * pooled).sum(-2), others], -1)

    def weights(self, scaled: Tensor) -> Tensor:
        """β(u), then w(u), of the first M numbers of retrieval vectors: unit vectors times `gain`."""
        weights: Tensor = self.weight(scaled * math.sqrt(scaled.shape[-1]))  # inputs near 0 ± 1
        return weights


def output_layers(*networks: nn.Module | None) -> list[nn.Linear]:
    """The last layer of each network, or a network of a single layer; none of None."""
    last = (network[-1] if isinstance(network, nn.Sequential) else network for network in networks)
    return [layer for layer in last if isinstance(layer, nn.Linear)]


def with_bias(linear: nn.Module, added: Tensor) -> nn.Module:
    """A linear map with another bias: the first values of `added` are added to it. The weight is shared."""
    assert isinstance(linear, nn.Linear)
    other = copy.copy(linear)
    other._parameters = {"weight": linear.weight, "bias": linear.bias.detach() + added[: len(linear.bias)]}  # type: ignore[dict-item]
    return other


@contextmanager
def restored(weights: Iterable[Tensor]) -> Iterator[None]:
    """After this block, tensors have the values again that they had before it."""
    kept = [(weight, weight.detach().clone()) for weight in weights]
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, values in kept:
                weight.copy_(values)


# Tables with drawn values, unless they are about to be read from a file.

TABLE_STD = 0.02
"""Standard deviation of drawn values."""
_FROM_FILE = ContextVar("tables_from_file", default=False)


@contextmanager
def tables_from_file() -> Iterator[None]:
    """Models that are built in this block get their tables by `load_state_dict(…, assign=True)`. So a large model opens
    in little more memory than it needs afterwards."""
    token = _FROM_FILE.set(True)
    try:
        yield
    finally:
        _FROM_FILE.reset(token)


def drawn_table(shape: torch.Size) -> Tensor:
    """Drawn values, and 0 in the first row; without memory within `tables_from_file`."""
    if _FROM_FILE.get():
        return torch.empty(shape, device="meta")
    table = nn.init.normal_(torch.empty(shape), std=TABLE_STD)
    table[0] = 0.0
    return table


# A limit on the memory that building a model allocates, for models whose sizes come from a file.

FACTORIES = {
    *(torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.eye),
    *(torch.arange, torch.linspace),
}
SIZED_BY_VALUES = {torch.arange, torch.linspace}
"""Their arguments are numbers, and the largest one bounds the size of the result."""


class AllocationLimit(TorchFunctionMode):
    """In a `with` block, torch's factories make tensors of at most `elements` elements in total.

    Raises:
        `error`, before the tensor that would exceed the limit is made.
    """

    def __init__(self, elements: int, error: Exception) -> None:
        super().__init__()
        self._left = elements
        self._error = error

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in FACTORIES:
            self._left -= _size(func, args, kwargs)
            if self._left < 0:
                raise self._error
        return func(*args, **kwargs)


def _size(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    """The number of elements of a factory's result, or an upper bound."""
    if func in SIZED_BY_VALUES:
        return max((math.ceil(abs(value)) for value in args if isinstance(value, int | float)), default=0)
    size = kwargs.get("size", args)
    if len(size) and isinstance(size[0], Sequence):
        size = size[0]
    return math.prod(size)


class EmbeddingFeature(IntEnum):
    """The feature whose values are hashed."""

    item = 1
    action = 2
    gap = 3


# One table for all categorical features, read by hashes: Unified Embedding (Coleman et al., NeurIPS 2023).
#
# Each hash function names one row for a feature's value, and the concatenated rows are its vector. Values share rows,
# within a feature and across features. Two values have the same vector only if all their rows agree.
#
# Saved models rely on which value reads which row, so the numbers of features and the hash functions never change.
# Letters: N rows that are hashed to, P hash functions, M model dim; a row is M / P wide.


def mix64(x: Tensor) -> Tensor:
    """SplitMix64 of states int64 [...] (Steele, Lea and Flood, OOPSLA 2014): a bijection of 64-bit words. The
    definition uses unsigned words. int64 has the same bits, since sums and products wrap around."""
    x = x + _GAMMA
    x = (x ^ _shift_right(x, 30)) * _FIRST
    x = (x ^ _shift_right(x, 27)) * _SECOND
    return x ^ _shift_right(x, 31)


def hashed_rows(values: Tensor, feature: EmbeddingFeature, num_hashes: int, num_rows: int) -> Tensor:
    """Rows int64 [..., P] in 1 … num_rows of a feature's values int64 [...]; no value hashes to row 0. Hash function i
    of feature f maps the value v to 1 + (mix64(v XOR mix64(2^32 f + i)) >> 1) mod num_rows."""
    keys = mix64((int(feature) << 32) + torch.arange(num_hashes, device=values.device))
    return 1 + _shift_right(mix64(values.unsqueeze(-1) ^ keys), 1) % num_rows


def gather(table: Tensor, rows: Tensor) -> Tensor:
    """[..., M] vectors of rows int64 [..., P] of a table [1 + N, M / P], whose gradient is sparse. Row 0 belongs to no
    value. It has no gradient, so it stays 0."""
    return F.embedding(rows, table, padding_idx=0, sparse=True).flatten(-2)


class HashedEmbedding(nn.Module):
    """In place of an `nn.Embedding` of few values: reads the table that all features share."""

    rows: Tensor

    def __init__(
        self, table: nn.Parameter, feature: EmbeddingFeature, num_values: int, num_hashes: int, num_rows: int
    ) -> None:
        """
        Args:
            num_rows: N of the whole table, of which a sharded one has only a part here.
        """
        super().__init__()
        self.set_table(table)
        rows = hashed_rows(torch.arange(num_values), feature, num_hashes, num_rows)
        self.register_buffer("rows", rows, persistent=False)
        self.read: Tensor | None = None
        """[num_values, M] vectors of all values, as `read_together` has read them from a sharded table."""

    def set_table(self, table: nn.Parameter) -> None:
        """Read another table."""
        # In a tuple, hidden from torch: the parameter belongs to the model, which moves and saves it once.
        self._table = (table,)

    def forward(self, values: Tensor) -> Tensor:
        """[..., M] vectors of values int64 [...]."""
        # All values first, then each event's, so that the table's gradient has these few rows instead of every event's.
        return F.embedding(values, gather(self._table[0], self.rows) if self.read is None else self.read)


def read_together(read: Callable[[Tensor], Tensor], rows: Tensor, embeddings: Sequence[HashedEmbedding]) -> Tensor:
    """[..., M] vectors of rows int64 [..., P], and those of all values of `embeddings`, from one read of a table.
    `read`: vectors [K, M / P] of rows int64 [K]."""
    asked = [rows, *(embedding.rows for embedding in embeddings)]
    read_rows = torch.split(read(torch.cat([each.flatten() for each in asked])), [each.numel() for each in asked])
    vectors = [part.view(*each.shape, part.shape[1]).flatten(-2) for part, each in zip(read_rows, asked, strict=True)]
    for embedding, own in zip(embeddings, vectors[1:], strict=True):
        embedding.read = own
    return vectors[0]


def _signed(word: int) -> int:
    """The int64 of the same 64 bits."""
    return word - 2**64 if word >= 2**63 else word


_GAMMA, _FIRST, _SECOND = (_signed(word) for word in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: fills with zeros from the left, while the shift of int64 repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
