"""Small models with drawn weights for tests of exports: every kind of stage 2, with and without what it can read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tests.conftest import draw_counter_weights
from tests.counters.counter_histories import category
from vista.config import DataConfig, ModelConfig
from vista.config.choices import TargetAttentionKind
from vista.log.vocabulary import Vocabulary
from vista.model.feature_spec import FeatureSpec
from vista.model.hashed_vocabulary import HashedVocabulary
from vista.model.row_feature_reader import RowFeatureReader
from vista.model.schema import Schema
from vista.model.vista_model import VistaModel

COLUMNS = [
    FeatureSpec("device", "category", 3),
    FeatureSpec("dwell", "number", 4, [0.0, 1.0, 2.0], 0.5, 1.5),
    FeatureSpec("page", "category", 5, hashed=True),
]


def drawn_model(
    kind: TargetAttentionKind = TargetAttentionKind.pointwise,
    *,
    num_seeds: int = 3,
    counters: bool = True,
    features: bool = True,
    tasks: Sequence[str] = ("click", "buy"),
    has_retrieval: bool = True,
    has_time: bool = True,
    mean_token: bool = False,
    num_layers: int = 2,
    categories: bool = False,
) -> VistaModel:
    """A model in eval mode. No weight that training starts at 0 is 0."""
    config = ModelConfig(
        dim=16,
        num_heads=2,
        num_seeds=num_seeds,
        num_layers=1,
        num_target_layers=num_layers,
        tail_len=6,
        target_attention=kind,
        counters=counters,
        counter_keys=10,
        counter_categories=["brand"] if categories else [],
        popularity=counters,
        mean_token=mean_token,
    )
    columns = COLUMNS if features else []
    brands, table = category("brand", np.arange(100) % 8 - 1) if categories else ([], None)
    schema = Schema(
        ["view", "like"],
        has_time,
        None,
        list(tasks),
        has_retrieval,
        item_features=brands,
        event_features=columns,
        num_tail_features=len(columns),
        request_features=columns,
        user_features=columns,
    )
    torch.manual_seed(0)
    model = VistaModel(config, schema, Vocabulary.from_ids(np.arange(100) * 7), DataConfig()).eval()
    if features:
        values = {"device": Vocabulary.from_ids(["phone", "tablet", "tv"]), "dwell": None, "page": HashedVocabulary(5)}
        model.event_features = model.request_features = model.user_features = RowFeatureReader(columns, values)
    model.set_item_features(table)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.3)
    draw_counter_weights(model)
    return model
