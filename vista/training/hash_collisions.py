"""How many values of a feature share rows of a hashed table, and how many uses of the feature have such a value."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vista.arrays import Int
from vista.config import TrainConfig
from vista.examples.chunks import visible_rows
from vista.log.event_log import EventLog
from vista.log.histories import ColumnValues, RowFeatures
from vista.log.item_features import CategoryColumn
from vista.log.splits import split_until, visible_blocks, visible_counts
from vista.log.vocabulary import Vocabulary
from vista.model.features import FeatureSpec, HashedVocabulary
from vista.model.ranking_model import RankingModel
from vista.model.tables import EmbeddingFeature, hashed_rows

logger = logging.getLogger(__name__)
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
    num_rows, num_hashes = model.config.embedding_rows, model.config.embedding_hashes
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
