"""What additive states must satisfy, and the forms that the torch backend chooses for them: memory, short segments."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vista_kernels import (
    accumulate_state,
    causal_linear_attention,
    quasi_linear_attention,
    read_state,
    scan_counts,
    scan_states,
    torch_backend,
)
from vista_kernels import backend as backends
from vista_kernels.torch_backend import short_segments

from .conftest import OPERATORS, Inputs, resized
from .test_operators import check_against_oracle


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def tokens(total: int, *, heads: int = 2, width: int = 4, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(total, heads, width, generator=generator, dtype=torch.float64) for _ in range(3)]


@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=6), share=st.floats(0, 1), seed=st.integers(0, 2**16))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_split_and_resume_equals_whole(lengths: list[int], share: float, seed: int) -> None:
    _, k, v = tokens(sum(lengths), seed=seed)
    weight = torch.randn(sum(lengths), 2, dtype=torch.float64)
    offsets = offsets_of(lengths)
    whole = accumulate_state(k, v, offsets, weight=weight)
    heads = [round(share * n) for n in lengths]
    first = torch.cat([torch.arange(n) < h for n, h in zip(lengths, heads, strict=True)])
    rest = [n - h for n, h in zip(lengths, heads, strict=True)]
    z, n = accumulate_state(k[first], v[first], offsets_of(heads), weight=weight[first])
    resumed = accumulate_state(k[~first], v[~first], offsets_of(rest), weight=weight[~first], initial_z=z, initial_n=n)
    for a, b in zip(resumed, whole, strict=True):
        torch.testing.assert_close(a, b)


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6), seed=st.integers(0, 2**16))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_weight_minus_one_forgets(lengths: list[int], seed: int) -> None:
    """Adding the last token of each segment again with weight -1 equals leaving it out."""
    _, k, v = tokens(sum(lengths), seed=seed)
    offsets = offsets_of(lengths)
    z, n = accumulate_state(k, v, offsets)
    last = offsets[1:] - 1
    ones = offsets_of([1] * len(lengths))
    z, n = accumulate_state(k[last], v[last], ones, weight=torch.full((len(lengths),), -1.0), initial_z=z, initial_n=n)
    keep = torch.ones(len(k), dtype=torch.bool)
    keep[last] = False
    expected = accumulate_state(k[keep], v[keep], offsets_of([length - 1 for length in lengths]))
    torch.testing.assert_close((z, n), expected)


@pytest.mark.parametrize("block", [1, 16])
def test_blocks_and_scan_equal_direct_weights(block: int) -> None:
    """States of blocks, decayed to the block's end and scanned, are the states of the whole prefix decayed directly."""
    lengths, taus = [50, 1, 0, 17, 16], torch.tensor([5.0, 40.0], dtype=torch.float64)
    _, k, v = tokens(sum(lengths))
    times = torch.cat([torch.rand(n, dtype=torch.float64).mul(30).sort().values for n in lengths])
    starts, ends, counts = [], [], []
    for start, stop in zip(offsets_of(lengths)[:-1].tolist(), offsets_of(lengths)[1:].tolist(), strict=True):
        borders = list(range(start, stop, block))
        starts += borders
        ends += [*borders[1:], stop] if borders else []
        counts.append(len(borders))
    block_offsets = torch.tensor([0, *ends])
    last_times = times[torch.tensor(ends) - 1]
    block_of = torch.bucketize(torch.arange(len(k)), torch.tensor(ends), right=True)
    z, n = accumulate_state(k, v, block_offsets, weight=torch.exp(-(last_times[block_of] - times)[:, None] / taus))
    sequences = offsets_of(counts)
    gaps = last_times.diff(prepend=last_times[:1])
    gaps[sequences[:-1][torch.tensor(counts) > 0]] = 0
    states, sums = scan_states(z, n, -gaps[:, None] / taus, sequences)
    torch.testing.assert_close(scan_counts(n, -gaps[:, None] / taus, sequences), sums)
    for b, (first, stop) in enumerate(zip(sequences[:-1].tolist(), sequences[1:].tolist(), strict=True)):
        begin = int(offsets_of(lengths)[b])
        for i in range(first, stop):
            part = slice(begin, ends[i])
            direct = accumulate_state(
                k[part],
                v[part],
                offsets_of([ends[i] - begin]),
                weight=torch.exp(-(last_times[i] - times[part])[:, None] / taus),
            )
            torch.testing.assert_close((states[i : i + 1], sums[i : i + 1]), direct)


