"""What `Scorer.rank` returns, and how it is made."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vista.config.choices import OnMissing
from vista.model.ranking_model import UNKNOWN_ITEM
from vista.scorer.candidate_set import CandidateSet
from vista.scorer.request import Request
from vista.scorer.request_arguments import ids_of, item_rows
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


def ranked(
    snapshot: ServingSnapshot,
    request: Request,
    task: str,
    top_k: int,
    candidates: Any,
    features: Any,
    exclude: Any,
    on_missing: OnMissing,
    recorder: StatsRecorder,
    *,
    exclude_tail: bool,
) -> Ranking:
    """The best items for the one user of a request; arguments, result and errors are those of `Scorer.rank`."""
    if not isinstance(top_k, (int, np.integer)) or isinstance(top_k, bool):
        raise TypeError(f"top_k: must be an integer, got {top_k!r}")
    if top_k < 1:
        raise ValueError(f"top_k: must be at least 1, got {top_k}")
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
    left_out[item_rows(snapshot.model, ids_of(exclude, "exclude"), "exclude")] = True
    if exclude_tail:
        left_out[request.tail.item[request.tail.valid]] = True
    given = None if rows is None else torch.from_numpy(rows)
    scores = snapshot.scores(request, given, [task])[task][0].numpy()
    if on_missing is OnMissing.nan and request.missing[0]:
        scores[:] = np.nan
    kept = ~(left_out if rows is None else left_out[rows])
    rows = np.flatnonzero(kept) if rows is None else rows[kept]
    scores = scores[kept]
    finite = np.isfinite(scores)
    rows, scores = rows[finite], scores[finite]
    best = torch.from_numpy(scores).topk(min(top_k, len(scores))).indices.numpy()
    num_dropped = num_unknown + int((~finite).sum())
    recorder.add(candidates=len(finite) + num_unknown, unknown_candidates=num_unknown, dropped=num_dropped)
    return Ranking(items.ids(rows[best] - 1), scores[best], num_dropped)
