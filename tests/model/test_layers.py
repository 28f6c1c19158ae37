"""SiLU at a request: its values, and their bits regardless of other values and of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from vista.model.layers import SHARE, VECTOR, silu

pytestmark = pytest.mark.processor


@pytest.fixture(params=[1, 3, 5], ids="{} threads".format)
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.usefixtures("num_threads")
@pytest.mark.parametrize(
    "count", [0, 1, VECTOR - 1, VECTOR, VECTOR + 1, SHARE - 1, SHARE, SHARE + 1, 7 * SHARE + 9, 8 * SHARE]
)
@torch.inference_mode()
def test_silu_gives_a_value_the_same_bits_wherever_it_lies(count: int) -> None:
    values = torch.linspace(-20, 20, 4 * VECTOR)
    alone = torch.stack([silu(value) for value in values])
    torch.testing.assert_close(alone, F.silu(values.double()).float(), rtol=3e-7, atol=0)
    for shift in (0, 1, 5):
        index = (torch.arange(count) + shift) % len(values)
        assert torch.equal(silu(values[index]), alone[index])
    index = torch.arange(count) % len(values)
    strided = values[index].repeat_interleave(3).view(-1, 3)[:, 1:]
    assert torch.equal(silu(strided), alone[index][:, None].expand(-1, 2))


@torch.inference_mode()
def test_silu_of_extreme_values() -> None:
    x = torch.tensor([-1e9, -200.0, 0.0, 200.0, 1e9, float("inf"), float("nan")])
    torch.testing.assert_close(
        silu(x), torch.tensor([0.0, 0.0, 0.0, 200.0, 1e9, float("inf"), float("nan")]), equal_nan=True
    )


def test_silu_has_a_gradient() -> None:
    x = torch.linspace(-4, 4, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(silu, x)
