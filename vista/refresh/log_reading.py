"""How a model reads a log for its summaries: what must fit, the rows of items, and what the log says about them."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int
from vista.config.checks import Decay
from vista.config.model_config import is_action, parts_of
from vista.errors import ConfigError
from vista.examples.item_spaces import ItemRates
from vista.examples.item_statistics import ItemStatistics, num_statistics
from vista.log.event_log import EventLog
from vista.log.features import declared_columns
from vista.log.histories import DAY_MS, ColumnValues, Histories
from vista.log.segment import features_of
from vista.log.segment_files import USERS
from vista.log.splits import Until
from vista.model.features import FeatureSpec, Recode
from vista.model.ranking_model import UNKNOWN_ITEM, RankingModel
from vista.model.vista_model import VistaModel
from vista.store.item_values import ItemValues
from vista.store.keys import history_digests, item_keys

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LogItems:
    """What each item of a log becomes: its row in the model, and its key in history digests. Likewise for features."""

    rows: NDArray[np.int32]
    """[num_items] rows of the model as histories have them: 0 for items that stage 1 was not trained on."""
    all_rows: NDArray[np.int32]
    """[num_items] rows of the model; 0 only for items that it does not know."""
    keys: NDArray[np.uint64]
    """[num_items] keys of `vista.store.keys.item_keys`."""
    recode: Recode
    """Features of events with the model's codes."""

    @classmethod
    def of(cls, model: VistaModel, log: EventLog) -> LogItems:
        """Look up all items of a log. Warns if the model knows fewer than half of them."""
        ids = log.items.ids(np.arange(log.num_items))
        all_rows = model.item_rows(ids)
        rows = model.history_rows(all_rows).astype(np.int32)
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
        return cls(rows, all_rows.astype(np.int32), item_keys(ids), model.event_recoder(log.event_features))

    def model_rows(self, histories: Histories) -> Histories:
        """The same histories with items as rows of the model, and features with the model's codes."""
        features = self.recode(histories.features, histories.num_events)
        return replace(histories, item=self.rows[histories.item], features=features)

    def digests(self, histories: Histories) -> NDArray[np.uint64]:
        """History digests, uint64 [B], of histories whose items are rows of the log."""
        times, actions = np.asarray(histories.timestamp), np.asarray(histories.action)
        return history_digests(self.keys[histories.item], times, actions, histories.offsets)


def check_log(model: RankingModel, log: EventLog, *, requests: bool = False) -> None:
    """Refuse a log whose events or users, and with `requests` impressions, the model would misread.

    Warns about features of them that the log lacks.

    Raises:
        ConfigError: the log's action codes differ from the model's, the model reads times and the log has none, or a
            feature is of another kind than the model's.
    """
    known = model.schema.actions
    spec = model.stage1.counters
    counts_actions = spec is not None and any(is_action(part) for key in spec.fields for part in parts_of(key))
    if (model.encoder.action is not None or counts_actions) and log.actions != known[: len(log.actions)]:
        raise ConfigError(
            f"{log.path}: its actions are {log.actions}, but the model was trained on {known}; train a model "
            "on this log"
        )
    stage1 = model.stage1
    reads_times = stage1.has_gap or stage1.decay is Decay.time or stage1.counters is not None
    if model.schema.has_time and not log.has_time and reads_times:
        raise ConfigError(f"{log.path}: has no times, which this model reads; train a model on this log")
    _check_features(log, "events", model.schema.event_features, _kinds(log.event_features))
    if model.schema.user_features:
        columns = declared_columns(features_of(log.segments, USERS))  # without reading the features of all users
        of_log = {name: parts[0].columns[name].kind for name, parts in columns.items()}
        _check_features(log, "users", model.schema.user_features, of_log)
    if requests and any(segment.impressions is not None for segment in log.segments):
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


def item_values(
    model: VistaModel, log: EventLog, rows: NDArray[np.integer], counts: Int, limit: Until
) -> ItemValues | None:
    """What a log says about the items of a model; None for a model that reads nothing of it.

    It takes one pass over the visible events, and one over the impressions.

    Args:
        rows: int [log.num_items] the model row of each of the log's items; 0 for those that it does not know.
        counts: int64 [num_users] visible events per user.
        limit: which events are visible. Label rates are left out if it hides events by their number, because it does
            not say which impressions are visible. With a time, labels that are known only later are not counted.
    """
    if not model.reads_item_values or num_statistics(has_time=log.has_time) != model.item_statistics.shape[1]:
        return None
    began = time.perf_counter()
    item_rows, num_rows = rows.astype(np.int64), 1 + len(model.items)
    statistics = ItemStatistics(log, item_rows, counts, most_times=1)
    rates, tasks, shown = np.zeros((num_rows, 0), np.float32), list[str](), log.impressions
    if shown is not None and not limit.held_out and not limit.held_share:
        timestamp = np.asarray(shown.timestamp)
        user = np.repeat(np.arange(log.num_users), np.diff(shown.offsets))
        end = np.iinfo(np.int64).max if limit.before is None else limit.before
        kept = np.flatnonzero(timestamp < end)
        mask = shown.known(kept, end)
        label = np.asarray(shown.label)[kept].astype(np.float32)
        has_labels = np.flatnonzero(mask.any(0))  # the model's own rates are better than none
        measured = ItemRates(
            item_rows[shown.item[kept]], label[:, has_labels], mask[:, has_labels], user[kept], num_rows
        )
        rates, tasks = measured.of_all(num_rows), [shown.tasks[place] for place in has_labels]
    as_of = int(statistics.time[-1]) - 1 if log.has_time and counts.any() else None
    logger.debug("values of %d items (%.1f s)", len(model.items), time.perf_counter() - began)
    return ItemValues(model.items.digest(), statistics.latest(num_rows), rates, tasks, as_of)


def are_due(held: ItemValues | None, newest: int | None) -> bool:
    """Whether an incremental refresh replaces the values of items.

    Training knows statistics as of times that are at least a day apart (`ItemStatistics`), so newer ones would be
    a pass over the whole log for nothing. Without times, they change so slowly that full refreshes are enough.

    Args:
        held: those of the generation; None without any.
        newest: time of the newest event of the changed users, ms; None without events or times.
    """
    return held is None or (newest is not None and (held.as_of is None or newest - held.as_of >= DAY_MS))
