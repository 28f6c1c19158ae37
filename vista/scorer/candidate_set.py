"""Candidates that are looked up once and scored many times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.config.choices import OnMissing
from vista.errors import UnknownItemError
from vista.model.ranking_model import UNKNOWN_ITEM
from vista.scorer.request_arguments import MAX_IDS, id_array, item_rows, length_of, require_most
from vista.scorer.serving_snapshot import ServingSnapshot


@dataclass(frozen=True, slots=True)
class CandidateSet:
    """Candidates encoded by `Scorer.encode`, which any number of calls can use."""

    rows: NDArray[np.int64]
    """Model rows, [C] (the same for every user) or [B, C]."""
    vocabulary: tuple[int, str]
    """Number of items and digest of the vocabulary that the rows refer to."""

    @classmethod
    def of(
        cls, snapshot: ServingSnapshot, candidates: Any, on_missing: OnMissing, name: str = "candidates"
    ) -> CandidateSet:
        """Look up item ids [C] or [B, C] in the vocabulary in service.

        A `CandidateSet` of it, or of its first items, is returned as it is: items that are added to a model come last.

        Raises:
            UnknownItemError: an id is unknown, and `on_missing` is "raise".
            ValueError, TypeError: the ids are not integers or strings as in the log, have the wrong shape, or are too
                many, or the set was encoded for another vocabulary.
        """
        if isinstance(candidates, CandidateSet):
            if not snapshot.begins_with(*candidates.vocabulary):
                raise ValueError(f"{name}: were encoded for another model; call encode again after a reload")
            return candidates
        require_most(length_of(candidates), MAX_IDS, name)
        try:
            ids = id_array(candidates, name)
        except ValueError as error:
            raise ValueError(f"{error}; pass (values, offsets) instead") from None
        if ids.ndim not in (1, 2):
            raise ValueError(f"{name}: must be of shape [C] or [B, C], got {ids.shape}")
        require_most(ids.size, MAX_IDS, name)
        rows = item_rows(snapshot.model, ids.ravel(), name).reshape(ids.shape)
        if on_missing is OnMissing.error and (rows == UNKNOWN_ITEM).any():
            unknown = ids[rows == UNKNOWN_ITEM][:5].tolist()
            raise UnknownItemError(
                f"{name}: items {unknown} are not in the model's vocabulary; train on a newer log, or pass "
                "on_missing='empty'"
            )
        return cls(rows, snapshot.vocabulary)
