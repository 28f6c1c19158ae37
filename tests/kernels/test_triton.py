"""The Triton backend alone: shapes and dtypes, how it shares out work, equal bits, and what it refuses.

Kernels run in Triton's interpreter where there is no GPU. Gradients are compared with the float64 oracle: gradcheck
needs float64, which the backend does not take. Kernels are compiled by `scripts.benchmarks.compile_kernels` in another
process, because Triton may use its interpreter in this one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import vista_kernels
from vista_kernels import backend as backends
from vista_kernels.segments import Segments
from vista_kernels.torch_backend import scan_rows as torch_scan_rows

from .conftest import OPERATORS, Operator
from .test_operators import check_against_oracle, err

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl

from vista_kernels import triton_backend
from vista_kernels.triton_backend import accelerator, blocks
from vista_kernels.triton_backend.item_sizes import ItemSizes
from vista_kernels.triton_backend.tile_access import rounded
from vista_kernels.triton_backend.work_plan import plan_work

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def triton_operator(torch_operator: Operator) -> Operator:
    return replace(torch_operator, backend="triton")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def operators(*quick: str) -> pytest.MarkDecorator:
    """Parametrize a test by operator. The others take seconds, call much of the same code, and run every night."""
    names = [name if name in quick else pytest.param(name, marks=pytest.mark.nightly) for name in OPERATORS]
    return pytest.mark.parametrize("torch_operator", names, indirect=True)


@operators("accumulate_state", "read_state")
@given(
    lengths=st.lists(st.one_of(st.integers(0, 3), st.integers(0, 20)), max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    width=st.integers(1, 5),
    activation=st.sampled_from(["silu", "relu", "identity"]),
    seed=st.integers(0, 2**16),
    small=st.booleans(),
)
@settings(
    max_examples=3,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.differing_executors, HealthCheck.function_scoped_fixture],
)
def test_any_shape(
    triton_operator: Operator,
    lengths: list[int],
    dtype: torch.dtype,
    width: int,
    activation: str,
    seed: int,
    small: bool,
) -> None:
    inputs = triton_operator.make(lengths, dtype, seed, width)
    if triton_operator.name != "scan_states":
        inputs["activation"] = activation
    if "num_targets" in inputs and small:
        inputs["num_targets"] = None
    for name in ("weight", "initial_n"):
        if name in inputs and small:
            inputs[name] = None
    check_against_oracle(triton_operator, inputs, unit=2.0**-24 if dtype == torch.float32 else 2.0**-12)


@pytest.mark.parametrize(
    ("width", "value_width", "lengths", "dtype"),
    [
        pytest.param(1, 33, [3, 0, 18], torch.float32, id="padded"),
        pytest.param(70, 40, [3, 0, 18], torch.float32, id="shared"),
        pytest.param(32, 16, [0, 70, 9], torch.bfloat16, id="long-blocks-bfloat16"),
    ],
)
def test_widths_and_blocks(width: int, value_width: int, lengths: list[int], dtype: torch.dtype) -> None:
    """Widths that are padded, wide ones whose columns several programs (or steps of one) share, and longest blocks."""
    total = sum(lengths)
    q, k, v = (normal(total, 1, w, seed=w, dtype=dtype) for w in (width, width, value_width))
    grad = normal(total, 1, value_width, seed=7, dtype=dtype)

    def run(backend: str) -> list[Tensor]:
        leaves = [(x.cpu().float() if backend == "torch" else x.clone()).requires_grad_() for x in (q, k, v)]
        results = []
        for name in ("quasi_linear_attention", "causal_linear_attention"):
            out = getattr(vista_kernels, name)(*leaves, offsets_of(lengths), backend=backend)
            out = out if isinstance(out, Tensor) else out[0]
            results += [out, *torch.autograd.grad(out, leaves, grad.to(out))]
        return [x.detach().cpu() for x in results]

    # A bfloat16 result is rounded, and so are up to three factors of its terms: 2^-8 of a number each.
    tolerance = 1e-5 if dtype == torch.float32 else 4 * 2.0**-8
    for a, b in zip(run("triton"), run("torch"), strict=True):
        assert err(a, b) <= tolerance * float(b.abs().max())


@operators("causal_linear_attention")
@pytest.mark.usefixtures("small_windows")
def test_chunks_repeat_bit_for_bit(triton_operator: Operator, poisoned_memory: Callable[[], None]) -> None:
    """A segment of many chunks gives the same bits every time, whatever memory held. Its result is compared with the
    oracle in test_operators.py."""
    inputs = triton_operator.make([50, 0, 2], torch.float32)
    first = triton_operator.gradients(triton_operator.fast, inputs)
    poisoned_memory()
    second = triton_operator.gradients(triton_operator.fast, inputs)
    for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True):
        assert bool(a.isfinite().all())
        assert torch.equal(a, b)


def test_scan_in_chunks_of_chunks() -> None:
    small = {"max_uncut": 3, "sizes": ItemSizes(programs_per_processor=1000)}
    offsets = np.array([0, 40, 40, 41, 60])
    x, initial = normal(60, 1, 3), normal(4, 1, 3, seed=1)
    decay = normal(60, 1, seed=2).abs().neg().exp()
    decay[5::9] = 0
    for descending, after in ((False, False), (True, True)):
        for use in (decay, None):
            flags = {"descending": descending, "decay_after": after}
            actual = triton_backend.scan_rows(x, use, offsets, initial, **flags, **small)
            on_cpu = (x.cpu(), None if use is None else use.cpu(), offsets, initial.cpu())
            for a, b in zip(actual, torch_scan_rows(*on_cpu, **flags), strict=True):
                torch.testing.assert_close(a.cpu(), b)


@pytest.mark.parametrize("size", [1e7, 1e-9], ids=str)
def test_float16_states_beyond_float16(size: float) -> None:
    """States beyond the range of float16 lose no more precision than float16 products do, nor do their gradients."""
    q = normal(5, 1, 4, dtype=torch.float16).requires_grad_()
    z = (normal(1, 1, 4, 4, seed=1) * size).requires_grad_()
    n = torch.full((1, 1), size, device=DEVICE)
    options = (
        {"normalization": "length", "state_activation": "identity"} if size > 1 else {"state_activation": "identity"}
    )

    def run(q: Tensor, z: Tensor, n: Tensor, backend: str) -> Tensor:
        return vista_kernels.read_state(q, z, n, offsets_of([5]), backend=backend, **options)

    exact = vista_kernels.reference.read_state(q.cpu(), z.cpu(), n.cpu(), offsets_of([5]), **options)
    out = run(q, z, n, "triton")
    smallest = 2.0**-24  # the smallest float16 number
    assert err(out.cpu(), exact) <= max(2.0**-9 * float(exact.abs().max()), smallest)
    key, value = q.detach(), normal(5, 1, 4, seed=3, dtype=torch.float16).requires_grad_()
    written, _ = vista_kernels.accumulate_state(key, value, offsets_of([5]), backend="triton")
    (grad,) = torch.autograd.grad(written, value, torch.full_like(written, min(size, 1e3)))
    expected = torch.nn.functional.silu(key.float()).sum(2, keepdim=True) * min(size, 1e3)
    assert err(grad, expected.expand_as(grad)) <= max(2.0**-9 * float(expected.abs().max()), smallest)


def test_tiny_weights_do_not_vanish_in_float16() -> None:
    k, v = (normal(9, 1, 4, seed=seed, dtype=torch.float16) for seed in (0, 1))
    weight = torch.full((9,), 1e-10, device=DEVICE)
    z, n = vista_kernels.accumulate_state(k, v, offsets_of([9]), weight=weight, backend="triton")
    exact, counts = vista_kernels.reference.accumulate_state(k.cpu(), v.cpu(), offsets_of([9]), weight=weight.cpu())
    assert err(z.cpu(), exact) <= 2.0**-9 * float(exact.abs().max())
    assert err(n.cpu(), counts) <= 1e-15


@triton.jit
def round_kernel(x_ptr, rounded_ptr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, BLOCK)
    tl.store(rounded_ptr + i, rounded(tl.load(x_ptr + i), tl.bfloat16))


@pytest.mark.parametrize("casts_round", [False, True])
def test_rounding_to_bfloat16(monkeypatch: pytest.MonkeyPatch, casts_round: bool) -> None:
    """To the nearest number, and to the even one of two, whether casts of Triton's interpreter truncate or round."""
    if casts_round and not accelerator.INTERPRETED:
        pytest.skip("compiled casts round")
    if casts_round:
        from triton.runtime import interpreter

        convert = interpreter._convert_float

        def round_first(data: np.ndarray, source: tl.dtype, target: tl.dtype, mode: object) -> np.ndarray:
            if target == tl.bfloat16:
                data = torch.from_numpy(data).bfloat16().float().numpy()
            return convert(data, source, target, mode)

        monkeypatch.setattr(interpreter, "_convert_float", round_first)
    x, rounded_x = normal(1024), torch.empty(1024, dtype=torch.bfloat16, device=DEVICE)
    x[:512] = (x[:512].view(torch.int32) & ~0xFFFF | 0x8000).view(torch.float32)  # halfway between two numbers
    round_kernel[(1,)](x, rounded_x, 1024)
    assert torch.equal(rounded_x, x.bfloat16())


