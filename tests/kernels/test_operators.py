"""Properties of every operator: error, gradients, registration, independent segments, and which tokens see which."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from .conftest import OPERATORS, needs_triton

if TYPE_CHECKING:
    from .conftest import Inputs, Operator
from vista_kernels import causal_linear_attention, quasi_linear_attention

# Chunks of causal_linear_attention are 32 tokens here. Small windows hold 256 tokens, and segments are long from 65 on.
LENGTHS = {
    "no-segments": [],
    "no-tokens": [0, 0],
    "one": [1],
    "chunk-1": [31],
    "chunk": [32],
    "chunk+1": [33],
    "block-1": [63],
    "block": [64],
    "block+1": [65],
    "equal": [16] * 9,
    "equal-and-empty": [4, 0, 4, 0, 0, 4],
    "ragged": [0, 1, 5, 16, 15, 3, 0, 31, 2, 70, 0],
    "padded": [16, 16, 15, 16, 14],
    "window-1": [255],
    "window+1": [257, 2],
}
RAGGED = LENGTHS["ragged"]
ALL_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
# Triton's interpreter takes a millisecond per line. Blocks are 16 tokens, or 32 in some kernels for longer segments.
# Small windows cut segments of 49 tokens or more into chunks of 32.
TRITON_LENGTHS = {
    "no-segments": [],
    "no-tokens": [0, 0],
    "one": [1],
    "block+1": [17],
    "chunk-1": [48],
    "chunks-among-short": [0, 1, 5, 53, 3, 0],
}


def each_case(torch: dict[str, list[int]], triton: dict[str, list[int]], *quick: str) -> pytest.MarkDecorator:
    """Parametrize a test by operator, backend, and lengths.

    In Triton's interpreter, each case takes seconds. Outside `make nightly`, the operators `quick` run there, with one
    case, which has segments of several lengths.
    """
    several = ("chunks-among-short", "poisoned-long", "several")
    cases = []
    for backend, name, (key, lengths) in [
        *itertools.product(["torch"], OPERATORS, torch.items()),
        *itertools.product(["triton"], OPERATORS, triton.items()),
    ]:
        is_quick = backend == "torch" or (name in quick and key in several)
        marks = [*([needs_triton] if backend == "triton" else []), *([] if is_quick else [pytest.mark.nightly])]
        cases.append(pytest.param(name, backend, lengths, id=f"{name}-{backend}-{key}", marks=marks))
    return pytest.mark.parametrize(
        ("torch_operator", "backend", "lengths"), cases, indirect=["torch_operator", "backend"]
    )


def err(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).abs().max()) if actual.numel() else 0.0


def check_against_oracle(operator: Operator, inputs: Inputs, unit: float) -> None:
    """Require err(fast) <= 2 err(oracle run in the kernel's dtype) + slack, of outputs and gradients."""
    exact, exact_grads = operator.gradients(operator.oracle, inputs)
    fast, fast_grads = operator.gradients(operator.fast, inputs)

    def rounded(inputs: Inputs) -> tuple[Tensor, ...]:
        outputs = operator.oracle(inputs, dtype=torch.float32)
        return tuple(a.to(b.dtype) for a, b in zip(outputs, fast, strict=True))

    plain, plain_grads = operator.gradients(rounded, inputs)
    for ours, theirs, precise in zip(fast + fast_grads, plain + plain_grads, exact + exact_grads, strict=True):
        assert ours.shape == precise.shape
        slack = 4 * unit * float(precise.abs().max()) if precise.numel() else 0.0
        assert err(ours, precise) <= 2 * err(theirs, precise) + slack


@each_case(LENGTHS, TRITON_LENGTHS, *OPERATORS)
@pytest.mark.usefixtures("small_windows")
def test_float32_error(operator: Operator, lengths: list[int]) -> None:
    # Twice the rounding unit: processors add in different orders, and an Intel Xeon without AMX needs 1.99 units.
    check_against_oracle(operator, operator.make(lengths, torch.float32), unit=2.0**-23)


@pytest.mark.processor
@each_case({"ragged": RAGGED}, {"several": [0, 19, 3]}, "accumulate_state", "read_state")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_error(operator: Operator, lengths: list[int], dtype: torch.dtype) -> None:
    # Float32 takes Triton's long segments to the oracle, so these are short.
    inputs = operator.make(lengths, dtype)
    unit = 2.0**-9 if dtype == torch.bfloat16 else 2.0**-12
    check_against_oracle(operator, inputs, unit)


@given(
    lengths=st.lists(st.one_of(st.integers(0, 4), st.integers(0, 40)), max_size=12),
    width=st.integers(1, 5),
    activation=st.sampled_from(["silu", "relu", "identity"]),
    seed=st.integers(0, 2**16),
    small=st.booleans(),
)
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.differing_executors])
def test_any_shape(
    torch_operator: Operator, lengths: list[int], width: int, activation: str, seed: int, small: bool
) -> None:
    inputs = torch_operator.make(lengths, torch.float64, seed, width)
    if "offsets" in inputs and torch_operator.name != "scan_states":
        inputs["activation"] = activation
    if "num_targets" in inputs and small:
        inputs["num_targets"] = None
    for name in ("weight", "initial_z", "initial_n"):
        if name in inputs and small and name not in torch_operator.leaves:
            inputs[name] = None
    actual, actual_grads = torch_operator.gradients(torch_operator.fast, inputs)
    expected, expected_grads = torch_operator.gradients(torch_operator.oracle, inputs)
    for a, b in zip(actual + actual_grads, expected + expected_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_constants_get_no_gradient(torch_operator: Operator) -> None:
    operator = torch_operator
    inputs = operator.make([3, 2], torch.float32)
    constants = [name for name in ("weight", "n", "initial_n", "log_decay") if name in inputs]
    inputs |= {name: inputs[name].requires_grad_() for name in constants}
    assert not any(output.requires_grad for output in operator.fast(inputs))


@pytest.mark.research
@pytest.mark.parametrize("optional", [True, False], ids=["all-arguments", "fewest-arguments"])
def test_opcheck(operator: Operator, optional: bool) -> None:
    """Run opcheck on the operator and, through recorded calls, on its backward. The Triton backend changes only the
    implementation: its outputs must have the fake ones' shapes, dtypes and strides."""
    if operator.backend == "triton" and not optional:
        pytest.skip("slow in the interpreter, and the backend does not change an operator's registration")
    inputs = operator.make([0, 1, 4, 4, 9] if operator.backend == "torch" else [0, 3, 2], torch.float32)
    if not optional:
        inputs |= dict.fromkeys(set(inputs) & {"weight", "initial_z", "initial_n", "num_targets"})
    inputs |= {name: inputs[name].requires_grad_() for name in operator.leaves if inputs[name] is not None}
    recorder = _Recorder()
    with recorder:
        sum(output.sum() for output in operator.fast(inputs) if output.requires_grad).backward()  # type: ignore[union-attr]
    assert sorted(recorder.calls) == [operator.name, f"{operator.name}_backward"]
    for name, args in recorder.calls.items():
        if not name.endswith("_backward"):
            args = [a.requires_grad_() if _is_leaf(a, operator, inputs) else a for a in args]
        checks = ALL_CHECKS if operator.backend == "torch" else ("test_schema", "test_faketensor")
        torch.library.opcheck(getattr(torch.ops.vista_kernels, name).default, args, test_utils=checks)


class _Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """Keeps the arguments of calls to the operators of vista_kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, list[object]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "vista_kernels":
            copies = [a.detach().clone() if isinstance(a, Tensor) else a for a in args]
            self.calls[func._schema.name.split("::")[1]] = copies
        return func(*args, **(kwargs or {}))


def _is_leaf(arg: object, operator: Operator, inputs: Inputs) -> bool:
    leaves = [inputs[name] for name in operator.leaves if inputs[name] is not None]
    return isinstance(arg, Tensor) and any(arg.shape == x.shape and torch.equal(arg, x) for x in leaves)


@pytest.mark.usefixtures("small_windows")
def test_batch_equals_segments_alone(torch_operator: Operator) -> None:
    """Triton's results are compared with the oracle, segment by segment."""
    operator, tolerance = torch_operator, 1e-10
    inputs = operator.make(RAGGED, torch.float64)
    outputs = operator.fast(inputs)
    for b in range(len(RAGGED)):
        alone = operator.fast(operator.segment(inputs, b))
        for result, whole, part in zip(operator.results, outputs, alone, strict=True):
            torch.testing.assert_close(part, whole[operator.rows(result, inputs, b)], rtol=tolerance, atol=tolerance)


@each_case(
    {"ragged": RAGGED, "equal": [5] * 6, "long": [200, 3, 3]},
    {"long": [53, 3, 2], "poisoned-long": [3, 53, 2]},
    "accumulate_state",
    "read_state",
    "scan_states",
)
@pytest.mark.usefixtures("small_windows")
def test_poison_stays_in_its_segment(operator: Operator, lengths: list[int]) -> None:
    """NaN and inf in one segment change no bit of another's outputs or gradients."""
    inputs = operator.make(lengths, torch.float32)
    clean, clean_grads = operator.gradients(operator.fast, inputs)
    victim = 1 if lengths[1] else 3
    start, stop = inputs["offsets"][victim : victim + 2].tolist()
    poisoned = dict(inputs)
    for name in operator.packed:
        if name != "log_decay":
            poisoned[name] = inputs[name].clone()
            poisoned[name][start:stop] = torch.nan
            poisoned[name][stop - 1] = torch.inf
    dirty, dirty_grads = operator.gradients(operator.fast, poisoned)
    kinds = ["tokens" if name in operator.packed else "segments" for name in operator.leaves]
    pairs = zip([*operator.results, *kinds], clean + clean_grads, dirty + dirty_grads, strict=True)
    reached = False
    for kind, before, after in pairs:
        keep = torch.ones(len(before), dtype=torch.bool)
        keep[operator.rows(kind, inputs, victim)] = False
        assert torch.equal(before[keep], after[keep])
        reached |= bool((~after[~keep].isfinite()).any())
    assert reached


@pytest.mark.parametrize("lengths", [RAGGED, [16] * 9, [0, 257, 2]], ids=["ragged", "equal", "long"])
@pytest.mark.usefixtures("small_windows")
def test_no_uninitialised_memory(
    torch_operator: Operator, lengths: list[int], poisoned_memory: Callable[[], None]
) -> None:
    """Of the torch backend; the test of equal bits in test_triton.py has the other one."""
    inputs = torch_operator.make(lengths, torch.float32)
    first = torch_operator.gradients(torch_operator.fast, inputs)
    poisoned_memory()
    second = torch_operator.gradients(torch_operator.fast, inputs)
    for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True):
        assert bool(a.isfinite().all())
        assert torch.equal(a, b)


