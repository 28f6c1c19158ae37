"""What `Scorer.explain` returns. C candidates, S seeds, L' events of the tail."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vista.config.choices import OnMissing
from vista.model import inference
from vista.model.attribution import Attribution, attribute
from vista.model.ranking_model import NEXT_TASK, UNKNOWN_ITEM
from vista.model.target_attention import TargetContext
from vista.model.vista_model import VistaModel
from vista.scorer.candidate_set import CandidateSet
from vista.scorer.request import Request
from vista.scorer.scorer_stats import StatsRecorder
from vista.scorer.serving_snapshot import ServingSnapshot


def explained(
    snapshot: ServingSnapshot,
    request: Request,
    candidates: Any,
    features: Any,
    task: str,
    on_missing: OnMissing,
    recorder: StatsRecorder,
) -> Explanation:
    """What `Scorer.explain` returns for the one user of a request; arguments and errors are those of that."""
    snapshot.require_task(task)
    rows = CandidateSet.of(snapshot, candidates, on_missing).rows
    if rows.ndim != 1:
        raise ValueError(f"candidates: must be of shape [C], got {rows.shape}")
    asked = request.with_features(snapshot.model, features, len(rows))
    explanation = Explanation.of(snapshot, asked, torch.from_numpy(rows), task)
    recorder.add(candidates=len(rows), unknown_candidates=int((rows == UNKNOWN_ITEM).sum()))
    return explanation


@dataclass(frozen=True, slots=True)
class Explanation:
    """The contributions to the scores of C candidates for one user (`vista.model.attribution`); float32.

    `summary.sum(1) + state + tail.sum(1) + own + counted + remainder` equals `value`.
    """

    value: NDArray[np.float32]
    """[C] the explained values: logits of a labeled task, whose sigmoid `score` returns, or the scores of `next`."""
    summary: NDArray[np.float32]
    """[C, S] contributions of the summary's tokens. For `next`, that of the mean token includes what it adds to the
    request token."""
    state: NDArray[np.float32]
    """[C] contribution of what candidates read of the state; 0 unless `model.target_attention=quasi_linear`."""
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
    shares of that."""
    counts: NDArray[np.float32]
    """[C, G * F] these counters as of the request, in the units and with the F columns of `CounterSpec`: of the item,
    then of its value of each of `model.counter_categories`; NaN where it is not counted. G is 0 for a model without
    counters."""
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
        value, shares = shares_of(snapshot, request, rows.to(snapshot.model.device))
        summary, tail, own, counted = shares.summary, shares.tail, shares.query[0], shares.counters
        valid = request.tail.valid[0]
        items = request.tail.item[0][valid]
        ids = snapshot.model.items.ids(np.maximum(items - 1, 0)).tolist()
        return cls(
            value.cpu().numpy(),
            summary.cpu().numpy(),
            shares.state.cpu().numpy(),
            tail[:, valid].cpu().numpy(),
            [item_id if item != UNKNOWN_ITEM else None for item_id, item in zip(ids, items.tolist(), strict=True)],
            own.cpu().numpy(),
            counted.cpu().numpy(),
            np.zeros((len(rows), 0), np.float32) if request.counters is None else request.counters.counts(rows.numpy()),
            (value - (summary.sum(1) + shares.state + tail[:, valid].sum(1) + own + counted)).cpu().numpy(),
        )


@torch.no_grad()
def _shares_of_next(snapshot: ServingSnapshot, request: Request, rows: Tensor) -> tuple[Tensor, Attribution]:
    """The scores [C] of `next`, and their contributions.

    What the query token starts from (`VistaModel.request_parts`) counts as its own share, or as a share of the newest
    event or of the mean token. The score of a counted item has two terms: one of its
    counters, and one of the user vector, which is broken down.
    """
    model, counters = snapshot.model, request.counters
    context, seen = _inputs(model, request)
    gap = inference.request_gap(model, request.now, request.tail)
    items = snapshot.retrieval_vectors()[rows] / model.config.softmax_temperature
    user = inference.user_vectors(model, context, gap)
    value: Tensor = items @ user[0]
    of_counters = torch.zeros_like(value)
    if counters is not None:
        assert model.counted is not None
        codes = torch.from_numpy(counters.of_items(rows.cpu().numpy())[:, :-1]).to(model.device)
        is_counted, popularity = codes[:, 0] > 0, model.item_popularity[rows]
        num_events = torch.from_numpy(counters.num_events).to(model.device)
        counted = model.counted.from_counters(codes[None], value[None], popularity[None], num_events)[0]
        of_counters = torch.where(is_counted, counted, 0.0)
        value = torch.where(is_counted, counted + model.counted.from_user(user), value)
        items = torch.where(is_counted[:, None], model.counted.gate.weight * user.shape[-1] ** 0.5, items)

    def head(out: Tensor) -> Tensor:
        length = out.detach().square().sum(-1, keepdim=True).sqrt()
        unit = out / length
        return ((unit if model.popularity is None else model.popularity(unit)) * items).sum(-1)

    parts = [part.reshape(1, -1).expand(len(rows), -1) for part in model.request_parts(seen, context)]
    shares = attribute(model.target_attention, parts, None if gap is None else gap[0], context, head)
    own, newest, *mean = shares.query
    summary, tail = shares.summary.clone(), shares.tail.clone()
    tail[:, -1] += newest
    if mean:
        summary[:, 0] += mean[0]
    return value, replace(shares, summary=summary, tail=tail, query=[own], counters=of_counters)


@torch.no_grad()
def _shares_of_task(task: str, snapshot: ServingSnapshot, request: Request, rows: Tensor) -> tuple[Tensor, Attribution]:
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
    value = model.candidate_logits(vectors[None], of_pairs, seen, context, codes=codes)[0, :, index]

    def head(out: Tensor) -> Tensor:
        return F.linear(out, weight)[:, 0]

    shares = attribute(model.target_attention, [vectors], asked, context, head, added)
    if codes is not None and model.candidate_counters is not None:
        shares = replace(shares, counters=shares.counters + model.candidate_counters.logits(codes)[0, :, index])
    return value, shares


def _inputs(model: VistaModel, request: Request) -> tuple[TargetContext, Tensor]:
    """The context of a request, and the number of events that query tokens see."""
    context = inference.request_context(model, request.summary, request.tail, users=request.users)
    return context, torch.full((1,), model.config.tail_len, device=model.device)