@pytest.mark.parametrize("lengths", [[100], [129, 0, 3, 300], [1000, 2]], ids=str)
def test_long_scan_equals_short_steps(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Cutting sequences into chunks, recursively, changes nothing; nor does cutting the batch into groups."""
    generator = torch.Generator().manual_seed(0)
    total = sum(lengths)
    z = torch.randn(total, 2, 3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    initial = torch.randn(len(lengths), 2, 3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    n = torch.rand(total, 2, generator=generator, dtype=torch.float64)
    decay = -torch.rand(total, 2, generator=generator, dtype=torch.float64)
    decay[7::50] = -torch.inf
    cotangent = torch.randn(z.shape, generator=generator, dtype=torch.float64)

    def run() -> tuple[Tensor, ...]:
        states, counts = scan_states(z, n, decay, offsets_of(lengths), initial_z=initial)
        return states, counts, *torch.autograd.grad(states, (z, initial), cotangent)

    monkeypatch.setitem(backends._LOADED, "torch", resized(torch_backend, max_uncut=10**6))
    expected = run()
    monkeypatch.setitem(backends._LOADED, "torch", resized(torch_backend, max_uncut=4, window_elements=200))
    torch.testing.assert_close(run(), expected)


def test_scan_forgets_exactly_and_never_overflows(backend: str) -> None:
    """-inf drops everything before it; huge decays of huge values leave no NaN, inf or cancellation."""
    z = torch.tensor([1e30, 1e30, 3.0, 5.0, 7.0])[:, None, None, None]
    decay = torch.tensor([0.0, -1e30, -torch.inf, -1e-3, 0.0])[:, None]
    states, counts = scan_states(z, z[:, :, 0, 0], decay, torch.tensor([0, 5]), backend=backend)
    last = 5 + 3 * torch.exp(torch.tensor(-1e-3))
    expected = torch.stack([z[0, 0, 0, 0], z[1, 0, 0, 0], torch.tensor(3.0), last, last + 7])
    torch.testing.assert_close(states.flatten(), expected)
    torch.testing.assert_close(counts.flatten(), expected)


def test_length_normalization_reads_a_mean() -> None:
    """With identity activations and alpha 1, repeating a history changes nothing; an empty one reads zero."""
    q, k, v = tokens(6)
    options = {"normalization": "length", "activation": "identity", "state_activation": "identity"}
    z, n = accumulate_state(k, v, torch.tensor([0, 6, 6]), activation="identity")
    twice = accumulate_state(k.repeat(2, 1, 1), v.repeat(2, 1, 1), torch.tensor([0, 12, 12]), activation="identity")
    queries = torch.tensor([0, 4, 6])
    once = read_state(q, z, n, queries, **options)
    torch.testing.assert_close(read_state(q, *twice, queries, **options), once)
    torch.testing.assert_close(once[:4], torch.einsum("nhd,shd,she->nhe", q[:4], k, v) / 6)
    assert not once[4:].any()


def test_long_and_short_users_at_full_window_size() -> None:
    """Windows of full size, with a user of several windows among short ones, against one dense product per user."""
    lengths = [3, 150_000, 0, 40_000, 7, 9]
    q, k, v = (x.float() for x in tokens(sum(lengths)))
    offsets = offsets_of(lengths)
    z, n = accumulate_state(k, v, offsets, activation="relu")
    out = read_state(q, z, n, offsets, normalization="length", activation="relu", state_activation="identity")
    assert n[:, 0].tolist() == lengths
    for b, (start, stop) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        keys, values = k[start:stop].double().relu(), v[start:stop].double()
        expected = torch.einsum("shd,she->hde", keys, values)
        torch.testing.assert_close(z[b].double(), expected, rtol=1e-4, atol=1e-2)
        read = torch.einsum("shd,hde->she", q[start:stop].double().relu(), expected / max(lengths[b], 1))
        torch.testing.assert_close(out[start:stop].double(), read, rtol=1e-4, atol=1e-5)


LENGTHS = [80, 3, 3, 0, 5, 1, 30, 31, 4]
"""The first segment is a long one in small windows."""
UNITS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
QLA = OPERATORS["quasi_linear_attention"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the functions that ran, so that a test can assert that they did."""
    names: list[str] = []
    for name in ("_tiles", "_long_state"):
        plain = getattr(short_segments, name)

        def counted(*args: Any, name: str = name, plain: Any = plain) -> Any:
            names.append(name)
            return plain(*args)

        monkeypatch.setattr(short_segments, name, counted)
    return names


def short_inputs(dtype: torch.dtype, weight: str, width: int = 64) -> Inputs:
    """Return inputs without targets, whose states hold more numbers than the segments."""
    inputs = QLA.make(LENGTHS, dtype, width=width, value_width=6) | {"num_targets": None}
    if weight == "none":
        inputs["weight"] = None
    elif weight == "tokens":
        inputs["weight"] = inputs["weight"][:, 0]
    return inputs


@pytest.mark.processor
@pytest.mark.parametrize(("dtype", "profile"), [*((each, "float32") for each in UNITS), (torch.bfloat16, "bfloat16")])
@pytest.mark.parametrize("weight", ["none", "tokens", "heads"])
@pytest.mark.usefixtures("small_windows")
def test_short_segments_agree_with_the_oracle(
    dtype: torch.dtype, profile: str, weight: str, calls: list[str], force_processor: Callable[[str], None]
) -> None:
    """Only products of bfloat16 depend on the profile."""
    force_processor(profile)
    for normalization in ("none", "length"):
        calls.clear()
        check_against_oracle(QLA, short_inputs(dtype, weight) | {"normalization": normalization}, UNITS[dtype])
        assert calls.count("_tiles") == calls.count("_long_state") == 2  # forward and backward


def test_short_segments_alone_and_together(calls: list[str]) -> None:
    inputs = short_inputs(torch.float64, "heads")
    (together,), gradients = QLA.gradients(QLA.fast, inputs)
    exact = QLA.gradients(QLA.oracle, inputs)[1]
    for ours, theirs in zip(gradients, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    for b in range(len(LENGTHS)):
        alone = QLA.fast(QLA.segment(inputs | {"num_targets": torch.zeros(len(LENGTHS))}, b) | {"num_targets": None})[0]
        torch.testing.assert_close(together[QLA.rows("tokens", inputs, b)], alone, rtol=1e-12, atol=1e-12)
    assert "_tiles" in calls


def test_poison_in_a_short_segment_stays_there(calls: list[str]) -> None:
    inputs = short_inputs(torch.float32, "heads")

    def run(inputs: Inputs) -> tuple[Tensor, ...]:
        outputs, gradients = QLA.gradients(QLA.fast, inputs)
        return outputs + gradients

    clean = run(inputs)
    start, stop = inputs["offsets"][6:8].tolist()
    poisoned = {name: inputs[name].clone() for name in ("q", "k", "v", "weight")}
    for x in poisoned.values():
        x[start + 1 : stop : 2] = torch.nan
    for before, after in zip(clean, run(inputs | poisoned), strict=True):
        assert after[start:stop].isnan().any()
        assert torch.equal(before[:start], after[:start]) and torch.equal(before[stop:], after[stop:])
    assert "_tiles" in calls


@pytest.mark.parametrize("length", [257, 5000])
@pytest.mark.processor
def test_sums_of_bfloat16_tokens_stay_exact(length: int) -> None:
    """A sum held in bfloat16 would stop at 256."""
    ones = torch.ones(length, 2, 3, dtype=torch.bfloat16)
    z, n = accumulate_state(ones, ones, torch.tensor([0, length]), activation="identity")
    assert z.dtype == n.dtype == torch.float32
    assert bool((z == length).all()) and bool((n == length).all())


STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
TOKEN_WIDTH, NUM_TOKENS = 16, 600_000
ROW_BYTES = 4 * TOKEN_WIDTH
"""Bytes of a token in one tensor. No operator may hold as much for every token.

A tensor of all tokens exceeds 32 MiB, so malloc maps it for itself and returns it when it is freed.
"""


def resident(key: str) -> int:
    """Return the bytes resident now (VmRSS), or at the peak since the last reset (VmHWM)."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


def extra_bytes(operator: Callable[..., Tensor], length: int) -> int:
    """Return the peak bytes of forward beyond its output or of backward beyond the gradients, whichever is more."""
    offsets = torch.arange(0, NUM_TOKENS + 1, length)
    q, k, v = (torch.ones(NUM_TOKENS, 1, TOKEN_WIDTH).requires_grad_() for _ in range(3))
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


def segment_states(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor) -> Tensor:
    """Return the states of the segments; q is not used."""
    return accumulate_state(k, v, offsets)[0]


def causal_outputs(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor) -> Tensor:
    """Return the outputs alone."""
    return causal_linear_attention(q, k, v, offsets)[0]


@pytest.mark.skipif(not RESET.exists(), reason="this system does not report peak memory")
@pytest.mark.parametrize(
    ("operator", "length"),
    [
        (quasi_linear_attention, NUM_TOKENS),
        (quasi_linear_attention, 50),
        (causal_outputs, NUM_TOKENS),
        (segment_states, 50),
    ],
)
def test_no_temporary_holds_all_tokens(operator: Callable[..., Tensor], length: int) -> None:
    extra_bytes(operator, length)  # allocates the buffers that are kept
    # Short segments have indices, a few numbers per token; a single segment has none.
    limit = ROW_BYTES * 3 // 4 if length < NUM_TOKENS else 4
    assert extra_bytes(operator, length) < limit * NUM_TOKENS