@each_case({"ragged": RAGGED}, {"several": [3, 0, 19]}, "accumulate_state")
def test_strided_inputs(operator: Operator, lengths: list[int]) -> None:
    """Parts of one fused projection give the same results as contiguous tensors."""
    inputs = operator.make(lengths, torch.float32)
    fused = dict(inputs)
    for name in operator.packed:
        x = inputs[name]
        fused[name] = torch.cat([x.detach(), x.detach(), x.detach()], -1)[..., x.shape[-1] : 2 * x.shape[-1]]
        assert not fused[name].is_contiguous()
    outputs, grads = operator.gradients(operator.fast, inputs)
    fused_outputs, fused_grads = operator.gradients(operator.fast, fused)
    for a, b in zip(outputs + grads, fused_outputs + fused_grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.research
def test_compiles_as_one_graph(operator: Operator) -> None:
    torch._dynamo.reset()  # it counts the compilations of `fast` for all operators together
    inputs = operator.make([0, 3, 5, 1], torch.float32)
    compiled = torch.compile(operator.fast, backend="aot_eager", fullgraph=True)
    expected, expected_grads = operator.gradients(operator.fast, inputs)
    actual, actual_grads = operator.gradients(compiled, inputs)
    for a, b in zip(actual + actual_grads, expected + expected_grads, strict=True):
        torch.testing.assert_close(a, b)


def test_after_inference_mode(torch_operator: Operator) -> None:
    """Training can use buffers that were made in inference mode."""
    inputs = torch_operator.make(RAGGED, torch.float32)
    results: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = []

    def run() -> None:
        with torch.inference_mode():
            torch_operator.fast(inputs)
        results.append(torch_operator.gradients(torch_operator.fast, inputs))

    thread = threading.Thread(target=run)  # a new thread has no buffers yet
    thread.start()
    thread.join()
    expected = torch_operator.gradients(torch_operator.fast, inputs)
    for a, b in zip(results[0][0] + results[0][1], expected[0] + expected[1], strict=True):
        torch.testing.assert_close(a, b)


def test_threads_do_not_share_buffers(torch_operator: Operator) -> None:
    cases = [torch_operator.make([n] * 40, torch.float32, seed=n) for n in (7, 9)]
    expected = [torch_operator.fast(case) for case in cases]
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(20):
            outputs = torch_operator.fast(cases[number])
            if not all(torch.equal(a, b) for a, b in zip(outputs, expected[number], strict=True)):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_reference_backend(torch_operator: Operator) -> None:
    operator = torch_operator
    inputs = operator.make([3, 0, 5], torch.float32)
    import vista_kernels

    outputs = getattr(vista_kernels, operator.name)(**inputs, backend="reference")
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    for a, b in zip(outputs, operator.fast(inputs), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b)


def cuts(torch: list[int], triton: list[int]) -> pytest.MarkDecorator:
    """Parametrize a test by backend and place of a cut, with few cuts for Triton, whose interpreter is slow."""
    cases = [pytest.param("torch", cut, id=f"torch-{cut}") for cut in torch]
    cases += [pytest.param("triton", cut, id=f"triton-{cut}", marks=needs_triton) for cut in triton]
    return pytest.mark.parametrize(("backend", "cut"), cases, indirect=["backend"])


def tokens_of(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (sum(lengths), 2, 4)
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    return q, k, v, torch.tensor([0, *lengths]).cumsum(0)


@cuts([0, 1, 40, 63, 64, 65, 127, 128, 199], [16])
@pytest.mark.usefixtures("small_windows")
def test_future_tokens_change_nothing(backend: str, cut: int) -> None:
    before_it, length = (30, 200) if backend == "torch" else (5, 53)
    q, k, v, offsets = tokens_of([before_it, length, 7])
    before, _ = causal_linear_attention(q, k, v, offsets, backend=backend)
    at, end = before_it + cut, before_it + length
    for x in (q, k, v):
        x[at:end] = torch.randn(x[at:end].shape) * 100
    after, _ = causal_linear_attention(q, k, v, offsets, backend=backend)
    assert torch.equal(before[:at], after[:at])
    assert not torch.equal(before[at:end], after[at:end])
    assert torch.equal(before[end:], after[end:])


@cuts([0, 1, 64, 100, 200], [20])
@pytest.mark.usefixtures("small_windows")
def test_causal_split_and_resume_equals_whole(backend: str, cut: int) -> None:
    q, k, v, _ = tokens_of([200 if backend == "torch" else 53])
    if backend == "torch":
        q, k, v = q.double(), k.double(), v.double()

    def run(part: slice, initial_z: Tensor | None = None) -> tuple[Tensor, Tensor]:
        offsets = torch.tensor([0, len(q[part])])
        return causal_linear_attention(q[part], k[part], v[part], offsets, initial_z=initial_z, backend=backend)

    whole, final = run(slice(None))
    first, state = run(slice(cut))
    rest, resumed = run(slice(cut, None), state)
    torch.testing.assert_close(torch.cat([first, rest]), whole)
    torch.testing.assert_close(resumed, final)


def test_targets_do_not_see_each_other_and_never_write(backend: str) -> None:
    lengths, num_targets = [12, 5, 6], torch.tensor([4, 0, 6])
    q, k, v, offsets = tokens_of(lengths)
    before = quasi_linear_attention(q, k, v, offsets, num_targets=num_targets, backend=backend)
    for target in (8, 10, 11, 17, 22):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[target] = torch.nan
        after = quasi_linear_attention(*changed, offsets, num_targets=num_targets, backend=backend)
        others = torch.arange(len(q)) != target
        assert torch.equal(before[others], after[others])
        assert bool(after[target].isnan().all())


def test_target_sees_the_history_and_itself(backend: str) -> None:
    q, k, v, offsets = tokens_of([9])
    before = quasi_linear_attention(q, k, v, offsets, num_targets=torch.tensor([3]), backend=backend)
    for changed in (2, 7):
        values = v.clone()
        values[changed] += 1
        after = quasi_linear_attention(q, k, values, offsets, num_targets=torch.tensor([3]), backend=backend)
        differs = (before != after).any(-1).any(-1)
        assert differs.tolist() == ([True] * 9 if changed == 2 else [t == 7 for t in range(9)])


def test_weights_of_targets_are_not_read(backend: str) -> None:
    q, k, v, offsets = tokens_of([9, 4])
    weight, num_targets = torch.rand(13), torch.tensor([3, 1])
    before = quasi_linear_attention(q, k, v, offsets, num_targets=num_targets, weight=weight, backend=backend)
    weight[[6, 7, 8, 12]] = torch.nan
    after = quasi_linear_attention(q, k, v, offsets, num_targets=num_targets, weight=weight, backend=backend)
    assert torch.equal(before, after)
