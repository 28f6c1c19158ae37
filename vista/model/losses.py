"""Losses. Letters: N label positions, J shared negatives, R item rows, M width of retrieval vectors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vista.config import OptimConfig
from vista.config.checks import planned
from vista.examples.batch import Batch, BatchAnchors

if TYPE_CHECKING:
    from vista.model.ranking_model import RankingModel


@dataclass(frozen=True, slots=True)
class LossPart:
    """One loss of a batch."""

    mean: Tensor
    """Scalar."""
    count: Tensor | int
    """Number of labels that it is the mean of."""


ATTENTION_WEIGHT = 3.0
"""Weight of the losses `attention_alone` of tasks, as a multiple of the task's."""
ROWS_PER_TILE = 256
"""Rows of the softmax that are held at once: 1 MiB with 1,024 negatives, which stays in a core's cache."""


@dataclass(frozen=True, slots=True)
class Losses:
    """Scalar losses of one batch."""

    total: Tensor
    """The weighted sum that training minimizes."""
    parts: dict[str, Tensor]
    """By name: "next", "window", "reconstruction", one per labeled task, "attention/next" and "attention/TASK" of a
    model that reads more than attention, and "search_unit/TASK" of SIM."""
    counts: dict[str, Tensor | int]
    """Number of labels that each part is the mean of."""


def loss_names(tasks: Iterable[str]) -> list[str]:
    """All names that `Losses.parts` can have, in a fixed order.

    Args:
        tasks: of the model.
    """
    alone = map(attention_alone, ("next", *tasks))
    return ["next", "window", "reconstruction", *tasks, *alone, *map(search_unit, tasks)]


def attention_alone(task: str) -> str:
    """Name of the loss of what attention predicts for a task, or "next", without counters and pooled vectors."""
    return f"attention/{task}"


def search_unit(task: str) -> str:
    """Name of the loss of SIM's search for a task."""
    return f"search_unit/{task}"


def weighted_losses(parts: Mapping[str, LossPart], optim: OptimConfig) -> Losses:
    """The losses of one batch and their weighted sum.

    Args:
        parts: the losses that are trained, by the names of `Losses.parts`. Those of tasks have `optim.task_weight`.
    """
    weights = {
        "next": planned(optim.next_weight, "optim.next_weight"),
        "window": planned(optim.window_weight, "optim.window_weight"),
        "reconstruction": optim.reconstruction_weight,
    }
    weights[attention_alone("next")] = weights["next"]
    weighted = (
        weights.get(name, optim.task_weight * (ATTENTION_WEIGHT if name.startswith(attention_alone("")) else 1))
        * part.mean
        for name, part in parts.items()
    )
    means = {name: part.mean for name, part in parts.items()}
    return Losses(sum(weighted, torch.zeros(())), means, {name: part.count for name, part in parts.items()})


def next_loss(
    batch: Batch, items: Tensor, users: Tensor, label: Tensor, temperature: float, weight: Tensor | None = None
) -> Tensor:
    """`sampled_softmax` over the negatives of a batch.

    Args:
        items: [R, M] vectors of the items `batch.rows`; users: [N, M]; label: int64 [N] rows of `items`; weight:
            float32 [N] of the labels, or None.
    """
    negatives, adjustment = batch.negatives, batch.logit_adjustment
    return sampled_softmax(users, items, label, negatives.item, negatives.log_weight, temperature, adjustment, weight)


