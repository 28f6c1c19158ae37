"""What a new model has before its first step, besides drawn weights."""

from __future__ import annotations

from vista.config import TrainConfig
from vista.config.choices import ItemStart, Precision, Stage
from vista.device import autocast
from vista.examples.batch_source import BatchSource
from vista.log.event_log import EventLog
from vista.model.anchor_losses import start_counted
from vista.model.ranking_model import RankingModel
from vista.training.item_start import start_from_factors


def start_model(
    model: RankingModel, log: EventLog, source: BatchSource, config: TrainConfig, precision: Precision
) -> None:
    """Give a model what it takes from the training part: the popularity of items, their vectors, and its gate."""
    model.set_item_frequency(source.frequency)
    if config.stage is Stage.joint:  # a base contains what is read here
        model.read_item_table(config.data)
        if config.model.item_start is not ItemStart.random:
            start_from_factors(model, log, source.counts, config.seed)
    if model.counted is not None:  # last, because it is measured by the scores of other items
        model.eval()
        with autocast(precision, model.device):
            start_counted(model, source.batch(0, 0).to(model.device), source.returning_share)
