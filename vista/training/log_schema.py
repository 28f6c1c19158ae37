"""What a training run may use of a log."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from vista.arrays import Int
from vista.config import DataConfig, ModelConfig, TrainConfig
from vista.config.checks import Decay, require
from vista.config.log_config import POSITION, PROPENSITY
from vista.config.model_config import (
    ACTION,
    CALENDAR,
    EMBEDDING_HASHES,
    MOST_ACTIONS,
    RankingConfig,
    is_action,
    parts_of,
)
from vista.errors import ConfigError, DataError, shown
from vista.examples.batch_source import ModelReads, label_residuals, trained_tasks, visible_rows
from vista.examples.item_statistics import item_counts
from vista.log.event_log import EventLog
from vista.log.features import Columns, row_features, selected
from vista.log.histories import ColumnValues, RowColumn, RowFeatures
from vista.log.splits import EVENTS_PER_BLOCK, split_until, visible_blocks, visible_counts
from vista.log.vocabulary import Vocabulary
from vista.model.features import (
    EncodedRows,
    FeatureSpec,
    HashedVocabulary,
    RowFeatureReader,
    RowReaders,
    Schema,
    log_encoder,
)
from vista.model.inference import LogUsers
from vista.model.item_feature_table import ItemFeatureTable, check_categories
from vista.model.layers import EmbeddingFeature, hashed_rows
from vista.model.ranking_model import NEXT_TASK, RankingModel

# Features of a log's events, requests, and users, as a model is built for them and reads them.

MEASURED_ROWS = 1_000_000
"""Most rows by which the distribution of a number is measured."""


def _reader(
    values: ColumnValues, hashed: Mapping[str, int], blocks: Iterable[RowFeatures], num_rows: int
) -> RowFeatureReader:
    """How a model reads features of rows: by the values that occur in those that training may see, and their numbers.

    A value that occurs only in other rows would get a row of the encoder's embedding that never trains. Left out, it is
    missing to the model, as a new value is in production.

    Args:
        values: of the log.
        hashed: by name of a category whose values are hashed: the number of their rows. It knows all values.
        blocks: all rows that training may see, with the log's codes.
        num_rows: how many these are.
    """
    kept = {name: HashedVocabulary(hashed[name]) if name in hashed else known for name, known in values.items()}
    categories = {name: known for name, known in values.items() if known is not None and name not in hashed}
    is_seen = {name: np.zeros(len(known) + 1, np.bool_) for name, known in categories.items()}
    numbers: dict[str, list[RowColumn]] = {
        name: [np.empty(0, np.float32)] for name, known in values.items() if known is None
    }
    step, before = max(1, -(-num_rows // MEASURED_ROWS)), 0
    for block in blocks:
        for name, seen in is_seen.items():
            seen[block.columns[name]] = True  # -1, a missing value, marks the last entry
        for name, columns in numbers.items():
            columns.append(block.columns[name][-before % step :: step].copy())
        before += len(next(iter(block.columns.values())))
    for name, known in categories.items():
        if not is_seen[name][:-1].all():
            kept[name] = Vocabulary.empty("str").extended(known.ids(np.flatnonzero(is_seen[name][:-1])).tolist())
    measured = RowFeatures({name: np.concatenate(columns) for name, columns in numbers.items()})  # type: ignore[misc]
    return RowFeatureReader.of(measured, kept)


def event_reader(log: EventLog, config: TrainConfig) -> tuple[RowFeatureReader | None, int]:
    """How a model reads features of events, and how many columns, the first ones, its stage 2 reads too.

    Without columns, the reader is None.

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
    blocks = (block.features for block in visible_blocks(log, counts, features=True))
    return _reader(ordered, model.hashed_rows, blocks, int(counts.sum())), len(in_tail)


def request_reader(log: EventLog, config: TrainConfig, since: int | None) -> RowFeatureReader | None:
    """How a model reads features of requests; None if it reads none. `since`: leave out the impressions before this
    time (ms)."""
    table = log.impressions
    values = {name: known for name, known in log.request_features.items() if name not in (POSITION, PROPENSITY)}
    if (
        table is None
        or not values
        or not config.model.reads("request_features")
        or not trained_tasks(log, config.optim)
    ):
        return None
    counts = visible_counts(log, split_until(config.data, "train"))
    rows = visible_rows(log, table, counts, config.data, since).row
    return _reader(values, config.model.hashed_rows, [table.features.select(rows)], len(rows))


