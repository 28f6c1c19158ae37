"""The loss of anchors: a softmax over the catalog whose labels are all items of the window after a question.

Letters: NA anchors, P labels and S counted slots per anchor, J shared negatives, R item rows, M width of retrieval
vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vista.model.losses import ROWS_PER_TILE


@dataclass(frozen=True, slots=True)
class CountedSlots:
    """Items whose logits come from the user's counters."""

    item: Tensor
    """int64 [NA, S] rows of the batch's items, distinct within an anchor; -1 pads. S is at least 1."""
    logit: Tensor
    """[NA, S]; ignored in the padding."""


def window_loss(
    user: Tensor,
    items: Tensor,
    label: Tensor,
    negatives: Tensor,
    negative_log_weight: Tensor,
    temperature: float,
    adjustment: Tensor | None = None,
    counted: CountedSlots | None = None,
) -> Tensor:
    """Mean over anchors of the summed cross-entropy of an anchor's labels.

    With s_i the logit of item i, P the labels, C the counted items, and J the negatives with log weights w_j:

        loss = |P| log Z - sum_P s_i,  Z = sum_C e^{s_i} + sum_{P - C} e^{s_i} + sum_{J - P - C} e^{s_j + w_j}

    All labels of an anchor share one partition function Z. The minimum has softmax(s)_i proportional to the probability
    that i occurs in the window, which is the best order for precision and recall at k. So labels are distinct, and an
    anchor with many labels weighs more: callers divide by a constant, not by an anchor's own |P|.

    Args:
        user: [NA, M] user vectors (`RankingModel.retrieval_users`).
        items: [R, M] vectors of `RankingModel.retrieval_items`.
        label: int64 [NA, P] rows of `items`, distinct within an anchor; -1 pads. Every anchor has at least one.
        negatives: int64 [J] distinct sorted rows of `items`.
        negative_log_weight: float32 [J], added to the negatives' logits (logQ correction, `NegativeSampler.draw`).
        temperature: divides the inner products, which are the logits of items that are not counted.
        adjustment: float32 [R], added to the logits of items that are not counted; see `sampled_softmax`.
        counted: the items that have logits of their own; None without counters.

    Returns:
        scalar of at least float32; 0 if NA = 0.
    """
    if len(label) == 0:
        return user.sum() * 0.0
    full = torch.promote_types(user.dtype, torch.float32)
    user, items = user.to(full), items.to(full)
    if adjustment is not None:
        negative_log_weight = negative_log_weight + adjustment[negatives]
    with torch.autocast(user.device.type, enabled=False):
        positive = products(user, items, label) / temperature
        if adjustment is not None:
            positive = positive + adjustment[label.clamp(min=0)]
        exact, slots = positive.masked_fill(label < 0, -torch.inf), label
        if counted is not None:
            slot_logit = counted.logit.to(full).masked_fill(counted.item < 0, -torch.inf)
            is_counted = (label[:, :, None] == counted.item[:, None, :]) & (label >= 0)[:, :, None]
            found = is_counted.any(2)
            positive = torch.where(found, slot_logit.gather(1, is_counted.int().argmax(2)), positive)
            exact = torch.cat([slot_logit, exact.masked_fill(found, -torch.inf)], 1)
            slots = torch.cat([counted.item, slots], 1)
        own = _columns(negatives, slots)
        weight = (label >= 0).sum(1).to(full) / len(label)
        partition: Tensor = _WeightedPartition.apply(  # type: ignore[no-untyped-call]
            user, exact, items[negatives], negative_log_weight.to(full), own, weight, temperature
        )
    return partition - positive.masked_fill(label < 0, 0.0).sum() / len(label)


