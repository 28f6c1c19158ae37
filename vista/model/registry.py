"""All architectures, and a loader for saved models of any of them."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from vista.config.checks import Architecture
from vista.log.features import Columns
from vista.log.vocabulary import Ids
from vista.model.baselines.candidate_models import DIN, SIM, TWIN
from vista.model.baselines.sequence_models import HSTU, FuXiLinear, SASRec
from vista.model.ranking_model import RankingModel
from vista.model.saved_model import ROW_FEATURES, ModelDescription
from vista.model.vista_model import VistaModel

ARCHITECTURES: dict[Architecture, type[RankingModel]] = {
    model.architecture: model for model in (VistaModel, SASRec, HSTU, FuXiLinear, DIN, SIM, TWIN)
}


def load_model(folder: str | Path, device: torch.device | str = "cpu") -> RankingModel:
    """Read a model of any architecture from a folder of `save_pretrained`, in eval mode. Raises CheckpointError if the
    folder is missing, truncated or of another format."""
    architecture = ModelDescription.read(Path(folder)).config.architecture
    return ARCHITECTURES[architecture].from_pretrained(folder, device)


def with_items(model: VistaModel, ids: Ids, features: Columns) -> VistaModel:
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
    if "item_statistics" in weights:
        least = model.item_statistics[1:].amin(0)  # those of the rarest items
        weights["item_statistics"] = torch.cat([model.item_statistics, least.expand(count, -1)])
    of_users = {
        "item_space",
        "item_space_weights",
        "item_rates",
        "transition_items",
        "transition_weights",
    }  # no user had the new items yet
    for name in of_users & weights.keys():
        weights[name] = F.pad(weights[name], (0, 0, 0, count))
    made.load_state_dict(weights)
    made.set_item_features(model.feature_table.extended(features, model.schema.item_features))
    for name in ROW_FEATURES:
        setattr(made, name, getattr(model, name))
    made.num_trained_items = model.num_trained_items
    return made.train(model.training)
