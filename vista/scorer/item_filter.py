"""Filters of the items that a request may return. Letters: V items of the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int
from vista.config.choices import OnMissing
from vista.model.ranking_model import UNKNOWN_ITEM
from vista.scorer.candidate_set import CandidateSet
from vista.scorer.request_arguments import ids_of, item_rows
from vista.scorer.serving_snapshot import ServingSnapshot


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

    def allowed(self, snapshot: ServingSnapshot, on_missing: OnMissing) -> NDArray[np.bool_] | None:
        """bool [1 + V]: rows of the items that `within` and `where` allow; None if neither is given."""
        num_rows, mask = len(snapshot.model.items) + 1, None
        if self.where is not None:
            mask = snapshot.items_by_value.mask(self.where, num_rows)
        if self.within is not None:
            rows = CandidateSet.of(snapshot, self.within, on_missing, "within").rows
            if rows.ndim != 1:
                raise ValueError(f"within: must be of shape [C], got {rows.shape}")
            listed = np.zeros(num_rows, np.bool_)
            listed[rows] = True
            mask = listed if mask is None else mask & listed
        if mask is not None:
            mask[UNKNOWN_ITEM] = False
        return mask