def log_others(
    user: Tensor,
    items: Tensor,
    left_out: Tensor,
    negatives: Tensor,
    negative_log_weight: Tensor,
    temperature: float,
    adjustment: Tensor | None = None,
) -> Tensor:
    """[NA]: log of the sum of e^s over the catalog less some items, estimated by the negatives as in `window_loss`.

    Args:
        left_out: int64 [NA, S] rows of `items`; -1 pads. The other arguments are those of `window_loss`.
    """
    full = torch.promote_types(user.dtype, torch.float32)
    if adjustment is not None:
        negative_log_weight = negative_log_weight + adjustment[negatives]
    own, transposed = _columns(negatives, left_out), items.to(full)[negatives].t() / temperature
    sums = []
    for begin in range(0, len(user), ROWS_PER_TILE):
        tile = slice(begin, begin + ROWS_PER_TILE)
        with torch.autocast(user.device.type, enabled=False):
            logits = torch.addmm(negative_log_weight.to(full), user[tile].to(full), transposed)
        row, place = (own[tile] >= 0).nonzero(as_tuple=True)
        logits[row, own[tile][row, place]] = -torch.inf
        sums.append(logits.logsumexp(1))
    return torch.cat(sums)


def _columns(negatives: Tensor, slots: Tensor) -> Tensor:
    """int64 [NA, E]: the places of item rows int64 [NA, E] among the sorted negatives; -1 for padding and others."""
    column = torch.searchsorted(negatives, slots.contiguous()).clamp_(max=len(negatives) - 1)
    return torch.where((negatives[column] == slots) & (slots >= 0), column, -1)


def products(user: Tensor, items: Tensor, label: Tensor) -> Tensor:
    """[NA, P] inner products of user vectors [NA, M] and rows int64 [NA, P] of items [R, M].

    Padding is -1, and has any finite number.
    """
    labeled = items.index_select(0, label.clamp(min=0).flatten()).view(*label.shape, -1)
    return torch.bmm(labeled, user.unsqueeze(2)).squeeze(2)


class _WeightedPartition(torch.autograd.Function):
    """Sum over anchors of weight * log Z, and gradients, in one pass over tiles, without a whole [NA, J] matrix.

    user [NA, M], exact [NA, E] logits that count once (-inf in the padding), negatives [J, M], log_weight [J], own
    int64 [NA, E] (columns of negatives that are among an anchor's exact items, or -1), weight [NA].
    """

    @staticmethod
    def forward(
        ctx: Any,
        user: Tensor,
        exact: Tensor,
        negatives: Tensor,
        log_weight: Tensor,
        own: Tensor,
        weight: Tensor,
        temperature: float,
    ) -> Tensor:
        grad_user, grad_exact = torch.empty_like(user), torch.empty_like(exact)
        grad_negatives = torch.zeros_like(negatives)
        scaled, transposed = negatives / temperature, negatives.t() / temperature
        loss = user.new_zeros(())
        for begin in range(0, len(user), ROWS_PER_TILE):
            tile = slice(begin, begin + ROWS_PER_TILE)
            logits = torch.addmm(log_weight, user[tile], transposed)
            row, place = (own[tile] >= 0).nonzero(as_tuple=True)
            logits[row, own[tile][row, place]] = -torch.inf
            top = torch.maximum(logits.amax(-1), exact[tile].amax(-1)).unsqueeze(-1)
            shares, exact_shares = logits.sub_(top).exp_(), (exact[tile] - top).exp_()
            total = shares.sum(-1) + exact_shares.sum(-1)
            loss += (weight[tile] * (total.log() + top.squeeze(-1))).sum()
            scale = (weight[tile] / total).unsqueeze(-1)
            grad_exact[tile] = exact_shares * scale
            shares *= scale
            torch.mm(shares, scaled, out=grad_user[tile])
            grad_negatives.addmm_(shares.t(), user[tile], alpha=1 / temperature)
        ctx.save_for_backward(grad_user, grad_exact, grad_negatives)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_user, grad_exact, grad_negatives = ctx.saved_tensors
        return grad_user * grad, grad_exact * grad, grad_negatives * grad, None, None, None, None
