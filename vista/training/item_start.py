"""Item vectors that training starts from."""

from __future__ import annotations

import logging
import time

import torch

from vista.arrays import Int
from vista.examples.item_factors import item_factors
from vista.log.event_log import EventLog
from vista.model.ranking_model import RankingModel

logger = logging.getLogger(__name__)


def start_from_factors(model: RankingModel, log: EventLog, counts: Int, seed: int) -> None:
    """Replace the drawn vectors of a model's items by factors, where the visible events have any."""
    began, table = time.perf_counter(), model.item_table
    rows, vectors = item_factors(log, model.rows_of(log.items), counts, table.shape[1], seed=seed)
    with torch.no_grad():
        table[torch.from_numpy(rows).to(table.device)] = torch.from_numpy(vectors).to(table.device)
    seconds = time.perf_counter() - began
    logger.info("%d of %d items start from factors (%.1f s)", len(rows), len(table) - 1, seconds)
