"""Bad arguments: a ValueError that names the argument and the shapes, and backends chosen in one place."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch

import vista_kernels
from vista_kernels import backend as backends

if TYPE_CHECKING:
    from .conftest import Operator

OPTIONAL = ("weight", "initial_z", "initial_n", "num_targets", "log_decay")


def check(operator: Operator, changes: dict[str, Any], match: str) -> None:
    inputs = operator.make([3, 2], torch.float32)
    with pytest.raises(ValueError, match=match):
        getattr(vista_kernels, operator.name)(**inputs | changes)


@pytest.mark.parametrize(
    ("offsets", "match"),
    [
        ([1, 3, 5], r"offsets \[3\] must start at 0, got 1"),
        ([0, 3, 4], r"offsets \[3\] must end at the number of rows 5, got 4"),
        ([0, 6, 5], r"offsets \[3\] must not decrease: 6 is followed by 5"),
        ([0, -1, 5], r"offsets \[3\] must not decrease: 0 is followed by -1"),
        ([[0, 3, 5]], r"offsets must be \[B\+1\], got shape \[1, 3\]"),
        ([0.0, 3.0, 5.0], "offsets must be int64, got torch.float32"),
        (5, r"offsets must be \[B\+1\], got shape \[\]"),
    ],
)
def test_offsets(operator: Operator, offsets: Any, match: str) -> None:
    check(operator, {"offsets": torch.tensor(offsets)}, match)


def test_empty_offsets(operator: Operator) -> None:
    check(operator, {"offsets": torch.empty(0, dtype=torch.int64)}, r"offsets must be \[B\+1\], got shape \[0\]")


def test_ranks(operator: Operator) -> None:
    for name in operator.packed + operator.per_segment:
        check(operator, {name: torch.zeros(1, 1, 1, 1, 1, dtype=torch.float32)}, rf"{name} must.*\[1, 1, 1, 1, 1\]")


def test_mixed_dtypes(operator: Operator) -> None:
    inputs = operator.make([3, 2], torch.float32)
    for name in operator.packed + operator.per_segment:
        if name in ("weight", "num_targets"):
            check(operator, {name: inputs[name].to(torch.int32)}, f"{name} must be .* got torch.int32")
        elif operator.packed[0] != name:
            check(operator, {name: inputs[name].double()}, rf"{name}.*torch\.float64")


def test_mixed_devices(operator: Operator) -> None:
    inputs = operator.make([3, 2], torch.float32)
    for name in (*operator.packed, *operator.per_segment):
        if name not in ("num_targets", operator.packed[0]):
            check(operator, {name: inputs[name].to("meta")}, rf"{name}.* is on meta")


def test_tokens_that_do_not_fit(operator: Operator) -> None:
    inputs = operator.make([3, 2], torch.float32)
    for name in operator.packed[1:]:
        check(operator, {name: inputs[name][:4]}, rf"{name}.*\[.*\].*\[.*\]")
    for name in operator.per_segment:
        check(operator, {name: inputs[name][:1]}, rf"{name} must.*\[1")


def test_widths_that_do_not_fit(operators: dict[str, Operator]) -> None:
    q = torch.zeros(5, 2, 7)
    check(operators["causal_linear_attention"], {"q": q}, r"k \[5, 2, 3\] does not fit q \[5, 2, 7\]")
    check(operators["read_state"], {"q": q}, r"z must have shape \[2, 2, 7, 4\], got \[2, 2, 3, 4\]")


def test_integer_tokens(operators: dict[str, Operator]) -> None:
    for name in ("accumulate_state", "causal_linear_attention"):
        tokens = torch.zeros(5, 2, 3, dtype=torch.int64)
        check(operators[name], {"k": tokens, "q": tokens} if "causal" in name else {"k": tokens}, "must be a floating")


def test_growing_log_decay(operators: dict[str, Operator]) -> None:
    for bad in (0.5, torch.nan):
        check(operators["scan_states"], {"log_decay": torch.full((5, 2), bad)}, r"log_decay \[5, 2\] must be at most 0")


@pytest.mark.parametrize("targets", [[4, 0], [-1, 0], [0, 3]])
def test_num_targets_out_of_range(operators: dict[str, Operator], targets: list[int]) -> None:
    check(operators["quasi_linear_attention"], {"num_targets": torch.tensor(targets)}, r"num_targets must lie in 0")


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("accumulate_state", "activation"),
        ("read_state", "activation"),
        ("read_state", "state_activation"),
        ("read_state", "normalization"),
        ("quasi_linear_attention", "normalization"),
        ("quasi_linear_attention", "state_activation"),
        ("causal_linear_attention", "activation"),
    ],
)
def test_options(operators: dict[str, Operator], name: str, option: str) -> None:
    check(operators[name], {option: "tanh"}, f"{option} must be one of .* got 'tanh'")


def test_unknown_backend(operator: Operator) -> None:
    check(
        operator,
        {"backend": "triton9"},
        "backend must be 'auto' or one of 'torch', 'triton', 'reference', got 'triton9'",
    )


def test_backend_is_logged_once(caplog: pytest.LogCaptureFixture, operators: dict[str, Operator]) -> None:
    backends._announce.cache_clear()
    inputs = operators["accumulate_state"].make([3], torch.float32)
    with caplog.at_level(logging.INFO, logger="vista_kernels"):
        for _ in range(3):
            vista_kernels.accumulate_state(**inputs)
    assert [record.getMessage() for record in caplog.records] == ["backend torch for cpu tensors (requested: auto)"]
