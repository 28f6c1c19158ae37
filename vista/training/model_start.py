"""What a new model has before its first step, besides drawn weights."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from vista.arrays import Int
from vista.config import TrainConfig
from vista.config.choices import ItemStart, Precision, Stage
from vista.device import autocast
from vista.examples.batch_source import MEASURED_BATCHES, BatchSource
from vista.log.event_log import EventLog
from vista.model.anchor_losses import start_counted
from vista.model.features import RowReaders, Schema
from vista.model.ranking_model import UNKNOWN_ITEM, RankingModel
from vista.model.registry import ARCHITECTURES
from vista.model.summarizer import clusters, nearest
from vista.model.vista_model import VistaModel
from vista.training.frequent_items import features_of, frequent_items
from vista.training.item_start import FrozenItems, start_from_factors, training_vectors
from vista.training.log_schema import encoded_features
from vista.training.warm_start import WarmStart


def drawn_model(config: TrainConfig, log: EventLog, schema: Schema, readers: RowReaders) -> RankingModel:
    """A model of a log with drawn weights."""
    items = frequent_items(log, config.data)
    model = ARCHITECTURES[config.model.architecture](config.model, schema, items, config.data)
    model.set_item_features(encoded_features(log, items, schema))
    for name, reader in readers.items():
        setattr(model, name, reader)
    return model


def start_model(
    model: RankingModel,
    log: EventLog,
    source: BatchSource,
    config: TrainConfig,
    precision: Precision,
    frozen: FrozenItems | None,
    warm: WarmStart | None,
) -> None:
    """Give a model what it takes from the training part: the popularity of items, their vectors, and its gate.

    Args:
        frozen: `FrozenItems.of` the run.
        warm: the warm start, if there is one; only its new items and heads are initialized.
    """
    model.set_item_frequency(source.frequency)
    if config.stage is Stage.joint:  # a base contains what is read here
        model.read_item_table(config.data, features_of(model.items, log))
        if frozen is not None:
            frozen.start()
        elif config.model.item_start is not ItemStart.random:
            start_from_factors(model, log, source.counts, config.seed, None if warm is None else warm.new_rows)
        if model.features is not None:
            unseen = np.setdiff1d(np.arange(UNKNOWN_ITEM + 1, 1 + len(model.items)), np.flatnonzero(source.frequency))
            model.zero_id_embeddings(unseen if warm is None else np.intersect1d(unseen, warm.new_rows))
        if isinstance(model, VistaModel) and config.model.num_interests and (warm is None or not warm.freezes):
            start_interests(model, source.frequency, config.seed)
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
            start_counted(model, asked, training_vectors(model, asked, frozen), source.returning_share)


@torch.no_grad()
def start_interests(model: VistaModel, frequency: Int, seed: int) -> None:
    """Let the interests be clusters of the vectors of the items that training shows; other items have none.

    After a warm start, items keep their interests, and others join the interest whose items are most similar.

    Args:
        frequency: int64 [at most 1 + V] events of each model row in the training part.
    """
    interest = model.item_interest
    rows = torch.from_numpy(np.flatnonzero(frequency)).to(model.device)
    rows = rows[(rows != UNKNOWN_ITEM) & (interest[rows] == 0)]
    vectors, known = model.item_vectors(rows), interest.nonzero().squeeze(1)
    if len(known):
        unit = F.normalize(model.item_vectors(known), dim=-1)
        sums = unit.new_zeros(1 + model.config.num_interests, unit.shape[1]).index_add_(0, interest[known].long(), unit)
        found = nearest(F.normalize(vectors, dim=-1), F.normalize(sums[1:], dim=-1))
    else:
        found = clusters(vectors, model.config.num_interests, seed)
    interest[rows] = 1 + found.to(interest.dtype)
