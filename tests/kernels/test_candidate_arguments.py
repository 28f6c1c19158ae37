"""Bad arguments of candidate attention: a ValueError that names the argument and the shapes."""

from __future__ import annotations

import pytest
import torch

from vista_kernels import candidate_attention

from .test_candidate_attention import TOKENS, Inputs, make

ERRORS: list[tuple[Inputs, str]] = [
    ({name: torch.zeros(2, 3, 4)}, rf"{name} must be \[B, H, N, D\], got shape \[2, 3, 4\]") for name in TOKENS
]
ERRORS += [
    ({name: torch.zeros(2, 2, 3, 8).long()}, f"{name} must be a floating tensor, got torch.int64") for name in TOKENS
]
ERRORS += [
    ({name: torch.zeros(2, 2, 3, 8).double()}, rf"{name} .* is torch.float64 but q .* is torch.float32")
    for name in TOKENS[1:]
]
ERRORS += [({name: torch.zeros(2, 2, 3, 8, device="meta")}, rf"{name} .* is on meta but q") for name in TOKENS[1:]]
ERRORS += [
    ({"k": torch.zeros(2, 2, 4, 7)}, r"k \[2, 2, 4, 7\] does not fit q \[2, 2, 3, 8\]"),
    ({"k": torch.zeros(1, 2, 4, 8)}, r"k \[1, 2, 4, 8\] does not fit q \[2, 2, 3, 8\]"),
    ({"v": torch.zeros(2, 2, 5, 6)}, r"v \[2, 2, 5, 6\] does not fit k \[2, 2, 4, 8\]"),
    ({"own_k": torch.zeros(2, 2, 4, 8)}, r"own_k \[2, 2, 4, 8\] does not fit q \[2, 2, 3, 8\]"),
    ({"own_v": torch.zeros(2, 2, 3, 8)}, r"own_v \[2, 2, 3, 8\] does not fit q \[2, 2, 3, 8\] and v \[2, 2, 4, 6\]"),
    ({"bias": torch.zeros(2, 3, 5)}, r"bias must be broadcastable to \[2, 2, 3, 4\], got shape \[2, 3, 5\]"),
    (
        {"bias": torch.zeros(1, 2, 2, 3, 4)},
        r"bias must be broadcastable to \[2, 2, 3, 4\], got shape \[1, 2, 2, 3, 4\]",
    ),
    ({"bias": torch.zeros(4).bool()}, "bias must be a floating tensor, got torch.bool"),
    ({"bias": torch.zeros(4, device="meta")}, "bias is on meta, q on cpu"),
    ({"own_bias": torch.zeros(3)}, r"own_bias of one axis must be \[H\] of q \[2, 2, 3, 8\], got shape \[3\]"),
    ({"own_bias": torch.zeros(2, 4)}, r"own_bias must be broadcastable to \[2, 2, 3\], got shape \[2, 4\]"),
    ({"own_bias": torch.zeros(2).long()}, "own_bias must be a floating tensor, got torch.int64"),
    (
        {"context_mask": torch.ones(2, 5).bool()},
        r"context_mask must be bool \[B, C\] of k \[2, 2, 4, 8\], got .* \[2, 5\]",
    ),
    ({"context_mask": torch.ones(2, 4)}, r"context_mask must be bool \[B, C\] .* got torch.float32 \[2, 4\]"),
    ({"context_mask": torch.ones(2, 4, device="meta").bool()}, "context_mask is on meta, q on cpu"),
    ({"scale": float("nan")}, "scale must be a finite number, got nan"),
    ({"scale": torch.ones(())}, "scale must be a finite number, got tensor"),
    ({"backend": "triton"}, "backend 'triton': this operator runs on torch's SDPA on all devices"),
    ({"backend": "cuda"}, "backend must be 'auto' or one of 'torch', 'triton', 'reference', got 'cuda'"),
]


@pytest.mark.parametrize(("changes", "match"), ERRORS)
def test_bad_arguments(changes: Inputs, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        candidate_attention(**make((2, 3, 4), torch.float32) | changes)
