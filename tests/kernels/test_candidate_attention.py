"""Candidate attention: error, gradients, hidden tokens, and that no candidate or request sees another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from vista_kernels import candidate_attention, reference
from vista_kernels.candidate_attention import attend_directly, attend_in_portions
from vista_kernels.candidate_tokens import CandidateTokens, check_candidates
from vista_kernels.processor import PROFILES

from .test_operators import _Recorder, err

Inputs = dict[str, Any]
BIASES: dict[str, tuple[int, ...] | None] = {
    "none": None,
    "learned": (0, 1, 1, 1),
    "keys": (1, 0, 0, 1),
    "all": (1,) * 4,
}
"""Whether a bias has each axis of [B, H, Q, C]."""
SHAPES = {
    "one": (1, 1, 1),
    "no-requests": (0, 3, 4),
    "no-candidates": (2, 0, 4),
    "no-context": (2, 3, 0),
    "few": (3, 7, 9),
    "many": (2, 33, 17),
}
TOKENS = ("q", "k", "v", "own_k", "own_v")


def make(
    shape: tuple[int, int, int], dtype: torch.dtype, bias: str = "learned", *, mask: bool = True, width: int = 8
) -> Inputs:
    """Return random inputs for (B, Q, C), with two heads and values of width 6."""
    (batch, queries, context), heads = shape, 2
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64)

    sums = torch.float64 if dtype == torch.float64 else torch.float32
    inputs: Inputs = {name: normal(batch, heads, queries, width).to(dtype) for name in ("q", "own_k")}
    inputs |= {"k": normal(batch, heads, context, width).to(dtype), "v": normal(batch, heads, context, 6).to(dtype)}
    inputs |= {"own_v": normal(batch, heads, queries, 6).to(dtype)}
    axes = BIASES[bias]
    if axes is not None:
        full = (batch, heads, queries, context)
        inputs["bias"] = normal(*(n if axis else 1 for n, axis in zip(full, axes, strict=True))).to(sums)
        inputs["own_bias"] = normal(heads).to(sums)
    if mask:
        inputs["context_mask"] = torch.rand((batch, context), generator=generator) > 0.3
    return inputs


def gradients(run: Callable[..., Tensor], inputs: Inputs) -> dict[str, Tensor]:
    """Return the output and the gradients of a fixed random functional of it, by name."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items() if x.is_floating_point()}
    out = run(**inputs | leaves)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    total = (out * cotangent.to(out.dtype)).sum() + sum(x.sum() * 0 for x in leaves.values())
    return {"out": out.detach()} | dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))


def oracle(*, dtype: torch.dtype = torch.float64, **inputs: Any) -> Tensor:
    """Run the loop over candidates in `dtype`."""
    return reference.candidate_attention(CandidateTokens(**inputs), dtype=dtype)


def check_against_oracle(run: Callable[..., Tensor], inputs: Inputs, unit: float) -> None:
    def rounded(**arguments: Any) -> Tensor:
        return oracle(**arguments, dtype=torch.float32).to(inputs["q"].dtype)

    exact = gradients(oracle, inputs)
    actual, plain = gradients(run, inputs), gradients(rounded, inputs)
    # The gradient of a score is a difference of larger terms, whose rounding bounds its error.
    largest = max((float(x.abs().max()) for x in exact.values() if x.numel()), default=0.0)
    for name, expected in exact.items():
        assert actual[name].shape == expected.shape
        is_sum = name in ("out", "v", "own_v") and expected.numel()
        scale = float(expected.abs().max()) if is_sum else largest
        assert err(actual[name], expected) <= 2 * err(plain[name], expected) + 4 * unit * scale, name


def run_form(form: Callable[..., Tensor], inputs: Inputs, **sizes: int) -> Tensor:
    """Run one form of the operator as the public function would."""
    return form(check_candidates(CandidateTokens(**inputs)), **sizes)


def in_portions(**inputs: Any) -> Tensor:
    """In portions of the usual size, also where products would be direct."""
    return run_form(attend_in_portions, inputs)


def in_small_portions(**inputs: Any) -> Tensor:
    """In portions of a few candidates."""
    return run_form(attend_in_portions, inputs, portion_elements=64)


def directly(**inputs: Any) -> Tensor:
    """By products in the tokens' dtype, also where the processor does not prefer them."""
    return run_form(attend_directly, inputs)


