"""Scores of the candidates that a caller names: looked up, scored, and returned in the caller's form."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from vista.config.choices import OnMissing
from vista.model.ranking_model import UNKNOWN_ITEM
from vista.scorer.candidate_set import CandidateSet
from vista.scorer.request import Request
from vista.scorer.request_arguments import MAX_SCORES, ragged_offsets, require_most, split_ragged
from vista.scorer.scorer_stats import StatsRecorder
from vista.scorer.serving_snapshot import ServingSnapshot


def predict(
    snapshot: ServingSnapshot,
    request: Request,
    candidates: Any,
    features: Any,
    tasks: list[str],
    on_missing: OnMissing,
    recorder: StatsRecorder,
) -> dict[str, Any]:
    """Scores of some tasks; arguments, result and errors are those of `Scorer.predict`."""
    values, given = split_ragged(candidates)
    rows, missing = CandidateSet.of(snapshot, values, on_missing).rows, request.missing
    if given is not None:
        offsets = ragged_offsets(rows, given, len(request))
        request = request.with_features(snapshot.model, features, offsets)
        scores = snapshot.ragged_scores(request, rows, offsets, tasks)
        missing = np.repeat(missing, np.diff(offsets))
    else:
        if rows.ndim == 2 and len(rows) != len(request):
            raise ValueError(
                f"candidates: shape {rows.shape} does not match {len(request)} users; pass [C], or one row per user"
            )
        require_most(len(request) * rows.shape[-1], MAX_SCORES, "candidates", "pairs of a user and a candidate")
        request = request.with_features(snapshot.model, features, rows.shape[-1])
        scores = snapshot.scores(request, torch.from_numpy(rows), tasks)
        missing = missing[:, None]
    unknown = np.broadcast_to(rows == UNKNOWN_ITEM, scores[tasks[0]].shape)
    if on_missing is OnMissing.nan:
        nobody = torch.from_numpy(missing | unknown)
        scores = {task: cells.masked_fill(nobody, float("nan")) for task, cells in scores.items()}
    recorder.add(candidates=unknown.size, unknown_candidates=int(unknown.sum()))
    if isinstance(values, Tensor):
        return {task: cells.to(values.device) for task, cells in scores.items()}
    return {task: cells.numpy() for task, cells in scores.items()}
