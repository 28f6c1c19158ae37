"""What `Scorer.rank`, `Scorer.retrieve` and `Scorer.explain` return, and how it is made.

B users, C candidates of each, N candidates of all users together, V items of the vocabulary, S seeds, L' events of the
tail.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vista.arrays import Int, offsets_of
from vista.config.checks import OnMissing
from vista.errors import DeadlineError
from vista.examples.item_spaces import Pooled
from vista.log.vocabulary import Vocabulary
from vista.model import inference
from vista.model.attribution import Attribution, attribute
from vista.model.item_index import ItemIndex
from vista.model.layers import CandidateHead
from vista.model.ranking_model import NEXT_TASK, UNKNOWN_ITEM
from vista.model.target_attention import TargetContext
from vista.model.vista_model import VistaModel
from vista.scorer.request import (
    MAX_SCORES,
    Request,
    ids_of,
    item_rows,
    require_most,
)
from vista.scorer.serving_snapshot import Call, ServingSnapshot


@dataclass(frozen=True, slots=True)
class ItemFilter:
    """Arguments of `Scorer.rank` and `Scorer.retrieve`, as a caller passes them."""

    exclude: Any = ()
    exclude_tail: bool = False
    within: Any = None
    where: Any = None

    def excluded(self, snapshot: ServingSnapshot) -> Int:
        """Model rows of the items to leave out for all users, ascending."""
        return np.unique(item_rows(snapshot.model, ids_of(self.exclude, "exclude"), "exclude"))

    def allowed(self, call: Call) -> NDArray[np.bool_] | None:
        """bool [1 + V]: rows of the items that `within` and `where` allow; None if neither is given."""
        num_rows, mask = len(call.snapshot.model.items) + 1, None
        if self.where is not None:
            mask = call.snapshot.items_by_value.mask(self.where, num_rows)
        if self.within is not None:
            listed = np.zeros(num_rows, np.bool_)
            listed[call.rows(self.within, "within")] = True
            mask = listed if mask is None else mask & listed
        if mask is not None:
            mask[UNKNOWN_ITEM] = False
        return mask


@dataclass(frozen=True, slots=True)
class Ranking:
    """The best items for a user, best first."""

    items: NDArray[Any]
    """Ids as in the log."""
    scores: NDArray[np.float32]
    num_dropped: int
    """Candidates left out because the model does not know them or their score is not finite."""
    num_scored: int
    """Candidates that the model scored: with `retrieve`, also the user's own items."""


CATALOG_TILE = 1 << 16
"""Items of the catalog that are ranked at once, which bounds the memory and the time between checks of a time limit."""


def ranked(
    call: Call, task: str, top_k: int, candidates: Any, features: Any, wanted: ItemFilter, timeout_s: float | None
) -> Ranking:
    """The best items for the one user of a request; arguments, result and errors are those of `Scorer.rank`."""
    deadline = None if timeout_s is None else time.perf_counter() + timeout_s
    require_top_k(top_k, "top_k")
    snapshot, items = call.snapshot, call.snapshot.model.items
    left_out = np.zeros(len(items) + 1, bool)
    left_out[UNKNOWN_ITEM] = True
    num_unknown = 0
    if candidates is None:
        request = call.asked(features, None)
        parts: Iterable[Int] = _catalog_tiles(len(left_out))
    else:
        chosen = call.rows(candidates)
        num_unknown = int((chosen == UNKNOWN_ITEM).sum())
        request = call.asked(features, len(chosen))
        rows, first = np.unique(chosen, return_index=True)
        if request.features is not None:
            request = replace(request, features=request.features.of_candidates(first))
        parts = [rows]
    left_out[wanted.excluded(snapshot)] = True
    if wanted.exclude_tail:
        left_out[request.tail.item[request.tail.valid]] = True
    best_rows, best_scores = np.zeros(0, np.int64), np.zeros(0, np.float32)
    num_dropped, num_scored = num_unknown, 0
    for rows in parts:
        if deadline is not None and time.perf_counter() > deadline:
            raise DeadlineError(f"the ranking took longer than {timeout_s:g} s; rank fewer candidates, or use retrieve")
        given = None if len(rows) == len(left_out) else torch.from_numpy(rows)
        scores = snapshot.scores(request, given, [task])[task][0].numpy()
        if call.on_missing is OnMissing.nan and request.missing[0]:
            scores[:] = np.nan
        kept = ~left_out[rows]
        finite = kept & np.isfinite(scores)
        num_scored += int(kept.sum())
        num_dropped += int(kept.sum() - finite.sum())
        best_rows, best_scores = _best(
            np.concatenate([best_rows, rows[finite]]), np.concatenate([best_scores, scores[finite]]), top_k
        )
    call.tally(candidates=num_scored + num_unknown, unknown_candidates=num_unknown, dropped=num_dropped)
    return Ranking(items.ids(best_rows - 1), best_scores, num_dropped, num_scored)


