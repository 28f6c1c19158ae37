"""The plan of a run: settings that are null, resolved from the log."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

from vista.config import TrainConfig
from vista.config.choices import ItemStart, Stage
from vista.log.event_log import EventLog
from vista.log.splits import split_until, visible_counts
from vista.log.until import Until

logger = logging.getLogger(__name__)
BATCHES_PER_EPOCH = 400
TOKENS_PER_BATCH = 512, 8192
"""Smallest and largest planned batch, in events."""
STEPS = 3000
MOST_EPOCHS = 30
MOST_NEGATIVES = 4096
WARMUP_SHARE = 0.03
TIMED_WARMUP_STEPS = 50
"""Warm-up with optim.minutes, where the number of steps is not known at the start."""


def plan_run(config: TrainConfig, log: EventLog, since: int | None = None) -> TrainConfig:
    """The configuration with its null settings resolved from the log. Explicit settings stay.

    Args:
        since: with stage=downstream, the time (ms) at which labels begin.
    """
    counts = visible_counts(log, split_until(config.data, "train"))
    if since is not None:
        counts = counts - visible_counts(log, Until(before=since))
    num_events, reasons = int(counts.sum()), list[str]()
    data, optim, model = replace(config.data), replace(config.optim), replace(config.model)

    if data.tokens_per_batch is None:
        least, most = TOKENS_PER_BATCH
        nearest = 2 ** round(math.log2(max(num_events / BATCHES_PER_EPOCH, 1)))
        data.tokens_per_batch = min(max(nearest, least), most)
        reasons.append(f"data.tokens_per_batch={data.tokens_per_batch} ({num_events:,} training events)")
    if data.num_negatives is None:
        data.num_negatives = max(min(log.num_items, MOST_NEGATIVES), 1)
        reasons.append(f"data.num_negatives={data.num_negatives} ({log.num_items:,} items)")
    batches = max(math.ceil(num_events / data.tokens_per_batch), 1)
    if optim.epochs is None and optim.minutes is None:
        optim.epochs = min(max(round(STEPS / batches), 1), MOST_EPOCHS)
        reasons.append(f"optim.epochs={optim.epochs} (about {batches:,} steps per epoch)")
    if optim.warmup_steps is None:
        steps = batches * (optim.epochs or 0)
        optim.warmup_steps = math.ceil(WARMUP_SHARE * steps) if steps else TIMED_WARMUP_STEPS
        reasons.append(
            f"optim.warmup_steps={optim.warmup_steps} ({f'about {steps:,} steps' if steps else 'a first guess'})"
        )
    if model.item_start is None and config.stage is Stage.joint:  # a downstream model has the item table of its base
        model.item_start = ItemStart.random if model.embedding_rows else ItemStart.factors
        reasons.append(
            f"model.item_start={model.item_start.value} ({'hashed' if model.embedding_rows else 'own'} rows)"
        )
    if reasons:
        logger.info("settings from the log: %s", ", ".join(reasons))
    return replace(config, data=data, optim=optim, model=model)
