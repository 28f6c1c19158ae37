"""EASE (Steck, WWW 2019, arXiv 1905.03375): a linear item-item model in closed form, over the most frequent items."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from vista.arrays import Floats, Int
from vista.evaluation.baselines.popularity import tie_breaker
from vista.examples.frequency import item_counts
from vista.log.event_log import EventLog

_USERS_PER_BLOCK = 1024


class Ease:
    """x B of the user's items x (0 or 1), with B_ij = -P_ij / P_jj, B_jj = 0, P = (Xᵀ X + ridge)⁻¹.

    All other items rank below, by popularity.
    """

    name = "EASE"

    def __init__(self, *, num_items: int = 5000, ridge: float = 1000.0) -> None:
        """
        Args:
            num_items: most items of the model; P needs the square of it in memory, and the cube in time.
            ridge: added to the diagonal of Xᵀ X.
        """
        self._num_items, self._ridge = num_items, ridge
        self._weights: Floats | None = None

    def choose(self, value: float) -> None:
        """Set the ridge."""
        self._ridge, self._weights = value, None

    def fit(self, log: EventLog, counts: Int, rng: np.random.Generator) -> None:
        self._log = log
        popularity = item_counts(log, counts)
        self._tie = tie_breaker(popularity)
        self._items = np.sort(np.argsort(-popularity, kind="stable")[: self._num_items])
        size = len(self._items)
        self._column = np.full(log.num_items, -1)
        self._column[self._items] = np.arange(size)
        self._gram, self._weights = np.zeros((size, size)), None
        for begin in range(0, log.num_users, _USERS_PER_BLOCK):
            users = np.arange(begin, min(begin + _USERS_PER_BLOCK, log.num_users))
            had = self._had(users, counts[users]).astype(np.float32)
            self._gram += had.T @ had

    def scores(self, user: Int, seen: Int, now: Int | None) -> Floats:
        if self._weights is None:
            self._weights = self._solved()
        known = self._had(user, seen).astype(np.float64) @ self._weights
        out = np.tile(self._tie, (len(user), 1))
        out += known.min(axis=1, keepdims=True) - 1
        out[:, self._items] = known
        return out

    def _solved(self) -> Floats:
        """B."""
        regular = torch.from_numpy(self._gram + self._ridge * np.eye(len(self._gram)))
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(regular)).numpy()
        weights: Floats = inverse / -np.diag(inverse)
        np.fill_diagonal(weights, 0)
        return weights

    def _had(self, user: Int, seen: Int) -> NDArray[np.bool_]:
        """bool [n, items of the model]: which of them each user had."""
        events = self._log.gather(user, seen, features=False)
        column = self._column[events.item]
        out = np.zeros((len(user), len(self._items)), np.bool_)
        out[events.owner[column >= 0], column[column >= 0]] = True
        return out
