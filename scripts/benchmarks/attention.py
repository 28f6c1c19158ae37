"""Our attention and its baselines: random tokens, a training step, checks, and our summarizer with another attention.

All take users of equal length: q [B, Q, H, D], k and v [B, T, H, D] -> [B, Q, H, D]. Letters: B users, Q queries,
T keys, H heads, D head dim, N = B·H.

SDPA is torch's softmax attention, unmasked. HSTU's attention is pointwise: o = silu(q kᵀ) v / T; its relative bias,
which would only slow it down, is left out. torch has no kernel for it and the plain formula writes T² numbers, so we
compute it in blocks of queries. All blocks share one buffer of scores, and the backward recomputes the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.benchmarks.benchmark import interleaved
from vista.config import ModelConfig
from vista.config.checks import Mixing
from vista.model import summarizer
from vista.model.features import Schema
from vista.model.summarizer import Stage1Config, Summarizer
from vista_kernels import accumulate_state, quasi_linear_attention, read_state

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
BLOCK_SCORES = (1 << 16, 1 << 18, 1 << 20, 1 << 22)
"""Scores that a block of HSTU's attention may hold; `fastest_block` chooses one of them."""
PILOT_QUERIES, PILOT_ITEMS = 1024, 8
HEAD_DIM, NUM_SEEDS, NUM_LAYERS = 64, 32, 3
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}
"""Largest error that counts as equal, relative to the largest value."""


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention."""
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def hstu(q: Tensor, k: Tensor, v: Tensor, *, block_scores: int) -> Tensor:
    """HSTU's attention in blocks of at most block_scores scores, but at least one row of T."""
    B, _, H, _ = q.shape
    rows = (x.transpose(1, 2).flatten(0, 1).contiguous() for x in (q, k, v))
    out: Tensor = _BlockedHSTU.apply(*rows, block_scores)  # type: ignore[no-untyped-call]
    return out.view(B, H, *out.shape[1:]).transpose(1, 2)


def plain_hstu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """HSTU's attention by its formula, with all T² scores at once."""
    scores = F.silu(torch.einsum("bqhd,bthd->bhqt", q, k)) / k.shape[1]
    return torch.einsum("bhqt,bthd->bqhd", scores, v)


