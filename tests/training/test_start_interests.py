"""What a model's interests are before training: clusters of the items that training shows."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from vista.config import DataConfig, ModelConfig
from vista.log.vocabulary import Vocabulary
from vista.model.schema import Schema
from vista.model.vista_model import VistaModel
from vista.training.model_start import start_interests


def test_new_items_join_the_most_similar_interest() -> None:
    """After a warm start, others keep theirs; items without events have none."""
    config = ModelConfig(dim=16, num_heads=2, num_interests=3)
    model = VistaModel(config, Schema(["view"], True, None, []), Vocabulary.from_ids(np.arange(90)), DataConfig())
    centers = F.normalize(torch.randn(3, 16, generator=torch.Generator().manual_seed(2)), dim=1)
    group = torch.arange(90) % 3
    with torch.no_grad():
        model.item_table[1:] = centers[group] + 0.02 * torch.randn(90, 16, generator=torch.Generator().manual_seed(3))
    known = np.concatenate([[5], np.ones(60, np.int64)])  # row 0 is the unknown item
    start_interests(model, known, seed=1)
    first = model.item_interest.clone()
    assert first[0] == 0 and (first[1:61] > 0).all() and not first[61:].any()
    start_interests(model, np.concatenate([known, np.ones(29, np.int64)]), seed=9)
    found = model.item_interest
    assert torch.equal(found[:61], first[:61]) and found[90] == 0
    by_group = {int(one): int(interest) for one, interest in zip(group[:60], first[1:61], strict=True)}
    assert [by_group[int(one)] for one in group[60:89]] == found[61:90].int().tolist()
