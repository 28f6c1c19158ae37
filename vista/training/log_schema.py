"""What a training run may use of a log."""

from __future__ import annotations

import math

import numpy as np

from vista.config import TrainConfig
from vista.config.choices import Decay
from vista.errors import ConfigError, DataError
from vista.examples.batch_source import trained_tasks
from vista.log.event_log import EventLog
from vista.log.splits import EVENTS_PER_BLOCK, split_until, visible_blocks, visible_counts
from vista.log.vocabulary import Vocabulary
from vista.model.features import FeatureSpec, RowFeatureReader, RowReaders, Schema
from vista.model.item_feature_table import ItemFeatureTable, check_categories
from vista.model.ranking_model import NEXT_TASK
from vista.training.event_features import event_reader
from vista.training.frequent_items import features_of
from vista.training.hashed_features import check_hashed_features
from vista.training.request_features import request_reader
from vista.training.seen_values import SeenValues

RESERVED_TASKS = {
    *(NEXT_TASK, "window", "reconstruction", "loss"),
    *("step", "epoch", "learning_rate", "gradient_norm", "tokens_per_s", "validation", "is_best"),
    *("epoch_seconds", "seconds"),
}
"""Names that no task may have: a line of metrics.jsonl has keys of these names, and one per task."""


def schema_of(log: EventLog, config: TrainConfig, since: int | None = None) -> Schema:
    """What a model may use of a log, as `schema_and_readers`."""
    return schema_and_readers(log, config, since)[0]


def schema_and_readers(log: EventLog, config: TrainConfig, since: int | None = None) -> tuple[Schema, RowReaders]:
    """What a model may use of a log, and how it reads features of the rows that training may see.

    Args:
        since: with stage=downstream, the time (ms) at which labels begin.

    Raises:
        ConfigError: if the log lacks what the configuration needs, or nothing would be trained.
        DataError: if a rating is infinite.
    """
    model, optim = config.model, config.optim
    if model.decay is Decay.time and not log.has_time:
        raise ConfigError(f"model.decay=time: {log.path} has no times; set model.decay=position or none")
    tasks = trained_tasks(log, optim)
    for name in RESERVED_TASKS & set(tasks):
        raise ConfigError(
            f"{log.path}: a label cannot be named {name!r}, which names the retrieval head or another key of "
            "metrics.jsonl; rename the label"
        )
    if tasks and config.data.gap_minutes:
        raise ConfigError(
            f"data.gap_minutes={config.data.gap_minutes:g}: impressions would be scored with events from the gap; set "
            "optim.task_weight=0, or leave the gap out"
        )
    if model.architecture.ranks_only and not tasks:
        why = "optim.task_weight=0" if log.impressions is not None else f"{log.path} has none"
        raise ConfigError(
            f"model.architecture={model.architecture.value}: learns only from labeled impressions, but {why}; prepare "
            "the log with impressions.* and set optim.task_weight=1, or train an architecture that ranks next items, "
            "such as model=sasrec"
        )
    if not config.ranks_items and not tasks:
        raise ConfigError(
            f"optim.next_weight={config.next_weight:g}: {log.path} has no labeled task either, so no head would be "
            "trained; set optim.next_weight=1"
        )
    ratings = rating_range(log) if log.has_rating and model.use_rating else None
    given = log.item_features if model.use_item_features else None
    hashed = model.hashed_rows
    check_hashed_features(hashed, log)
    check_categories(model, given, log.items, str(log.path))
    features = [
        FeatureSpec(name, "category", hashed[name], hashed=True) if name in hashed else FeatureSpec.of(name, column)
        for name, column in ({} if given is None else given.columns).items()
    ]
    of_events, num_tail_features = event_reader(log, config)
    of_requests, of_users = request_reader(log, config, since), user_reader(log, config)
    found = {"event_features": of_events, "request_features": of_requests, "user_features": of_users}
    readers = {name: reader for name, reader in found.items() if reader is not None}
    schema = Schema(
        list(log.actions),
        log.has_time,
        ratings,
        tasks,
        config.ranks_items,
        features,
        num_tail_features=num_tail_features,
        **{name: reader.columns for name, reader in readers.items()},
    )
    return schema, readers


def encoded_features(log: EventLog, items: Vocabulary, schema: Schema) -> ItemFeatureTable | None:
    """What a model of these items, with this schema, reads of a log's item features; None if it reads none."""
    given = features_of(items, log) if schema.item_features else None
    return None if given is None else ItemFeatureTable.of(given, schema.item_features)


def user_reader(log: EventLog, config: TrainConfig) -> RowFeatureReader | None:
    """How a model reads features of users; None if it reads none.

    It knows the values, and the distribution of numbers, of the users with events that training may see.
    """
    if not config.model.use_user_features or not log.user_features.values:
        return None
    users = np.flatnonzero(visible_counts(log, split_until(config.data, "train")))
    features, seen = (
        log.user_features.rows.select(users),
        SeenValues(log.user_features.values, config.model.hashed_rows),
    )
    seen.add(features)
    return RowFeatureReader.of(features, seen.values)


def rating_range(log: EventLog, *, events_per_batch: int = EVENTS_PER_BLOCK) -> tuple[float, float] | None:
    """Smallest and largest rating of a log; None if all are equal, since nothing can be learned from them.

    Args:
        events_per_batch: events that are read at once, because every column is read along with the ratings.

    Raises:
        DataError: if a rating is infinite.
    """
    low, high = math.inf, -math.inf
    for block in visible_blocks(log, log.lengths, events_per_batch):
        ratings = np.asarray(block.rating)
        low = min(low, float(np.nanmin(ratings, initial=np.inf)))
        high = max(high, float(np.nanmax(ratings, initial=-np.inf)))
    if low >= high:
        return None
    if not math.isfinite(high - low):
        raise DataError(
            f"{log.path}: ratings range from {low} to {high}; prepare the log again from finite ratings, or set "
            "model.use_rating=false"
        )
    return low, high
