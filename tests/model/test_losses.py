"""Losses against explicit float64 formulas, with and without counted items, and their gradients."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vista.examples.batch_source import NegativeSampler
from vista.examples.item_spaces import FOLDS, Pooled
from vista.model.layers import StatisticsTerm
from vista.model.losses import AskedStatistics, CountedSlots, log_others, sampled_softmax, task_losses, window_loss


def problem(count: int, items: int, dim: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(count)
    user = F.normalize(torch.randn(count, dim, dtype=dtype), dim=-1)
    vectors = F.normalize(torch.randn(items, dim, dtype=dtype), dim=-1)
    return user, vectors, torch.randint(0, items, (count,))


def formula(
    user: Tensor,
    items: Tensor,
    label: Tensor,
    negatives: Tensor,
    log_weight: Tensor,
    temperature: float,
    weight: Tensor | None = None,
) -> Tensor:
    """-log e^{s+} / (e^{s+} + sum over negatives other than the label of w_j e^{s_j}), row by row."""
    total = user.new_zeros(())
    for row, own in enumerate(label.tolist()):
        scores = items @ user[row] / temperature
        others = [j for j, item in enumerate(negatives.tolist()) if item != own]
        terms = [scores[own], *(scores[negatives[j]] + log_weight[j] for j in others)]
        own_weight = 1.0 if weight is None else weight[row]
        total = total + own_weight * (torch.logsumexp(torch.stack(terms), 0) - scores[own])
    return total / max(len(label), 1)


@pytest.mark.parametrize(
    ("count", "temperature", "is_weighted"), [(1, 1.0, True), (256, 0.05, False), (257, 0.05, True), (600, 1.0, False)]
)
def test_sampled_softmax_equals_its_formula(count: int, temperature: float, is_weighted: bool) -> None:
    user, items, label = problem(count, 40)
    negatives = torch.arange(0, 40, 2)
    log_weight = torch.linspace(-1, 3, 20, dtype=torch.float64)
    leaves = [user.requires_grad_(), items.requires_grad_()]
    weight = torch.linspace(0, 4, count, dtype=torch.float64) if is_weighted else None
    loss = sampled_softmax(user, items, label, negatives, log_weight, temperature, weight=weight)
    exact = formula(user, items, label, negatives, log_weight, temperature, weight)
    torch.testing.assert_close(loss, exact)
    for mine, theirs in zip(torch.autograd.grad(loss * 3, leaves), torch.autograd.grad(exact * 3, leaves), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    user, items, label = problem(300, 40, 16)
    rounded = [x.to(dtype) for x in (user, items)]
    weight = torch.zeros(20)
    exact = formula(rounded[0].double(), rounded[1].double(), label, torch.arange(20), weight, 0.05)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        loss = sampled_softmax(rounded[0], rounded[1], label, torch.arange(20), weight, 0.05)
    assert loss.dtype == torch.float32
    assert abs(float(loss) - float(exact)) < 1e-5 * float(exact)


def test_without_labels_the_loss_is_zero() -> None:
    user = torch.zeros(0, 4, requires_grad=True)
    loss = sampled_softmax(
        user, torch.randn(3, 4), torch.zeros(0, dtype=torch.int64), torch.arange(3), torch.zeros(3), 1
    )
    loss.backward()
    assert float(loss.detach()) == 0.0 and user.grad is not None


def test_large_logits_stay_finite() -> None:
    user = torch.tensor([[1.0, 0.0]], requires_grad=True)
    items = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    for label, expected in ((0, 0.0), (1, 4000.0)):
        loss = sampled_softmax(user, items, torch.tensor([label]), torch.arange(2), torch.zeros(2), 0.0005)
        assert float(loss.detach()) == pytest.approx(expected, abs=1e-3)
        assert torch.isfinite(torch.autograd.grad(loss, user)[0]).all()


@pytest.mark.parametrize(("power", "strength"), [(0.0, 1.0), (1.0, 0.5)])
def test_the_correction_makes_the_sampled_loss_estimate_the_full_one(power: float, strength: float) -> None:
    """logQ: the sampled denominator is right on average for any distribution of draws, and far off without logQ."""
    user, items, label = problem(40, 300)
    frequency = np.random.default_rng(0).zipf(1.5, 300).clip(max=5000)
    adjustment = (1 - strength) * torch.from_numpy(np.log(frequency / frequency.sum()))
    exact = float(F.cross_entropy(user @ items.t() / 0.5 + adjustment, label))
    sampler = NegativeSampler(frequency, num_negatives=120, power=power)

    def mean_loss(weight_scale: float) -> float:
        estimates = []
        for seed in range(100):
            rows, weight = map(torch.from_numpy, sampler.draw(np.random.default_rng(seed)))
            estimates.append(float(sampled_softmax(user, items, label, rows, weight * weight_scale, 0.5, adjustment)))
        return float(np.mean(estimates))

    error = abs(mean_loss(1) - exact)
    assert error < 0.06 * exact
    assert abs(mean_loss(0) - exact) > 5 * error


@pytest.mark.parametrize("count", [7, 300])
def test_an_adjustment_is_added_to_labels_and_negatives(count: int) -> None:
    """It acts like one more column of the items, which all users read with weight 1 and which gets no gradient."""
    user, items, label = problem(count, 40)
    negatives, log_weight = torch.arange(0, 40, 2), torch.linspace(-1, 3, 20, dtype=torch.float64)
    adjustment = torch.linspace(-4, 0, 40, dtype=torch.float64)
    leaves = [user.requires_grad_(), items.requires_grad_()]
    loss = sampled_softmax(user, items, label, negatives, log_weight, 0.5, adjustment)
    wide_user = torch.cat([user, torch.ones(count, 1, dtype=torch.float64)], 1)
    wide_items = torch.cat([items, 0.5 * adjustment[:, None]], 1)
    exact = formula(wide_user, wide_items, label, negatives, log_weight, 0.5)
    torch.testing.assert_close(loss, exact)
    for mine, theirs in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(exact, leaves), strict=True):
        torch.testing.assert_close(mine, theirs)
    shifted = sampled_softmax(user, items, label, negatives, log_weight, 0.5, adjustment + 3)
    torch.testing.assert_close(shifted, loss)  # a constant changes nothing


def test_task_losses_average_over_known_labels() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 4, 2, requires_grad=True)
    label, mask = torch.randint(0, 2, (3, 4, 2)).float(), torch.rand(3, 4, 2) < 0.5
    mask[..., 1] = False
    mask[0, 0, 1] = True
    losses = task_losses(logits, label, mask)
    for task in range(2):
        known = mask[..., task]
        x, y = logits[..., task][known].double(), label[..., task][known].double()
        exact = -(y * torch.log(torch.sigmoid(x)) + (1 - y) * torch.log(1 - torch.sigmoid(x))).mean()
        torch.testing.assert_close(losses[task].double(), exact, rtol=1e-6, atol=1e-7)
    losses.sum().backward()
    assert logits.grad is not None
    assert not logits.grad[~mask].any() and logits.grad[mask].all()
    # Values in unknown places do not matter.
    with torch.no_grad():
        other = task_losses(logits.masked_fill(~mask, 99.0), torch.where(mask, label, 1 - label), mask)
    assert torch.equal(other, losses)


def test_labels_of_items_that_few_look_at_are_modeled_as_seldom_examined() -> None:
    torch.manual_seed(0)
    logits = (3 * torch.randn(50, 2)).requires_grad_()
    label, mask = torch.randint(0, 2, (50, 2)).float(), torch.ones(50, 2, dtype=torch.bool)
    examined = torch.rand(50, 2) * 0.9 + 0.05
    examined[:25, 1] = 1  # everyone looks
    losses = task_losses(logits, label, mask, examined)
    p = examined.double() * torch.sigmoid(logits.double())
    exact = -(label * p.log() + (1 - label) * (1 - p).log()).mean(0)
    torch.testing.assert_close(losses.double(), exact, rtol=1e-5, atol=1e-6)
    losses.sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()
    with torch.no_grad():
        torch.testing.assert_close(
            task_losses(logits, label, mask, torch.ones(50, 2)), task_losses(logits, label, mask)
        )


def test_a_task_without_known_labels_has_zero_loss() -> None:
    logits = torch.randn(2, 3, 2, requires_grad=True)
    mask = torch.zeros(2, 3, 2, dtype=torch.bool)
    loss = task_losses(logits, torch.zeros(2, 3, 2), mask)
    loss.sum().backward()
    assert loss.tolist() == [0.0, 0.0] and logits.grad is not None and not logits.grad.any()


NUM_ITEMS, NUM_LABELS, NUM_SLOTS = 40, 6, 7


@dataclass(frozen=True)
class WindowProblem:
    """Anchors with 1 to NUM_LABELS labels, and 0 to NUM_SLOTS counted items."""

    user: Tensor
    items: Tensor
    label: Tensor
    slot: Tensor
    logit: Tensor

    statistics: AskedStatistics | None

    @property
    def leaves(self) -> list[Tensor]:
        return [leaf.requires_grad_() for leaf in (self.user, self.items, self.logit)]

    @property
    def counted(self) -> CountedSlots:
        return CountedSlots(self.slot, self.logit)


def window_problem(
    count: int, *, num_items: int = NUM_ITEMS, num_statistics: int = 0, num_sums: int = 0
) -> WindowProblem:
    torch.manual_seed(count)

    def distinct(width: int, least: int) -> Tensor:
        """int64 [count, width] distinct items, with `least` to `width` of them in random places."""
        drawn = torch.rand(count, num_items).argsort(1)[:, :width]
        rank = torch.rand(count, width).argsort(1)
        return torch.where(rank < torch.randint(least, width + 1, (count, 1)), drawn, -1)

    user = F.normalize(torch.randn(count, 5, dtype=torch.float64), dim=-1)
    statistics = None
    if num_statistics:
        user = torch.cat([user, torch.randn(count, num_statistics + num_sums, dtype=torch.float64)], 1)
        sums = torch.randn(count, num_sums, num_items) if num_sums else None
        statistics = AskedStatistics(torch.randn(4, num_items, num_statistics), torch.randint(0, 4, (count,)), sums)
    return WindowProblem(
        user,
        F.normalize(torch.randn(num_items, 5, dtype=torch.float64), dim=-1),
        distinct(NUM_LABELS, 1),
        distinct(NUM_SLOTS, 0),
        torch.randn(count, NUM_SLOTS, dtype=torch.float64) * 3,
        statistics,
    )


def window_formula(
    asked: WindowProblem,
    negatives: Tensor,
    log_weight: Tensor,
    temperature: float,
    adjustment: Tensor,
    *,
    counts: bool,
    weight: Tensor | None,
) -> Tensor:
    """Weighted sum of log Z less each label's logit, anchor by anchor and item by item."""
    total = asked.user.new_zeros(())
    for row in range(len(asked.label)):
        own = {}
        if counts:
            own = {item: asked.logit[row, k] for k, item in enumerate(asked.slot[row].tolist()) if item >= 0}
        cosine = asked.items @ asked.user[row, :5] / temperature + adjustment
        if asked.statistics is not None:
            values = asked.statistics.values[int(asked.statistics.time[row])].double()
            cosine = cosine + values @ asked.user[row, 5 : 5 + values.shape[1]]
            if asked.statistics.sums is not None:
                cosine = cosine + asked.user[row, 5 + values.shape[1] :] @ asked.statistics.sums[row].double()
        labels = [item for item in asked.label[row].tolist() if item >= 0]
        logits = [own.get(item, cosine[item]) for item in labels]
        terms = [*own.values(), *(cosine[item] for item in labels if item not in own)]
        for item, extra in zip(negatives.tolist(), log_weight, strict=True):
            if item not in own and item not in labels:
                terms.append(cosine[item] + extra)
        own_weight = torch.ones(len(labels)) if weight is None else weight[row][asked.label[row] >= 0]
        total = total + (own_weight * (torch.logsumexp(torch.stack(terms), 0) - torch.stack(logits))).sum()
    return total / len(asked.label)