def plain_quasi_linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Our attention by its formula, normalized by length: o = silu(q) silu(silu(k)ᵀ v / T)."""
    state = torch.einsum("bthd,bthe->bhde", F.silu(k), v) / k.shape[1]
    return torch.einsum("bqhd,bhde->bqhe", F.silu(q), F.silu(state))


def fastest_block(
    num_users: int,
    num_keys: int,
    num_heads: int,
    head_dim: int,
    like: Tensor,
    *,
    block_scores: Sequence[int] = BLOCK_SCORES,
) -> int:
    """The block_scores with the fastest forward and backward of HSTU, by a short measurement on a part of the work.

    Args:
        like: a tensor of the dtype and device to use.
        block_scores: the sizes to try.
    """
    users = min(num_users, max(1, PILOT_ITEMS // num_heads))
    shape = (users, num_keys, num_heads, head_dim)
    k, v = (torch.randn(shape).to(like).requires_grad_() for _ in range(2))
    q = k.detach()[:, :PILOT_QUERIES].clone().requires_grad_()

    def step(scores: int) -> object:
        return torch.autograd.grad(hstu(q, k, v, block_scores=scores).sum(), (q, k, v))

    wait = torch.cuda.synchronize if like.is_cuda else None
    calls = {str(scores): partial(step, scores) for scores in block_scores}
    timing = interleaved(calls, rounds=3, warmup=1, max_seconds=10, synchronize=wait)
    return int(min(timing, key=lambda scores: timing[scores].median_s))


@contextmanager
def attention_replaced(attention: Attention) -> Iterator[None]:
    """Make every bidirectional `Summarizer` attend with `attention`, also for the seeds of the last layer.

    There our model writes a state that the seeds read. A baseline has no state, so the keys and values take its place.
    """

    def quasi_linear_attention(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, **_: Any) -> Tensor:
        return attention(*(_by_user(x, offsets) for x in (q, k, v))).flatten(0, 1)

    def accumulate_state(k: Tensor, v: Tensor, offsets: Tensor, **_: Any) -> tuple[tuple[Tensor, Tensor], None]:
        return (_by_user(k, offsets), _by_user(v, offsets)), None

    def read_state(q: Tensor, z: tuple[Tensor, Tensor], n: None, offsets: Tensor, **_: Any) -> Tensor:
        return attention(_by_user(q, offsets), *z).flatten(0, 1)

    with patch.multiple(
        summarizer,
        quasi_linear_attention=quasi_linear_attention,
        accumulate_state=accumulate_state,
        read_state=read_state,
    ):
        yield


def _by_user(x: Tensor, offsets: Tensor) -> Tensor:
    """[B·T, H, D] -> [B, T, H, D], a view."""
    lengths = offsets.diff()
    if len(lengths) == 0 or not bool((lengths == lengths[0]).all()):
        raise ValueError(f"offsets: baselines take users of equal length, got {lengths.tolist()}")
    return x.view(len(lengths), -1, *x.shape[1:])


class _BlockedHSTU(torch.autograd.Function):
    """q [N, Q, D], k and v [N, T, D] contiguous -> [N, Q, D].

    The sums of dk and dv over blocks use the tokens' dtype, which is fastest but not most precise in bfloat16.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, block_scores: int) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(q, k, v)
        ctx.block_scores = block_scores
        out = torch.empty_like(q)
        (scores,) = _buffers(1, q, k, block_scores)
        for items, rows in _blocks(q, k, block_scores):
            block = _product(scores, q[items, rows], k[items].transpose(1, 2))
            torch.ops.aten.silu.out(block, out=block)
            torch.bmm(block, v[items], out=out[items, rows])
        return out.div_(k.shape[1])

    @staticmethod
    def backward(ctx, grad_out: Tensor):  # type: ignore[no-untyped-def]
        q, k, v = ctx.saved_tensors
        grad_out = grad_out.contiguous() / k.shape[1]
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        first, second, third = _buffers(3, q, k, ctx.block_scores)
        for items, rows in _blocks(q, k, ctx.block_scores):
            queries, grad = q[items, rows], grad_out[items, rows]
            scores = _product(first, queries, k[items].transpose(1, 2))
            attended = second[: scores.numel()].view(scores.shape)
            torch.ops.aten.silu.out(scores, out=attended)
            grad_v[items].baddbmm_(attended.transpose(1, 2), grad)
            grad_scores = _product(third, grad, v[items].transpose(1, 2))
            torch.ops.aten.silu_backward.grad_input(grad_scores, scores, grad_input=attended)
            torch.bmm(attended, k[items], out=grad_q[items, rows])
            grad_k[items].baddbmm_(attended.transpose(1, 2), queries)
        return grad_q, grad_k, grad_v, None


