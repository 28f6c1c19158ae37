"""What additive states must satisfy: split and resume, decay, forgetting, blocks, and reading."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vista_kernels import (
    accumulate_state,
    quasi_linear_attention,
    read_state,
    scan_counts,
    scan_states,
    torch_backend,
)
from vista_kernels import backend as backends

from .conftest import resized


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def tokens(total: int, *, heads: int = 2, width: int = 4, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(total, heads, width, generator=generator, dtype=torch.float64) for _ in range(3)]


@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=6), share=st.floats(0, 1), seed=st.integers(0, 2**16))
@settings(max_examples=25, deadline=None, derandomize=True)
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
@settings(max_examples=25, deadline=None, derandomize=True)
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


@pytest.mark.parametrize("block", [1, 4, 16])
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


def test_accumulate_and_read_compose_to_attention() -> None:
    lengths = [0, 3, 40, 1]
    q, k, v = tokens(sum(lengths))
    weight = torch.rand(sum(lengths))
    z, n = accumulate_state(k, v, offsets_of(lengths), weight=weight)
    options = {"normalization": "length", "alpha": 0.7}
    torch.testing.assert_close(
        quasi_linear_attention(q, k, v, offsets_of(lengths), weight=weight, **options),
        read_state(q, z, n, offsets_of(lengths), **options),
    )


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
