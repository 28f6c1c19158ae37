"""What `Scorer.rank` returns, and how it is made."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vista.arrays import Int
from vista.config.choices import OnMissing
from vista.log.vocabulary import Vocabulary
from vista.model.ranking_model import UNKNOWN_ITEM
from vista.scorer.candidate_set import CandidateSet
from vista.scorer.item_filter import ItemFilter
from vista.scorer.request import Request
from vista.scorer.scorer_stats import StatsRecorder
from vista.scorer.serving_snapshot import ServingSnapshot


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


def ranked(
    snapshot: ServingSnapshot,
    request: Request,
    task: str,
    top_k: int,
    candidates: Any,
    features: Any,
    wanted: ItemFilter,
    on_missing: OnMissing,
    recorder: StatsRecorder,
) -> Ranking:
    """The best items for the one user of a request; arguments, result and errors are those of `Scorer.rank`."""
    require_top_k(top_k, "top_k")
    items = snapshot.model.items
    left_out = np.zeros(len(items) + 1, bool)
    left_out[UNKNOWN_ITEM] = True
    num_unknown, rows = 0, None
    if candidates is None:
        request = request.with_features(snapshot.model, features, None)
    else:
        chosen = CandidateSet.of(snapshot, candidates, on_missing).rows
        if chosen.ndim != 1:
            raise ValueError(f"candidates: must be of shape [C], got {chosen.shape}")
        num_unknown = int((chosen == UNKNOWN_ITEM).sum())
        request = request.with_features(snapshot.model, features, len(chosen))
        rows, first = np.unique(chosen, return_index=True)
        if request.features is not None:
            request = replace(request, features=request.features.of_candidates(first))
    left_out[wanted.excluded(snapshot)] = True
    if wanted.exclude_tail:
        left_out[request.tail.item[request.tail.valid]] = True
    given = None if rows is None else torch.from_numpy(rows)
    scores = snapshot.scores(request, given, [task])[task][0].numpy()
    if on_missing is OnMissing.nan and request.missing[0]:
        scores[:] = np.nan
    kept = ~(left_out if rows is None else left_out[rows])
    rows = np.flatnonzero(kept) if rows is None else rows[kept]
    scores = scores[kept]
    ranking = best_items(items, rows, scores, top_k, num_unknown)
    num_scored = len(scores) + num_unknown
    recorder.add(candidates=num_scored, unknown_candidates=num_unknown, dropped=ranking.num_dropped)
    return ranking


def best_items(items: Vocabulary, rows: Int, scores: NDArray[np.float32], top_k: int, num_unknown: int = 0) -> Ranking:
    """The best of some items for a user, without those whose score is not finite.

    Args:
        items: of the model.
        rows: int64 [C] model rows, ascending and distinct, so that equal scores always have the same order.
        scores: [C].
        top_k: at least 1.
        num_unknown: candidates that the caller left out because the model does not know them.
    """
    finite = np.isfinite(scores)
    num_dropped = num_unknown + int((~finite).sum())
    rows, scores = rows[finite], scores[finite]
    best = torch.from_numpy(scores).topk(min(top_k, len(scores))).indices.numpy()
    return Ranking(items.ids(rows[best] - 1), scores[best], num_dropped, len(finite))


def require_top_k(value: Any, name: str) -> None:
    """Require a number of items.

    Raises:
        TypeError, ValueError: it is not an integer, or below 1; the message names the argument.
    """
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise TypeError(f"{name}: must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: must be at least 1, got {value}")
