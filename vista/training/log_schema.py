"""What a training run may use of a log."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from vista.arrays import Float32s, Int
from vista.config import DataConfig, ModelConfig, TrainConfig
from vista.config.checks import Decay
from vista.errors import ConfigError, DataError
from vista.examples.batch_source import EncodeEvents, EncodeRows, ModelReads, trained_tasks
from vista.examples.chunks import visible_rows
from vista.examples.item_statistics import item_counts
from vista.log.event_log import EventLog
from vista.log.features import CategoryColumn, ItemFeatures
from vista.log.histories import ColumnValues, RowColumn, RowFeatures
from vista.log.splits import EVENTS_PER_BLOCK, split_until, visible_blocks, visible_counts
from vista.log.vocabulary import Vocabulary
from vista.model.features import FeatureSpec, HashedVocabulary, RowFeatureReader, RowReaders, Schema, log_encoder
from vista.model.inference import LogUsers
from vista.model.item_feature_table import ItemFeatureTable, check_categories
from vista.model.layers import EmbeddingFeature, hashed_rows
from vista.model.ranking_model import NEXT_TASK, RankingModel


class SeenValues:
    """Collects the values that occur in the rows that training may see.

    A value that occurs only in other rows would get a row of the encoder's embedding that never trains. Left out, it is
    missing to the model, as a new value is in production.
    """

    def __init__(self, values: ColumnValues, hashed: Mapping[str, int]) -> None:
        """
        Args:
            values: of the log.
            hashed: by name of a category whose values are hashed: the number of their rows. It knows all values.
        """
        self._values = dict(values)
        for name in hashed.keys() & values.keys():
            self._values[name] = HashedVocabulary(hashed[name])
        self._is_seen = {
            name: np.zeros(len(known) + 1, np.bool_)
            for name, known in self._values.items()
            if known is not None and name not in hashed
        }

    def add(self, features: RowFeatures) -> None:
        """Add rows that training may see, with the log's codes."""
        for name, is_seen in self._is_seen.items():
            is_seen[features.columns[name]] = True  # -1, a missing value, marks the last entry

    @property
    def values(self) -> ColumnValues:
        """Those of the log that occur in the rows."""
        kept = dict(self._values)
        for name, is_seen in self._is_seen.items():
            known = self._values[name]
            assert known is not None
            if not is_seen[:-1].all():
                ids = known.ids(np.flatnonzero(is_seen[:-1]))
                kept[name] = Vocabulary.empty("str").extended(ids.tolist())
        return kept


# Features of a log's events, as a model is built for them and reads them.

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
    values = log.event_features if model.reads("event_features") else {}
    asked = model.tail_features if isinstance(model, ModelConfig) else None
    in_tail = [*values] if asked is None else asked
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


def model_reads(model: RankingModel, log: EventLog) -> ModelReads:
    """How batches for a model are made from a log."""
    return ModelReads(
        model.rows_of(log.items),
        num_known=model.num_trained_items,
        has_features=model.rows_with_features(),
        keys=model.item_keys,
        encode_events=event_encoding(model, log),
        encode_requests=request_encoding(model, log),
        encode_users=LogUsers(model.user_features, log).encoding(),
    )


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


# Features of requests in a log's impressions, as a model is built for them and reads them.

MEASURED_REQUESTS = 1_000_000
"""Most impressions by which the distribution of a number is measured."""


def request_reader(log: EventLog, config: TrainConfig, since: int | None) -> RowFeatureReader | None:
    """How a model reads features of requests; None if it reads none.

    It knows the values, and the distribution of numbers, of the impressions that training may see.

    Args:
        since: leave out the impressions before this time (ms).
    """
    table, values = log.impressions, log.request_features
    if (
        table is None
        or not values
        or not config.model.reads("request_features")
        or not trained_tasks(log, config.optim)
    ):
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


def check_hashed_features(hashed: Mapping[str, int], log: EventLog) -> None:
    """Refuse hashed features that a log lacks.

    Args:
        hashed: by name of a feature, of anything that has features: the number of rows.

    Raises:
        ConfigError: if the log has no category with this name.
    """
    categories = _categories(log) if hashed else set()
    for name in hashed:
        if name not in categories:
            raise ConfigError(
                f"model.hashed_features: {log.path} has no category {name!r}; it has: "
                f"{', '.join(sorted(categories)) or 'none'}"
            )


def _categories(log: EventLog) -> set[str]:
    """Names of all categories of a log."""
    items = {} if log.item_features is None else log.item_features.columns
    rows = (log.event_features, log.request_features, log.user_features.values)
    return {name for name, column in items.items() if isinstance(column, CategoryColumn)} | {
        name for columns in rows for name, known in columns.items() if known is not None
    }


# Which of a log's items get a row of their own in a model's table (`data.min_item_events`).

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
        since: over a base, the time (ms) at which labels begin.

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
    ratings = rating_range(log) if log.has_rating else None
    given = log.item_features if model.reads("item_features") else None
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
    if not config.model.reads("user_features") or not log.user_features.values:
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
            f"{log.path}: ratings range from {low} to {high}; prepare the log again from finite ratings, or "
            "without events.rating"
        )
    return low, high


# How many values of a feature share rows of a hashed table, and how many uses of the feature have such a value.

HASHED_AT_ONCE = 1 << 20
"""Items whose rows are computed at once."""


