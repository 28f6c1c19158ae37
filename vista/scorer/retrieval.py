"""The best items of a large catalog: candidates from an index and the user's own items, ranked by stage 2.

B users, V items of the vocabulary, N candidates of all users together.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int, offsets_of
from vista.config.choices import OnMissing
from vista.model.item_index import ItemIndex
from vista.model.ranking_model import UNKNOWN_ITEM
from vista.scorer.item_filter import ItemFilter
from vista.scorer.ranking import Ranking, best_items, require_top_k
from vista.scorer.request import Request
from vista.scorer.request_arguments import MAX_SCORES, require_most
from vista.scorer.scorer_stats import StatsRecorder
from vista.scorer.serving_snapshot import ServingSnapshot


def retrieved(
    snapshot: ServingSnapshot,
    request: Request,
    task: str,
    top_k: int,
    num_candidates: int,
    wanted: ItemFilter,
    features: Any,
    on_missing: OnMissing,
    recorder: StatsRecorder,
) -> list[Ranking]:
    """The best items for each user of a request; arguments, result and errors are those of `Scorer.retrieve`."""
    index = snapshot.item_index()
    require_top_k(top_k, "top_k")
    require_top_k(num_candidates, "num_candidates")
    count = max(top_k, num_candidates)
    require_most(len(request) * count, MAX_SCORES, "num_candidates", "pairs of a user and a candidate")
    request = request.with_features(snapshot.model, features, None)
    excluded, allowed = wanted.excluded(snapshot), wanted.allowed(snapshot, on_missing)
    if allowed is None and len(excluded) > count:
        allowed = np.ones(len(snapshot.model.items) + 1, np.bool_)
    if allowed is not None:
        allowed[excluded] = False
        excluded = excluded[:0]
    candidates = _candidates(snapshot, index, request, count, allowed, excluded, exclude_tail=wanted.exclude_tail)
    if on_missing is OnMissing.nan:  # Their scores would be NaN, so that none could be returned.
        candidates = [rows[:0] if request.missing[user] else rows for user, rows in enumerate(candidates)]
    rows = np.concatenate([np.zeros(0, np.int64), *candidates])
    offsets = offsets_of(np.array([len(part) for part in candidates], np.int64))
    scores = snapshot.ragged_scores(request, rows, offsets, [task])[task].numpy()
    rankings = [
        best_items(snapshot.model.items, rows[first:stop], scores[first:stop], top_k)
        for first, stop in pairwise(offsets.tolist())
    ]
    recorder.add(candidates=len(rows), dropped=sum(ranking.num_dropped for ranking in rankings))
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

    Args:
        count: nearest items per user, besides their own.
        allowed: bool [1 + V] rows that may be returned; None allows all.
        excluded: rows that may not be returned, even if allowed.
        exclude_tail: whether to leave out the items of the user's tail too.
    """
    table, vectors = snapshot.retrieval_vectors(), snapshot.user_vectors(request)
    counters, tail, candidates = request.counters, request.tail, []
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
        own = own[(own != UNKNOWN_ITEM) & ~np.isin(own, left_out)]
        candidates.append(np.union1d(nearest, own if allowed is None else own[allowed[own]]))
    return candidates
