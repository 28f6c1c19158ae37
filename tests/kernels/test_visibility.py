"""Which tokens see which: causal order, and targets that see only the history and themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vista_kernels import accumulate_state, causal_linear_attention, quasi_linear_attention

from .conftest import needs_triton


def cuts(torch: list[int], triton: list[int]) -> pytest.MarkDecorator:
    """Parametrize a test by backend and place of a cut, with few cuts for Triton, whose interpreter is slow."""
    cases = [pytest.param("torch", cut, id=f"torch-{cut}") for cut in torch]
    cases += [pytest.param("triton", cut, id=f"triton-{cut}", marks=needs_triton) for cut in triton]
    return pytest.mark.parametrize(("backend", "cut"), cases, indirect=["backend"])


def make(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (sum(lengths), 2, 4)
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    return q, k, v, torch.tensor([0, *lengths]).cumsum(0)


@cuts([0, 1, 40, 63, 64, 65, 127, 128, 199], [0, 15, 16, 40])
@pytest.mark.usefixtures("small_windows")
def test_future_tokens_change_nothing(backend: str, cut: int) -> None:
    before_it, length = (30, 200) if backend == "torch" else (5, 53)
    q, k, v, offsets = make([before_it, length, 7])
    before, _ = causal_linear_attention(q, k, v, offsets, backend=backend)
    at, end = before_it + cut, before_it + length
    for x in (q, k, v):
        x[at:end] = torch.randn(x[at:end].shape) * 100
    after, _ = causal_linear_attention(q, k, v, offsets, backend=backend)
    assert torch.equal(before[:at], after[:at])
    assert not torch.equal(before[at:end], after[at:end])
    assert torch.equal(before[end:], after[end:])


@cuts([0, 1, 64, 100, 200], [0, 20])
@pytest.mark.usefixtures("small_windows")
def test_causal_split_and_resume_equals_whole(backend: str, cut: int) -> None:
    q, k, v, _ = make([200 if backend == "torch" else 53])
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


def test_causal_final_state_is_the_accumulated_state(backend: str) -> None:
    q, k, v, offsets = make([0, 70, 1, 130] if backend == "torch" else [0, 17, 1, 53])
    _, final = causal_linear_attention(q, k, v, offsets, backend=backend)
    torch.testing.assert_close(final, accumulate_state(k, v, offsets, backend=backend)[0])


def test_targets_do_not_see_each_other_and_never_write(backend: str) -> None:
    lengths, num_targets = [12, 5, 6], torch.tensor([4, 0, 6])
    q, k, v, offsets = make(lengths)
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
    q, k, v, offsets = make([9])
    before = quasi_linear_attention(q, k, v, offsets, num_targets=torch.tensor([3]), backend=backend)
    for changed in (2, 7):
        values = v.clone()
        values[changed] += 1
        after = quasi_linear_attention(q, k, values, offsets, num_targets=torch.tensor([3]), backend=backend)
        differs = (before != after).any(-1).any(-1)
        assert differs.tolist() == ([True] * 9 if changed == 2 else [t == 7 for t in range(9)])


def test_weights_of_targets_are_not_read(backend: str) -> None:
    q, k, v, offsets = make([9, 4])
    weight, num_targets = torch.rand(13), torch.tensor([3, 1])
    before = quasi_linear_attention(q, k, v, offsets, num_targets=num_targets, weight=weight, backend=backend)
    weight[[6, 7, 8, 12]] = torch.nan
    after = quasi_linear_attention(q, k, v, offsets, num_targets=num_targets, weight=weight, backend=backend)
    assert torch.equal(before, after)


def test_only_targets_read_an_empty_history(backend: str) -> None:
    q, k, v, offsets = make([3])
    out = quasi_linear_attention(q, k, v, offsets, num_targets=torch.tensor([3]), backend=backend)
    phi = torch.nn.functional.silu
    torch.testing.assert_close(out, (phi(q) * phi(k)).sum(-1, keepdim=True) * v)
