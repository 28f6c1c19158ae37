"""Warm starts: training begins with the weights and the optimizer state of an earlier model, on a log that has grown.

Everything that belongs to an id or a name is matched by it: rows of items, values of features, actions, and tasks. The
earlier model's items keep their rows, also those that the log lacks; new ones come after them. With
init_freeze=summarizer, nothing changes that `VistaModel.summarizer_id` covers, so stores stay valid.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vista.arrays import Int
from vista.config import DataConfig, TrainConfig
from vista.config.choices import Architecture, InitFreeze, ItemStart, Split
from vista.config.config_keys import value_text
from vista.config.conversion import to_dict
from vista.errors import CheckpointError, ConfigError, LeakageError
from vista.log.event_log import EventLog
from vista.log.item_features import CategoryColumn, ItemFeatures
from vista.log.splits import split_until
from vista.model.grown_columns import GrownColumns
from vista.model.item_feature_table import ItemFeatureTable
from vista.model.joined_item_features import joined_features
from vista.model.model_description import CONFIG_FILE
from vista.model.ranking_model import RankingModel
from vista.model.registry import ARCHITECTURES, load_model
from vista.model.schema import Schema
from vista.training.checkpoint import load_checkpoint, newest_checkpoint, unpack_state
from vista.training.downstream import COUNTER_KEYS, KEPT_WEIGHTS, with_settings_of
from vista.training.optimizers import Optimizers, moments_of

logger = logging.getLogger(__name__)
FREE_KEYS = ("dropout", "counted_dropout", "id_dropout", "item_start")
"""Fields of ModelConfig that may differ from the earlier model's."""
MEASURED_WEIGHTS = ("item_popularity", "category")
"""Names of buffers that training makes from the log, or reads from a file."""
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
        self._items = base.items.extended(log.items.ids(np.arange(log.num_items)))
        self._digest = hashlib.sha256((self._folder / CONFIG_FILE).read_bytes()).hexdigest()[:12]
        self._rows: dict[str, Tensor] = {} if config.model.embedding_rows else {"item_table": self._item_rows()}
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
        _check_model(config, base)
        _check_split(config, base.data)
        _check_log(config, base, log)
        return cls(config, log, base)

    @property
    def new_rows(self) -> Int:
        """Sorted rows of the item table that start as in a model without an earlier one."""
        rows = self._rows.get("item_table")
        return np.empty(0, np.int64) if rows is None else np.flatnonzero(rows.numpy() < 0)

    def model(self, schema: Schema) -> RankingModel:
        """The model to train.

        Args:
            schema: of the log.
        """
        base, config = self.base, self.config
        has_task_rows = config.model.architecture in (Architecture.vista, Architecture.hstu)
        if base.schema.tasks != schema.tasks and not has_task_rows:
            raise ConfigError(
                f"optim.tasks: init_from={config.init_from} was trained for {base.schema.tasks}, but this run trains "
                f"{schema.tasks}; a model of architecture {config.model.architecture.value} keeps its tasks"
            )
        grown = self._grown_columns(schema)
        if self.freezes:
            schema = replace(base.schema, tasks=schema.tasks, has_retrieval=schema.has_retrieval)
            table = self._extended_table()
        else:
            schema, table = self._grown_schema(schema, grown), base.feature_table
            if grown is not None:
                self._rows["features.values"] = torch.from_numpy(grown.value_rows)
                self._rows["features.dense"] = torch.from_numpy(grown.dense_rows)
                table = joined_features(grown, table, self._features())
        made = ARCHITECTURES[config.model.architecture](config.model, schema, self._items, config.data)
        weights, earlier = made.state_dict(), base.state_dict()
        self._match(ACTION_WEIGHTS, base.schema.actions, schema.actions)
        self._match(TASK_WEIGHTS, base.schema.tasks, schema.tasks)
        self._shapes = {name: weight.shape for name, weight in weights.items()}
        for name in weights.keys() & earlier.keys() - set(MEASURED_WEIGHTS):
            weights[name] = self._fitted(name, earlier[name], weights[name].clone())
        made.load_state_dict(weights)
        made.set_item_features(table)
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
        is_empty = ~self.base.item_table.detach().any(1) & (known >= max(self.frozen_rows, 1))
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

    def _grown_columns(self, schema: Schema) -> GrownColumns | None:
        """The columns of item features of the model and of a log with this schema; None without any."""
        known, table = self.base.schema.item_features, self.base.feature_table
        if not known and not schema.item_features:
            return None
        given = {} if self._log.item_features is None else self._log.item_features.columns
        values = {name: column.values for name, column in given.items() if isinstance(column, CategoryColumn)}
        return GrownColumns.of(known, {} if table is None else table.values, schema.item_features, values)

    def _grown_schema(self, schema: Schema, grown: GrownColumns | None) -> Schema:
        """The schema of a model of which everything trains."""
        known = self.base.schema
        # Codes of actions are those of the log, so actions that only the model knows come last.
        actions = [*schema.actions, *(name for name in known.actions if name not in schema.actions)]
        ratings, columns = known.rating_range or schema.rating_range, [] if grown is None else grown.columns
        return replace(schema, actions=actions, rating_range=ratings, item_features=columns)

    def _extended_table(self) -> ItemFeatureTable | None:
        """The features of a model whose summarizer is frozen: those of known items stay."""
        table, columns = self.base.feature_table, self.base.schema.item_features
        if table is None or len(self._items) == len(self.base.items):
            return table
        features = self._features(len(self.base.items)).columns
        return table.extended(ItemFeatures({column.name: features[column.name] for column in columns}), columns)

    def _features(self, first: int = 0) -> ItemFeatures:
        """The log's features of the model's items, from the row `first` of the vocabulary on."""
        assert self._log.item_features is not None
        ids = self._items.ids(np.arange(first, len(self._items)))
        return self._log.item_features.select(self._log.items.rows(ids))


