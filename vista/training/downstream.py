"""Downstream training: a new stage 2 and new heads over the summaries of a store. The base model stays as it is.

These are the paper's downstream models: many models read the stored summaries of one summarizer. A downstream model
keeps everything that `VistaModel.summarizer_id` covers, so the base's stores serve it too. Its labels lie between the
store's `until` and `data.validation_from`. Training reads these events and the tail_len before them, regardless of the
length of a history.
"""

from __future__ import annotations

import logging
from dataclasses import fields, replace
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.config import ModelConfig, TrainConfig
from vista.config.checks import to_dict
from vista.config.composition import value_text
from vista.errors import ConfigError, LeakageError
from vista.examples.batch_source import StoredSummaries
from vista.log.event_log import EventLog
from vista.log.splits import parse_until, split_until, visible_counts
from vista.model.features import RowReaders, Schema
from vista.model.ranking_model import RankingModel
from vista.model.summarizer import Stage1Config
from vista.model.vista_model import STAGE1_WEIGHTS, VistaModel
from vista.refresh import check_log
from vista.store.reader import StoreReader
from vista.store.record_encoding import read_key

logger = logging.getLogger(__name__)
COUNTER_KEYS = ("counter_keys", "num_counters", "counter_days", "counter_events")
KEYS_OF_STAGE_1 = {"has_gap": ("ignore",), "counters": COUNTER_KEYS}
"""Fields of Stage1Config -> the fields of ModelConfig that set them, where these have other names."""
INHERITED_KEYS = ("counter_keys", "temperature", "tail_features")
"""Fields of ModelConfig that are the base's if they are null."""


class Downstream:
    """A base model, and the generation of its store that training reads. A context manager that closes the store."""

    def __init__(self, config: TrainConfig, log: EventLog, base: VistaModel, store: StoreReader, since: int) -> None:
        self.config = config
        """With the base's values for settings that are null."""
        self._log, self.base, self._store, self._since = log, base, store, since
        self._seen = visible_counts(log, since)
        self._empty = base.empty_summary().numpy()
        self.summaries = StoredSummaries(since, self._read)
        logger.info(
            "downstream of %s: %d summaries of generation %d of %s, until=%d",
            config.base,
            len(store),
            store.generation,
            store.path,
            since,
        )

    @classmethod
    def open(cls, config: TrainConfig, log: EventLog) -> Downstream:
        """Open the base and the store of a configuration with a base.

        Raises:
            ConfigError: if the configuration or the log does not fit the base.
            LeakageError: if the base was trained on, or the store was refreshed with, events that
                `data.validation_from` hides.
            SummarizerMismatchError: if the store was written by another summarizer.
            CheckpointError, StoreError: if the base or the store is missing or damaged.
        """
        assert config.base is not None  # TrainConfig has checked
        base = VistaModel.from_pretrained(config.base)
        config = with_settings_of(base, config)
        assert config.store is not None
        _check_model(config, base)
        check_log(base, log)
        end = split_until(config.data, "train").before
        assert end is not None  # a base requires a split by time
        trained = split_until(base.data, "train")
        if trained.before is None or trained.before > end:
            raise LeakageError(
                f"base={config.base}: was trained on events until {trained}, which include labels that "
                f"data.validation_from={config.data.validation_from} hides; train it with this data.validation_from, "
                "or an earlier one"
            )
        key = read_key(config.authentication_key_file)
        store = StoreReader.open(config.store, summarizer_id=base.summarizer_id(), key=key)
        try:
            seen = parse_until(store.manifest.until)
            if seen.before is None or seen.before > end:
                raise LeakageError(
                    f"store={store.path}: was refreshed with until={seen}, but labels must lie between that and "
                    f"data.validation_from={config.data.validation_from}; run `vista refresh until=…` with an earlier "
                    "time into a store of its own"
                )
            return cls(config, log, base, store, seen.before)
        except BaseException:
            store.close()
            raise

    def __enter__(self) -> Downstream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._store.close()

    def model(self, schema: Schema, readers: RowReaders) -> VistaModel:
        """The model to train: the base's weights, frozen, and a new stage 2 and heads for `schema`.

        Args:
            schema: of the log, and readers: of its features.
        """
        kept = replace(
            self.base.schema,
            tasks=schema.tasks,
            has_retrieval=schema.has_retrieval,
            has_decoder=False,
            examined_tasks=schema.examined_tasks,
            request_features=schema.request_features,
            user_features=self.base.schema.user_features if self.config.model.reads("user_features") else [],
        )
        assert isinstance(self.config.model, ModelConfig)  # TrainConfig has checked
        model = VistaModel(self.config.model, kept, self.base.items, self.config.data)
        weights = {name: value for name, value in self.base.state_dict().items() if name.startswith(STAGE1_WEIGHTS)}
        model.load_state_dict(weights, strict=False)
        model.take_catalog(self.base)
        model.request_features = readers.get("request_features")
        model.user_features = self.base.user_features if kept.user_features else None
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(STAGE1_WEIGHTS))
        return model

    def identity(self) -> dict[str, Any]:
        """What must not change between a run and its resumption."""
        manifest = self._store.manifest
        return {
            "base's summarizer": manifest.summarizer_id[:12],
            "store's generation": f"{manifest.generation} ({manifest.records_digest})",
        }

    def _read(self, users: NDArray[np.int64]) -> NDArray[np.float32]:
        """Summaries [B, S, M] of user rows int64 [B]; users without a record get that of an empty history.

        Raises:
            LeakageError: if a record covers more than the store says, and so perhaps a label.
        """
        ids = self._log.users.ids(users)
        stored = self._store.get_many(ids)
        late = stored.found & ((stored.last_event_ts >= self._since) | (stored.event_count > self._seen[users]))
        if late.any():
            first = int(np.flatnonzero(late)[0])
            raise LeakageError(
                f"user {ids.tolist()[first]!r}: the record in {self._store.path} covers {stored.event_count[first]} "
                f"events, the last at {stored.last_event_ts[first]}, but of this log only {self._seen[users[first]]} "
                f"events lie before its until={self._since}; refresh the store from this log"
            )
        summary = stored.summary[:, : self._empty.shape[1]]  # without the row of pooled vectors, which the log gives
        return np.where(stored.found[:, None, None], summary, self._empty)


def with_settings_of(base: RankingModel, config: TrainConfig) -> TrainConfig:
    """The configuration with the base's values for settings that are null."""
    asked = [key for key in INHERITED_KEYS if getattr(config.model, key, ...) is None]
    null: dict[str, Any] = {key: getattr(base.config, key, None) for key in asked}
    return replace(config, model=replace(config.model, **null))


def _check_model(config: TrainConfig, base: VistaModel) -> None:
    """Refuse settings that would make other summaries, or other records of them, than the base's."""
    asked, kept = to_dict(config.model), to_dict(base.config)
    stage1 = Stage1Config.of(config.model, base.schema)
    names = [field.name for field in fields(stage1) if getattr(stage1, field.name) != getattr(base.stage1, field.name)]
    keys = [key for name in names for key in KEYS_OF_STAGE_1.get(name, (name,))]
    changed = [key for key in (*keys, "tail_features") if asked[key] != kept[key]]
    if changed:
        differences = ", ".join(f"model.{key} ({kept[key]} -> {asked[key]})" for key in changed)
        words = " ".join(f"model.{key}={value_text(kept[key])}" for key in changed)
        raise ConfigError(f"base={config.base}: stage 1 is kept, but this run changes {differences}; set {words}")
