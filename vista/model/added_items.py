"""Items that a model knows by their features alone, because they were added after training."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vista.log.item_features import ItemFeatures
from vista.log.vocabulary import Ids
from vista.model.saved_parts import ROW_FEATURES
from vista.model.vista_model import VistaModel


def with_items(model: VistaModel, ids: Ids, features: ItemFeatures) -> VistaModel:
    """A model with more items. Its scores of other items and its summarizer stay the same, so stores stay valid.

    Args:
        model: with features of items.
        ids: [n] distinct raw ids that its vocabulary lacks, in sorted order.
        features: of these items. Values that training did not see are missing.

    Raises:
        ValueError: the model has no features, or an id is known, comes twice, or is out of order.
    """
    if model.feature_table is None:
        raise ValueError("the model has no features of items")
    items, count = model.items.extended(ids), len(ids)
    if len(items) != len(model.items) + count or items.part(len(model.items)).ids(range(count)).tolist() != list(ids):
        raise ValueError("ids must be new, distinct, and sorted")
    with torch.random.fork_rng(devices=[]):  # the drawn weights are replaced at once
        made = VistaModel(model.config, model.schema, items, model.data).to(model.device)
    weights = model.state_dict()
    if model.id_mask is None:
        weights["item_table"] = F.pad(model.item_table.detach(), (0, 0, 0, count))
    else:
        weights["id_mask"] = F.pad(model.id_mask, (0, count))
    if "item_interest" in weights:  # stage 1 does not know them
        weights["item_interest"] = F.pad(weights["item_interest"], (0, count))
    if "item_popularity" in weights:
        least = model.item_popularity[1:].min()  # that of the rarest items
        weights["item_popularity"] = torch.cat([model.item_popularity, least.expand(count)])
    made.load_state_dict(weights)
    made.set_item_features(model.feature_table.extended(features, model.schema.item_features))
    for name in ROW_FEATURES:
        setattr(made, name, getattr(model, name))
    made.num_trained_items = model.num_trained_items
    return made.train(model.training)
