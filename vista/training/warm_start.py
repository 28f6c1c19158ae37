"""Warm starts: training begins with the weights and the optimizer state of an earlier model, on a log that has grown.

Everything that belongs to an id or a name is matched by it: rows of items, values of features, actions, and tasks. The
earlier model's items keep their rows, also those that the log lacks; new ones come after them. With
init_freeze=summarizer, nothing changes that `VistaModel.summarizer_id` covers, so stores stay valid.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vista.arrays import Int
from vista.config import TrainConfig
from vista.config.choices import Architecture, InitFreeze
from vista.errors import CheckpointError, ConfigError
from vista.log.event_log import EventLog
from vista.log.histories import ColumnValues
from vista.log.item_features import CategoryColumn, ItemFeatures
from vista.model.features import RowFeatureReader, RowReaders, Schema
from vista.model.item_feature_table import GrownColumns, ItemFeatureTable, joined_features
from vista.model.ranking_model import RankingModel
from vista.model.registry import ARCHITECTURES, load_model
from vista.model.saved_model import CONFIG_FILE
from vista.model.vista_model import STAGE1_WEIGHTS
from vista.training.checkpoint import load_checkpoint, newest_checkpoint, unpack_state
from vista.training.downstream import KEPT_WEIGHTS, with_settings_of
from vista.training.frequent_items import features_of, frequent_items
from vista.training.optimizers import Optimizers, moments_of
from vista.training.start_checks import check_start

logger = logging.getLogger(__name__)
MEASURED_WEIGHTS = ("item_popularity", "category")
"""Names of buffers that training makes from the log, or reads from a file."""
ENCODERS = {
    "item_features": "features",
    "event_features": "encoder.features",
    "request_features": "request_encoder",
    "user_features": "user_encoder",
}
"""By field of Schema that lists columns of features: the module that encodes them."""
RECORDED = ("user_features",)
"""Fields of Schema whose columns and values records name, in addition to those that a summary depends on."""
ACTION_WEIGHTS = ("encoder.action.weight", "action_bias.weight")
TASK_WEIGHTS = ("task_head.weight", "task_head.bias")
"""Names of weights with a row per action, and per task."""


class WarmStart:
    """An earlier model, and what becomes of it on the log of a run."""

    def __init__(self, config: TrainConfig, log: EventLog, base: RankingModel) -> None:
        self.config = config
        """With the earlier model's values for settings that are null."""
        self.base = base
        self.freezes = config.init_freeze is InitFreeze.summarizer
        self.frozen_rows = 1 + base.num_trained_items if self.freezes else 0
        """Leading rows of the item table that do not train."""
        self._log = log
        self._folder = Path(str(config.init_from))
        items = frequent_items(log, config.data)
        self._items = base.items.extended(items.ids(np.arange(len(items))))
        self._digest = hashlib.sha256((self._folder / CONFIG_FILE).read_bytes()).hexdigest()[:12]
        self._items_in = "id_mask" if config.model.embedding_rows else "item_table"
        """The weight with a row per item."""
        self._rows: dict[str, Tensor] = {self._items_in: self._item_rows()}
        self._rows["item_interest"] = self._rows[self._items_in]
        """By name of a weight: for each of its rows, int64, the earlier model's row, or -1. Other weights are taken
        as they are."""
        self._shapes: dict[str, torch.Size] = {}

    @classmethod
    def open(cls, config: TrainConfig, log: EventLog) -> WarmStart:
        """Open the earlier model of a configuration with init_from.

        Raises:
            ConfigError: if the configuration or the log does not fit the model.
            LeakageError: if it was trained on events that this run holds out.
            CheckpointError: if it is missing or damaged.
        """
        assert config.init_from is not None
        if Path(config.init_from).resolve().is_relative_to(Path(config.run_dir).resolve()):
            raise ConfigError(
                f"run_dir={config.run_dir}: holds the model of init_from, which this run would replace; choose another "
                "run_dir"
            )
        base = load_model(config.init_from)
        config = with_settings_of(base, config)
        if config.init_freeze is InitFreeze.summarizer:  # the decoder belongs to the summaries that it reads
            config = replace(config, optim=replace(config.optim, reconstruction_weight=0.0))
        check_start(config, base, log)
        return cls(config, log, base)

    @property
    def new_rows(self) -> Int:
        """Sorted model rows of the items that are initialized from scratch."""
        return np.flatnonzero(self._rows[self._items_in].numpy() < 0)

    def model(self, schema: Schema, readers: RowReaders) -> RankingModel:
        """The model to train.

        Args:
            schema: of the log, and readers: of its features.
        """
        base, config = self.base, self.config
        has_task_rows = config.model.architecture in (Architecture.vista, Architecture.hstu)
        if base.schema.tasks != schema.tasks and not has_task_rows:
            raise ConfigError(
                f"optim.tasks: init_from={config.init_from} was trained for {base.schema.tasks}, but this run trains "
                f"{schema.tasks}; a model of architecture {config.model.architecture.value} keeps its tasks, "
                "so set these, or train from scratch (without init_from)"
            )
        grown = self._grown_columns(schema, readers)
        schema = self._joined_schema(schema, grown)
        made = ARCHITECTURES[config.model.architecture](config.model, schema, self._items, config.data)
        weights, earlier = made.state_dict(), base.state_dict()
        self._match(ACTION_WEIGHTS, base.schema.actions, schema.actions)
        self._match(TASK_WEIGHTS, base.schema.tasks, schema.tasks)
        self._shapes = {name: weight.shape for name, weight in weights.items()}
        for name in weights.keys() & earlier.keys() - set(MEASURED_WEIGHTS):
            weights[name] = self._fitted(name, earlier[name], weights[name].clone())
        made.load_state_dict(weights)
        made.set_item_features(self._item_features(grown.get("item_features")))
        made.event_features = _reader(grown.get("event_features"), base.event_features)
        made.request_features = _reader(grown.get("request_features"), None)
        made.user_features = _reader(grown.get("user_features"), base.user_features)
        if self.freezes:
            made.num_trained_items = base.num_trained_items
            for name, parameter in made.named_parameters():
                trains = len(self._items) > base.num_trained_items if name == "item_table" else False
                parameter.requires_grad_(trains or not name.startswith(KEPT_WEIGHTS))
        logger.info(
            "starting from %s: %d items, of which %d are new to it%s",
            self._folder,
            len(self._items),
            len(self._items) - len(base.items),
            "; stage 1 is frozen" if self.freezes else "",
        )
        return made

    def start_optimizers(self, optimizers: Optimizers) -> None:
        """Give optimizers the moments of the newest checkpoint of the earlier model's run, if there is one.

        Raises:
            CheckpointError: if the checkpoint is damaged, or does not belong to the model.
        """
        folder = self._folder.resolve()
        newest = newest_checkpoint(folder.parent / "checkpoints") if folder.name == "best" else None
        if newest is None:
            logger.info("the optimizers start without moments: %s has no checkpoint of its run", folder.parent)
            return
        tensors, body = load_checkpoint(newest)
        state = unpack_state(body["run"], tensors)
        moments = moments_of(state["optimizer"]) | moments_of(state["table_optimizer"])
        count = optimizers.start_from(
            moments, lambda name, old: self._fitted(name, old, torch.zeros(self._shapes[name], dtype=old.dtype))
        )
        logger.info("the optimizers start with the moments of %d parameters from %s", count, newest)

    def identity(self) -> dict[str, Any]:
        """What must not change between a run and its resumption."""
        return {"init_from": self._digest, "init_freeze": self.config.init_freeze.value}

    def _item_rows(self) -> Tensor:
        """int64 [1 + V]: the earlier row of each model row, or -1."""
        known = torch.arange(1 + len(self.base.items))
        # Items that were added, or that had no events, have no vector of their own yet.
        is_empty = torch.zeros(len(known), dtype=torch.bool)
        if self._items_in == "item_table":
            is_empty = ~self.base.item_table.detach().any(1)
        elif self.base.id_mask is not None:
            is_empty = self.base.id_mask == 0
        is_empty &= known >= max(self.frozen_rows, 1)
        new = torch.full((len(self._items) - len(self.base.items),), -1)
        return torch.cat([known.masked_fill(is_empty, -1), new])

    def _match(self, weights: tuple[str, ...], old: list[str], new: list[str]) -> None:
        rows = torch.tensor([old.index(name) if name in old else -1 for name in new], dtype=torch.int64)
        self._rows |= dict.fromkeys(weights, rows)

    def _fitted(self, name: str, old: Tensor, start: Tensor) -> Tensor:
        """`start` with what `old` has for it: all of it, or matching rows."""
        rows = self._rows.get(name)
        if old.shape[1:] != start.shape[1:] or (rows is None and old.shape != start.shape):
            raise CheckpointError(
                f"init_from={self._folder}: {name} has the shape {tuple(old.shape)}, but {tuple(start.shape)} is "
                "needed; train without init_from"
            )
        if rows is None:
            return old
        known = (rows >= 0) & (rows < len(old))  # items may have been added since the optimizer's state was saved
        start[known] = old[rows[known]]
        return start

    def _grown_columns(self, schema: Schema, readers: RowReaders) -> dict[str, GrownColumns]:
        """By field of Schema: the columns of features of the model and of a log with this schema, if there are any.

        With a frozen summarizer, those that it reads, and those that records name, are checked but left out, because
        they do not grow.
        """
        found, base, log = {}, self.base, self._log
        items = {} if log.item_features is None else log.item_features.columns
        of_log: dict[str, ColumnValues] = {
            "item_features": {name: own.values for name, own in items.items() if isinstance(own, CategoryColumn)},
            **{key: reader.values for key, reader in readers.items()},
        }
        of_model: dict[str, ColumnValues] = {
            "item_features": {} if base.feature_table is None else base.feature_table.values,
            "event_features": {} if base.event_features is None else base.event_features.values,
            "request_features": {} if base.request_features is None else base.request_features.values,
            "user_features": {} if base.user_features is None else base.user_features.values,
        }
        for key, module in ENCODERS.items():
            known, given = getattr(base.schema, key), getattr(schema, key)
            only_tasks_read = key == "request_features"
            if not given and (not known or (only_tasks_read and not schema.tasks)):
                continue
            columns = GrownColumns.of(known, of_model[key], given, of_log.get(key, {}))
            if self.freezes and (f"{module}.".startswith(STAGE1_WEIGHTS) or key in RECORDED):
                continue
            found[key] = columns
            self._rows[f"{module}.values"] = torch.from_numpy(columns.value_rows)
            self._rows[f"{module}.dense"] = torch.from_numpy(columns.dense_rows)
        return found

    def _joined_schema(self, schema: Schema, grown: Mapping[str, GrownColumns]) -> Schema:
        """The schema of the model to train, from that of the log."""
        known = self.base.schema
        features: dict[str, Any] = {key: columns.columns for key, columns in grown.items()}
        if self.freezes:
            features = {"request_features": schema.request_features} | features
            return replace(known, tasks=schema.tasks, has_retrieval=schema.has_retrieval, **features)
        # Codes of actions are those of the log, so actions that only the model knows come last.
        actions = [*schema.actions, *(name for name in known.actions if name not in schema.actions)]
        features["num_tail_features"] = known.num_tail_features  # new columns come last, so stage 2 does not read them
        return replace(schema, actions=actions, rating_range=known.rating_range or schema.rating_range, **features)

    def _item_features(self, grown: GrownColumns | None) -> ItemFeatureTable | None:
        """Encoded features of the items of the model to train.

        Args:
            grown: its columns; None if they are those of the earlier model, whose items then keep their features.
        """
        table, known, columns = self.base.feature_table, len(self.base.items), self.base.schema.item_features
        if grown is not None:
            return joined_features(grown, table, self._features())
        if table is None or len(self._items) == known:
            return table
        features = self._features(known).columns
        return table.extended(ItemFeatures({column.name: features[column.name] for column in columns}), columns)

    def _features(self, first: int = 0) -> ItemFeatures:
        """The log's features of the model's items, from the row `first` of the vocabulary on."""
        features = features_of(self._items, self._log, first)
        assert features is not None
        return features


def _reader(grown: GrownColumns | None, known: RowFeatureReader | None) -> RowFeatureReader | None:
    """How the model to train reads features of rows: as `known` if `grown` is None."""
    if grown is None:
        return known
    return RowFeatureReader(grown.columns, {column.name: grown.values.get(column.name) for column in grown.columns})
