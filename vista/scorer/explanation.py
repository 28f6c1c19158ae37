"""What `Scorer.explain` returns. C candidates, S seeds, L' events of the tail."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vista.model.ranking_model import UNKNOWN_ITEM
from vista.scorer.request import Request
from vista.scorer.serving_snapshot import ServingSnapshot


@dataclass(frozen=True, slots=True)
class Explanation:
    """The contributions to the scores of C candidates for one user (`vista.model.attribution`); float32.

    `summary.sum(1) + state + tail.sum(1) + own + counted + remainder` equals `value`.
    """

    value: NDArray[np.float32]
    """[C] the explained values: logits of a labeled task, whose sigmoid `score` returns, or the scores of `next`."""
    summary: NDArray[np.float32]
    """[C, S] contributions of the summary's tokens."""
    state: NDArray[np.float32]
    """[C] contribution of what candidates read of the state; 0 unless `model.target_attention=quasi_linear`."""
    tail: NDArray[np.float32]
    """[C, L'] contributions of the events of the tail, oldest first."""
    tail_items: list[Any]
    """[L'] ids of their items; None for items that the model does not know."""
    own: NDArray[np.float32]
    """[C] contribution of the candidate itself and the time of the request; for `next`, of the request alone, because
    all contributions are measured along the candidate's vector."""
    counted: NDArray[np.float32]
    """[C] contribution of the user's counters of the candidate; 0 if it is not counted. For `next`, it is the score of
    a counted item except for what the user vector adds, and the other contributions are shares of that."""
    counts: NDArray[np.float32]
    """[C, F] these counters as of the request, in the units and with the columns of `CounterSpec`; NaN if the candidate
    is not counted. F is 0 for a model without counters."""
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
        value, shares = snapshot.shares(request, rows, task)
        tail, own, counted = shares.tail.clone(), shares.query[0], shares.counters
        if len(shares.query) > 1:
            tail[:, -1] += shares.query[1]  # The query token of `next` starts from the newest event.
        valid = request.tail.valid[0]
        items = request.tail.item[0][valid]
        ids = snapshot.model.items.ids(np.maximum(items - 1, 0)).tolist()
        return cls(
            value.numpy(),
            shares.summary.numpy(),
            shares.state.numpy(),
            tail[:, valid].numpy(),
            [item_id if item != UNKNOWN_ITEM else None for item_id, item in zip(ids, items.tolist(), strict=True)],
            own.numpy(),
            counted.numpy(),
            np.zeros((len(rows), 0), np.float32) if request.counters is None else request.counters.counts(rows.numpy()),
            (value - (shares.summary.sum(1) + shares.state + tail[:, valid].sum(1) + own + counted)).numpy(),
        )