def sampled_softmax(
    user: Tensor,
    item_vectors: Tensor,
    label: Tensor,
    negatives: Tensor,
    negative_log_weight: Tensor,
    temperature: float,
    adjustment: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Mean sampled-softmax loss of the next item over shared negatives.

    A negative that equals a row's own positive is masked in that row. With an adjustment a, the label is modeled as
    p(i) ~ e^{a_i + s_i}. Serving omits a, so scores are s_i = log p(i) - a_i, up to a constant (Menon et al. 2021).

    Args:
        user: [N, M] user vectors (`RankingModel.retrieval_users`).
        item_vectors: [R, M] vectors of `RankingModel.retrieval_items`.
        label: int64 [N] rows of item_vectors.
        negatives: int64 [J] distinct sorted rows of item_vectors.
        negative_log_weight: float32 [J], added to the negatives' logits (logQ correction, `NegativeSampler.draw`).
        temperature: divides the inner products.
        adjustment: float32 [R], added to an item's logits as label and as negative; a constant changes nothing.
        weight: float32 [N] factors of the rows' losses, whose sum is still divided by N; None is 1.

    Returns:
        scalar float32; 0 if N = 0.
    """
    if len(label) == 0:
        return user.sum() * 0.0
    # Products divided by a small temperature need more digits than bfloat16 has.
    full = torch.promote_types(user.dtype, torch.float32)
    user, item_vectors = user.to(full), item_vectors.to(full)
    positive = (user * item_vectors[label]).sum(-1) / temperature
    if adjustment is not None:
        positive = positive + adjustment[label]
        negative_log_weight = negative_log_weight + adjustment[negatives]
    column = torch.searchsorted(negatives, label).clamp_(max=len(negatives) - 1)
    own = torch.where(negatives[column] == label, column, -1)
    row_weight = torch.ones_like(positive) if weight is None else weight.to(full)
    with torch.autocast(user.device.type, enabled=False):
        loss: Tensor = _SampledSoftmax.apply(  # type: ignore[no-untyped-call]
            user, positive, item_vectors[negatives], negative_log_weight.to(full), own, row_weight, temperature
        )
    return loss


class _SampledSoftmax(torch.autograd.Function):
    """Loss and gradients in one pass over tiles of rows, without a whole [N, J] matrix.

    user [N, M], positive [N] logits, negatives [J, M], log_weight [J], own int64 [N] (column of a row's own positive,
    or -1), row_weight [N].
    """

    @staticmethod
    def forward(
        ctx: Any,
        user: Tensor,
        positive: Tensor,
        negatives: Tensor,
        log_weight: Tensor,
        own: Tensor,
        row_weight: Tensor,
        temperature: float,
    ) -> Tensor:
        count = len(user)
        grad_user, grad_positive = torch.empty_like(user), torch.empty_like(positive)
        grad_negatives = torch.zeros_like(negatives)
        scaled, transposed = negatives / temperature, negatives.t() / temperature
        loss = positive.new_zeros(())
        for begin in range(0, count, ROWS_PER_TILE):
            tile = slice(begin, begin + ROWS_PER_TILE)
            logits = torch.addmm(log_weight, user[tile], transposed)
            hit = (own[tile] >= 0).nonzero().squeeze(-1)
            logits[hit, own[tile][hit]] = float("-inf")
            top = torch.maximum(logits.amax(-1), positive[tile])
            weight = logits.sub_(top.unsqueeze(-1)).exp_()
            own_weight = (positive[tile] - top).exp()
            total = weight.sum(-1) + own_weight
            loss += (row_weight[tile] * (total.log() - (positive[tile] - top))).sum()
            grad_positive[tile] = row_weight[tile] * (own_weight / total - 1) / count
            weight *= (row_weight[tile] / (total * count)).unsqueeze(-1)
            torch.mm(weight, scaled, out=grad_user[tile])
            grad_negatives.addmm_(weight.t(), user[tile], alpha=1 / temperature)
        ctx.save_for_backward(grad_user, grad_positive, grad_negatives)
        return loss / count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_user, grad_positive, grad_negatives = ctx.saved_tensors
        return grad_user * grad, grad_positive * grad, grad_negatives * grad, None, None, None, None


def task_losses(logits: Tensor, label: Tensor, mask: Tensor, examined: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of each task, averaged over the impressions whose label is known.

    Args:
        logits: [..., num_tasks]; label: float32 of the same shape; mask: bool of the same shape.
        examined: probabilities e of the same shape that users looked at the items. A label is then modeled as 1 with
            probability e * sigmoid(logit), so the logit is that of an item that is looked at.

    Returns:
        float32 [num_tasks]; 0 for a task without known labels.
    """
    num_tasks, logits = logits.shape[-1], logits.float()
    if examined is not None:  # the logit of e * sigmoid(x)
        logits = logits + examined.log() - F.softplus(logits + (1 - examined).log())
    loss = F.binary_cross_entropy_with_logits(logits, label, reduction="none")
    loss = torch.where(mask, loss, loss.new_zeros(())).reshape(-1, num_tasks)
    return loss.sum(0) / mask.reshape(-1, num_tasks).sum(0).clamp(min=1)


def task_parts(
    names: Iterable[str], logits: Tensor, label: Tensor, mask: Tensor, examined: Tensor | None = None
) -> dict[str, LossPart]:
    """`task_losses` by name, in the order of the tasks."""
    means, counts = task_losses(logits, label, mask, examined), mask.reshape(-1, logits.shape[-1]).sum(0)
    return {name: LossPart(mean, count) for name, mean, count in zip(names, means, counts, strict=True)}


def reconstruction_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean over events of the squared distance between predicted and embedded events (VISTA, L_rec).

    Embeddings get no gradient. Otherwise they could shrink to a point, where the loss is 0 and the model useless.

    Args:
        predicted: [N, M]; target: [N, M] event embeddings.
    """
    if len(target) == 0:
        return predicted.sum() * 0.0
    return (predicted.float() - target.detach().float()).square().sum(-1).mean()


# The loss of anchors: a softmax over the catalog whose labels are all items of the window after a question.
#
# Letters: NA anchors, P labels and S counted slots per anchor, J shared negatives, R item rows, M model dim, T times, F
# statistics of items, K sums over transitions.


@dataclass(frozen=True, slots=True)
class CountedSlots:
    """Items whose logits come from the user's counters."""

    item: Tensor
    """int64 [NA, S] rows of the batch's items, distinct within an anchor; -1 pads. S is at least 1."""
    logit: Tensor
    """[NA, S]; ignored in the padding."""


@dataclass(frozen=True, slots=True)
class AskedStatistics:
    """Statistics of items as of the questions of anchors, which are inputs of logits in addition to item vectors."""

    values: Tensor
    """float32 [T, R, F]."""
    time: Tensor
    """int64 [NA] which of the T times each anchor reads."""
    sums: Tensor | None = None
    """float32 [NA, K, R] sums over transitions, which belong to a pair of anchor and item; None for a model without."""

    @classmethod
    def of(cls, batch: Batch) -> AskedStatistics | None:
        """Those of a batch's anchors; None without counters."""
        statistics, anchors = batch.statistics, batch.anchors
        if statistics is None or anchors is None:
            return None
        time = torch.searchsorted(statistics.time, anchors.time, right=True) - 1
        return cls(statistics.values, time, anchors.transitions)

    def select(self, anchors: Tensor) -> AskedStatistics:
        """Those of some anchors, int64 [n]."""
        return AskedStatistics(self.values, self.time[anchors], None if self.sums is None else self.sums[anchors])

    def of_rows(self, rows: Tensor) -> Tensor:
        """[NA, P, F + K] of item rows int64 [NA, P], where -1 pads: statistics, then sums."""
        rows = rows.clamp(min=0)
        statistics = self.values[self.time.unsqueeze(1), rows]
        if self.sums is None:
            return statistics
        sums = self.sums.gather(2, rows.unsqueeze(1).expand(-1, self.sums.shape[1], -1))
        return torch.cat([statistics, sums.transpose(1, 2)], -1)


def window_loss(
    user: Tensor,
    items: Tensor,
    label: Tensor,
    negatives: Tensor,
    negative_log_weight: Tensor,
    temperature: float,
    adjustment: Tensor | None = None,
    counted: CountedSlots | None = None,
    statistics: AskedStatistics | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Mean over anchors of the summed cross-entropy of an anchor's labels.

    With s_i the logit of item i, P the labels, C the counted items, and J the negatives with log weights w_j:

        loss = |P| log Z - sum_P s_i,  Z = sum_C e^{s_i} + sum_{P - C} e^{s_i} + sum_{J - P - C} e^{s_j + w_j}

    All labels of an anchor share one partition function Z. The minimum has softmax(s)_i proportional to the probability
    that i occurs in the window, which is the best order for precision and recall at k. So labels are distinct, and an
    anchor with many labels weighs more: callers divide by a constant, not by an anchor's own |P|.

    Args:
        user: [NA, M], or [NA, M + F + K] with statistics (`RankingModel.retrieval_users`).
        items: [R, M] of `RankingModel.training_items`.
        label: int64 [NA, P] rows of `items`, distinct within an anchor; -1 pads. Every anchor has at least one.
        negatives: int64 [J] distinct sorted rows of `items`.
        negative_log_weight: float32 [J], added to the negatives' logits (logQ correction, `NegativeSampler.draw`).
        temperature: divides the products. Plus the products with statistics, they are the logits of items that are not
            counted.
        adjustment: float32 [R], added to the logits of items that are not counted; see `sampled_softmax`.
        counted: the items that have logits of their own; None without counters.
        statistics: of the items, as of each question; None without counters.
        weight: float32 [NA, P] factors of the labels' cross-entropies; None is 1.

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
        positive = logits_of(user, items, label, temperature, statistics)
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
        share = (label >= 0).to(full) if weight is None else weight.to(full).masked_fill(label < 0, 0.0)
        own, total = _columns(negatives, slots), share.sum(1) / len(label)
        values, time, sums = _of_negatives(user, negatives, statistics)
        order = time.argsort(stable=True)  # anchors that read the same statistics then lie together
        partition: Tensor = _WeightedPartition.apply(  # type: ignore[no-untyped-call]
            *(part[order] for part in (user, exact, own, total, time, sums)),
            items[negatives],
            negative_log_weight.to(full),
            temperature,
            values,
        )
    return partition - (share * positive.masked_fill(label < 0, 0.0)).sum() / len(label)


def log_others(
    user: Tensor,
    items: Tensor,
    left_out: Tensor,
    negatives: Tensor,
    negative_log_weight: Tensor,
    temperature: float,
    adjustment: Tensor | None = None,
    statistics: AskedStatistics | None = None,
) -> Tensor:
    """[NA]: log of the sum of e^s over the catalog less some items, estimated by the negatives as in `window_loss`.

    Args:
        left_out: int64 [NA, S] rows of `items`; -1 pads. The other arguments are those of `window_loss`.
    """
    full = torch.promote_types(user.dtype, torch.float32)
    if adjustment is not None:
        negative_log_weight = negative_log_weight + adjustment[negatives]
    user, log_weight = user.to(full), negative_log_weight.to(full)
    own, transposed = _columns(negatives, left_out), items.to(full)[negatives].t() / temperature
    values, time, of_pairs = _of_negatives(user, negatives, statistics)
    sums = []
    for begin in range(0, len(user), ROWS_PER_TILE):
        tile = slice(begin, begin + ROWS_PER_TILE)
        with torch.autocast(user.device.type, enabled=False):
            logits = _negative_logits(user[tile], transposed, log_weight, values, time[tile], of_pairs[tile])
        row, place = (own[tile] >= 0).nonzero(as_tuple=True)
        logits[row, own[tile][row, place]] = -torch.inf
        sums.append(logits.logsumexp(1))
    return torch.cat(sums)


def _of_negatives(user: Tensor, negatives: Tensor, statistics: AskedStatistics | None) -> tuple[Tensor, Tensor, Tensor]:
    """Of the negatives: statistics [T, F, J]; int64 [NA], which of the times each anchor reads; and sums over
    transitions [NA, K, J]. F = 0 and K = 0 without them."""
    no_sums = user.new_zeros(len(user), 0, len(negatives))
    if statistics is None:
        no_time = torch.zeros(len(user), dtype=torch.int64, device=user.device)
        return user.new_zeros(1, 0, len(negatives)), no_time, no_sums
    values = statistics.values[:, negatives].transpose(1, 2).to(user.dtype).contiguous()
    sums = no_sums if statistics.sums is None else statistics.sums[:, :, negatives].to(user.dtype)
    return values, statistics.time, sums


def _negative_logits(
    user: Tensor, transposed: Tensor, log_weight: Tensor, values: Tensor, time: Tensor, sums: Tensor
) -> Tensor:
    """[N, J] logits of negatives: inner products with N user vectors [N, M + F + K], plus log_weight [J].

    Args:
        transposed: [M, J] item vectors divided by the temperature.
        values: [T, F, J] statistics; time: int64 [N], fastest if equal times lie together.
        sums: [N, K, J].
    """
    first, last = len(transposed), user.shape[1] - sums.shape[1]
    logits = torch.addmm(log_weight, user[:, :first], transposed)
    for rows, each in _runs(time):
        logits[rows].addmm_(user[rows, first:last], values[each])
    if sums.shape[1]:
        logits.unsqueeze(1).baddbmm_(user[:, last:].unsqueeze(1), sums)
    return logits


def _runs(time: Tensor) -> Iterator[tuple[slice, int]]:
    """The ranges of equal values in int64 [N], with the value."""
    value, count = torch.unique_consecutive(time, return_counts=True)
    end = 0
    for each, size in zip(value.tolist(), count.tolist(), strict=True):
        yield slice(end, end + size), each
        end += size


def _columns(negatives: Tensor, slots: Tensor) -> Tensor:
    """int64 [NA, E]: the places of item rows int64 [NA, E] among the sorted negatives; -1 for padding and others."""
    column = torch.searchsorted(negatives, slots.contiguous()).clamp_(max=len(negatives) - 1)
    return torch.where((negatives[column] == slots) & (slots >= 0), column, -1)


def logits_of(
    user: Tensor, items: Tensor, label: Tensor, temperature: float, statistics: AskedStatistics | None
) -> Tensor:
    """[NA, P] logits of rows int64 [NA, P] of items [R, M], without counters. Arguments as in `window_loss`.

    Padding is -1, and has any finite number.
    """
    dim = items.shape[1]
    labeled = items.index_select(0, label.clamp(min=0).flatten()).view(*label.shape, -1)
    logits = torch.bmm(labeled, user[:, :dim].unsqueeze(2)).squeeze(2) / temperature
    if statistics is None:
        return logits
    return logits + torch.bmm(statistics.of_rows(label).to(user.dtype), user[:, dim:].unsqueeze(2)).squeeze(2)


class _WeightedPartition(torch.autograd.Function):
    """Sum over anchors of weight * log Z, and gradients, in one pass over tiles, without a whole [NA, J] matrix.

    user [NA, M + F + K], exact [NA, E] logits that count once (-inf in the padding), own int64 [NA, E] (columns of
    negatives that are among an anchor's exact items, or -1), weight [NA], time int64 [NA], sums [NA, K, J], negatives
    [J, M], log_weight [J], values [T, F, J].
    """

    @staticmethod
    def forward(
        ctx: Any,
        user: Tensor,
        exact: Tensor,
        own: Tensor,
        weight: Tensor,
        time: Tensor,
        sums: Tensor,
        negatives: Tensor,
        log_weight: Tensor,
        temperature: float,
        values: Tensor,
    ) -> Tensor:
        dim, last = negatives.shape[1], user.shape[1] - sums.shape[1]
        grad_user, grad_exact = torch.empty_like(user), torch.empty_like(exact)
        grad_negatives = torch.zeros_like(negatives)
        scaled, transposed = negatives / temperature, negatives.t() / temperature
        loss = user.new_zeros(())
        for begin in range(0, len(user), ROWS_PER_TILE):
            tile = slice(begin, begin + ROWS_PER_TILE)
            logits = _negative_logits(user[tile], transposed, log_weight, values, time[tile], sums[tile])
            row, place = (own[tile] >= 0).nonzero(as_tuple=True)
            logits[row, own[tile][row, place]] = -torch.inf
            top = torch.maximum(logits.amax(-1), exact[tile].amax(-1)).unsqueeze(-1)
            shares, exact_shares = logits.sub_(top).exp_(), (exact[tile] - top).exp_()
            total = shares.sum(-1) + exact_shares.sum(-1)
            loss += (weight[tile] * (total.log() + top.squeeze(-1))).sum()
            scale = (weight[tile] / total).unsqueeze(-1)
            grad_exact[tile] = exact_shares * scale
            shares *= scale
            grad_user[tile, :dim] = shares @ scaled
            for rows, each in _runs(time[tile]):
                grad_user[tile][rows, dim:last] = shares[rows] @ values[each].t()
            grad_user[tile, last:] = torch.bmm(sums[tile], shares.unsqueeze(2)).squeeze(2)
            grad_negatives.addmm_(shares.t(), user[tile, :dim], alpha=1 / temperature)
        ctx.save_for_backward(grad_user, grad_exact, grad_negatives)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_user, grad_exact, grad_negatives = ctx.saved_tensors
        of_inputs = grad_user * grad, grad_exact * grad, None, None, None, None, grad_negatives * grad
        return *of_inputs, None, None, None


# The losses at anchors: of the window that follows, and with counters also of the next item.
#
# Letters: NA anchors, S counted items per anchor, R item rows, M model dim, M' width of retrieval vectors.


def anchor_losses(
    model: RankingModel, batch: Batch, users: Tensor, item_vectors: Tensor, optim: OptimConfig
) -> dict[str, LossPart]:
    """The losses of a batch's anchors, by name: "window", and "next" if the model has counters.

    Args:
        model: scores counted items.
        batch: with anchors.
        users: [NA, M'] user vectors (`RankingModel.retrieval_users`), in the order of the anchors.
        item_vectors: [R, M] of the items `batch.rows`.
        optim: says which losses are trained.
    """
    anchors, negatives = batch.anchors, batch.negatives
    assert anchors is not None
    items, statistics = model.training_items(batch, item_vectors), AskedStatistics.of(batch)
    counted = _counted_slots(model, anchors, users, items, statistics)
    parts: dict[str, LossPart] = {}

    def loss(
        users: Tensor, label: Tensor, counted: CountedSlots | None, asked: AskedStatistics | None, weight: Tensor | None
    ) -> Tensor:
        of_batch = negatives.item, negatives.log_weight, model.temperature, batch.logit_adjustment
        return window_loss(users, items, label, *of_batch, counted, asked, weight)

    if counted is not None and planned(optim.next_weight, "optim.next_weight"):
        known = (anchors.next_item >= 0).nonzero().squeeze(-1)
        label, slots = anchors.next_item[known].unsqueeze(1), CountedSlots(counted.item[known], counted.logit[known])
        of_known = None if statistics is None else statistics.select(known)
        weight = None if anchors.next_weight is None else anchors.next_weight[known].unsqueeze(1)
        parts["next"] = LossPart(loss(users[known], label, slots, of_known, weight), len(known))
    if planned(optim.window_weight, "optim.window_weight"):
        # Labels are summed. Their mean number is a constant, so that anchors with many labels weigh more.
        mean = loss(users, anchors.item, counted, statistics, anchors.weight) / anchors.mean_labels
        parts["window"] = LossPart(mean, len(users))
    return parts


@torch.no_grad()
def start_counted(model: RankingModel, batch: Batch, vectors: Tensor, returning_share: float) -> None:
    """Start the head of counted items: before training, they have their share of the labels as their probability.

    Args:
        model: untrained.
        batch: with at least one anchor. The logits of other items are measured by its anchors.
        vectors: [R, M] vectors of the items `batch.rows` as the first step reads them.
        returning_share: `BatchSource.returning_share`.
    """
    anchors, negatives = batch.anchors, batch.negatives
    assert model.counted is not None and anchors is not None and anchors.counters is not None
    counted = anchors.counters.item
    others = log_others(
        model.anchor_users(batch, vectors),
        model.training_items(batch, vectors),
        counted,
        negatives.item,
        negatives.log_weight,
        model.temperature,
        batch.logit_adjustment,
        AskedStatistics.of(batch),
    )
    num_counted = (counted >= 0).sum(1)
    measured = (num_counted > 0) & others.isfinite()  # it is -inf if all items are counted
    if measured.any():
        model.counted.start(returning_share, num_counted[measured], others[measured])


def _counted_slots(
    model: RankingModel, anchors: BatchAnchors, users: Tensor, items: Tensor, statistics: AskedStatistics | None
) -> CountedSlots | None:
    """The counted items of anchors and their logits; None without counters."""
    slots = anchors.counters
    if model.counted is None:
        return None
    assert slots is not None and statistics is not None
    full = torch.promote_types(users.dtype, torch.float32)
    with torch.autocast(users.device.type, enabled=False):
        users = users.to(full)
        score = logits_of(users, items.to(full), slots.item, model.temperature, statistics)
        of_slots, unit = statistics.of_rows(slots.item), users[:, : model.config.dim]
        if anchors.pooled is not None:
            spaces = items[:, model.config.dim :].to(full) / model.temperature
            cosines = torch.einsum("ajr,asr->asj", anchors.pooled.to(full), spaces[slots.item.clamp(min=0)])
            of_slots = torch.cat([of_slots, cosines], -1)
        logit = model.counted(slots.codes, score, of_slots, slots.num_events, unit)
    return CountedSlots(slots.item, logit)