def _catalog_tiles(num_rows: int) -> Iterator[Int]:
    """All model rows, int64, in ascending tiles."""
    for low in range(0, num_rows, CATALOG_TILE):
        yield np.arange(low, min(low + CATALOG_TILE, num_rows))


def best_items(items: Vocabulary, rows: Int, scores: NDArray[np.float32], top_k: int) -> Ranking:
    """The best of some items for a user, without those whose score is not finite.

    Args:
        items: of the model.
        rows: int64 [C] model rows, ascending and distinct.
        scores: [C].
        top_k: at least 1.
    """
    finite = np.isfinite(scores)
    best, of_best = _best(rows[finite], scores[finite], top_k)
    return Ranking(items.ids(best - 1), of_best, int((~finite).sum()), len(rows))


def _best(rows: Int, scores: NDArray[np.float32], top_k: int) -> tuple[Int, NDArray[np.float32]]:
    """The rows with the best finite scores, and these scores, best first."""
    best = torch.from_numpy(scores).topk(min(top_k, len(scores))).indices.numpy()
    return rows[best], scores[best]


def require_top_k(value: Any, name: str) -> None:
    """Require a number of items.

    Raises:
        TypeError, ValueError: it is not an integer, or below 1; the message names the argument.
    """
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise TypeError(f"{name}: must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: must be at least 1, got {value}")


def retrieved(
    call: Call, task: str, top_k: int, num_candidates: int, features: Any, wanted: ItemFilter
) -> list[Ranking]:
    """The best items for each user of a request: candidates from an index and the user's own items, ranked by stage 2.

    Arguments, result and errors are those of `Scorer.retrieve`.
    """
    snapshot, index = call.snapshot, call.snapshot.item_index()
    require_top_k(top_k, "top_k")
    require_top_k(num_candidates, "num_candidates")
    count = max(top_k, num_candidates)
    require_most(len(call.request) * count, MAX_SCORES, "num_candidates", "pairs of a user and a candidate")
    request = call.asked(features, None)
    excluded, allowed = wanted.excluded(snapshot), wanted.allowed(call)
    if allowed is None and len(excluded) > count:
        allowed = np.ones(len(snapshot.model.items) + 1, np.bool_)
    if allowed is not None:
        allowed[excluded] = False
        excluded = excluded[:0]
    candidates = _candidates(snapshot, index, request, count, allowed, excluded, exclude_tail=wanted.exclude_tail)
    if call.on_missing is OnMissing.nan:  # Their scores would be NaN, so that none could be returned.
        candidates = [rows[:0] if request.missing[user] else rows for user, rows in enumerate(candidates)]
    rows = np.concatenate([np.zeros(0, np.int64), *candidates])
    offsets = offsets_of(np.array([len(part) for part in candidates], np.int64))
    scores = snapshot.ragged_scores(request, rows, offsets, [task])[task].numpy()
    rankings = [
        best_items(snapshot.model.items, rows[first:stop], scores[first:stop], top_k)
        for first, stop in pairwise(offsets.tolist())
    ]
    call.tally(candidates=len(rows), dropped=sum(ranking.num_dropped for ranking in rankings))
    return rankings


