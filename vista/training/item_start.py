"""Item vectors that training starts from, and those that it reads while they are frozen."""

from __future__ import annotations

import logging
import time

import numpy as np
import torch
from torch import Tensor

from vista.arrays import Int
from vista.config import TrainConfig
from vista.config.choices import ItemStart, Stage
from vista.examples.batch import Batch
from vista.examples.item_factors import item_factors
from vista.examples.user_factors import UserFactors
from vista.log.event_log import EventLog
from vista.model.ranking_model import RankingModel

logger = logging.getLogger(__name__)


def start_from_factors(model: RankingModel, log: EventLog, counts: Int, seed: int) -> None:
    """Replace the drawn vectors of a model's items by factors, where the visible events have any."""
    began, table = time.perf_counter(), model.item_table
    item_rows, dim = model.rows_of(log.items), table.shape[1]
    if model.config.item_start is ItemStart.user_factors:
        factors = UserFactors(log, item_rows, counts, dim, seed=seed)
        rows = np.flatnonzero(factors.has_vector)
        vectors = factors.vectors(rows)
    else:
        rows, vectors = item_factors(log, item_rows, counts, dim, seed=seed)
    with torch.no_grad():
        table[torch.from_numpy(rows).to(table.device)] = torch.from_numpy(vectors).to(table.device)
    seconds = time.perf_counter() - began
    logger.info("%d of %d items start from factors (%.1f s)", len(rows), len(table) - 1, seconds)


class FrozenItems:
    """Item vectors for training on a frozen table of `UserFactors`. Each batch reads factors without its own users.

    Factors of all users know who had which item, labels included. With them, the items of a training window have far
    larger cosines than those of a later window, and training would learn to trust cosines too much.
    """

    def __init__(self, table: Tensor, factors: UserFactors) -> None:
        """
        Args:
            table: [V1, M] the model's table, for items without factors.
            factors: those that the table started from.
        """
        self._table, self._factors = table.detach(), factors

    @classmethod
    def of(cls, model: RankingModel, log: EventLog, counts: Int, config: TrainConfig) -> FrozenItems | None:
        """Those of a run; None if its table is trained or starts from something else, or belongs to a base.

        Args:
            counts: int64 [log.num_users], visible events per user.
        """
        starts = config.stage is Stage.joint and config.model.item_start is ItemStart.user_factors
        if not starts or config.optim.table_rate > 0:
            return None
        dim = model.item_table.shape[1]
        factors = UserFactors(log, model.rows_of(log.items), counts, dim, seed=config.seed)
        return cls(model.item_table, factors)

    def vectors(self, batch: Batch) -> Tensor:
        """[R, M] of the items `batch.rows`."""
        known, rows = self._factors.has_vector, batch.rows.cpu().numpy()
        places = np.flatnonzero(known[np.minimum(rows, len(known) - 1)] & (rows < len(known)))
        own = self._factors.vectors(rows[places], np.unique(batch.user.cpu().numpy()))
        out = self._table[batch.rows]
        out[torch.from_numpy(places).to(out.device)] = torch.from_numpy(own).to(out.device)
        return out
