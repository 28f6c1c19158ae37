"""Beyond inputs and outputs, the torch operators need the same memory for any number of events."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vista_kernels import accumulate_state, causal_linear_attention, quasi_linear_attention

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
WIDTH, NUM_TOKENS = 16, 1_000_000
ROW_BYTES = 4 * WIDTH
"""Bytes of a token in one tensor. No operator may hold as much for every token."""

pytestmark = pytest.mark.skipif(not RESET.exists(), reason="this system does not report peak memory")


def resident(key: str) -> int:
    """Return the bytes resident now (VmRSS), or at the peak since the last reset (VmHWM)."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


def extra_bytes(operator: Callable[..., Tensor], length: int) -> int:
    """Return the peak bytes of forward beyond its output or of backward beyond the gradients, whichever is more."""
    offsets = torch.arange(0, NUM_TOKENS + 1, length)
    q, k, v = (torch.randn(NUM_TOKENS, 1, WIDTH).requires_grad_() for _ in range(3))
    RESET.write_text("5")
    before = resident("VmRSS")
    out = operator(q, k, v, offsets)
    forward = resident("VmHWM") - before - out.untyped_storage().nbytes()
    given = torch.ones_like(out)
    RESET.write_text("5")
    before = resident("VmRSS")
    grads = torch.autograd.grad(out, (q, k, v), given, allow_unused=True)
    results = sum(x.untyped_storage().nbytes() for x in grads if x is not None)
    return max(forward, resident("VmHWM") - before - results)


def states(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor) -> Tensor:
    """Return the states of the segments; q is not used."""
    return accumulate_state(k, v, offsets)[0]


def causal(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor) -> Tensor:
    """Return the outputs alone."""
    return causal_linear_attention(q, k, v, offsets)[0]


@pytest.mark.parametrize("length", [NUM_TOKENS, 50], ids=["one-user", "short-users"])
@pytest.mark.parametrize("operator", [quasi_linear_attention, causal, states])
def test_no_temporary_holds_all_tokens(operator: Callable[..., Tensor], length: int) -> None:
    extra_bytes(operator, length)  # allocates the buffers that are kept
    # Short segments have indices, a few numbers per token; a single segment has none.
    limit = ROW_BYTES * 3 // 4 if length < NUM_TOKENS else 4
    assert extra_bytes(operator, length) < limit * NUM_TOKENS
