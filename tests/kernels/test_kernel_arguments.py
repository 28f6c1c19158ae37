"""Bad arguments: a ValueError that names the argument and the shapes; backends and profiles are chosen in one place."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch

import vista_kernels

if TYPE_CHECKING:
    from .conftest import Operator
from collections.abc import Callable

from vista_kernels import candidate_attention
from vista_kernels.processor import PROFILES, ProcessorError, detect, multiplies_bfloat16, processor
from vista_kernels.torch_backend.precision import product_dtype

from .test_candidate_attention import TOKENS, Inputs, make


def check(torch_operator: Operator, changes: dict[str, Any], match: str) -> None:
    inputs = torch_operator.make([3, 2], torch.float32)
    with pytest.raises(ValueError, match=match):
        getattr(vista_kernels, torch_operator.name)(**inputs | changes)


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
        (torch.empty(0, dtype=torch.int64), r"offsets must be \[B\+1\], got shape \[0\]"),
    ],
)
def test_offsets(torch_operator: Operator, offsets: Any, match: str) -> None:
    check(torch_operator, {"offsets": torch.as_tensor(offsets)}, match)


def test_ranks(torch_operator: Operator) -> None:
    for name in torch_operator.packed + torch_operator.per_segment:
        check(
            torch_operator, {name: torch.zeros(1, 1, 1, 1, 1, dtype=torch.float32)}, rf"{name} must.*\[1, 1, 1, 1, 1\]"
        )


def test_mixed_dtypes(torch_operator: Operator) -> None:
    inputs = torch_operator.make([3, 2], torch.float32)
    for name in torch_operator.packed + torch_operator.per_segment:
        if name in ("weight", "num_targets"):
            check(torch_operator, {name: inputs[name].to(torch.int32)}, f"{name} must be .* got torch.int32")
        elif torch_operator.packed[0] != name:
            check(torch_operator, {name: inputs[name].double()}, rf"{name}.*torch\.float64")


def test_mixed_devices(torch_operator: Operator) -> None:
    inputs = torch_operator.make([3, 2], torch.float32)
    for name in (*torch_operator.packed, *torch_operator.per_segment):
        if name not in ("num_targets", torch_operator.packed[0]):
            check(torch_operator, {name: inputs[name].to("meta")}, rf"{name}.* is on meta")


def test_tokens_that_do_not_fit(torch_operator: Operator) -> None:
    inputs = torch_operator.make([3, 2], torch.float32)
    for name in torch_operator.packed[1:]:
        check(torch_operator, {name: inputs[name][:4]}, rf"{name}.*\[.*\].*\[.*\]")
    for name in torch_operator.per_segment:
        check(torch_operator, {name: inputs[name][:1]}, rf"{name} must.*\[1")


TOKENS_OF_WIDTH_7, INTEGERS = torch.zeros(5, 2, 7), torch.zeros(5, 2, 3, dtype=torch.int64)
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("causal_linear_attention", {"q": TOKENS_OF_WIDTH_7}, r"k \[5, 2, 3\] does not fit q \[5, 2, 7\]"),
    ("read_state", {"q": TOKENS_OF_WIDTH_7}, r"z must have shape \[2, 2, 7, 4\], got \[2, 2, 3, 4\]"),
    ("accumulate_state", {"k": INTEGERS}, "must be a floating"),
    ("causal_linear_attention", {"k": INTEGERS, "q": INTEGERS}, "must be a floating"),
    *(
        ("scan_states", {"log_decay": torch.full((5, 2), bad)}, r"log_decay \[5, 2\] must be at most 0")
        for bad in (0.5, torch.nan)
    ),
    *(
        ("quasi_linear_attention", {"num_targets": torch.tensor(bad)}, r"num_targets must lie in 0")
        for bad in ([4, 0], [-1, 0], [0, 3])
    ),
    *(
        (name, {option: "tanh"}, f"{option} must be one of .* got 'tanh'")
        for name, options in (
            ("accumulate_state", ["activation"]),
            ("read_state", ["activation", "state_activation", "normalization"]),
            ("quasi_linear_attention", ["normalization", "state_activation"]),
            ("causal_linear_attention", ["activation"]),
        )
        for option in options
    ),
]


@pytest.mark.parametrize(("name", "changes", "match"), REFUSED)
def test_what_single_operators_refuse(
    operators: dict[str, Operator], name: str, changes: dict[str, Any], match: str
) -> None:
    check(operators[name], changes, match)


def test_unknown_backend(torch_operator: Operator) -> None:
    check(
        torch_operator,
        {"backend": "triton9"},
        "backend must be 'auto' or one of 'torch', 'triton', 'reference', got 'triton9'",
    )


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


FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
OFFSETS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("name", "flags", "fast", "packed"),
    [
        ("AMD EPYC", {"avx512_f"}, False, (FLOAT32,)),
        ("AMD EPYC", {"avx512_f", "avx512_bf16"}, True, (FLOAT32, BFLOAT16)),
        ("AMD EPYC", set(), False, ()),
        ("Intel(R) Xeon(R)", {"avx512_f", "avx512_bf16", "amx_tile"}, True, (BFLOAT16,)),
        ("Intel(R) Xeon(R)", {"avx512_f", "amx_tile"}, True, (BFLOAT16,)),
        ("Intel Xeon", {"avx512_f", "avx512_bf16"}, False, ()),
        (None, set(), False, ()),
    ],
)
def test_detection(name: str | None, flags: set[str], fast: bool, packed: tuple[torch.dtype, ...]) -> None:
    detected = detect(({"cpu_name": name} if name else {}) | dict.fromkeys(flags, True))
    assert detected.multiplies_bfloat16 is fast and detected.packed_dtypes == packed
    assert (name or "unknown") in detected.name


def test_profiles_are_machines_that_exist() -> None:
    amd, amx = {"cpu_name": "AMD EPYC", "avx512_f": True, "avx512_bf16": True}, {"cpu_name": "Intel", "amx_tile": True}
    for profile, capabilities in (("float32", {}), ("bfloat16", amd), ("amx", amx)):
        machine, forced = detect(capabilities), PROFILES[profile]
        assert (machine.multiplies_bfloat16, machine.packed_dtypes) == (
            forced.multiplies_bfloat16,
            forced.packed_dtypes,
        )


@pytest.mark.parametrize("profile", PROFILES)
def test_forcing_a_profile(
    profile: str, force_processor: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    force_processor(profile)
    with caplog.at_level(logging.DEBUG, logger="vista_kernels"):
        forced = processor()
        assert processor() is forced
    assert [record.getMessage().partition(";")[0] for record in caplog.records] == [
        f"processor: {profile} (forced by VISTA_PROCESSOR)"
    ]
    assert forced.multiplies_bfloat16 is multiplies_bfloat16("cpu") is PROFILES[profile].multiplies_bfloat16
    # Forcing does not give oneDNN instructions that the hardware lacks.
    assert set(forced.packed_dtypes) <= set(PROFILES[profile].packed_dtypes)
    if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert forced.packed_dtypes == PROFILES[profile].packed_dtypes
    expected = BFLOAT16 if forced.multiplies_bfloat16 else FLOAT32
    assert product_dtype(torch.ones(1, dtype=BFLOAT16)) == expected
    assert product_dtype(torch.ones(1, dtype=torch.float16)) == product_dtype(torch.ones(1)) == FLOAT32
    assert product_dtype(torch.ones(1, dtype=torch.float64)) == torch.float64


def test_other_devices_do_not_depend_on_the_processor(force_processor: Callable[[str], None]) -> None:
    for profile in PROFILES:
        force_processor(profile)
        assert multiplies_bfloat16("cuda") and not multiplies_bfloat16("mps")


def test_an_empty_variable_forces_nothing(force_processor: Callable[[str], None]) -> None:
    force_processor("")
    assert processor().name == detect(torch.cpu.get_capabilities()).name


def test_a_wrong_value_names_the_profiles(force_processor: Callable[[str], None]) -> None:
    force_processor("avx1024")
    for call in (processor, lambda: vista_kernels.accumulate_state(*[torch.ones(1, 1, 1).bfloat16()] * 2, OFFSETS)):
        with pytest.raises(
            ProcessorError,
            match=r"VISTA_PROCESSOR=avx1024: not a processor profile; set one of float32, bfloat16, amx, or unset it",
        ):
            call()
    assert issubclass(ProcessorError, ValueError)
