"""Warm starts: training begins with the weights of an earlier model, on a log that has grown.

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
import torch.nn.functional as F
from torch import Tensor

from vista.arrays import Int
from vista.config import DataConfig, TrainConfig
from vista.config.checks import Architecture, InitFreeze, Precision, Split, planned, to_dict
from vista.config.composition import value_text
from vista.device import autocast
from vista.errors import CheckpointError, ConfigError, LeakageError
from vista.examples.batch import Batch
from vista.examples.batch_source import MEASURED_BATCHES, BatchSource
from vista.log.event_log import EventLog
from vista.log.histories import ColumnValues
from vista.log.splits import split_until
from vista.model.features import RowFeatureReader, RowReaders, Schema
from vista.model.item_feature_table import GrownColumns, ItemFeatureTable, joined_features
from vista.model.losses import start_counted
from vista.model.ranking_model import UNKNOWN_ITEM, RankingModel
from vista.model.registry import ARCHITECTURES, load_model
from vista.model.saved_model import CONFIG_FILE
from vista.model.vista_model import STAGE1_WEIGHTS
from vista.training.downstream import COUNTER_KEYS, with_settings_of
from vista.training.log_schema import encoded_features, features_of, frequent_items

# What a warm start refuses: another model, another kind of log, and labels that the earlier model was trained on.

FREE_KEYS = ("dropout", "counted_dropout", "hashed_features")
"""Fields of ModelConfig that may differ from the earlier model's."""


def check_start(config: TrainConfig, base: RankingModel, log: EventLog) -> None:
    """Check that a run can start from a model.

    Args:
        config: with the model's values for settings that are null.
        base: the model of init_from.
        log: of the run.

    Raises:
        ConfigError: if the configuration or the log does not fit the model.
        LeakageError: if the model was trained on events that this run holds out.
    """
    _check_model(config, base)
    _check_split(config, base.data)
    _check_log(config, base, log)


