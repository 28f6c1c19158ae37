"""Who sees whom: causal order, and targets that see the history and themselves only."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vista_kernels import accumulate_state, causal_linear_attention, quasi_linear_attention


def make(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (sum(lengths), 2, 4)
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    return q, k, v, torch.tensor([0, *lengths]).cumsum(0)


@pytest.mark.parametrize("cut", [0, 1, 40, 63, 64, 65, 127, 128, 199])
def test_future_tokens_change_nothing(cut: int) -> None:
    q, k, v, offsets = make([30, 200, 7])
    before, _ = causal_linear_attention(q, k, v, offsets)
    at = 30 + cut
    for x in (q, k, v):
        x[at:230] = torch.randn(x[at:230].shape) * 100
    after, _ = causal_linear_attention(q, k, v, offsets)
    assert torch.equal(before[:at], after[:at])
    assert not torch.equal(before[at:230], after[at:230])
    assert torch.equal(before[230:], after[230:])


@pytest.mark.parametrize("cut", [0, 1, 64, 100, 200])
def test_causal_split_and_resume_equals_whole(cut: int) -> None:
    q, k, v, _ = make([200])
    q, k, v = q.double(), k.double(), v.double()
    whole, final = causal_linear_attention(q, k, v, torch.tensor([0, 200]))
    first, state = causal_linear_attention(q[:cut], k[:cut], v[:cut], torch.tensor([0, cut]))
    rest, resumed = causal_linear_attention(q[cut:], k[cut:], v[cut:], torch.tensor([0, 200 - cut]), initial_z=state)
    torch.testing.assert_close(torch.cat([first, rest]), whole)
    torch.testing.assert_close(resumed, final)


def test_causal_final_state_is_the_accumulated_state() -> None:
    q, k, v, offsets = make([0, 70, 1, 130])
    _, final = causal_linear_attention(q, k, v, offsets)
    torch.testing.assert_close(final, accumulate_state(k, v, offsets)[0])


def test_targets_do_not_see_each_other_and_never_write() -> None:
    lengths, num_targets = [12, 5, 6], torch.tensor([4, 0, 6])
    q, k, v, offsets = make(lengths)
    before = quasi_linear_attention(q, k, v, offsets, num_targets=num_targets)
    for target in (8, 10, 11, 17, 22):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[target] = torch.nan
        after = quasi_linear_attention(*changed, offsets, num_targets=num_targets)
        others = torch.arange(len(q)) != target
        assert torch.equal(before[others], after[others])
        assert bool(after[target].isnan().all())


def test_target_sees_the_history_and_itself() -> None:
    q, k, v, offsets = make([9])
    before = quasi_linear_attention(q, k, v, offsets, num_targets=torch.tensor([3]))
    for changed in (2, 7):
        values = v.clone()
        values[changed] += 1
        after = quasi_linear_attention(q, k, values, offsets, num_targets=torch.tensor([3]))
        differs = (before != after).any(-1).any(-1)
        assert differs.tolist() == ([True] * 9 if changed == 2 else [t == 7 for t in range(9)])


def test_weights_of_targets_are_not_read() -> None:
    q, k, v, offsets = make([9, 4])
    weight, num_targets = torch.rand(13), torch.tensor([3, 1])
    before = quasi_linear_attention(q, k, v, offsets, num_targets=num_targets, weight=weight)
    weight[[6, 7, 8, 12]] = torch.nan
    after = quasi_linear_attention(q, k, v, offsets, num_targets=num_targets, weight=weight)
    assert torch.equal(before, after)


def test_only_targets_read_an_empty_history() -> None:
    q, k, v, offsets = make([3])
    out = quasi_linear_attention(q, k, v, offsets, num_targets=torch.tensor([3]))
    phi = torch.nn.functional.silu
    torch.testing.assert_close(out, (phi(q) * phi(k)).sum(-1, keepdim=True) * v)
