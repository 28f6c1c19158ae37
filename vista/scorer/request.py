"""A request, as the model reads it. B users, S seeds, M model dim."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vista.arrays import Int
from vista.model.features import EncodedRows
from vista.model.inference import PaddedTail
from vista.model.vista_model import VistaModel
from vista.scorer.pair_features import PairFeatures, of_users
from vista.scorer.request_counters import RequestCounters


@dataclass(frozen=True, slots=True)
class Request:
    """Summaries, tails, times and features of B users' requests."""

    summary: Tensor
    """float32 [B, S, M]."""
    tail: PaddedTail
    now: Int | None
    """[B] ms, or None if unknown."""
    missing: NDArray[np.bool_]
    """[B] users without a usable record, whose summary is that of an empty history."""
    generation: int = 0
    """Number of the store's generation from which the records come; 0 if there are none."""
    counters: RequestCounters | None = None
    """Of the B users; None without counters."""
    features: PairFeatures | None = None
    """Of the B requests; None if all are missing."""
    users: EncodedRows | None = None
    """Features of the B users; None if all are missing."""

    def __len__(self) -> int:
        return len(self.missing)

    def with_features(self, model: VistaModel, given: Any, candidates: int | Int | None) -> Request:
        """The same request with the features that a caller passes, of the request and of the users.

        Arguments and errors are those of `PairFeatures`. A name that both have belongs to the request.
        """
        of_request, own, users = model.request_features, model.user_features, self.users
        if isinstance(given, Mapping) and own is not None and users is not None:
            known = {} if of_request is None else of_request.values
            of_user = {name: values for name, values in given.items() if name in own.values and name not in known}
            users = of_users(own, users, of_user) if of_user else users
            given = {name: values for name, values in given.items() if name not in of_user}
        return replace(self, users=users, features=PairFeatures.of(of_request, given, len(self), candidates))

    def select(self, users: slice | Int) -> Request:
        """Some of the users, or all of them in another order."""
        now = None if self.now is None else self.now[users]
        counters = None if self.counters is None else self.counters.select(users)
        features = None if self.features is None else self.features.select(users)
        own = None if self.users is None else self.users.select(users)
        summary, tail, missing = self.summary[users], self.tail.select(users), self.missing[users]
        return Request(summary, tail, now, missing, self.generation, counters, features, own)
