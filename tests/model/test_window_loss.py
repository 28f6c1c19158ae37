"""The window loss against its formula in float64, with and without counted items, and its gradients."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vista.examples.negatives import NegativeSampler
from vista.model.losses import sampled_softmax
from vista.model.window_loss import CountedSlots, window_loss

NUM_ITEMS, NUM_LABELS, NUM_SLOTS = 40, 6, 7


@dataclass(frozen=True)
class Problem:
    """Anchors with 1 to NUM_LABELS labels, and 0 to NUM_SLOTS counted items."""

    user: Tensor
    items: Tensor
    label: Tensor
    slot: Tensor
    logit: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [leaf.requires_grad_() for leaf in (self.user, self.items, self.logit)]

    @property
    def counted(self) -> CountedSlots:
        return CountedSlots(self.slot, self.logit)


def problem(count: int, *, num_items: int = NUM_ITEMS) -> Problem:
    torch.manual_seed(count)

    def distinct(width: int, least: int) -> Tensor:
        """int64 [count, width] distinct items, with `least` to `width` of them in random places."""
        drawn = torch.rand(count, num_items).argsort(1)[:, :width]
        rank = torch.rand(count, width).argsort(1)
        return torch.where(rank < torch.randint(least, width + 1, (count, 1)), drawn, -1)

    return Problem(
        F.normalize(torch.randn(count, 5, dtype=torch.float64), dim=-1),
        F.normalize(torch.randn(num_items, 5, dtype=torch.float64), dim=-1),
        distinct(NUM_LABELS, 1),
        distinct(NUM_SLOTS, 0),
        torch.randn(count, NUM_SLOTS, dtype=torch.float64) * 3,
    )


def formula(
    asked: Problem, negatives: Tensor, log_weight: Tensor, temperature: float, adjustment: Tensor, *, counts: bool
) -> Tensor:
    """|P| log Z - sum of the labels' logits, anchor by anchor and item by item."""
    total = asked.user.new_zeros(())
    for row in range(len(asked.label)):
        own = {}
        if counts:
            own = {item: asked.logit[row, k] for k, item in enumerate(asked.slot[row].tolist()) if item >= 0}
        cosine = asked.items @ asked.user[row] / temperature + adjustment
        labels = [item for item in asked.label[row].tolist() if item >= 0]
        logits = [own.get(item, cosine[item]) for item in labels]
        terms = [*own.values(), *(cosine[item] for item in labels if item not in own)]
        for item, extra in zip(negatives.tolist(), log_weight, strict=True):
            if item not in own and item not in labels:
                terms.append(cosine[item] + extra)
        total = total + len(labels) * torch.logsumexp(torch.stack(terms), 0) - torch.stack(logits).sum()
    return total / len(asked.label)


