"""Inputs of the attention benchmarks: random tokens, a training step, and checks that results are equal.

Letters: B users, T packed events, H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from scripts.benchmarks.baseline_attention import Attention, attention_replaced, plain_quasi_linear
from vista.config import ModelConfig
from vista.config.choices import Mixing
from vista.model.features import Schema
from vista.model.summarizer import Stage1Config, Summarizer
from vista_kernels import accumulate_state, quasi_linear_attention, read_state

HEAD_DIM, NUM_SEEDS, NUM_LAYERS = 64, 32, 3
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}
"""Largest error that counts as equal, relative to the largest value."""


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
