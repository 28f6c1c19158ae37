"""How a model reads a log: whether it can read it at all, and what items and features are to the model."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vista.config.choices import Decay
from vista.errors import ConfigError
from vista.log.event_log import EventLog
from vista.log.histories import ColumnValues, Histories
from vista.log.item_features import USERS
from vista.log.merged_features import declared_columns
from vista.model.features import FeatureSpec, Recode
from vista.model.ranking_model import UNKNOWN_ITEM, RankingModel
from vista.model.vista_model import VistaModel
from vista.store.format.digest import history_digests, item_keys

logger = logging.getLogger(__name__)


def check_log(model: RankingModel, log: EventLog) -> None:
    """Refuse a log whose events or users the model would misread. Warns about features of them that the log lacks.

    Raises:
        ConfigError: the log's action codes differ from the model's, the model reads times and the log has none, or a
            feature of events or users is of another kind than the model's.
    """
    known = model.schema.actions
    if model.encoder.action is not None and log.actions != known[: len(log.actions)]:
        raise ConfigError(
            f"{log.path}: its actions are {log.actions}, but the model was trained on {known}; train a model "
            "on this log"
        )
    config = model.config
    reads_times = config.use_time or config.decay is Decay.time or config.counters
    if model.schema.has_time and not log.has_time and reads_times:
        raise ConfigError(f"{log.path}: has no times, which this model reads; train a model on this log")
    _check_features(log, "events", model.schema.event_features, _kinds(log.event_features))
    if model.schema.user_features:
        columns = declared_columns(log.segments, USERS)  # without reading the features of all users
        of_log = {name: parts[0].column.kind for name, parts in columns.items()}
        _check_features(log, "users", model.schema.user_features, of_log)


def check_requests(model: RankingModel, log: EventLog) -> None:
    """Refuse a log whose impressions the model would misread. Warns about features of requests that the log lacks.

    Raises:
        ConfigError: a feature of requests is of another kind than the model's.
    """
    if any(segment.impressions is not None for segment in log.segments):
        _check_features(log, "impressions", model.schema.request_features, _kinds(log.request_features))


def _kinds(values: ColumnValues) -> dict[str, str]:
    return {name: "number" if known is None else "category" for name, known in values.items()}


def _check_features(log: EventLog, table: str, columns: Sequence[FeatureSpec], kinds: Mapping[str, str]) -> None:
    """Compare the columns that a model reads of a table with those of a log, which have these kinds."""
    for column in columns:
        kind = kinds.get(column.name, column.kind)
        if kind != column.kind:
            key = {"number": "numbers", "category": "categories"}[column.kind]
            raise ConfigError(
                f"{log.path}: the feature {column.name!r} of {table} is a {kind}, but a {column.kind} to the model; "
                f"prepare the log with {table}.{key}=[{column.name}], or train a model on this log"
            )
    if lacking := [column.name for column in columns if column.name not in kinds]:
        logger.warning(
            "%s: lacks the features %s of %s, so the model takes them as missing", log.path, ", ".join(lacking), table
        )


@dataclass(frozen=True, slots=True)
class LogItems:
    """What each item of a log becomes: its row in the model, and its key in history digests. Likewise for features."""

    rows: NDArray[np.int32]
    """[num_items] rows of the model; 0 for items it does not know."""
    keys: NDArray[np.uint64]
    """[num_items] keys of `vista.store.format.digest.item_keys`."""
    recode: Recode
    """Features of events with the model's codes."""

    @classmethod
    def of(cls, model: VistaModel, log: EventLog) -> LogItems:
        """Look up all items of a log. Warns if the model knows fewer than half of them."""
        ids = log.items.ids(np.arange(log.num_items))
        rows = model.history_rows(model.item_rows(ids)).astype(np.int32)
        known = int(np.count_nonzero(rows != UNKNOWN_ITEM))
        # With min_item_events, a model is meant to know few of the items.
        if 2 * known < log.num_items and not (known and model.data.min_item_events):
            logger.warning(
                "%s: the model knows only %d of %d items, and summarizes the others as one unknown item; train a model "
                "on this log",
                log.path,
                known,
                log.num_items,
            )
        return cls(rows, item_keys(ids), model.event_recoder(log.event_features))

    def model_rows(self, histories: Histories) -> Histories:
        """The same histories with items as rows of the model, and features with the model's codes."""
        features = self.recode(histories.features, histories.num_events)
        return dataclasses.replace(histories, item=self.rows[histories.item], features=features)

    def digests(self, histories: Histories) -> NDArray[np.uint64]:
        """History digests, uint64 [B], of histories whose items are rows of the log."""
        times, actions = np.asarray(histories.timestamp), np.asarray(histories.action)
        return history_digests(self.keys[histories.item], times, actions, histories.offsets)
