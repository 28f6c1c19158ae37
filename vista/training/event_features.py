"""Features of a log's events, as a model is built for them and reads them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Float32s, Int
from vista.config import TrainConfig
from vista.errors import ConfigError
from vista.examples.batch_source import EncodeEvents
from vista.log.event_log import EventLog
from vista.log.histories import RowColumn, RowFeatures
from vista.log.splits import split_until, visible_blocks, visible_counts
from vista.model.features import RowFeatureReader, log_encoder
from vista.model.ranking_model import RankingModel
from vista.training.seen_values import SeenValues

MEASURED_EVENTS = 1_000_000
"""Most events by which the distribution of a number is measured."""


def event_reader(log: EventLog, config: TrainConfig) -> tuple[RowFeatureReader | None, int]:
    """How a model reads features of events, and how many columns, the first ones, its stage 2 reads too.

    It knows the values, and the distribution of numbers, of the events that training may see. Without columns, the
    reader is None.

    Raises:
        ConfigError: if `model.tail_features` names a column that the model does not read.
    """
    model = config.model
    values = log.event_features if model.use_event_features else {}
    in_tail = [*values] if model.tail_features is None else model.tail_features
    for name in in_tail:
        if name not in values:
            raise ConfigError(
                f"model.tail_features: {name!r} is not a feature of events that the model reads; {log.path} has: "
                f"{', '.join(log.event_features) or 'none'}"
            )
    if not values:
        return None, 0
    ordered = {name: values[name] for name in sorted(values, key=lambda name: name not in in_tail)}
    counts = visible_counts(log, split_until(config.data, "train"))
    seen = SeenValues(ordered, model.hashed_rows)
    numbers = _read(log, counts, seen)
    return RowFeatureReader.of(numbers, seen.values), len(in_tail)


def event_encoding(model: RankingModel, log: EventLog) -> EncodeEvents | None:
    """What a model reads of a log's events; None if it reads no features of them."""
    if model.event_features is None:
        return None
    read = log_encoder(model.event_features, log.event_features)

    def encode(features: RowFeatures, num_events: int) -> tuple[Int, Float32s]:
        encoded = read(features, num_events)
        assert encoded is not None
        return encoded.entry, encoded.dense

    return encode


def _read(log: EventLog, counts: NDArray[np.int64], seen: SeenValues) -> RowFeatures:
    """Collect the values of the events that training may see.

    Args:
        counts: int64 [num_users] events that training may see.
        seen: takes their categories.

    Returns:
        The numbers of these events, or of every n-th one if there are more than MEASURED_EVENTS.
    """
    step = max(1, -(-int(counts.sum()) // MEASURED_EVENTS))
    parts: dict[str, list[RowColumn]] = {
        name: [np.empty(0, np.float32)] for name, known in log.event_features.items() if known is None
    }
    before = 0
    for block in visible_blocks(log, counts, features=True):
        seen.add(block.features)
        for name, columns in parts.items():
            columns.append(block.features.columns[name][-before % step :: step].copy())
        before += block.num_events
    return RowFeatures({name: np.concatenate(columns) for name, columns in parts.items()})  # type: ignore[misc]