PLANS = {
    "none": [],
    "empties": [0] * 1000,
    "short": [16] * 100_000,
    "one": [10**6],
    "mixed": [3, 0, 10**6, 17, 16, 0, 5000, 769, 768, 1],
    "many-long": [20_000] * 500,
}


@pytest.mark.parametrize("num_heads", [1, 4, 64])
@pytest.mark.parametrize("lengths", PLANS.values(), ids=PLANS.keys())
def test_every_token_is_in_one_item(lengths: list[int], num_heads: int) -> None:
    sizes = np.array(lengths, dtype=np.int64)
    starts = np.cumsum(sizes) - sizes + 7 * np.arange(len(sizes))  # with gaps of 7 tokens
    work = plan_work(Segments(starts, sizes), num_heads=num_heads, num_processors=132)
    first_segment, last_segment, _, _, slot = work.items.T
    whole = np.flatnonzero(slot < 0)
    in_chunks = set(work.sums[:, 0].tolist())
    covered = [b for i in whole for b in range(first_segment[i], last_segment[i])]
    assert sorted([*covered, *in_chunks]) == list(range(len(sizes)))
    for segment, first, count in work.sums.tolist():
        rows = work.items[first : first + count]
        assert (rows[:, 0] == segment).all()
        assert (rows[:, 4] == np.arange(first, first + count)).all()
        assert rows[0, 2] == starts[segment]
        assert rows[-1, 3] == starts[segment] + sizes[segment]
        assert (rows[1:, 2] == rows[:-1, 3]).all()
        assert (rows[:, 2] < rows[:, 3]).all()
    assert work.num_slots == work.sums[:, 2].sum()
    again = plan_work(Segments(starts, sizes), num_heads=num_heads, num_processors=132)
    assert all(np.array_equal(a, b) for a, b in zip(work.arrays, again.arrays, strict=True))


