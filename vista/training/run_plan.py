"""The plan of a run: settings that are null, resolved from the log."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass, field, replace
from typing import Any

from tqdm import tqdm

from vista.config import OptimConfig, TrainConfig
from vista.config.checks import Architecture, TableKind, planned, require
from vista.config.composition import flat_settings, value_text
from vista.config.model_config import (
    ACTION,
    ITEM,
    MOST_ACTIONS,
    TEMPERATURES,
    NextItemConfig,
    RankingConfig,
    is_category,
)
from vista.examples.batch_source import trained_tasks
from vista.files import NUMBER, TABLE, FieldRule, check_fields, either, list_of, one_of, whole
from vista.log.event_log import EventLog
from vista.log.splits import Until, leaves_out_seen, split_until, visible_counts

logger = logging.getLogger(__name__)
STEPS, BATCHES_PER_EPOCH, BATCHES_WITH_COUNTERS = 10_000, 400, 200
"""Most steps of a run, which optim.patience ends much earlier, and batches per epoch. With counters, models overfit in
steps of fewer events (research log)."""
TOKENS_PER_BATCH = 512, 8192
"""Smallest and largest planned batch, in events."""
MOST_EPOCHS = 30
RARE_EVENTS, RARE_TABLE_RATE = 50, 0.1
"""Training events per item below which item vectors that start from the item space learn at this rate from labels
alone. With the full rate they learn the labels by heart in two epochs (research log)."""
MOST_NEGATIVES = 4096
MOST_CATEGORIES, ITEMS_PER_VALUE = 2, 4
"""Categories of items that are counted where labels are trained: at most, and how many items share a value on average.
Counts of items alone do not tell how much a user likes a topic, or how often the user was right (research log)."""
MOST_WARMUP, WARMUP_SHARE = 100, 0.25
"""Steps of the warm-up: at most, and as a share of an epoch."""
FEW_STEPS = 20
"""A run of fewer steps warns that it cannot learn much."""


def plan_run(config: TrainConfig, log: EventLog, since: int | None = None) -> TrainConfig:
    """The configuration with its null settings resolved from the log. Explicit settings stay. `since`: over a base, the
    time (ms) at which labels begin."""
    counts = visible_counts(log, split_until(config.data, "train"))
    if since is not None:
        counts = counts - visible_counts(log, Until(before=since))
    num_events, reasons = int(counts.sum()), list[str]()
    data, optim, model = replace(config.data), replace(config.optim), replace(config.model)

    data.exclude_seen = leaves_out_seen(log, data)
    reasons += _plan_counters(replace(config, data=data), log, model, optim)
    config = replace(config, data=data, optim=optim, model=model)
    at_all_positions = config.learns_alone or not model.counter_keys
    batches_per_epoch = BATCHES_PER_EPOCH if at_all_positions else BATCHES_WITH_COUNTERS
    if data.tokens_per_batch is None:
        least, most = TOKENS_PER_BATCH
        nearest = 2 ** round(math.log2(max(num_events / batches_per_epoch, 1)))
        data.tokens_per_batch = min(max(nearest, least), most)
        reasons.append(f"data.tokens_per_batch={data.tokens_per_batch} ({num_events:,} training events)")
    if data.num_negatives is None:
        data.num_negatives = max(min(log.num_items, MOST_NEGATIVES), 1)
        reasons.append(f"data.num_negatives={data.num_negatives} ({log.num_items:,} items)")
    require(
        model.table is TableKind.plain or not config.ranks_items or data.num_negatives < log.num_items,
        "data.num_negatives",
        f"{data.num_negatives} of the log's {log.num_items:,} items make an exact softmax, which reads the whole table "
        "in every step; with model.table=torchrec set fewer negatives than items, or set model.table=plain",
    )
    batches = max(math.ceil(num_events / data.tokens_per_batch), 1)
    if optim.epochs is None and optim.minutes is None:
        optim.epochs = min(max(round(STEPS / batches), 1), MOST_EPOCHS)
        reasons.append(f"optim.epochs={optim.epochs} at most (about {batches:,} steps per epoch)")
    if optim.warmup_steps is None:
        optim.warmup_steps = min(math.ceil(WARMUP_SHARE * batches), MOST_WARMUP)
        reasons.append(f"optim.warmup_steps={optim.warmup_steps}")
    if optim.table_rate is None:
        starts = model.space_dim > 0 and not model.embedding_rows  # from vectors that others' histories have made
        is_slow = starts and num_events < RARE_EVENTS * log.num_items and not config.ranks_items
        optim.table_rate = RARE_TABLE_RATE if is_slow else 1.0
        reasons += [f"optim.table_rate={RARE_TABLE_RATE} (labels alone, and few per item)"] if is_slow else []
    if reasons:
        logger.info("settings from the log: %s", ", ".join(reasons))
    return replace(config, data=data, optim=optim, model=model)


def _plan_counters(config: TrainConfig, log: EventLog, model: RankingConfig, optim: OptimConfig) -> list[str]:
    """Resolve what a model counts, and the settings that follow; what to log about them.

    Args:
        config: as given, but with `data.exclude_seen`.
        model: a copy of its model, which is changed.
        optim: likewise.
    """
    returns = not config.data.exclude_seen
    has_labels = bool(trained_tasks(log, optim))
    labels_alone = has_labels and optim.next_weight == 0 and not optim.window_weight
    if labels_alone:
        optim.window_weight = 0.0
    ranks_items = optim.next_weight != 0 or optim.window_weight != 0
    if isinstance(model, NextItemConfig):
        if model.counter_keys is None:
            counts_items = ranks_items and (returns or (model.architecture is Architecture.vista and not has_labels))
            if config.base is not None or not (counts_items or labels_alone):
                model.counter_keys = []
            elif has_labels:
                told = labels_alone or bool(log.passive)
                model.counter_keys = _keys_of_labels(model, log, by_action=told, returns=returns)
            else:
                model.counter_keys = [ITEM]
        if model.temperature is None:
            alone = replace(config, model=model, optim=optim).learns_alone
            model.temperature = TEMPERATURES[0] if alone else model.softmax_temperature
    resolved = replace(config, model=model, optim=optim)
    optim.window_weight, optim.next_weight = resolved.window_weight, resolved.next_weight
    if not model.counter_keys:
        return []
    why = {
        "model.counter_keys": " (labels)" if has_labels else " (next items)",
        "optim.next_weight": f" (data.split={config.data.split.value})",
    }
    asked, chosen = flat_settings(config), flat_settings(resolved)
    keys = "model.counter_keys", "model.temperature", "optim.window_weight", "optim.next_weight"
    nulls = [key for key in keys if asked.get(key, "absent") is None]
    return [f"{key}={value_text(chosen[key]).removesuffix('.0')}{why.get(key, '')}" for key in nulls]


def _keys_of_labels(model: RankingConfig, log: EventLog, *, by_action: bool, returns: bool) -> list[str]:
    """What to count where labels are trained: items and categories of items, and all events and these by action; items
    by action only if users return to them."""
    categories = [
        name
        for name, column in (log.item_features if model.reads("item_features") else {}).items()
        if column.is_single and column.size * ITEMS_PER_VALUE <= log.num_items
        if "*" not in name and is_category(name)  # else a key means something else
    ][:MOST_CATEGORIES]
    by_action &= 1 < len(log.actions) <= MOST_ACTIONS and not any("*" in name for name in log.actions)
    names = [*categories, *([ITEM] if returns else [])]
    return [ITEM, *categories, *([ACTION, *(f"{name}*{ACTION}" for name in names)] if by_action else [])]


def warn_of_few_steps(optim: OptimConfig, steps: int) -> None:
    """Warn if a run was too short. `steps`: of the whole run."""
    limits = [name for name in ("epochs", "minutes") if getattr(optim, name) is not None]
    if 0 < steps < max(2 * planned(optim.warmup_steps, "optim.warmup_steps"), FEW_STEPS):
        logger.warning(
            "the run had only %d steps, of which %d were warm-up: too few to learn much; raise %s, "
            "or take smaller batches (data.tokens_per_batch)",
            steps,
            optim.warmup_steps,
            " or ".join(f"optim.{name}" for name in limits),
        )


_MEASURED = FieldRule("a number", lambda value: type(value) in (int, float))
"""A metric, which can be NaN."""


@dataclass(slots=True)
class Progress:
    """What a checkpoint holds besides tensors."""

    epoch: int = 0
    batch: int = 0
    """Batches done in this epoch."""
    step: int = 0
    best: float | None = None
    """Best value of the validation metric so far."""
    stopped: bool = False
    """Whether training stopped before its last epoch, as validation did not improve or the time was up."""
    seconds: float = 0.0
    """Time spent on the run, validation included, in all processes that worked on it."""
    validation_seconds: float = 0.0
    """Time of the newest validation."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Validation metrics, one entry per validation."""
    wide: list[float] = field(default_factory=list)
    """The validation metric of each user after epoch 0; empty without an epoch 0."""
    baselines: dict[str, dict[str, float]] = field(default_factory=dict)
    """Validation metrics of the counting baselines, by name."""
    counted: list[float] = field(default_factory=list)
    """NDCG@10 of each user by the best of these baselines."""
    lead: list[float] = field(default_factory=list)
    """By how much the best model is ahead of that baseline in NDCG@10, and the standard error over users."""

    @classmethod
    def restored(cls, values: dict[str, Any], step: int, metric: str, ranking_metric: str) -> Progress:
        """The progress in a checkpoint that was written after `step` steps.

        Args:
            values: of all fields, by name.
            metric: as in `Validation`; empty without validation.
            ranking_metric: likewise.

        Raises:
            ValueError: if a field is missing, unknown, of another type, or contradicts another one.
        """
        rules = {
            **dict.fromkeys(("epoch", "batch"), whole(most=step)),
            "step": one_of(step),
            "best": either(one_of(None), _MEASURED),
            "stopped": one_of(False, True),
            **dict.fromkeys(("seconds", "validation_seconds"), NUMBER),
            "history": list_of(TABLE),
            "wide": list_of(_MEASURED),
            "baselines": TABLE,
            "counted": list_of(_MEASURED),
            "lead": either(list_of(_MEASURED, 0, 0), list_of(_MEASURED, 2, 2)),
        }
        check_fields(values, rules)
        progress = cls(**values)
        count, measured = whole(most=step), {metric, ranking_metric} - {""}
        for row in progress.history:
            check_fields(row, dict.fromkeys(row.keys() | measured, _MEASURED) | {"epoch": count, "step": count})
        for name, row in progress.baselines.items():
            check_fields({name: row}, {name: TABLE})
            check_fields(row, dict.fromkeys((*row, ranking_metric), _MEASURED))
        # An epoch has at least one batch. Compared as text, because a metric that is NaN does not equal itself.
        batches_fit = progress.epoch + progress.batch <= step and (progress.epoch > 0 or progress.batch == step)
        best_fits = (progress.best is None) == (not progress.history) and (
            progress.best is None or str(progress.best) in {str(row[metric]) for row in progress.history}
        )
        if not batches_fit or not best_fits:
            raise ValueError("the fields of progress contradict each other")
        return progress

    def finished(self, epochs: int | None) -> bool:
        """Whether training ends here. `epochs`: optim.epochs."""
        return self.stopped or (epochs is not None and self.epoch >= epochs)