@pytest.fixture(params=[candidate_attention, in_small_portions], ids=["one-portion", "small-portions"])
def attend(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    """The public function, which chooses a form, and small portions."""
    form: Callable[..., Tensor] = request.param
    return form


@pytest.mark.parametrize(
    ("shape", "bias"),
    [*((shape, "learned") for shape in SHAPES), ("few", "none"), ("few", "keys"), ("few", "all"), ("many", "all")],
)
def test_float32_error(shape: str, bias: str, attend: Callable[..., Tensor]) -> None:
    check_against_oracle(attend, make(SHAPES[shape], torch.float32, bias, mask=bias != "keys"), 2.0**-24)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("run", [in_portions, in_small_portions])
def test_low_precision_error(dtype: torch.dtype, run: Callable[..., Tensor]) -> None:
    unit = 2.0**-9 if dtype == torch.bfloat16 else 2.0**-12
    for shape in SHAPES.values():
        check_against_oracle(run, make(shape, dtype), unit)


@pytest.mark.parametrize("bias", ["none", "all"])
def test_direct_products_error(bias: str) -> None:
    """The form of bfloat16 on CPUs that multiply it fast, with gradients and, in buffers, without."""
    for shape in SHAPES.values():
        inputs = make(shape, torch.bfloat16, bias)
        check_against_oracle(directly, inputs, 2.0**-9)
        expected = directly(**inputs)
        with torch.no_grad():
            actual = directly(**inputs)
        torch.testing.assert_close(actual, expected, rtol=2.0**-7, atol=2.0**-7)


@pytest.mark.parametrize("profile", PROFILES)
def test_the_processor_chooses_the_form(profile: str, force_processor: Callable[[str], None]) -> None:
    force_processor(profile)
    for dtype in (torch.bfloat16, torch.float32):
        inputs = make((2, 20, 9), dtype)
        chosen = directly if dtype == torch.bfloat16 and profile != "float32" else in_portions
        assert torch.equal(candidate_attention(**inputs), chosen(**inputs))
        check_against_oracle(candidate_attention, inputs, 2.0**-9 if dtype == torch.bfloat16 else 2.0**-24)


@pytest.mark.research
@pytest.mark.parametrize("bias", BIASES)
def test_opcheck(bias: str) -> None:
    """Run opcheck on the operator and, through recorded calls, on its backward."""
    inputs = make((2, 3, 4), torch.float32, bias, mask=bias != "all")
    recorder = _Recorder()
    with recorder:
        gradients(candidate_attention, inputs)
    assert sorted(recorder.calls) == ["candidate_attention", "candidate_attention_backward"]
    for name, args in recorder.calls.items():
        if not name.endswith("_backward"):
            args = [a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
        torch.library.opcheck(getattr(torch.ops.vista_kernels, name).default, args)


@pytest.mark.research
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_as_one_graph(dtype: torch.dtype) -> None:
    inputs = make((2, 5, 4), dtype)
    compiled = torch.compile(candidate_attention, backend="aot_eager", fullgraph=True)
    expected, actual = gradients(candidate_attention, inputs), gradients(compiled, inputs)
    tolerance = {} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    for name, x in expected.items():
        torch.testing.assert_close(actual[name], x, **tolerance)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs), candidate_attention(**inputs), **tolerance)


@pytest.mark.processor
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("how", ["-1e9", "-inf", "mask", "no context"])
def test_hidden_context_leaves_the_candidate_itself(
    dtype: torch.dtype, how: str, attend: Callable[..., Tensor]
) -> None:
    inputs = make((3, 7, 0 if how == "no context" else 9), dtype, "all", mask=False)
    if how == "mask":
        inputs["context_mask"] = torch.arange(3)[:, None].expand(3, 9) != 1
    elif how != "no context":
        inputs["bias"][1] = float(how)
    results = gradients(attend, inputs)
    hidden = slice(None) if how == "no context" else 1
    assert torch.equal(results["out"][hidden], inputs["own_v"][hidden])
    assert all(bool(x.isfinite().all()) for x in results.values())
    assert not results["q"][hidden].any()
    assert not results["k"][hidden].any()
    assert not results["bias"][hidden].any()


def test_partly_hidden_by_infinity() -> None:
    inputs = make((2, 5, 9), torch.float32, "all", mask=False)
    inputs["bias"][:, :, :, 4:] = -torch.inf
    shorter = inputs | {name: inputs[name][:, :, :4] for name in ("k", "v")} | {"bias": inputs["bias"][..., :4]}
    torch.testing.assert_close(candidate_attention(**inputs), candidate_attention(**shorter))
    assert not gradients(candidate_attention, inputs)["k"][:, :, 4:].any()