def _check_model(config: TrainConfig, base: RankingModel) -> None:
    asked, kept = to_dict(config.model), to_dict(base.config)
    unread = () if config.model.counter_keys or base.config.counter_keys else (*COUNTER_KEYS[1:], "transitions")
    changed = [key for key in asked if key not in (*FREE_KEYS, *unread) and asked[key] != kept.get(key)]
    if config.model.kind is not base.config.kind:  # which then also has other keys
        changed = ["architecture"]
    if changed:
        differences = ", ".join(f"model.{key} ({kept[key]} -> {asked[key]})" for key in changed)
        words = " ".join(f"model.{key}={value_text(kept[key])}" for key in changed)
        raise ConfigError(
            f"init_from={config.init_from}: model settings must match the earlier model, but these differ: "
            f"{differences}; set {words}"
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
        raise ConfigError(
            f"{where}: its item ids are {base.items.kind}, but those of {log.path} are {log.items.kind}; start from "
            "a model of this log, or leave init_from out"
        )
    if log.has_time != known.has_time:
        has = ("has no times", "has times")
        raise ConfigError(
            f"{log.path}: {has[log.has_time]}, but the log of {where} {has[known.has_time]}; start from a "
            "model of this log, or leave init_from out"
        )
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


logger = logging.getLogger(__name__)
MEASURED_WEIGHTS = ("item_statistics", "item_rates", "transition_items", "transition_weights", "category")
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
HEAD_WEIGHTS = "candidate_head.network."
"""Prefix of the names of weights that read all tasks, so they start again if the tasks change."""


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
        rows = self._item_rows()
        self._rows: dict[str, Tensor] = {self._items_in: rows, "item_space": rows, "item_space_weights": rows}
        """By name of a weight: for each of its rows, int64, the earlier model's row, or -1. Other weights are taken
        as they are."""

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
        if config.init_freeze is InitFreeze.summarizer:  # a decoder trains summaries
            config = replace(config, optim=replace(config.optim, reconstruction_weight=0.0))
        check_start(config, base, log)
        return cls(config, log, base)

    @property
    def new_rows(self) -> Int:
        """Sorted model rows of the items that are initialized from scratch."""
        return np.flatnonzero(self._rows[self._items_in].numpy() < 0)

    def model(self, schema: Schema, readers: RowReaders) -> RankingModel:
        """The model to train. `schema`: of the log, and readers: of its features."""
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
        tasks_change = base.schema.tasks != schema.tasks
        self._match(ACTION_WEIGHTS, base.schema.actions, schema.actions)
        self._match(TASK_WEIGHTS, base.schema.tasks, schema.tasks)
        measured = {*MEASURED_WEIGHTS, *([] if self.freezes else ["item_space_weights"])}
        for name in weights.keys() & earlier.keys() - measured:
            if name.startswith(HEAD_WEIGHTS) and tasks_change:
                continue
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
                parameter.requires_grad_(trains or not name.startswith(STAGE1_WEIGHTS))
        logger.info(
            "starting from %s: %d items, of which %d are new to it%s",
            self._folder,
            len(self._items),
            len(self._items) - len(base.items),
            "; stage 1 is frozen" if self.freezes else "",
        )
        return made

    def identity(self) -> dict[str, Any]:
        """What must not change between a run and its resumption."""
        return {"init_from": self._digest, "init_freeze": planned(self.config.init_freeze, "init_freeze").value}

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
        known = rows >= 0
        start[known] = old[rows[known]]
        return start

    def _grown_columns(self, schema: Schema, readers: RowReaders) -> dict[str, GrownColumns]:
        """By field of Schema: the columns of features of the model and of a log with this schema, if there are any.

        With a frozen summarizer, those that it reads, and those that records name, are checked but left out, because
        they do not grow.
        """
        found, base, log = {}, self.base, self._log
        of_log: dict[str, ColumnValues] = {
            "item_features": {name: own.values for name, own in log.item_features.items()},
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
            names = ("tasks", "examined_tasks", "has_retrieval", "request_features")
            return replace(known, has_decoder=False, **{name: getattr(schema, name) for name in names} | features)
        # Codes of actions are those of the log, so actions that only the model knows come last.
        actions = [*schema.actions, *(name for name in known.actions if name not in schema.actions)]
        features["num_tail_features"] = known.num_tail_features  # new columns come last, so stage 2 does not read them
        return replace(schema, actions=actions, rating_range=known.rating_range or schema.rating_range, **features)

    def _item_features(self, grown: GrownColumns | None) -> ItemFeatureTable | None:
        """Encoded features of the items of the model to train. `grown`: its columns; None if they are those of the
        earlier model, whose items then keep their features."""
        table, known, columns = self.base.feature_table, len(self.base.items), self.base.schema.item_features
        if grown is not None:
            return joined_features(grown, table, features_of(self._items, self._log))
        if table is None or len(self._items) == known:
            return table
        features = features_of(self._items, self._log, known)
        return table.extended({column.name: features[column.name] for column in columns}, columns)


def _reader(grown: GrownColumns | None, known: RowFeatureReader | None) -> RowFeatureReader | None:
    """How the model to train reads features of rows: as `known` if `grown` is None."""
    if grown is None:
        return known
    return RowFeatureReader(grown.columns, {column.name: grown.values.get(column.name) for column in grown.columns})


# Item vectors that training starts from, and those that it reads.


START_RMS = 0.05
"""Root mean square of the values of a vector that starts from the item space."""


@torch.no_grad()
def start_from_space(model: RankingModel, new_rows: Int | None = None) -> None:
    """Replace the drawn vectors of a model's items by those of its item space, where they have any.

    Args:
        new_rows: model rows to start. The vectors of other rows are trained: those of the space are rotated and scaled
            to fit these, because its directions are arbitrary. None starts all rows.
    """
    rows = model.item_space.any(1).nonzero().squeeze(1).cpu()
    width = model.item_table.shape[1]
    vectors = F.pad(model.item_space[rows].cpu(), (0, width - model.item_space.shape[1])) * START_RMS * width**0.5
    if new_rows is not None:
        is_new = torch.isin(rows, torch.from_numpy(new_rows))
        vectors = _fitted(model, rows, vectors, is_new)
        rows = rows[is_new]
    model.write_id_vectors(rows.numpy(), vectors)


def _fitted(model: RankingModel, rows: Tensor, vectors: Tensor, is_new: Tensor) -> Tensor:
    """ID embeddings [n, M] of the new ones among `rows`: orthogonal Procrustes with a scale (Schönemann, 1966). Vectors
    of items include their features, so these are subtracted."""
    places = rows.to(model.device)
    target = model.item_vectors(places).cpu().double()
    vectors = vectors.double()
    left, stretch, right = torch.linalg.svd(vectors[~is_new].T @ target[~is_new])
    square = float(vectors[~is_new].square().sum())
    scale = float(stretch.sum()) / square if square else 1.0
    features = model.with_features(torch.zeros_like(model.id_vectors(places)), places).cpu().double()
    fitted: Tensor = scale * vectors @ (left @ right) - features
    return fitted[is_new].float()


ID_DROPOUT = 0.1
"""With features of items: share of the items of a batch whose ID embeddings are left out, so that their features stand
in for them."""


def training_vectors(model: RankingModel, batch: Batch) -> Tensor:
    """[R, M] vectors of the items `batch.rows` as training reads them. With features, these stand alone at random,
    unless model.dropout is 0."""
    vectors = model.id_vectors(batch.rows)
    if model.features is not None and model.training and model.config.dropout > 0:
        dropped = torch.rand(len(vectors), 1, device=vectors.device) < ID_DROPOUT
        vectors = vectors.masked_fill(dropped, 0.0)
    return model.with_features(vectors, batch.rows)


# What a new model has before its first step, besides drawn weights.


def drawn_model(config: TrainConfig, log: EventLog, schema: Schema, readers: RowReaders) -> RankingModel:
    """A model of a log with drawn weights."""
    items = frequent_items(log, config.data)
    model = ARCHITECTURES[config.model.architecture](config.model, schema, items, config.data)
    model.set_item_features(encoded_features(log, items, schema))
    for name, reader in readers.items():
        setattr(model, name, reader)
    return model


def take_item_values(model: RankingModel, source: BatchSource) -> None:
    """Give a model the statistics and label rates of items in the training part, where it reads them."""
    if source.statistics is not None:
        model.item_statistics.copy_(torch.from_numpy(source.statistics.latest(1 + len(model.items))))
    if source.rates is not None:
        model.item_rates.copy_(torch.from_numpy(source.rates.of_all(1 + len(model.items))))


def start_model(
    model: RankingModel,
    log: EventLog,
    source: BatchSource,
    config: TrainConfig,
    precision: Precision,
    warm: WarmStart | None,
) -> None:
    """Give a model what it takes from the training part: statistics and transitions of items, their vectors, its gate.
    `warm`: the warm start, if there is one; only its new items and heads are initialized."""
    take_item_values(model, source)
    if source.spaces is not None and config.base is None and (warm is None or not warm.freezes):
        model.item_space.copy_(torch.from_numpy(source.spaces.of_all(1 + len(model.items))))
        if model.item_space_weights is not None:
            weights = torch.from_numpy(source.spaces.weights_of_all(1 + len(model.items)))
            model.item_space_weights[:, : weights.shape[1]] = weights  # actions that only the model knows come last
    if source.transitions is not None and model.transitions is not None:
        model.transitions.copy_(source.transitions.table(1 + len(model.items)))
    if config.base is None:  # a base contains what is read here
        model.read_item_table(features_of(model.items, log))
        if config.model.space_dim and not config.model.embedding_rows:
            start_from_space(model, None if warm is None else warm.new_rows)
        if model.features is not None:
            unseen = np.setdiff1d(np.arange(UNKNOWN_ITEM + 1, 1 + len(model.items)), np.flatnonzero(source.frequency))
            model.zero_id_embeddings(unseen if warm is None else np.intersect1d(unseen, warm.new_rows))
    if model.counted is not None and (
        warm is None or warm.base.counted is None
    ):  # last, because it is measured by the scores of other items
        model.eval()
        batches = (source.batch(0, index) for index in range(min(source.num_batches(0), MEASURED_BATCHES)))
        asked = next((batch for batch in batches if batch.anchors is not None and len(batch.anchors.window)), None)
        if asked is None:
            return
        asked = asked.to(model.device)
        with autocast(precision, model.device):
            start_counted(model, asked, training_vectors(model, asked), source.returning_share)