@pytest.mark.parametrize("counts", [False, True], ids=["cosines", "counted"])
@pytest.mark.parametrize("count", [1, 7, 257])
def test_window_loss_equals_its_formula(count: int, counts: bool) -> None:
    asked = problem(count)
    negatives, log_weight = torch.arange(0, NUM_ITEMS, 2), torch.linspace(-1, 3, 20, dtype=torch.float64)
    adjustment = torch.linspace(-2, 0, NUM_ITEMS, dtype=torch.float64)
    leaves = asked.leaves if counts else asked.leaves[:2]
    counted = asked.counted if counts else None
    loss = window_loss(asked.user, asked.items, asked.label, negatives, log_weight, 0.3, adjustment, counted)
    exact = formula(asked, negatives, log_weight, 0.3, adjustment, counts=counts)
    torch.testing.assert_close(loss, exact)
    for mine, theirs in zip(torch.autograd.grad(loss * 3, leaves), torch.autograd.grad(exact * 3, leaves), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_window_loss_passes_gradcheck() -> None:
    asked = problem(5, num_items=12)
    negatives, log_weight = torch.tensor([0, 3, 4, 8, 11]), torch.zeros(5, dtype=torch.float64)

    def loss(user: Tensor, items: Tensor, logit: Tensor) -> Tensor:
        counted = CountedSlots(asked.slot, logit)
        return window_loss(user, items, asked.label, negatives, log_weight, 0.5, counted=counted)

    assert torch.autograd.gradcheck(loss, tuple(asked.leaves))


@pytest.mark.parametrize("counts", [False, True], ids=["cosines", "counted"])
def test_with_all_items_it_is_the_full_softmax(counts: bool) -> None:
    asked = problem(30)
    logits = asked.user @ asked.items.t() / 0.1
    if counts:
        row, place = (asked.slot >= 0).nonzero(as_tuple=True)
        logits = logits.index_put((row, asked.slot[row, place]), asked.logit[row, place])
    log_share, is_label = torch.log_softmax(logits, 1), asked.label >= 0
    exact = -(log_share.gather(1, asked.label.clamp(min=0)) * is_label).sum() / len(asked.label)
    all_items, no_weight = torch.arange(NUM_ITEMS), torch.zeros(NUM_ITEMS, dtype=torch.float64)
    counted = asked.counted if counts else None
    loss = window_loss(asked.user, asked.items, asked.label, all_items, no_weight, 0.1, counted=counted)
    torch.testing.assert_close(loss, exact)


def test_with_one_label_it_is_the_loss_of_the_next_item() -> None:
    asked = problem(50)
    label = asked.label.amax(1)
    negatives, log_weight = torch.arange(0, NUM_ITEMS, 3), torch.linspace(-1, 2, 14, dtype=torch.float64)
    loss = window_loss(asked.user, asked.items, label[:, None], negatives, log_weight, 0.2)
    torch.testing.assert_close(loss, sampled_softmax(asked.user, asked.items, label, negatives, log_weight, 0.2))


def test_the_correction_makes_the_sampled_loss_estimate_the_full_one() -> None:
    asked = problem(40, num_items=300)
    sampler = NegativeSampler(np.random.default_rng(0).zipf(1.5, 300).clip(max=5000), num_negatives=120, power=1.0)
    every, no_weight = torch.arange(300), torch.zeros(300)
    exact = float(window_loss(asked.user, asked.items, asked.label, every, no_weight, 0.5, counted=asked.counted))

    def mean_loss(weight_scale: float) -> float:
        estimates = []
        for seed in range(100):
            rows, weight = map(torch.from_numpy, sampler.draw(np.random.default_rng(seed)))
            weight = weight * weight_scale
            loss = window_loss(asked.user, asked.items, asked.label, rows, weight, 0.5, counted=asked.counted)
            estimates.append(float(loss))
        return float(np.mean(estimates))

    error = abs(mean_loss(1) - exact)
    assert error < 0.06 * exact
    assert abs(mean_loss(0) - exact) > 5 * error


def test_free_logits_learn_the_probability_of_occurring_in_the_window() -> None:
    """Ranked by it, and not by the expected number of events, the best k items have the highest precision at k."""
    windows = [[0, 1], [0, 2], [0, 1, 2, 3], [0], [1, 3], [0, 2]]
    label = torch.full((len(windows), 4), -1)
    for row, items in enumerate(windows):
        label[row, : len(items)] = torch.tensor(items)
    user, scores = torch.ones(len(windows), 1).double(), torch.zeros(4, 1).double().requires_grad_()
    optimizer = torch.optim.LBFGS([scores], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = window_loss(user, scores, label, torch.arange(4), torch.zeros(4), 1.0)
        torch.autograd.backward(loss)
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    learned = torch.softmax(scores.detach()[:, 0], 0)
    occurs = torch.tensor([5.0, 3.0, 3.0, 2.0]).double()
    torch.testing.assert_close(learned, occurs / occurs.sum(), atol=1e-4, rtol=0)


def test_low_precision_is_computed_in_float32() -> None:
    asked = problem(300)
    weight, negatives = torch.zeros(20), torch.arange(20)
    user, items = asked.user.bfloat16(), asked.items.bfloat16()
    exact = window_loss(user.double(), items.double(), asked.label, negatives, weight, 0.05)
    with torch.autocast("cpu", torch.bfloat16):
        loss = window_loss(user, items, asked.label, negatives, weight, 0.05)
    assert loss.dtype == torch.float32
    assert abs(float(loss) - float(exact)) < 1e-5 * float(exact)


def test_without_anchors_the_loss_is_zero() -> None:
    user, none = torch.zeros(0, 4, requires_grad=True), torch.zeros(0, 3, dtype=torch.int64)
    loss = window_loss(user, torch.randn(3, 4), none, torch.arange(3), torch.zeros(3), 1)
    loss.backward()
    assert float(loss.detach()) == 0.0 and user.grad is not None