@pytest.mark.processor
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_poisoned_candidate_changes_no_other(dtype: torch.dtype, attend: Callable[..., Tensor]) -> None:
    inputs = make((2, 70, 33), dtype, "none")
    inputs["bias"] = torch.zeros(2, 70, 33)
    before = gradients(attend, inputs)
    for i in (0, 31, 69):
        poisoned = inputs | {name: inputs[name].clone() for name in ("q", "own_k", "own_v")}
        for name in ("q", "own_k", "own_v"):
            poisoned[name][:, :, i] = torch.nan
        after = gradients(attend, poisoned)
        others = torch.arange(70) != i
        for name in ("out", "q", "own_k", "own_v"):
            assert torch.equal(before[name][:, :, others], after[name][:, :, others])
        assert torch.equal(before["bias"][:, others], after["bias"][:, others])
        assert bool(after["out"][:, :, i].isnan().all())


@pytest.mark.processor
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_poison_stays_in_its_request(dtype: torch.dtype, attend: Callable[..., Tensor]) -> None:
    inputs = make((3, 7, 9), dtype, "all")
    before = gradients(attend, inputs)
    for value in (torch.nan, torch.inf):
        poisoned = {name: x.clone() for name, x in inputs.items()}
        for name in (*TOKENS, "bias"):
            poisoned[name][1] = value
        after = gradients(attend, poisoned)
        for name in ("out", *TOKENS, "bias"):
            assert torch.equal(before[name][[0, 2]], after[name][[0, 2]])
        assert bool(after["out"][1].isnan().any())


@pytest.mark.parametrize(("dtype", "units"), [(torch.float32, 8), (torch.float64, 8)], ids=str)
def test_candidates_alone_equal_candidates_in_a_list(dtype: torch.dtype, units: int) -> None:
    """Products of other shapes round differently, by at most 8 units of the largest value."""
    inputs = make((2, 70, 33), dtype, "keys")
    whole = candidate_attention(**inputs)
    for i in range(70):
        one = inputs | {name: inputs[name][:, :, i : i + 1] for name in ("q", "own_k", "own_v")}
        assert err(candidate_attention(**one), whole[:, :, i : i + 1]) <= units * torch.finfo(dtype).eps / 2 * float(
            whole.abs().max()
        )


def test_no_uninitialised_memory(poisoned_memory: Callable[[], None]) -> None:
    inputs = make((3, 7, 9), torch.float32)
    first = gradients(candidate_attention, inputs)
    poisoned_memory()
    second = gradients(candidate_attention, inputs)
    for name, x in first.items():
        assert bool(x.isfinite().all())
        assert torch.equal(x, second[name])


def test_strided_and_expanded_inputs() -> None:
    inputs = make((3, 7, 9), torch.float32)
    expected = gradients(candidate_attention, inputs)
    strided = inputs | {name: inputs[name].transpose(1, 2).contiguous().transpose(1, 2) for name in TOKENS}
    for name, x in gradients(candidate_attention, strided).items():
        torch.testing.assert_close(x, expected[name])
    same = inputs | {"q": inputs["q"][:1, :, :1].expand(3, 2, 7, 8)}
    copied = same | {"q": same["q"].contiguous()}
    torch.testing.assert_close(candidate_attention(**same), candidate_attention(**copied))


def test_under_autocast() -> None:
    """Autocast changes no dtype inside the operator: the caller chose the dtype of the tokens."""
    inputs = make((3, 7, 9), torch.float32)
    expected = gradients(candidate_attention, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        actual = gradients(candidate_attention, inputs)
    for name, x in expected.items():
        assert torch.equal(actual[name], x)


def test_without_gradients_the_same_bits() -> None:
    inputs = make((3, 7, 9), torch.float32)
    expected = gradients(candidate_attention, inputs)["out"]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(candidate_attention(**inputs), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", BIASES)
def test_on_a_gpu(dtype: torch.dtype, bias: str) -> None:
    for shape in SHAPES.values():
        inputs = make(shape, dtype, bias)
        expected = gradients(candidate_attention, inputs)
        actual = gradients(candidate_attention, {name: x.cuda() for name, x in inputs.items()})
        for name, x in expected.items():
            tolerance = 1e-9 if dtype == torch.float64 else 1e-4 if dtype == torch.float32 else 3e-2
            torch.testing.assert_close(actual[name].cpu(), x, rtol=tolerance, atol=tolerance)
