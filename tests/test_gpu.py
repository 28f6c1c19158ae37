"""On a GPU the operators agree with the oracle, and a model trains, refreshes and scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.conftest import small_config
from tests.kernels.conftest import OPERATORS, Inputs
from tests.kernels.test_operators import RAGGED, err
from vista.log.event_log import EventLog
from vista.refresh import refresh
from vista.scorer import Scorer
from vista.training.trainer import train
from vista_kernels import accumulate_state, causal_linear_attention, read_state

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use (`make test-gpu` runs these)"),
]


# float32 products are three TF32 products on a GPU, which keep 22 bits. By a simulation on a CPU, 2^-24 would hold too,
# except for the longest chain of them: quasi-linear attention of width 3 with random weights.
UNITS = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
LONGER = [*RAGGED, 1000, 0]
"""The longest of these is cut into chunks."""


def on_gpu(inputs: Inputs) -> Inputs:
    """Move all tensors but the offsets, which the host reads."""
    return {
        k: x.cuda() if isinstance(x, Tensor) and k not in ("offsets", "num_targets") else x for k, x in inputs.items()
    }


def gradients(
    name: str, run: Callable[[Inputs], tuple[Tensor, ...]], inputs: Inputs
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return outputs and gradients of `Operator.gradients`, with the random functional drawn on the CPU."""

    def run_there(inputs: Inputs) -> tuple[Tensor, ...]:
        return tuple(x.cpu() for x in run(on_gpu(inputs)))

    return OPERATORS[name].gradients(run_there, inputs)


@pytest.mark.parametrize(("width", "value_width"), [(3, 4), (64, 64), (128, 128), (128, 64), (16, 70)])
@pytest.mark.parametrize("dtype", UNITS, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_on_the_gpu_agree_with_the_oracle(
    name: str, dtype: torch.dtype, width: int, value_width: int
) -> None:
    """The bound of the CPU: err <= 2 err(oracle run in float32 and rounded to the output's dtype) + 4 units."""
    operator = replace(OPERATORS[name], backend="auto")
    inputs = operator.make(LONGER if width == 3 else RAGGED, dtype, width=width, value_width=value_width)
    exact = operator.gradients(operator.oracle, inputs)
    fast = gradients(name, operator.fast, inputs)

    def rounded(inputs: Inputs) -> tuple[Tensor, ...]:
        outputs = operator.oracle(inputs, dtype=torch.float32)
        return tuple(a.to(b.dtype) for a, b in zip(outputs, fast[0], strict=True))

    plain = operator.gradients(rounded, inputs)
    for ours, theirs, precise in zip(sum(fast, ()), sum(plain, ()), sum(exact, ()), strict=True):
        assert ours.shape == precise.shape
        assert err(ours, precise) <= 2 * err(theirs, precise) + 4 * UNITS[dtype] * float(precise.abs().max())


@pytest.mark.parametrize("lengths", [[20_000], [5, 0, 17, 16] * 200], ids=["one-long", "many-short"])
@pytest.mark.parametrize("name", OPERATORS)
def test_two_runs_give_equal_bits(name: str, lengths: list[int]) -> None:
    operator = replace(OPERATORS[name], backend="triton")
    inputs = operator.make(lengths, torch.float32, width=16)
    first, second = (gradients(name, operator.fast, inputs) for _ in range(2))
    for a, b in zip(sum(first, ()), sum(second, ()), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", OPERATORS)
def test_inductor_compiles_one_graph(name: str) -> None:
    operator = replace(OPERATORS[name], backend="triton")
    inputs = operator.make([0, 3, 50, 1], torch.float32, width=16)
    compiled = torch.compile(operator.fast, fullgraph=True)
    expected, actual = gradients(name, operator.fast, inputs), gradients(name, compiled, inputs)
    for a, b in zip(sum(actual, ()), sum(expected, ()), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_million_tokens(dtype: torch.dtype) -> None:
    """One user of 10^6 tokens, against dense products in float64 over slices."""
    total, heads, width = 10**6, 2, 32
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(total, heads, width, generator=generator, device="cuda").to(dtype) for _ in range(3))
    offsets = torch.tensor([0, total])
    options = {"activation": "relu", "backend": "triton"}
    z, n = accumulate_state(k, v, offsets, **options)
    out = read_state(q, z, n, offsets, normalization="length", state_activation="identity", **options)
    causal, final = causal_linear_attention(q, k, v, offsets, **options)
    exact = torch.zeros(heads, width, width, dtype=torch.float64, device="cuda")
    unit = UNITS[dtype]
    for start in range(0, total, 50_000):
        part = slice(start, start + 50_000)
        keys, values = k[part].double().relu(), v[part].double()
        state = exact + torch.einsum("hd,he->hde", keys[0], values[0])
        first = torch.einsum("hd,hde->he", q[start].double().relu(), state)
        assert err(causal[start], first) <= 64 * unit * float(state.abs().max())
        exact += torch.einsum("shd,she->hde", keys, values)
    assert n.tolist() == [[total] * heads]
    for state in (z[0], final[0]):
        assert err(state, exact) <= 64 * unit * float(exact.abs().max())
    for start in (0, 123_456, total - 1):
        expected = torch.einsum("hd,hde->he", q[start].double().relu(), exact / total)
        assert err(out[start], expected) <= 64 * unit * float(expected.abs().max())


def test_train_refresh_and_score_on_the_gpu(event_log: EventLog, tmp_path: Path) -> None:
    model = train(small_config(event_log, tmp_path / "run", device="cuda"), event_log)
    assert model.device.type == "cuda"
    refresh(model, event_log, tmp_path / "store")
    with (
        Scorer.open(tmp_path / "run" / "best", tmp_path / "store", device="cuda") as gpu,
        Scorer.open(tmp_path / "run" / "best", tmp_path / "store") as cpu,
    ):
        scores = gpu.score([100, 103], [0, 10, 390])
        np.testing.assert_allclose(scores, cpu.score([100, 103], [0, 10, 390]), atol=0.05)
        explained = gpu.explain(100, [0, 10, 390])
        np.testing.assert_allclose(explained.value, scores[0], atol=0.05)
        np.testing.assert_allclose(explained.tail, cpu.explain(100, [0, 10, 390]).tail, atol=0.05)