def _candidates(
    snapshot: ServingSnapshot,
    index: ItemIndex,
    request: Request,
    count: int,
    allowed: NDArray[np.bool_] | None,
    excluded: Int,
    *,
    exclude_tail: bool,
) -> list[Int]:
    """Model rows of each user's candidates, ascending: the nearest items, and those of the counters and the tail.

    The followers of the user's newest items are compared with the nearest items, because an index does not know them.

    Args:
        count: nearest items and followers per user, besides their own.
        allowed: bool [1 + V] rows that may be returned; None allows all.
        excluded: rows that may not be returned, even if allowed.
        exclude_tail: whether to leave out the items of the user's tail too.
    """
    table, vectors = snapshot.retrieval_vectors(), snapshot.user_vectors(request)
    counters, tail, candidates = request.counters, request.tail, []
    transitions = snapshot.transitions(request)
    for user in range(len(request)):
        own = own_tail = np.unique(tail.item[user][tail.valid[user]]).astype(np.int64)
        if counters is not None:
            first, stop = counters.codes.offsets[user : user + 2].tolist()
            own = np.union1d(own, counters.codes.key[first:stop].astype(np.int64))
        left_out = np.union1d(excluded, own_tail if exclude_tail else own_tail[:0])
        # The user's own items may be among the nearest, and the scores of counted items do not follow from distances.
        others = np.union1d(left_out, own)
        nearest = index.nearest(table, vectors[user], count + len(others), allowed)
        nearest = nearest[~np.isin(nearest, others)][:count]
        if transitions is not None:
            of_user = transitions.select(slice(user, user + 1))
            found = np.setdiff1d(of_user.items(), others)
            both = np.union1d(nearest, found if allowed is None else found[allowed[found]])
            scores = snapshot.scores_of_others(vectors[user], of_user, both)
            nearest = both[scores.topk(min(count, len(both))).indices.cpu().numpy()]
        own = own[(own != UNKNOWN_ITEM) & ~np.isin(own, left_out)]
        candidates.append(np.union1d(nearest, own if allowed is None else own[allowed[own]]))
    return candidates


def explained(call: Call, task: str, candidates: Any, features: Any) -> Explanation:
    """What `Scorer.explain` returns for the one user of a request; arguments and errors are those of that."""
    call.snapshot.require_task(task)
    rows = call.rows(candidates)
    explanation = Explanation.of(call.snapshot, call.asked(features, len(rows)), torch.from_numpy(rows), task)
    call.tally(candidates=len(rows), unknown_candidates=int((rows == UNKNOWN_ITEM).sum()))
    return explanation


