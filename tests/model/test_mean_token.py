"""The mean token: a mean of events in the space of item vectors, from which user vectors start."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vista.config import ModelConfig
from vista.config.choices import Activation, Decay
from vista.model import inference
from vista.model.history_states import embed
from vista.model.summarizer import Summarizer

DAY = 86_400_000


@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("decay", [Decay.none, Decay.time])
def test_the_first_token_is_the_mean_of_the_events(make: SimpleNamespace, activation: Activation, decay: Decay) -> None:
    """By a sum over the values of the events."""
    horizons = [2.0, 2.0] if decay is Decay.time else []
    model = make.model(seed=2, mean_token=True, activation=activation, decay=decay, decay_horizons=horizons)
    packed = make.histories([0, 1, 9], 4)
    token = inference.summarize(model, packed)[:, 0]
    assert not token[0].any()  # an empty history
    layer = model.summarizer.layers[0]
    for row in (1, 2):
        history = packed.slice(row, 0, packed.lengths[row])
        with torch.no_grad():
            vectors, position, _ = embed(model, history)
            values = layer.key_value(layer.norm(model.summarizer.tokens(vectors, position))).chunk(2, -1)[1]
        age = torch.from_numpy(history.timestamp[-1] - history.timestamp).double() / (2 * DAY)
        weight = torch.exp(-age).float() if decay is Decay.time else torch.ones(len(age))
        with torch.no_grad():
            mean = model.summarizer.mean.output((weight[:, None] * values).sum(0) / weight.sum())
            expected = model.summarizer.final_norm(mean)
        torch.testing.assert_close(token[row], expected, atol=2e-5, rtol=1e-4)


def test_at_first_it_is_a_mean_of_events() -> None:
    config = ModelConfig(dim=32, num_heads=4, mean_token=True)
    summarizer = Summarizer(config)
    values = summarizer.layers[0].key_value.weight[config.dim :]
    assert summarizer.mean is not None
    torch.testing.assert_close(summarizer.mean.output.weight @ values, torch.eye(32), atol=1e-5, rtol=0)


def test_user_vectors_start_from_it(make: SimpleNamespace) -> None:
    """Without the layers of stage 2, the user vector follows the mean where that is far larger than the rest."""
    model = make.model(seed=2, mean_token=True)
    packed = make.histories([30, 30, 30], 4)
    summary, tail = inference.summarize(model, packed), make.tail(model, packed)
    with torch.no_grad():
        model.mean_scale.fill_(1e4)
    users = inference.user_vectors(model, inference.request_context(model, summary, tail), None)
    cosine = (users * F.normalize(summary[:, 0], dim=1)).sum(1)
    assert (cosine > 0.99).all()
    with torch.no_grad():
        model.mean_scale.zero_()
    without = inference.user_vectors(model, inference.request_context(model, summary, tail), None)
    assert (without * users).sum(1).abs().max() < 0.9


def test_summarizers_with_a_mean_token_have_ids_of_their_own(make: SimpleNamespace) -> None:
    ids = {make.model(seed=2, mean_token=mean).summarizer_id() for mean in (False, True)}
    assert len(ids) == 2 and np.all([len(identity) == 32 for identity in ids])
