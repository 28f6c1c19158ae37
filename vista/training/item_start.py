"""Item vectors that training starts from, and those that it reads while they are frozen."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vista.arrays import Int
from vista.config import TrainConfig
from vista.config.choices import ItemStart, Stage
from vista.errors import CheckpointError
from vista.examples.batch import Batch
from vista.examples.item_statistics import START_RMS, UserFactors, item_factors
from vista.log.event_log import EventLog
from vista.model.ranking_model import RankingModel

MOST_CHANGE = 0.01
"""Root mean square of the change of factors that are computed again, relative to START_RMS, at most: what rounding may
do. A column with the other sign changes them by 0.35 if there are 32."""
logger = logging.getLogger(__name__)


def start_from_factors(model: RankingModel, log: EventLog, counts: Int, seed: int, new_rows: Int | None = None) -> None:
    """Replace the drawn vectors of a model's items by factors of their co-occurrences, where they have any.

    Args:
        counts: int64 [log.num_users], visible events per user.
        new_rows: model rows to start. The vectors of other rows are trained: factors are rotated and scaled to fit
            these, because the directions of factors are arbitrary. None starts all rows.
    """
    began = time.perf_counter()
    rows, vectors = item_factors(log, model.rows_of(log.items), counts, model.item_table.shape[1], seed=seed)
    factors = torch.from_numpy(vectors)
    if new_rows is not None:
        is_new = np.isin(rows, new_rows)
        factors = _fitted_factors(model, rows, factors, is_new)
        rows = rows[is_new]
    model.write_id_vectors(rows, factors)
    _log_start(len(rows), len(model.items), began)


class FrozenItems:
    """Item vectors of a model whose table is frozen `UserFactors`. Training reads factors without a batch's own users.

    Factors of all users are fitted to all of their items, labels included. With them, the items of a training window
    have far larger cosines than those of a later window, and training would learn to trust cosines too much. Leaving
    out a batch's users gives the factors of the other users approximately: in simulations of pure noise, it removes 69
    to 88 % of the difference (`vista.examples.item_statistics`).
    """

    def __init__(self, table: Tensor, factors: UserFactors) -> None:
        """
        Args:
            table: [V1, M] the model's table, for items without factors.
            factors: those that the table starts from.
        """
        self._table, self._factors = table.detach(), factors

    @classmethod
    def of(cls, model: RankingModel, log: EventLog, counts: Int, config: TrainConfig) -> FrozenItems | None:
        """Those of a run; None if its table starts from something else, or belongs to a base.

        Args:
            counts: int64 [log.num_users], visible events per user.
        """
        if config.stage is not Stage.joint or config.model.item_start is not ItemStart.user_factors:
            return None
        began, table = time.perf_counter(), model.item_table
        factors = UserFactors(log, model.rows_of(log.items), counts, table.shape[1], seed=config.seed)
        _log_start(int(factors.has_vector.sum()), len(model.items), began)
        return cls(table, factors)

    def start(self) -> None:
        """Replace the drawn vectors in the table by the factors of all users."""
        rows = np.flatnonzero(self._factors.has_vector)
        _write(self._table, rows, torch.from_numpy(self._factors.vectors(rows)))

    def change(self) -> float:
        """Root mean square of the difference between the table and the factors of all users, relative to START_RMS."""
        rows = np.flatnonzero(self._factors.has_vector)
        if not len(rows):
            return 0.0
        found = self._table[torch.from_numpy(rows).to(self._table.device)].cpu().numpy()
        return float(np.sqrt(np.mean((found - self._factors.vectors(rows)) ** 2)) / START_RMS)

    def check(self, place: Path) -> None:
        """Refuse to train if rounding gave other factors than those in the table, such as rotated ones.

        Args:
            place: where the table comes from, for the message.

        Raises:
            CheckpointError: if they differ by more than MOST_CHANGE.
        """
        if (change := self.change()) > MOST_CHANGE:
            raise CheckpointError(
                f"{place}: its item vectors are factors that come out {change:.0%} different here, perhaps because the "
                "number of threads, the processor, or the version of torch differs; resume where the run began, or set "
                "resume=false to start a new run"
            )

    def vectors(self, batch: Batch) -> Tensor:
        """[R, M] of the items `batch.rows`."""
        known, rows = self._factors.has_vector, batch.rows.cpu().numpy()
        places = np.flatnonzero(known[np.minimum(rows, len(known) - 1)] & (rows < len(known)))
        own = self._factors.vectors(rows[places], np.unique(batch.user.cpu().numpy()))
        out = self._table[batch.rows]
        _write(out, places, torch.from_numpy(own))
        return out


def training_vectors(model: RankingModel, batch: Batch, frozen: FrozenItems | None) -> Tensor:
    """[R, M] vectors of the items `batch.rows` as training reads them.

    Those of `frozen`, or the table's; with features, which at random stand alone (`model.id_dropout`).
    """
    vectors = model.id_vectors(batch.rows) if frozen is None else frozen.vectors(batch)
    if model.features is not None and model.training and model.config.id_dropout > 0:
        dropped = torch.rand(len(vectors), 1, device=vectors.device) < model.config.id_dropout
        vectors = vectors.masked_fill(dropped, 0.0)
    return model.with_features(vectors, batch.rows)


@torch.no_grad()
def _fitted_factors(model: RankingModel, rows: Int, factors: Tensor, is_new: NDArray[np.bool_]) -> Tensor:
    """ID embeddings [n, M] of the new ones among `rows`: orthogonal Procrustes with a scale (Schönemann, 1966).

    Vectors of items include their features, so these are subtracted.
    """
    known = torch.from_numpy(~is_new)
    places = torch.from_numpy(rows).to(model.device)
    target = model.item_vectors(places).cpu().double()
    left, stretch, right = torch.linalg.svd(factors[known].double().T @ target[known])
    square = float(factors[known].double().square().sum())
    scale = float(stretch.sum()) / square if square else 1.0
    features = model.with_features(torch.zeros_like(model.id_vectors(places)), places).cpu().double()
    fitted: Tensor = scale * factors.double() @ (left @ right) - features
    return fitted[~known].float()


def _write(table: Tensor, rows: Int, vectors: Tensor) -> None:
    with torch.no_grad():
        table[torch.from_numpy(rows).to(table.device)] = vectors.to(table.device)


def _log_start(num_rows: int, num_items: int, began: float) -> None:
    logger.info("%d of %d items have factors (%.1f s)", num_rows, num_items, time.perf_counter() - began)
