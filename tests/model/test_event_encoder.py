"""Embeddings of events and small layers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vista.log.gaps import NUM_GAPS, gap_bucket, history_gaps
from vista.model.event_encoder import EventEncoder
from vista.model.layers import CausalConvolution, Dropout, FeedForward, GatedOutput, split_heads


def test_gap_buckets_by_hand() -> None:
    ms = [-5, 0, 999, 1000, 2999, 3000, 6999, 7000, 3_600_000, 86_400_000, 2**62]
    # 1 + floor(log2(1 + seconds))
    assert gap_bucket(np.array(ms)).tolist() == [1, 1, 1, 2, 2, 3, 3, 4, 12, 17, NUM_GAPS - 1]


def test_history_gaps_start_over_with_every_user() -> None:
    times = np.array([0, 1000, 4000, 10**9, 10**9 + 7000, 5])
    gaps = history_gaps(times, np.array([0, 3, 3, 5, 6, 6]))
    assert gaps.tolist() == [0, 2, 3, 0, 4, 0]
    assert history_gaps(np.zeros(0, np.int64), np.array([0, 0])).tolist() == []


def encoder(**options: object) -> EventEncoder:
    torch.manual_seed(0)
    return EventEncoder(
        **{"dim": 4, "num_actions": 3, "use_action": True, "use_time": True, "rating_range": (1.0, 5.0)} | options
    )  # type: ignore[arg-type]


def test_an_event_is_the_sum_of_its_fields() -> None:
    made = encoder()
    items, action, gap = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]), torch.tensor([0, 1, 5, 39, 2])
    rating = torch.tensor([1.0, 3.0, 5.0, float("nan"), 4.0])
    assert made.action is not None and made.gap is not None and made.rating is not None
    scaled = torch.tensor([-1.0, 0.0, 1.0, 0.0, 0.5])  # the range becomes [-1, 1]; an unrated event is neutral
    expected = items + made.action.weight[action] + made.gap.weight[gap] + scaled[:, None] * made.rating
    torch.testing.assert_close(made(items, action, gap, rating), expected)
    torch.testing.assert_close(made(items, action, gap), items + made.action.weight[action] + made.gap.weight[gap])


def test_fields_that_a_log_lacks_are_absent() -> None:
    items = torch.randn(2, 4)
    zeros = torch.zeros(2, dtype=torch.int64)
    bare = encoder(num_actions=1, use_time=False, rating_range=None)
    assert not list(bare.parameters()) and bare.gap_vectors(zeros) is None
    assert torch.equal(bare(items, zeros, zeros, torch.ones(2)), items)
    assert encoder(use_action=False).action is None
    same = encoder(rating_range=(3.0, 3.0))
    other = torch.tensor([3.0, 4.0])  # ratings after a training that had only one value
    assert torch.equal(same(items, zeros, zeros, other), same(items, zeros, zeros)), (
        "a model trained on one rating value ignores ratings"
    )


def test_the_convolution_looks_back_within_its_history() -> None:
    torch.manual_seed(0)
    made = CausalConvolution(3, 3)
    x = torch.randn(7, 3)
    position = torch.tensor([0, 1, 2, 3, 0, 0, 1])
    w = made.weight
    y = made(x, position)
    torch.testing.assert_close(y[3], x[3] + w[0] * x[3] + w[1] * x[2] + w[2] * x[1])
    torch.testing.assert_close(y[1], x[1] + w[0] * x[1] + w[1] * x[0])
    for first in (0, 4, 5):
        torch.testing.assert_close(y[first], x[first] + w[0] * x[first])
    torch.testing.assert_close(y[6], x[6] + w[0] * x[6] + w[1] * x[5])
    assert made(x[:0], position[:0]).shape == (0, 3)
    torch.testing.assert_close(made(x[:1], position[:1]), y[:1])


@pytest.mark.parametrize("p", [0.001, 0.2, 0.5, 0.999])
def test_dropout_drops_its_share_and_keeps_the_mean(p: float) -> None:
    torch.manual_seed(0)
    made = Dropout(p).train()
    x = torch.ones(1000, 130, requires_grad=True)
    out = made(x)
    rounded = min(max(round(p * 256), 1), 255) / 256
    kept = out != 0
    assert abs(float((~kept).float().mean()) - rounded) < 5 * (rounded * (1 - rounded) / 130_000) ** 0.5
    assert out[kept].unique().tolist() == pytest.approx([1 / (1 - rounded)])
    # Everywhere: in all rows and columns.
    spread = 6 * (rounded * (1 - rounded) / 1000) ** 0.5 + 1e-3
    assert ((~kept).float().mean(0) - rounded).abs().max() < spread
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())
    assert not torch.equal(made(x), out), "each call draws a new mask"


def test_dropout_follows_the_generator_and_is_off_in_inference() -> None:
    x = torch.randn(3, 5, 7)
    made = Dropout(0.3)
    torch.manual_seed(1)
    one = made(x)
    torch.manual_seed(1)
    assert torch.equal(made(x), one)
    assert made.eval()(x) is x and Dropout(0.0).train()(x) is x
    assert made.train()(x[:0]).shape == (0, 5, 7)
    assert made(x.bfloat16()).dtype == torch.bfloat16


def test_blocks_keep_shapes_and_residuals() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 8)
    feed, gated = FeedForward(8, 2.0, 0.0), GatedOutput(8, 2, 0.0)
    assert split_heads(x, 2).shape == (6, 2, 4) and split_heads(x[:0], 2).shape == (0, 2, 4)
    for block, arguments in ((feed, (x,)), (gated, (x, split_heads(x, 2), x))):
        assert block(*arguments).shape == x.shape
        with torch.no_grad():
            last = block.down if block is feed else block.out
            last.weight.zero_()
        assert torch.equal(block(*arguments), x)
