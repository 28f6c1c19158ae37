"""Which of a log's items get a row of their own in a model's table (`data.min_item_events`)."""

from __future__ import annotations

import logging

import numpy as np

from vista.config import DataConfig
from vista.errors import ConfigError
from vista.examples.item_statistics import item_counts
from vista.log.event_log import EventLog
from vista.log.item_features import ItemFeatures
from vista.log.splits import split_until, visible_counts
from vista.log.vocabulary import Vocabulary

logger = logging.getLogger(__name__)


def frequent_items(log: EventLog, data: DataConfig) -> Vocabulary:
    """The log's items with at least `data.min_item_events` training events: all of them if this is 0.

    Only events that training may see count, so a label of the validation or the test gives no item a row.

    Raises:
        ConfigError: if no item has that many.
    """
    if not data.min_item_events:
        return log.items
    counts = item_counts(log, visible_counts(log, split_until(data, "train")))
    kept = counts >= data.min_item_events
    setting = f"data.min_item_events={data.min_item_events}"
    if not kept.any():
        raise ConfigError(
            f"{setting}: no item of {log.path} has that many training events; the most frequent one has "
            f"{counts.max(initial=0):,}; lower it"
        )
    logger.info(
        "%s: %s of %s items have a row of their own; the others are unknown, with %.1f%% of the training events",
        setting,
        f"{kept.sum():,}",
        f"{len(kept):,}",
        100 * counts[~kept].sum() / counts.sum(),
    )
    return log.items if kept.all() else Vocabulary.from_ids(log.items.ids(np.flatnonzero(kept)))


def features_of(items: Vocabulary, log: EventLog, first: int = 0) -> ItemFeatures | None:
    """A log's features of a model's items, from the row `first` of their vocabulary on; None if the log has none.

    Items that the log lacks have none.
    """
    if log.item_features is None or (items is log.items and not first):
        return log.item_features
    return log.item_features.select(log.items.rows(items.ids(np.arange(first, len(items)))))