def test_work_is_shared_out_evenly() -> None:
    """Many short users are a few programs of similar size. One long user fills the device."""
    short = np.full(100_000, 16)
    work = plan_work(Segments(np.cumsum(short) - short, short), num_heads=4, num_processors=132)
    sizes = 16 * (work.items[:, 1] - work.items[:, 0])
    assert len(work.items) * 4 < 100_000 // 10
    assert sizes[:-1].min() >= 0.9 * sizes.max()
    long = np.array([10**6])
    for num_heads in (1, 4):
        work = plan_work(Segments(np.array([0]), long), num_heads=num_heads, num_processors=132)
        sizes = work.items[:, 3] - work.items[:, 2]
        assert len(work.items) * num_heads >= 4 * 132
        assert sizes[:-1].min() >= 0.9 * sizes.max()
        assert sizes.max() >= 512


def test_refusals() -> None:
    offsets = offsets_of([3])
    for k, match in (
        (normal(3, 1, 4).double(), r"k is torch.float64: backend 'triton' takes float32, .* use backend='torch'"),
        (normal(3, 1, 129), r"k \[3, 1, 129\] must have a last dimension of 1 to 128 for 'triton'"),
    ):
        with pytest.raises(ValueError, match=match):
            vista_kernels.accumulate_state(k, k, offsets, backend="triton")
    states = normal(2, 1, 3, 3).double()
    with pytest.raises(ValueError, match=r"states are torch.float64: backend 'triton' scans float32"):
        vista_kernels.scan_states(
            states, states[:, :, 0, 0], -states[:, :, 0, 0].abs(), offsets_of([2]), backend="triton"
        )
    far = torch.empty(1, device="meta").as_strided((2, 1, 4), (2**31, 1, 1))
    with pytest.raises(ValueError, match=r"k \[2, 1, 4\] has strides \(2147483648, 1, 1\), too wide for 'triton'"):
        blocks.check_tokens(k=far)


@pytest.mark.skipif(DEVICE == "cuda", reason="about CPUs")
def test_refusals_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    k = normal(3, 1, 4)
    monkeypatch.setattr(accelerator, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"needs tensors on a GPU, got cpu; .* set TRITON_INTERPRET=1"):
        vista_kernels.accumulate_state(k, k, offsets_of([3]), backend="triton")


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the backend and what to install."""
    for name in [name for name in sys.modules if name.startswith("vista_kernels.triton_backend")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(backends._LOADED, "triton", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ValueError, match=r"'triton' needs the package triton, .* not installed: pip install triton"):
        backends.load_backend("triton")


REPOSITORY = Path(__file__).parents[2]
DEVICES = ["sm_80", "sm_90", "sm_100", "gfx942"]


def compile_kernels(*words: str) -> str:
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'kernels'}"}
    command = [sys.executable, "-W", "ignore", "-m", "scripts.benchmarks.compile_kernels", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.research
@pytest.mark.parametrize("device", DEVICES)
def test_compiles(device: str) -> None:
    lines = compile_kernels("--device", device).splitlines()
    assert len(lines) > 15
    assert all(line.startswith(f"| {device} |") for line in lines[2:])


@pytest.mark.research
def test_compiles_in_float32() -> None:
    compile_kernels("--device", "sm_90", "--dtype", "float32")


@pytest.mark.aot
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("device", DEVICES)
def test_compiles_in_every_width_and_dtype(device: str) -> None:
    compile_kernels("--device", device, "--all")