def _check_model(config: TrainConfig, base: RankingModel) -> None:
    asked, kept = to_dict(config.model), to_dict(base.config)
    unread = COUNTER_KEYS[1:] if not (config.model.counters or base.config.counters) else ()
    changed = [key for key in asked if key not in (*FREE_KEYS, *unread) and asked[key] != kept[key]]
    if changed:
        differences = ", ".join(f"model.{key} ({kept[key]} -> {asked[key]})" for key in changed)
        words = " ".join(f"model.{key}={value_text(kept[key])}" for key in changed)
        raise ConfigError(
            f"init_from={config.init_from}: the model stays, but this run changes {differences}; set {words}"
        )
    if base.config.item_start is ItemStart.user_factors:
        raise ConfigError(
            f"init_from={config.init_from}: its item vectors are user factors, which hold the labels of its log and "
            "have no vectors of new items; train without init_from"
        )


def _check_split(config: TrainConfig, before: DataConfig) -> None:
    """Refuse a model that was trained on labels which this run holds out, assuming that the log has only grown."""
    was, now = split_until(before, "train"), split_until(config.data, "train")
    fits = before.split is config.data.split and was.held_share >= now.held_share
    if before.split is Split.time and now.before is not None and was.before is not None:
        fits = fits and was.before <= now.before
    if not fits:
        raise LeakageError(
            f"init_from={config.init_from}: was trained on events until {was}, but this run holds out what comes after "
            f"{now}; use the same split, with times or shares that hold out no more"
        )


def _check_log(config: TrainConfig, base: RankingModel, log: EventLog) -> None:
    where, known = f"init_from={config.init_from}", base.schema
    if log.items.kind != base.items.kind:
        raise ConfigError(f"{where}: its item ids are {base.items.kind}, but those of {log.path} are {log.items.kind}")
    if log.has_time != known.has_time:
        has = ("has no times", "has times")
        raise ConfigError(f"{log.path}: {has[log.has_time]}, but the log of {where} {has[known.has_time]}")
    keeps_codes = config.init_freeze is InitFreeze.summarizer
    if keeps_codes and log.actions != known.actions[: len(log.actions)]:
        raise ConfigError(
            f"init_freeze=summarizer: the actions of {log.path} are {log.actions}, but summaries know {known.actions}; "
            "set init_freeze=none, and refresh all stores"
        )
    if config.model.embedding_rows and known.actions != log.actions[: len(known.actions)]:
        raise ConfigError(
            f"{where}: a hashed table reads actions by their place, but {log.path} has {log.actions} instead of "
            f"{known.actions}; train without init_from"
        )