@pytest.mark.parametrize(
    ("count", "num_statistics", "num_sums", "counts", "is_weighted"),
    [
        (1, 3, 2, True, True),
        (7, 0, 0, False, True),
        (7, 3, 0, True, False),
        (257, 0, 0, True, True),
        (257, 3, 2, True, False),
    ],
)
def test_window_loss_equals_its_formula(
    count: int, num_statistics: int, num_sums: int, counts: bool, is_weighted: bool
) -> None:
    asked = window_problem(count, num_statistics=num_statistics, num_sums=num_sums)
    negatives, log_weight = torch.arange(0, NUM_ITEMS, 2), torch.linspace(-1, 3, 20, dtype=torch.float64)
    adjustment = torch.linspace(-2, 0, NUM_ITEMS, dtype=torch.float64)
    leaves = asked.leaves if counts else asked.leaves[:2]
    counted = asked.counted if counts else None
    weight = torch.rand(asked.label.shape, dtype=torch.float64) * 3 if is_weighted else None
    loss = window_loss(
        asked.user, asked.items, asked.label, negatives, log_weight, 0.3, adjustment, counted, asked.statistics, weight
    )
    exact = window_formula(asked, negatives, log_weight, 0.3, adjustment, counts=counts, weight=weight)
    torch.testing.assert_close(loss, exact)
    for mine, theirs in zip(torch.autograd.grad(loss * 3, leaves), torch.autograd.grad(exact * 3, leaves), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("num_statistics", [0, 3])
def test_pooled_vectors_add_weighted_cosines_in_the_space_of_each_question(num_statistics: int) -> None:
    """Spaces lie side by side, and a question has zeros in the columns of the one that it does not read."""
    torch.manual_seed(0)
    count, dim, size, temperature = 40, 5, 3, 0.3
    asked = window_problem(count, num_statistics=num_statistics)
    term = StatisticsTerm(dim, num_statistics, num_pooled=len(Pooled)).double()
    with torch.no_grad():
        for weight in term.parameters():
            weight.normal_()
    unit, items = asked.user[:, :dim].clone().requires_grad_(), asked.items.clone().requires_grad_()
    leaves = [unit, items, *term.parameters()]
    pooled = F.normalize(torch.randn(count, len(Pooled), size, dtype=torch.float64), dim=-1)
    spaces, fold = torch.randn(FOLDS, NUM_ITEMS, size, dtype=torch.float64), torch.randint(0, FOLDS, (count,))
    placed = pooled.new_zeros(count, len(Pooled), FOLDS, size)
    placed[torch.arange(count), :, fold] = pooled
    wide = torch.cat([items, temperature * spaces.movedim(0, 1).flatten(1)], 1)
    negatives, log_weight = torch.arange(NUM_ITEMS), torch.zeros(NUM_ITEMS, dtype=torch.float64)
    user = term(unit, placed.flatten(2))
    assert user.shape == (count, dim + FOLDS * size + num_statistics)
    loss = window_loss(
        user, wide, asked.label, negatives, log_weight, temperature, counted=asked.counted, statistics=asked.statistics
    )
    scaled = term.gain * unit
    weights = scaled @ term.weight.weight.t() * dim**0.5 + term.weight.bias
    cosines = torch.einsum("ajr,air->aji", pooled, spaces[fold])
    logits = scaled @ items.t() / temperature + torch.einsum("aj,aji->ai", weights[:, num_statistics:], cosines)
    if asked.statistics is not None:
        values = asked.statistics.values.double()[asked.statistics.time]
        logits = logits + torch.einsum("af,aif->ai", weights[:, :num_statistics], values)
    is_slot = asked.slot[:, :, None] == torch.arange(NUM_ITEMS)
    own = torch.where(is_slot, asked.logit[:, :, None], 0).sum(1)
    logits = torch.where(is_slot.any(1), own, logits)
    is_label = (asked.label[:, :, None] == torch.arange(NUM_ITEMS)).any(1)
    exact = -torch.where(is_label, logits.log_softmax(1), 0).sum() / count
    torch.testing.assert_close(loss, exact)
    for mine, theirs in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(exact, leaves), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_log_others_equals_its_formula() -> None:
    asked = window_problem(300, num_statistics=3, num_sums=2)
    negatives, log_weight = torch.arange(NUM_ITEMS), torch.zeros(NUM_ITEMS, dtype=torch.float64)
    others = log_others(asked.user, asked.items, asked.slot, negatives, log_weight, 0.3, statistics=asked.statistics)
    assert asked.statistics is not None and asked.statistics.sums is not None
    values = asked.statistics.values.double()[asked.statistics.time]
    logits = asked.user[:, :5] @ asked.items.t() / 0.3 + (values @ asked.user[:, 5:8, None])[:, :, 0]
    logits = logits + (asked.user[:, None, 8:] @ asked.statistics.sums.double())[:, 0]
    is_slot = (asked.slot[:, :, None] == torch.arange(NUM_ITEMS)).any(1)
    torch.testing.assert_close(others, logits.masked_fill(is_slot, -torch.inf).logsumexp(1))


def test_window_loss_of_low_precision_is_computed_in_float32() -> None:
    asked = window_problem(300)
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
