"""Bidirectional mixing: the paper's set attention against its formula, and the role of order."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from vista.config.choices import Mixing, Normalization
from vista.log.histories import Histories
from vista.model import inference
from vista.model.history_states import embed
from vista.model.vista_model import VistaModel


def formula(model: VistaModel, history: Histories) -> Tensor:
    """[S, M] in float64: history and seeds are one set; all write and all read at every layer."""
    exact = copy.deepcopy(model).double()
    stage = exact.summarizer
    assert stage is not None
    with torch.no_grad():
        events, inside, _ = embed(exact, history)
        x = torch.cat([stage.tokens(events, inside), stage.seeds])
        for layer in stage.layers:
            h = layer.norm(x)
            query, gate = layer.query_gate(h).chunk(2, -1)
            key, value = layer.key_value(h).chunk(2, -1)
            outputs = []
            for q, k, v in zip(*(part.split(8, -1) for part in (query, key, value)), strict=True):
                z = silu(k).t() @ v
                if model.config.normalization is Normalization.length:
                    z = z / len(x) ** model.config.normalization_alpha
                outputs.append(silu(q) @ silu(z))
            x = layer.feed_forward(layer.output(x, torch.stack(outputs, 1), gate))
        return stage.final_norm(x[-len(stage.seeds) :])


@pytest.mark.parametrize("normalization", Normalization)
@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_summaries_are_the_papers_set_attention(
    make: SimpleNamespace, normalization: Normalization, num_layers: int
) -> None:
    model = make.model(
        seed=1, mixing=Mixing.bidirectional, normalization=normalization, normalization_alpha=0.7, num_layers=num_layers
    )
    packed = make.histories([0, 1, 30, 2, 9], 1)
    summary = inference.summarize(model, packed)
    for row in range(packed.num_users):
        torch.testing.assert_close(summary[row].double(), formula(model, packed.slice(row)), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("conv_width", [1, 3])
def test_a_long_history_is_summarized_slice_by_slice(make: SimpleNamespace, conv_width: int) -> None:
    model = make.model(seed=1, mixing=Mixing.bidirectional, num_layers=3, conv_width=conv_width)
    packed = make.histories([0, 1, 30, 2, 9, 16], 1)
    whole = inference.summarize(model, packed)
    sliced = inference.summarize(model, packed, slice_len=8)
    torch.testing.assert_close(sliced, whole, atol=2e-6, rtol=1e-5)
    assert not torch.equal(sliced[2], whole[2])  # another order of summation, so it was sliced


def permuted(history: Histories, seed: int) -> Histories:
    """The same events in another order, at the same times."""
    order = np.random.default_rng(seed).permutation(history.num_events)
    assert history.rating is not None
    return Histories(
        history.item[order], history.timestamp, history.action[order], history.rating[order], history.offsets
    )


@pytest.mark.parametrize("mixing", Mixing)
@pytest.mark.parametrize(("conv_width", "has_time"), [(1, False), (3, False), (1, True)])
def test_order_matters_only_through_convolution_and_gaps(
    make: SimpleNamespace, mixing: Mixing, conv_width: int, has_time: bool
) -> None:
    model = make.model(seed=2, mixing=mixing, conv_width=conv_width, has_time=has_time)
    history = make.histories([25], 2)
    one, other = (inference.summarize(model, h) for h in (history, permuted(history, 1)))
    if conv_width == 1 and not has_time:
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    else:
        assert (one - other).abs().max() > 1e-3


def test_gradients_are_those_of_the_formula(make: SimpleNamespace) -> None:
    """The last layer computes only the seeds' outputs. The outputs it leaves out have no gradient."""
    model = make.model(seed=3, mixing=Mixing.bidirectional, conv_width=1).double()
    stage = model.summarizer
    assert stage is not None
    tokens = torch.randn(12, 16, dtype=torch.float64, requires_grad=True)
    offsets = torch.tensor([0, 5, 5, 12])
    assert torch.autograd.gradcheck(lambda x: stage.summarize_set(x, offsets), (tokens,), fast_mode=True)
    stage.summarize_set(tokens, offsets).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in stage.parameters())


def test_events_do_not_change_summaries_of_other_users(make: SimpleNamespace) -> None:
    model = make.model(seed=4, mixing=Mixing.bidirectional)
    packed = make.histories([8, 8], 5)
    item = packed.item.copy()
    item[:8] = item[:8] % make.num_items + 1
    changed = Histories(item, packed.timestamp, packed.action, packed.rating, packed.offsets)
    one, other = inference.summarize(model, packed), inference.summarize(model, changed)
    assert torch.equal(one[1], other[1]) and not torch.allclose(one[0], other[0], atol=1e-3)