def user_reader(log: EventLog, config: TrainConfig) -> RowFeatureReader | None:
    """How a model reads features of users, by those with events that training may see; None if it reads none."""
    if not config.model.reads("user_features") or not log.user_features:
        return None
    users = np.flatnonzero(visible_counts(log, split_until(config.data, "train")))
    rows, values = row_features(log.user_features)
    return _reader(values, config.model.hashed_rows, [rows.select(users)], len(users))


def model_reads(model: RankingModel, log: EventLog) -> ModelReads:
    """How batches for a model are made from a log."""
    return ModelReads(
        model.rows_of(log.items),
        num_known=model.num_trained_items,
        has_features=model.rows_with_features(),
        keys=model.item_keys,
        residual_task=model.schema.residual_task,
        encode_events=log_encoder(model.event_features, log.event_features),
        encode_requests=_request_encoder(model.request_features, log),
        encode_users=LogUsers(model.user_features, log).encoded_with_unknown,
    )


def _request_encoder(reader: RowFeatureReader | None, log: EventLog) -> Callable[[Int], EncodedRows | None]:
    """Gives what a model reads of impressions int64 [N] of a log and, in a last row, of a request without features."""
    table = log.impressions
    if reader is None or table is None:
        return lambda rows: None
    recode, missing = reader.recoder(log.request_features), reader.missing(1)
    return lambda rows: reader.encode(recode(table.features.select(rows), len(rows)), len(rows)).joined(missing)


def _check_hashed(hashed: Mapping[str, int], log: EventLog) -> None:
    """Refuse hashed features that are not categories of the log's items, events, requests, or users."""
    if not hashed:
        return
    of_items, of_users = (row_features(columns)[1] for columns in (log.item_features, log.user_features))
    tables = (of_items, of_users, log.event_features, log.request_features)
    known = {name for columns in tables for name, values in columns.items() if values is not None}
    for name in hashed:
        if name not in known:
            raise ConfigError(
                f"model.hashed_features: {log.path} has no category {name!r}; it has: "
                f"{', '.join(sorted(known)) or 'none'}"
            )


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


def features_of(items: Vocabulary, log: EventLog, first: int = 0) -> Columns:
    """A log's features of a model's items, from the row `first` of their vocabulary on. Items that the log lacks have
    none."""
    if not log.item_features or (items is log.items and not first):
        return log.item_features
    return selected(log.item_features, log.items.rows(items.ids(np.arange(first, len(items)))))


RESERVED_TASKS = {
    *(NEXT_TASK, "window", "reconstruction", "loss"),
    *("step", "epoch", "learning_rate", "gradient_norm", "tokens_per_s", "validation", "is_best"),
    *("epoch_seconds", "seconds"),
}
"""Names that no task may have: a line of metrics.jsonl has keys of these names, and one per task."""


def schema_of(log: EventLog, config: TrainConfig, since: int | None = None) -> Schema:
    """What a model may use of a log, as `schema_and_readers`."""
    return schema_and_readers(log, config, since)[0]


def _check_counted_actions(model: RankingConfig, log: EventLog) -> None:
    """Check that a log has the actions that counters count."""
    named = {part: key for key in model.counter_keys or [] for part in parts_of(key) if is_action(part)}
    for part, key in named.items():
        own = f"model.counter_keys: {key!r}", f"{log.path} has {shown(log.actions)}"
        if part != ACTION and part.partition(":")[2] not in log.actions:
            raise ConfigError(f"{own[0]} counts an action that the log does not have; {own[1]}")
        if part == ACTION and not 1 < len(log.actions) <= MOST_ACTIONS:
            raise ConfigError(
                f"{own[0]} needs a log with 2 to {MOST_ACTIONS} actions, but {own[1]}; name one, such as "
                "item*action:click"
            )
        if bad := [name for name in log.actions if "*" in name]:
            raise ConfigError(f"{own[0]}: the action {bad[0]!r} has a *, which separates the parts of keys; rename it")


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
            "such as model.kind=sasrec"
        )
    if not config.ranks_items and not tasks:
        raise ConfigError(
            f"optim.next_weight={config.next_weight:g}: {log.path} has no labeled task either, so no head would be "
            "trained; set optim.next_weight=1"
        )
    ratings = rating_range(log) if log.has_rating else None
    given = log.item_features if model.reads("item_features") else {}
    hashed = model.hashed_rows
    _check_hashed(hashed, log)
    check_categories(model, given, log.items, str(log.path))
    timed = [key for key in model.counter_keys or [] if CALENDAR.keys() & parts_of(key)]
    lacks = f"{', '.join(timed)} needs times, which {log.path} does not have"
    require(log.has_time or not timed, "model.counter_keys", lacks)
    _check_counted_actions(model, log)
    features = [
        FeatureSpec(name, "category", hashed[name], hashed=True) if name in hashed else FeatureSpec.of(name, column)
        for name, column in given.items()
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
        has_decoder=config.trains_decoder,
        examined_tasks=list(config.optim.examined_tasks),
        residual_task=_residual_task(log, config, tasks),
        **{name: reader.columns for name, reader in readers.items()},
    )
    return schema, readers