def _blocks(q: Tensor, k: Tensor, block_scores: int) -> Iterator[tuple[slice, slice]]:
    """Items and query rows of each block: several whole items, or some queries of one item."""
    N, Q, _ = q.shape
    rows = max(1, block_scores // k.shape[1])
    items = max(1, rows // Q)
    for item in range(0, N, items):
        for row in range(0, Q, rows):
            yield slice(item, item + items), slice(row, row + rows)


def _buffers(count: int, q: Tensor, k: Tensor, block_scores: int) -> list[Tensor]:
    """`count` buffers for the scores of a block."""
    size = min(max(block_scores, k.shape[1]), q.shape[0] * q.shape[1] * k.shape[1])
    return [q.new_empty(size) for _ in range(count)]


def _product(buffer: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a @ b, written to the buffer."""
    shape = (a.shape[0], a.shape[1], b.shape[2])
    return torch.bmm(a, b, out=buffer[: shape[0] * shape[1] * shape[2]].view(shape))


class AttentionTokens:
    """Random q, k, v [T, H, D] of packed users that require gradients, and a gradient of the output."""

    def __init__(
        self, lengths: Sequence[int], dim: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        torch.manual_seed(0)
        self.offsets = torch.tensor([0, *lengths]).cumsum(0)
        shape = (sum(lengths), dim // HEAD_DIM, HEAD_DIM)
        self.q, self.k, self.v = (torch.randn(shape).to(device, dtype).requires_grad_() for _ in range(3))
        self.grad = torch.randn(shape).to(device, dtype)

    def attend(self) -> Tensor:
        """QLA, normalized by length."""
        return quasi_linear_attention(self.q, self.k, self.v, self.offsets, normalization="length")

    @torch.no_grad()
    def forward(self) -> Tensor:
        """QLA without gradients."""
        return self.attend()

    def backward(self) -> Callable[[], tuple[Tensor, ...]]:
        """A call that runs only QLA's backward."""
        out = self.attend()
        return lambda: torch.autograd.grad(out, (self.q, self.k, self.v), self.grad, retain_graph=True)

    @torch.no_grad()
    def write_and_read(self, queries: Tensor, query_offsets: Tensor) -> Tensor:
        """The separable path: accumulate a state from k and v, then read it by queries."""
        z, n = accumulate_state(self.k, self.v, self.offsets)
        return read_state(queries, z, n, query_offsets, normalization="length")

    def by_user(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """q, k and v [B, T, H, D] of users of equal length, as new leaves."""
        shape = (len(self.offsets) - 1, -1, *self.q.shape[1:])
        return [x.detach().to(dtype).view(shape).requires_grad_() for x in (self.q, self.k, self.v)]


class AttentionStep:
    """A training step of the bidirectional summarizer on users of equal length."""

    def __init__(self, num_users: int, length: int, dim: int) -> None:
        torch.manual_seed(0)
        config = ModelConfig(
            dim=dim,
            num_heads=dim // HEAD_DIM,
            num_seeds=NUM_SEEDS,
            num_layers=NUM_LAYERS,
            mixing=Mixing.bidirectional,
            conv_width=1,
        )
        self.model = Summarizer(Stage1Config.of(config, Schema([], False, None, [])), config.dropout)
        self.tokens = torch.randn(num_users * length, dim, requires_grad=True)
        self.offsets = torch.arange(num_users + 1) * length
        self.weight = torch.randn(num_users, NUM_SEEDS, dim)  # the plain sum of a layer norm has no gradient

    def summarize(self, dtype: torch.dtype, attention: Attention | None) -> Tensor:
        """Summaries [B, S, M], in bfloat16 under autocast, as in the trainer; None stands for our attention."""
        replaced = nullcontext() if attention is None else attention_replaced(attention)
        with replaced, torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return self.model.summarize_set(self.tokens, self.offsets)

    def run(self, dtype: torch.dtype, attention: Attention | None) -> None:
        """Forward and backward, with dropout."""
        self.model.zero_grad(set_to_none=True)
        self.tokens.grad = None
        loss = (self.summarize(dtype, attention).float() * self.weight).sum()
        torch.autograd.backward(loss)


def check(tokens: AttentionTokens) -> None:
    """Compare QLA of users of equal length, and its gradients, with the formula in float64 on the same tokens."""
    exact = tokens.by_user(torch.float64)
    expected = plain_quasi_linear(*exact)
    grads = torch.autograd.grad(expected, exact, tokens.grad.double().view(expected.shape))
    ours = [tokens.forward(), *tokens.backward()()]
    for name, mine, true in zip(("o", "dq", "dk", "dv"), ours, [expected, *grads], strict=True):
        assert_equal(name, mine, true)


def assert_equal(name: str, ours: Tensor, expected: Tensor) -> None:
    """Require equality up to the rounding of the dtype of `ours`."""
    error = (ours.detach().double() - expected.detach().double().reshape(ours.shape)).abs().max()
    limit = TOLERANCE[ours.dtype] * float(expected.detach().abs().max())
    assert float(error) <= limit, f"{name}: error {float(error)} over {limit}"