@dataclass(frozen=True, slots=True)
class HashCollisions:
    """Collisions of one feature, among the values that occur in the training part."""

    feature: str
    """Its name, and whose it is."""
    num_rows: int
    """Of the table."""
    num_values: int
    value_share: float
    """Share of the values without a row of their own: each of their rows is another value's too."""
    use_share: float
    """Share of the training events (or impressions) whose value is one of these."""

    def __str__(self) -> str:
        return (
            f"{self.feature}: {self.num_values:,} values in {self.num_rows:,} hashed rows; {self.value_share:.1%} of "
            f"the values share all their rows, and {self.use_share:.1%} of the uses are of these"
        )

    @classmethod
    def of(cls, feature: str, rows: Int, uses: Int, num_rows: int) -> HashCollisions:
        """Count collisions.

        Args:
            rows: int64 [V, P] that each value reads; uses: int64 [V] of each value, of which those with 0 are ignored.
        """
        rows, uses = rows[uses > 0], uses[uses > 0]
        per_value = np.sort(rows, axis=1)
        is_first = np.diff(per_value, axis=1, prepend=-1) != 0  # a value that reads a row twice does not share it
        num_readers = np.bincount(per_value[is_first], minlength=num_rows)
        shares = (num_readers[rows] > 1).all(1)
        return cls(
            feature,
            num_rows,
            len(uses),
            float(shares.mean()) if len(uses) else 0.0,
            float(uses[shares].sum() / uses.sum()) if len(uses) else 0.0,
        )


def hash_collisions(
    model: RankingModel, log: EventLog, config: TrainConfig, frequency: Int, since: int | None = None
) -> list[HashCollisions]:
    """Log and return the collisions of a model's hashed features, and of its items if these share rows.

    Args:
        frequency: int64 [at most 1 + V] training events of each model row.
        since: leave out the impressions before this time (ms).
    """
    rows = _of_rows(model, log, config, since)
    found = [*_of_items(model, frequency), *_of_item_features(model, log, frequency), *rows]
    for collisions in found:
        logger.info("%s", collisions)
    return found


def _of_items(model: RankingModel, frequency: Int) -> Iterator[HashCollisions]:
    num_rows, num_hashes = model.stage1.embedding_rows, model.stage1.embedding_hashes
    if num_rows:
        item = np.flatnonzero(frequency)
        parts = [
            hashed_rows(torch.from_numpy(part), EmbeddingFeature.item, num_hashes, num_rows).numpy() - 1
            for part in np.array_split(item, 1 + len(item) // HASHED_AT_ONCE)
        ]
        yield HashCollisions.of("items", np.concatenate(parts), frequency[item], num_rows)


def _of_item_features(model: RankingModel, log: EventLog, frequency: Int) -> Iterator[HashCollisions]:
    hashed = [column for column in model.schema.item_features if column.hashed]
    if not hashed or log.item_features is None:
        return
    rows = model.rows_of(log.items)
    events = np.where(rows < len(frequency), frequency[np.minimum(rows, len(frequency) - 1)], 0)
    for column in hashed:
        given = log.item_features.columns.get(column.name)
        if isinstance(given, CategoryColumn):
            weight = np.repeat(events, np.diff(given.offsets))
            uses = np.bincount(given.codes, weight, len(given.values)).astype(np.int64)
            yield _collisions(f"feature {column.name} of items", column, given.values, uses)


def _of_rows(model: RankingModel, log: EventLog, config: TrainConfig, since: int | None) -> Iterator[HashCollisions]:
    """Features of events, requests, and users."""
    counts = visible_counts(log, split_until(config.data, "train"))
    columns = _hashed(model.schema.event_features, log.event_features)
    if columns:
        blocks = (block.features for block in visible_blocks(log, counts, features=True))
        yield from _counted("events", columns, log.event_features, blocks)
    columns = _hashed(model.schema.request_features, log.request_features)
    if columns and log.impressions is not None:
        shown = visible_rows(log, log.impressions, counts, config.data, since).row
        yield from _counted("impressions", columns, log.request_features, [log.impressions.features.select(shown)])
    columns = _hashed(model.schema.user_features, log.user_features.values)
    if columns:
        users = log.user_features.rows.select(np.flatnonzero(counts))
        yield from _counted("users", columns, log.user_features.values, [users])


def _hashed(columns: Sequence[FeatureSpec], values: ColumnValues) -> dict[str, FeatureSpec]:
    """By name: hashed columns that a log has."""
    return {column.name: column for column in columns if column.hashed and values.get(column.name) is not None}


def _counted(
    owners: str, columns: Mapping[str, FeatureSpec], values: ColumnValues, blocks: Iterable[RowFeatures]
) -> Iterator[HashCollisions]:
    known = {name: vocabulary for name, vocabulary in values.items() if vocabulary is not None and name in columns}
    uses = {name: np.zeros(len(vocabulary), np.int64) for name, vocabulary in known.items()}
    for block in blocks:
        for name, total in uses.items():
            code = block.columns[name]
            total += np.bincount(code[code >= 0], minlength=len(total))
    for name, total in uses.items():
        yield _collisions(f"feature {name} of {owners}", columns[name], known[name], total)


def _collisions(feature: str, column: FeatureSpec, values: Vocabulary, uses: Int) -> HashCollisions:
    used = np.flatnonzero(uses)
    rows = HashedVocabulary(column.size).rows(values.ids(used).tolist())
    return HashCollisions.of(feature, rows[:, None], uses[used], column.size)