def _residual_task(log: EventLog, config: TrainConfig, tasks: list[str]) -> str | None:
    """The first task whose labels actions tell, if labels alone are trained; None without one. Labels of impressions
    that users may not have looked at say little of items."""
    is_asked = config.model.space_dim > 0 and not config.ranks_items and not config.optim.examined_tasks
    if not is_asked or not 1 < len(log.actions) <= MOST_ACTIONS:
        return None
    counts, rows = visible_counts(log, split_until(config.data, "train")), np.arange(1, 1 + log.num_items)
    told = (task for task in tasks if label_residuals(log, rows, counts, config.data, task) is not None)
    return next(told, None)


def encoded_features(log: EventLog, items: Vocabulary, schema: Schema) -> ItemFeatureTable | None:
    """What a model of these items, with this schema, reads of a log's item features; None if it reads none."""
    given = features_of(items, log) if schema.item_features else {}
    return ItemFeatureTable.of(given, schema.item_features) if given else None


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
        """Count collisions. `rows`: int64 [V, P] that each value reads; uses: int64 [V] of each value, of which those
        with 0 are ignored."""
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
    found = [*_of_items(model, frequency), *_of_item_features(model, log, frequency)]
    found += _of_rows(model, log, config, since)
    for collisions in found:
        logger.info("%s", collisions)
    return found


def _of_items(model: RankingModel, frequency: Int) -> Iterator[HashCollisions]:
    num_rows = model.stage1.embedding_rows
    if num_rows:
        item = np.flatnonzero(frequency)
        parts = [
            hashed_rows(torch.from_numpy(part), EmbeddingFeature.item, EMBEDDING_HASHES, num_rows).numpy() - 1
            for part in np.array_split(item, 1 + len(item) // HASHED_AT_ONCE)
        ]
        yield HashCollisions.of("items", np.concatenate(parts), frequency[item], num_rows)


def _of_item_features(model: RankingModel, log: EventLog, frequency: Int) -> Iterator[HashCollisions]:
    hashed = [column for column in model.schema.item_features if column.hashed]
    if not hashed:
        return
    rows = model.rows_of(log.items)
    events = np.where(rows < len(frequency), frequency[np.minimum(rows, len(frequency) - 1)], 0)
    for column in hashed:
        given = log.item_features.get(column.name)
        if given is not None and given.values is not None and given.offsets is not None:
            weight = np.repeat(events, np.diff(given.offsets))
            uses = np.bincount(given.data, weight, len(given.values)).astype(np.int64)
            yield _collisions(f"feature {column.name} of items", column, given.values, uses)


def _of_rows(model: RankingModel, log: EventLog, config: TrainConfig, since: int | None) -> Iterator[HashCollisions]:
    """Features of events, requests, and users."""
    schema, counts, table = model.schema, visible_counts(log, split_until(config.data, "train")), log.impressions
    user_rows, user_values = row_features(log.user_features)

    def events() -> Iterator[RowFeatures]:
        return (block.features for block in visible_blocks(log, counts, features=True))

    def requests() -> list[RowFeatures]:
        return (
            [] if table is None else [table.features.select(visible_rows(log, table, counts, config.data, since).row)]
        )

    def users() -> list[RowFeatures]:
        return [user_rows.select(np.flatnonzero(counts))]

    for owners, columns, values, blocks in (
        ("events", schema.event_features, log.event_features, events),
        ("impressions", schema.request_features, log.request_features, requests),
        ("users", schema.user_features, user_values, users),
    ):
        known = {column.name: values.get(column.name) for column in columns if column.hashed}
        uses = {name: np.zeros(len(own), np.int64) for name, own in known.items() if own is not None}
        for block in blocks() if uses else ():
            for name, total in uses.items():
                code = block.columns[name]
                total += np.bincount(code[code >= 0], minlength=len(total))
        for column in columns:
            if (own := known.get(column.name)) is not None:
                yield _collisions(f"feature {column.name} of {owners}", column, own, uses[column.name])


def _collisions(feature: str, column: FeatureSpec, values: Vocabulary, uses: Int) -> HashCollisions:
    used = np.flatnonzero(uses)
    rows = HashedVocabulary(column.size).rows(values.ids(used).tolist())
    return HashCollisions.of(feature, rows[:, None], uses[used], column.size)