@dataclass(frozen=True, slots=True)
class Explanation:
    """The contributions to the scores of C candidates for one user (`vista.model.attribution`); float32.

    `summary.sum(1) + tail.sum(1) + own + counted + pooled + statistics + remainder` equals `value`.
    """

    value: NDArray[np.float32]
    """[C] the explained values: logits of a labeled task, whose sigmoid `score` returns, or the scores of `next`."""
    summary: NDArray[np.float32]
    """[C, S] contributions of the summary's tokens."""
    tail: NDArray[np.float32]
    """[C, L'] contributions of the events of the tail, oldest first."""
    tail_items: list[Any]
    """[L'] ids of their items; None for items that the model does not know."""
    own: NDArray[np.float32]
    """[C] contribution of the candidate itself, the features of the user, and the time and the features of the request;
    for `next`, of the user and the request alone, because all contributions are measured along the candidate's
    vector."""
    counted: NDArray[np.float32]
    """[C] contribution of the user's counters of the candidate and its categories; 0 if they are not counted. For
    `next`, it is the score of a counted item except for what the user vector adds, and the other contributions are
    shares of that; of other items, it is that of transitions from the user's newest items."""
    counts: NDArray[np.float32]
    """[C, G * F] these counters as of the request, in the units and with the F columns of `CounterSpec`: of the item,
    then of its value of each of `model.counter_categories`; NaN where it is not counted. G is 0 for a model without
    counters."""
    pooled: NDArray[np.float32]
    """[C] contribution of the user's pooled vectors: of how similar the candidate is to all that the user had, and to
    the newest of it; 0 without them."""
    statistics: NDArray[np.float32]
    """[C] contribution of how popular the candidate is among all users; 0 for a model that does not read it. The scores
    of `next` of counted items read it, and pooled vectors, together with their counters, so `counted` has all three."""
    remainder: NDArray[np.float32]
    """[C] the task's bias, and rounding."""

    @classmethod
    def of(cls, snapshot: ServingSnapshot, request: Request, rows: Tensor, task: str) -> Explanation:
        """Explain the scores of candidates for the one user of a request.

        Args:
            snapshot: what is in service.
            request: of one user.
            rows: model rows of the candidates, int64 [C].
            task: one of `snapshot.tasks`.
        """
        shares_of = _shares_of_next if task == NEXT_TASK else partial(_shares_of_task, task)
        value, shares, pooled, statistics = shares_of(snapshot, request, rows.to(snapshot.model.device))
        summary, tail, own, counted = shares.summary, shares.tail, shares.query[0], shares.counters
        valid = request.tail.valid[0]
        items = request.tail.item[0][valid]
        ids = snapshot.model.items.ids(np.maximum(items - 1, 0)).tolist()
        added = summary.sum(1) + tail[:, valid].sum(1) + own + counted + pooled + statistics
        return cls(
            value.cpu().numpy(),
            summary.cpu().numpy(),
            tail[:, valid].cpu().numpy(),
            [item_id if item != UNKNOWN_ITEM else None for item_id, item in zip(ids, items.tolist(), strict=True)],
            own.cpu().numpy(),
            counted.cpu().numpy(),
            np.zeros((len(rows), 0), np.float32) if request.counters is None else request.counters.counts(rows.numpy()),
            pooled.cpu().numpy(),
            statistics.cpu().numpy(),
            (value - added).cpu().numpy(),
        )


_Shares = tuple[Tensor, Attribution, Tensor, Tensor]
"""Values, the shares of what stage 2 reads and of counters, those of pooled vectors, and those of statistics."""


def _wide_shares(products: Tensor, dim: int, width: int) -> tuple[Tensor, Tensor]:
    """Shares of pooled vectors and of statistics, [C] each, in the products [C, M'] of retrieval vectors."""
    return products[:, dim : dim + width].sum(1), products[:, dim + width :].sum(1)


@torch.no_grad()
def _shares_of_next(snapshot: ServingSnapshot, request: Request, rows: Tensor) -> _Shares:
    """The scores [C] of `next`, and their contributions.

    What the query token starts from (`VistaModel.request_parts`) counts as its own share, or as a share of the newest
    event. The score of a counted item has two terms: one of its counters, and one of the user vector, which is broken
    down.
    """
    model, counters, dim = snapshot.model, request.counters, snapshot.model.config.dim
    context, seen = _inputs(model, request)
    gap = inference.request_gap(model, request.now, request.tail)
    items = snapshot.retrieval_vectors()[rows] / model.temperature
    user = inference.user_vectors(model, context, gap, request.pooled)
    value: Tensor = items @ user[0]
    of_pooled, of_statistics = _wide_shares(items * user, dim, model.config.space_dim)
    items = items[:, :dim]
    of_counters, transitions = torch.zeros_like(value), snapshot.transitions(request)
    sums = value.new_zeros(len(rows), 0) if transitions is None else transitions.sums(rows)[0].t()
    if transitions is not None:
        of_counters = inference.transition_scores(user, sums.t()[None])[0]
        value = value + of_counters
    if counters is not None:
        assert model.counted is not None
        codes = torch.from_numpy(counters.of_items(rows.cpu().numpy())[:, :-1]).to(model.device)
        is_counted, statistics = codes[:, 0] > 0, [model.item_statistics[rows], sums]
        if request.pooled is not None:
            pooled = request.pooled.expand(len(rows), -1, -1)
            statistics.append(inference.pooled_cosines(pooled, model.item_space[rows]))
        num_events = torch.from_numpy(counters.num_events).to(model.device)
        counted = model.counted.from_counters(codes[None], value[None], torch.cat(statistics, 1)[None], num_events)[0]
        of_counters = torch.where(is_counted, counted, of_counters)
        of_pooled, of_statistics = of_pooled.masked_fill(is_counted, 0), of_statistics.masked_fill(is_counted, 0)
        value = torch.where(is_counted, counted + model.counted.from_user(user[:, :dim]), value)
        items = torch.where(is_counted[:, None], model.counted.gate.weight * dim**0.5, items)

    gain = 1.0 if model.statistics is None else model.statistics.gain

    def head(out: Tensor) -> Tensor:
        length = out.detach().square().sum(-1, keepdim=True).sqrt()
        # The model of epoch 0 has outputs of 0.
        return (gain * out / length.clamp(min=1e-12) * items).sum(-1)

    parts = [part.reshape(1, -1).expand(len(rows), -1) for part in model.request_parts(seen, context)]
    shares = attribute(model.target_attention, parts, None if gap is None else gap[0], context, head)
    own, newest = shares.query
    tail = shares.tail.clone()
    tail[:, -1] += newest
    shares = replace(shares, tail=tail, query=[own], counters=of_counters)
    return value, shares, of_pooled, of_statistics


