"""What `Scorer.rank` and `Scorer.retrieve` return, and how it is made.

B users, C candidates of each, N candidates of all users together, V items of the vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int, offsets_of
from vista.config.checks import OnMissing
from vista.errors import DeadlineError
from vista.log.vocabulary import Vocabulary
from vista.model.serving_model import NEXT_TASK, UNKNOWN_ITEM, follower_rows
from vista.scorer.request import MAX_SCORES, Request, ids_of, item_rows, require_most
from vista.scorer.serving_snapshot import Call, ServingSnapshot

if TYPE_CHECKING:
    from vista.model.item_index import ItemIndex


@dataclass(frozen=True, slots=True)
class ItemFilter:
    """Arguments of `Scorer.rank` and `Scorer.retrieve`, as a caller passes them."""

    exclude: Any = ()
    exclude_tail: bool = False
    within: Any = None
    where: Any = None

    def excluded(self, snapshot: ServingSnapshot) -> Int:
        """Model rows of the items to leave out for all users, ascending."""
        return np.unique(item_rows(snapshot.served, ids_of(self.exclude, "exclude"), "exclude"))

    def allowed(self, call: Call) -> NDArray[np.bool_] | None:
        """bool [1 + V]: rows of the items that `within` and `where` allow; None if neither is given."""
        num_rows, mask = len(call.snapshot.served.items) + 1, None
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


POOL = 10
"""With diversity, a list is chosen from this many times as many of the best items."""


def ranked(
    call: Call,
    task: str,
    top_k: int,
    candidates: Any,
    features: Any,
    wanted: ItemFilter,
    timeout_s: float | None,
    diversity: Any = 0.0,
) -> Ranking:
    """The best items for the one user of a request; arguments, result and errors are those of `Scorer.rank`."""
    deadline = None if timeout_s is None else time.perf_counter() + timeout_s

    def require_time() -> None:
        if deadline is not None and time.perf_counter() > deadline:
            raise DeadlineError(f"the ranking took longer than {timeout_s:g} s; rank fewer candidates, or use retrieve")

    require_top_k(top_k, "top_k")
    if not isinstance(diversity, (int, float, np.integer, np.floating)):
        raise TypeError(f"diversity: must be a number, got {diversity!r}")
    if not 0 <= diversity <= 1:
        raise ValueError(f"diversity: must lie in [0, 1], got {diversity}")
    snapshot, items = call.snapshot, call.snapshot.served.items
    vectors = snapshot.retrieval_vectors() if diversity else None
    most = int(top_k) if vectors is None else POOL * int(top_k)
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
        require_time()
        given = None if len(rows) == len(left_out) else rows
        scores = snapshot.scores(request, given, [task])[task][0]
        if call.on_missing is OnMissing.nan and request.missing[0]:
            scores[:] = np.nan
        kept = ~left_out[rows]
        finite = kept & np.isfinite(scores)
        num_scored += int(kept.sum())
        num_dropped += int(kept.sum() - finite.sum())
        best_rows, best_scores = _best(
            np.concatenate([best_rows, rows[finite]]), np.concatenate([best_scores, scores[finite]]), most
        )
    if vectors is not None:
        chosen = diverse(best_scores, vectors[best_rows], top_k, float(diversity), require_time)
        best_rows, best_scores = best_rows[chosen], best_scores[chosen]
    call.tally(candidates=num_scored + num_unknown, unknown_candidates=num_unknown, dropped=num_dropped)
    return Ranking(items.ids(best_rows - 1), best_scores, num_dropped, num_scored)


def diverse(
    scores: NDArray[np.float32],
    vectors: NDArray[np.float32],
    top_k: int,
    diversity: float,
    before_each: Callable[[], None] = lambda: None,
) -> Int:
    """Places of items, chosen one by one by maximal marginal relevance (Carbonell and Goldstein, 1998).

    The next item has the largest (1 - diversity) * relevance - diversity * similarity: the score, scaled to [0, 1], and
    the largest cosine with an item that was chosen before.

    Args:
        scores: [P] finite, best first.
        vectors: [P, M'] of the items.
        before_each: called before each choice.

    Returns:
        int64 [min(top_k, P)].
    """
    relevance = scores.astype(np.float64) - (scores[-1] if len(scores) else 0.0)
    relevance /= max(float(relevance[0]), 1e-12) if len(scores) else 1.0
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    value, nearest = (1 - diversity) * relevance, np.full(len(scores), -1.0)
    chosen: list[int] = []
    while len(chosen) < min(top_k, len(scores)):
        before_each()
        place = int(np.argmax(value - diversity * nearest))
        chosen.append(place)
        value[place] = -np.inf
        nearest = np.maximum(nearest, unit @ unit[place])
    return np.array(chosen, np.int64)


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
    if top_k < len(scores):
        chosen = np.sort(np.argpartition(scores, len(scores) - top_k)[len(scores) - top_k :])
        rows, scores = rows[chosen], scores[chosen]
    best = np.argsort(-scores, kind="stable")
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
        allowed = np.ones(len(snapshot.served.items) + 1, np.bool_)
    if allowed is not None:
        allowed[excluded] = False
        excluded = excluded[:0]
    candidates = _candidates(snapshot, index, request, count, allowed, excluded, exclude_tail=wanted.exclude_tail)
    if call.on_missing is OnMissing.nan:  # Their scores would be NaN, so that none could be returned.
        candidates = [rows[:0] if request.missing[user] else rows for user, rows in enumerate(candidates)]
    rows = np.concatenate([np.zeros(0, np.int64), *candidates])
    offsets = offsets_of(np.array([len(part) for part in candidates], np.int64))
    scores = snapshot.ragged_scores(request, rows, offsets, [task])[task]
    rankings = [
        best_items(snapshot.served.items, rows[first:stop], scores[first:stop], top_k)
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
    table, vectors = snapshot.searched_vectors(), snapshot.user_vectors(request)
    counters, tail, nearest, of_users = request.counters, request.tail, [], []
    followers = follower_rows(snapshot.served, tail.item)
    for user in range(len(request)):
        own = own_tail = np.unique(tail.item[user][tail.valid[user]]).astype(np.int64)
        if counters is not None:
            first, stop = counters.codes.offsets[user : user + 2].tolist()
            own = np.union1d(own, counters.codes.key[first:stop].astype(np.int64))
        left_out = np.union1d(excluded, own_tail if exclude_tail else own_tail[:0])
        # The user's own items may be among the nearest, and the scores of counted items do not follow from distances.
        others = np.union1d(left_out, own)
        found = index.nearest(table, vectors[user], count + len(others), allowed)
        found = found[~np.isin(found, others)][:count]
        following = np.setdiff1d(followers[user], others)
        nearest.append(np.union1d(found, following if allowed is None else following[allowed[following]]))
        own = own[(own != UNKNOWN_ITEM) & ~np.isin(own, left_out)]
        of_users.append(own if allowed is None else own[allowed[own]])
    if any(len(rows) > count for rows in nearest):
        rows, offsets = np.concatenate(nearest), offsets_of(np.array([len(part) for part in nearest], np.int64))
        scores = snapshot.ragged_scores(request, rows, offsets, [NEXT_TASK])[NEXT_TASK]
        bounds = pairwise(offsets.tolist())
        nearest = [_best(rows[first:stop], scores[first:stop], count)[0] for first, stop in bounds]
    return [np.union1d(*parts) for parts in zip(nearest, of_users, strict=True)]
