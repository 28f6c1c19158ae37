"""Every operator as a row of a table (inputs, fast path, oracle), so that one test covers them all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from inspect import signature
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import vista_kernels
from vista_kernels import backend as backends
from vista_kernels import reference, torch_backend
from vista_kernels.qla_tokens import QlaTokens
from vista_kernels.torch_backend import workspace

Inputs = dict[str, Any]
HEADS, WIDTH, VALUE_WIDTH = 2, 3, 4
HAS_TRITON = find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
BACKENDS = ["torch", pytest.param("triton", marks=needs_triton)]


@dataclass(frozen=True)
class Operator:
    """One public operator. `packed` and `per_segment` name the inputs whose first axis is tokens or segments; `results`
    says the same of the outputs; `leaves` are the inputs that get gradients."""

    name: str
    packed: tuple[str, ...]
    per_segment: tuple[str, ...]
    leaves: tuple[str, ...]
    results: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    bundle: Callable[..., tuple[Any, ...]] | None = None
    """The tuple in which the oracle takes its arguments, if it does."""
    backend: str = "torch"

    def make(
        self, lengths: list[int], dtype: torch.dtype, seed: int = 0, width: int = WIDTH, value_width: int = VALUE_WIDTH
    ) -> Inputs:
        """Return random inputs for segments of these lengths."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        total, batch = sum(lengths), len(lengths)
        states = torch.float64 if dtype == torch.float64 else torch.float32
        inputs: Inputs = {"offsets": torch.tensor([0, *lengths]).cumsum(0), **self.options}
        for name in ("q", "k", "v"):
            if name in self.packed:
                inputs[name] = normal(total, HEADS, value_width if name == "v" else width).to(dtype)
        if "weight" in self.packed:
            inputs["weight"] = normal(total, HEADS).to(states)
        if "log_decay" in self.packed:
            decay = -normal(total, HEADS).abs()
            decay[1::5], decay[3::5] = 0, -torch.inf
            inputs["log_decay"] = decay.to(states)
        if "num_targets" in self.per_segment:
            inputs["num_targets"] = torch.tensor([min(n, b % 4) for b, n in enumerate(lengths)], dtype=torch.int64)
        for names, rows in ((self.packed, total), (self.per_segment, batch)):
            for name in names:
                if name in ("z", "initial_z"):
                    inputs[name] = normal(rows, HEADS, width, value_width).to(states)
                elif name in ("n", "initial_n"):
                    inputs[name] = 20 * normal(rows, HEADS).abs().to(states)
        return inputs

    def fast(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Run the backend."""
        return _as_tuple(getattr(vista_kernels, self.name)(**inputs, backend=self.backend))

    def oracle(self, inputs: Inputs, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        """Run the loop over events in `dtype`."""
        run = getattr(reference, self.name)
        return _as_tuple(run(**inputs, dtype=dtype) if self.bundle is None else run(self.bundle(**inputs), dtype=dtype))

    def gradients(
        self, run: Callable[[Inputs], tuple[Tensor, ...]], inputs: Inputs, seed: int = 1
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return outputs, and the gradients of a fixed random functional of them."""
        inputs = inputs | {name: inputs[name].detach().requires_grad_() for name in self.leaves}
        outputs = run(inputs)
        generator = torch.Generator().manual_seed(seed)
        total: Tensor = sum((inputs[name].sum() * 0 for name in self.leaves), torch.zeros(()))
        for output in outputs:
            cotangent = torch.randn(output.shape, generator=generator, dtype=torch.float64)
            if output.requires_grad:
                total = total + (output * cotangent.to(output.dtype)).sum()
        grads = torch.autograd.grad(total, [inputs[name] for name in self.leaves])
        return tuple(output.detach() for output in outputs), grads

    def segment(self, inputs: Inputs, b: int) -> Inputs:
        """Return the inputs of segment b alone."""
        start, stop = inputs["offsets"][b : b + 2].tolist()
        alone = {name: inputs[name][start:stop] for name in self.packed}
        alone |= {name: inputs[name][b : b + 1] for name in self.per_segment}
        return inputs | alone | {"offsets": torch.tensor([0, stop - start])}

    def rows(self, result: str, inputs: Inputs, b: int) -> slice:
        """Return the rows of an output that belong to segment b."""
        start, stop = inputs["offsets"][b : b + 2].tolist()
        return slice(start, stop) if result == "tokens" else slice(b, b + 1)


OPERATORS = {
    operator.name: operator
    for operator in (
        Operator(
            "accumulate_state",
            packed=("k", "v", "weight"),
            per_segment=("initial_z", "initial_n"),
            leaves=("k", "v", "initial_z"),
            results=("segments", "segments"),
        ),
        Operator(
            "scan_states",
            packed=("z", "n", "log_decay"),
            per_segment=("initial_z", "initial_n"),
            leaves=("z", "initial_z"),
            results=("tokens", "tokens"),
        ),
        Operator(
            "read_state",
            packed=("q",),
            per_segment=("z", "n"),
            leaves=("q", "z"),
            results=("tokens",),
            options={"normalization": "length", "alpha": 0.5},
        ),
        Operator(
            "quasi_linear_attention",
            packed=("q", "k", "v", "weight"),
            per_segment=("num_targets",),
            leaves=("q", "k", "v"),
            results=("tokens",),
            options={"normalization": "length", "alpha": 0.5},
            bundle=QlaTokens,
        ),
        Operator(
            "causal_linear_attention",
            packed=("q", "k", "v"),
            per_segment=("initial_z",),
            leaves=("q", "k", "v", "initial_z"),
            results=("tokens", "segments"),
        ),
    )
}


@pytest.fixture(params=BACKENDS, scope="session")
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend in turn; on a CPU Triton's kernels run in its interpreter."""
    name: str = request.param
    return name


@pytest.fixture(params=list(OPERATORS), scope="session")
def torch_operator(request: pytest.FixtureRequest) -> Operator:
    """Each operator in turn, on the torch backend."""
    return OPERATORS[request.param]


@pytest.fixture(scope="session")
def operator(torch_operator: Operator, backend: str) -> Operator:
    """Each operator in turn, on each backend."""
    return replace(torch_operator, backend=backend)


@pytest.fixture(scope="session")
def operators() -> dict[str, Operator]:
    """All operators by name."""
    return OPERATORS


def resized(module: ModuleType, **sizes: object) -> SimpleNamespace:
    """Return a backend whose functions get other sizes than their defaults."""
    functions = {name: getattr(module, name) for name in module.__all__}
    parameters = {name: signature(function).parameters for name, function in functions.items()}
    assert set(sizes) <= set().union(*parameters.values())
    return SimpleNamespace(
        **{
            name: partial(function, **{size: value for size, value in sizes.items() if size in parameters[name]})
            for name, function in functions.items()
        }
    )


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shrink windows to 256 tokens (segments are long from 65 tokens on), so that small inputs cross every border.
    Likewise the items of the Triton backend: segments of 49 tokens or more are cut into chunks of 32."""
    monkeypatch.setitem(backends._LOADED, "torch", resized(torch_backend, window_elements=1024))
    if HAS_TRITON:
        from vista_kernels import triton_backend
        from vista_kernels.triton_backend.item_sizes import ItemSizes

        sizes = ItemSizes(programs_per_processor=1000, min_item=64, max_item=64, min_chunk=32, alignment=16)
        monkeypatch.setitem(backends._LOADED, "triton", resized(triton_backend, sizes=sizes, max_uncut=24))


@pytest.fixture
def poisoned_memory() -> Iterator[Callable[[], None]]:
    """Make fresh tensors NaN, and return a function that makes the reused buffers NaN as well."""

    def poison() -> None:
        for buffer in workspace._SLOTS.__dict__.get("held", {}).values():
            buffer.fill_(torch.nan)

    torch.use_deterministic_algorithms(True)
    poison()
    yield poison
    torch.use_deterministic_algorithms(False)


def _as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs
