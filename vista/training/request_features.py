"""Features of requests in a log's impressions, as a model is built for them and reads them."""

from __future__ import annotations

import numpy as np

from vista.arrays import Float32s, Int
from vista.config import TrainConfig
from vista.examples.batch_source import EncodeRows, trained_tasks
from vista.examples.chunks import visible_rows
from vista.log.event_log import EventLog
from vista.log.splits import split_until, visible_counts
from vista.model.features import RowFeatureReader, log_encoder
from vista.model.ranking_model import RankingModel
from vista.training.seen_values import SeenValues

MEASURED_REQUESTS = 1_000_000
"""Most impressions by which the distribution of a number is measured."""


def request_reader(log: EventLog, config: TrainConfig, since: int | None) -> RowFeatureReader | None:
    """How a model reads features of requests; None if it reads none.

    It knows the values, and the distribution of numbers, of the impressions that training may see.

    Args:
        since: leave out the impressions before this time (ms).
    """
    table, values = log.impressions, log.request_features
    if table is None or not values or not config.model.use_request_features or not trained_tasks(log, config.optim):
        return None
    counts = visible_counts(log, split_until(config.data, "train"))
    rows = visible_rows(log, table, counts, config.data, since).row
    features, step = table.features.select(rows), max(1, -(-len(rows) // MEASURED_REQUESTS))
    seen = SeenValues(values, config.model.hashed_rows)
    seen.add(features)
    return RowFeatureReader.of(features.select(slice(None, None, step)), seen.values)


def request_encoding(model: RankingModel, log: EventLog) -> EncodeRows | None:
    """What a model reads of a log's impressions; None if it reads no features of requests."""
    reader, table = model.request_features, log.impressions
    if reader is None or table is None:
        return None
    read, missing = log_encoder(reader, log.request_features), reader.missing(1)

    def encode(rows: Int) -> tuple[Int, Float32s]:
        asked = read(table.features.select(rows), len(rows))
        assert asked is not None
        return np.concatenate([asked.entry, missing.entry]), np.concatenate([asked.dense, missing.dense])

    return encode