@torch.no_grad()
def _shares_of_task(task: str, snapshot: ServingSnapshot, request: Request, rows: Tensor) -> _Shares:
    """The logits [C] of a labeled task, and their contributions."""
    model, dim = snapshot.model, snapshot.model.config.dim
    assert model.task_head is not None
    context, seen = _inputs(model, request)
    features = None if request.features is None else request.features.rows  # one row, or one per candidate
    asked = inference.request_vectors(model, request.now, request.tail, features)
    asked = None if asked is None else asked[:, 0]
    index, codes, added = model.schema.tasks.index(task), None, None
    if request.counters is not None:
        of_items = request.counters.of_items(rows.cpu().numpy())
        both = snapshot.added_by(of_items)
        codes, added = torch.from_numpy(of_items).to(model.device)[None], (both[:, :dim], both[:, dim:])
    vectors, weight = model.item_vectors(rows), model.task_head.weight[index : index + 1]
    of_pairs = None if asked is None else asked.expand_as(vectors)[None]
    inputs = None
    if request.pooled is not None:
        cosines = inference.pooled_cosines(request.pooled.expand(len(rows), -1, -1), model.item_space[rows])
        inputs = model.candidate_inputs(cosines, rows)[None]
    value = model.candidate_logits(vectors[None], of_pairs, seen, context, codes=codes, inputs=inputs)[0, :, index]

    def head(out: Tensor) -> Tensor:
        return F.linear(out, weight)[:, 0]

    shares = attribute(model.target_attention, [vectors], asked, context, head, added)
    if model.candidate_head is None or (codes is None and inputs is None):
        return value, shares, torch.zeros_like(value), torch.zeros_like(value)
    of_head = (share[0, :, index] for share in _head_shares(model.candidate_head, codes, inputs))
    of_counters, of_statistics, of_pooled = of_head
    return value, replace(shares, counters=shares.counters + of_counters), of_pooled, of_statistics


def _head_shares(head: CandidateHead, codes: Tensor | None, inputs: Tensor | None) -> list[Tensor]:
    """What counters, statistics, and pooled vectors change of what a network adds to logits, [1, C, num_tasks] each.

    A network is not a sum of what it reads, so a share is the change when its part joins those before it. What the
    network gives without all three is the same for all candidates, and belongs to the remainder.
    """
    if inputs is None:
        logits = head.logits(codes)
        return [logits, torch.zeros_like(logits), torch.zeros_like(logits)]
    of_items = inputs.clone()
    of_items[..., : len(Pooled)] = 0
    none = None if codes is None else codes * 0
    given = (none, inputs * 0), (codes, inputs * 0), (codes, of_items), (codes, inputs)
    return [after - before for before, after in pairwise([head.logits(*parts) for parts in given])]


def _inputs(model: VistaModel, request: Request) -> tuple[TargetContext, Tensor]:
    """The context of a request, and the number of events that query tokens see."""
    context = inference.request_context(model, request.summary, request.tail, users=request.users)
    return context, torch.full((1,), model.config.tail_len, device=model.device)
