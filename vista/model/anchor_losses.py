"""The losses at anchors: of the window that follows, and with counters also of the next item.

Letters: NA anchors, S counted items per anchor, R item rows, M' width of retrieval vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vista.config import OptimConfig
from vista.config.checks import planned
from vista.examples.batch import Batch, BatchAnchors
from vista.model.losses import CountedSlots, LossPart, log_others, products, window_loss
from vista.model.ranking_model import RankingModel


def anchor_losses(
    model: RankingModel, batch: Batch, users: Tensor, items: Tensor, optim: OptimConfig
) -> dict[str, LossPart]:
    """The losses of a batch's anchors, by name: "window", and "next" if the model has counters.

    Args:
        model: scores counted items.
        batch: with anchors.
        users: [NA, M'] user vectors, in the order of the anchors.
        items: [R, M'] vectors of the items `batch.rows`.
        optim: says which losses are trained.
    """
    anchors, negatives = batch.anchors, batch.negatives
    assert anchors is not None
    counted = _counted_slots(model, batch, anchors, users, items)
    parts: dict[str, LossPart] = {}

    def loss(users: Tensor, label: Tensor, counted: CountedSlots | None) -> Tensor:
        temperature = model.temperature
        return window_loss(
            users, items, label, negatives.item, negatives.log_weight, temperature, batch.logit_adjustment, counted
        )

    if counted is not None and planned(optim.next_weight, "optim.next_weight"):
        known = (anchors.next_item >= 0).nonzero().squeeze(-1)
        label = anchors.next_item[known].unsqueeze(1)
        mean = loss(users[known], label, CountedSlots(counted.item[known], counted.logit[known]))
        parts["next"] = LossPart(mean, len(known))
    if planned(optim.window_weight, "optim.window_weight"):
        # Labels are summed. Their mean number is a constant, so that anchors with many labels weigh more.
        parts["window"] = LossPart(loss(users, anchors.item, counted) / anchors.mean_labels, len(users))
    return parts


@torch.no_grad()
def start_counted(model: RankingModel, batch: Batch, vectors: Tensor, returning_share: float) -> None:
    """Start the head of counted items: before training, they have their share of the labels as their probability.

    Args:
        model: untrained, with the popularity of items that training starts from.
        batch: with at least one anchor. The logits of other items are measured by its anchors.
        vectors: [R, M] vectors of the items `batch.rows` as the first step reads them.
        returning_share: `BatchSource.returning_share`.
    """
    anchors, negatives = batch.anchors, batch.negatives
    assert model.counted is not None and anchors is not None and anchors.counters is not None
    counted = anchors.counters.item
    others = log_others(
        model.anchor_users(batch, vectors),
        model.retrieval_items(vectors, batch.rows),
        counted,
        negatives.item,
        negatives.log_weight,
        model.temperature,
        batch.logit_adjustment,
    )
    num_counted = (counted >= 0).sum(1)
    measured = (num_counted > 0) & others.isfinite()  # it is -inf if all items are counted
    if measured.any():
        model.counted.start(returning_share, num_counted[measured], others[measured])


def _counted_slots(
    model: RankingModel, batch: Batch, anchors: BatchAnchors, users: Tensor, items: Tensor
) -> CountedSlots | None:
    """The counted items of anchors and their logits; None without counters."""
    slots = anchors.counters
    if model.counted is None or slots is None:
        return None
    full = torch.promote_types(users.dtype, torch.float32)
    with torch.autocast(users.device.type, enabled=False):
        score = products(users.to(full), items.to(full), slots.item) / model.temperature
        popularity = model.item_popularity[batch.rows][slots.item.clamp(min=0)]
        logit = model.counted(slots.codes, score, popularity, slots.num_events, users.to(full))
    return CountedSlots(slots.item, logit)