class RunClock:
    """Measures the time that this process spends on a run."""

    def __init__(self, began: float | None = None) -> None:
        """
        Args:
            began: `time.perf_counter` when the process began; None is now.
        """
        self._lap_began = time.perf_counter() if began is None else began
        self._steps_s = self._waited_s = 0.0
        self._began: tuple[float, float] | None = None
        """Seconds when `left` was first asked, and the share of the run that was done."""

    def lap(self) -> float:
        """Seconds since the last call, or since the process began."""
        before, self._lap_began = self._lap_began, time.perf_counter()
        return self._lap_began - before

    def since_lap(self) -> float:
        """Seconds since `lap` was called, or since the process began."""
        return time.perf_counter() - self._lap_began

    def add_step(self, seconds: float, waited: float) -> None:
        """Count a step, and the part of it in which it waited for its batch (s)."""
        self._steps_s += seconds
        self._waited_s += waited

    @property
    def waiting_share(self) -> float | None:
        """Share of the time of steps in which they waited for their batches; None without steps."""
        return self._waited_s / self._steps_s if self._steps_s else None

    def left(self, share_done: float) -> dict[str, str]:
        """{"run": "1:02:03 left"}, extrapolated from the first call; empty where it cannot be known yet. `share_done`:
        of the run; 0 if it is unknown."""
        now = time.monotonic()
        if self._began is None:
            self._began = (now, share_done) if share_done > 0 else None
            return {}
        seconds, done = now - self._began[0], share_done - self._began[1]
        if done <= 0:
            return {}
        return {"run": f"{tqdm.format_interval(seconds / done * max(0.0, 1 - share_done))} left"}
