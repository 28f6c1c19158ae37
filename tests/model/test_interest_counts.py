"""Interests: clusters of items, counted in the state, from which the seeds start."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from vista.model import inference
from vista.model.history_states import history_states
from vista.model.interest_counts import clusters


def test_a_state_counts_the_events_of_each_interest(make: SimpleNamespace) -> None:
    model = make.model(seed=2, num_interests=5)
    packed = make.histories([0, 1, 30, 4], 4)
    layer = history_states(model, packed).z[:, model.config.num_layers]
    counts = model.summarizer.interests.counts(layer)
    interest = model.item_interest.numpy().astype(int)[packed.item]
    for row in range(packed.num_users):
        mine = interest[packed.offsets[row] : packed.offsets[row + 1]]
        assert counts[row].tolist() == np.bincount(mine, minlength=6)[1:].tolist()


def test_summaries_depend_on_the_counts(make: SimpleNamespace) -> None:
    """Of two histories that differ in the interests of their items alone."""
    model = make.model(seed=2, num_interests=5)
    packed = make.histories([30], 4)
    before = inference.summarize(model, packed)
    model.item_interest[1:] = 1
    after = inference.summarize(model, packed)
    assert (before - after).abs().max() > 1e-3


def test_clusters_are_found() -> None:
    generator = torch.Generator().manual_seed(3)
    centers = F.normalize(torch.randn(12, 16, generator=generator), dim=1)
    true = torch.arange(600) % 12
    vectors = (centers[true] + 0.05 * torch.randn(600, 16, generator=generator)) * 7.0
    found = clusters(vectors, 36, seed=1)
    pairs = {(int(one), int(other)) for one, other in zip(true, found, strict=True)}
    assert len(pairs) == len(set(found.tolist())) == 36  # each cluster is a part of one
    assert torch.equal(found, clusters(vectors, 36, seed=1))
    assert len(set(clusters(vectors[:3], 12, seed=1).tolist())) == 3  # fewer items than clusters
    assert len(clusters(vectors[:0], 12, seed=1)) == 0


def test_interests_have_ids_of_their_own(make: SimpleNamespace) -> None:
    model = make.model(seed=2, num_interests=5)
    before = model.summarizer_id()
    model.item_interest[3] = 1 + model.item_interest[3] % 5
    assert model.summarizer_id() != before
