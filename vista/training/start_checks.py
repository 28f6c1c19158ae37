"""What a warm start refuses: another model, another kind of log, and labels that the earlier model was trained on."""

from __future__ import annotations

from vista.config import DataConfig, TrainConfig
from vista.config.checks import to_dict
from vista.config.choices import InitFreeze, ItemStart, Split
from vista.config.config_keys import value_text
from vista.errors import ConfigError, LeakageError
from vista.log.event_log import EventLog
from vista.log.splits import split_until
from vista.model.ranking_model import RankingModel
from vista.training.downstream import COUNTER_KEYS

FREE_KEYS = ("dropout", "counted_dropout", "id_dropout", "item_start", "hashed_features")
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
    unread = COUNTER_KEYS[1:] if not (config.model.counters or base.config.counters) else ()
    changed = [key for key in asked if key not in (*FREE_KEYS, *unread) and asked[key] != kept[key]]
    if changed:
        differences = ", ".join(f"model.{key} ({kept[key]} -> {asked[key]})" for key in changed)
        words = " ".join(f"model.{key}={value_text(kept[key])}" for key in changed)
        raise ConfigError(
            f"init_from={config.init_from}: model settings must match the earlier model, but these differ: "
            f"{differences}; set {words}"
        )
    if base.config.item_start is ItemStart.user_factors:
        raise ConfigError(
            f"init_from={config.init_from}: its item vectors are user factors, which contain the labels of its log "
            "and cannot be extended to new items; train without init_from"
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
