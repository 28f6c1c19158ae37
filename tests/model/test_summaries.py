"""Summaries: set attention by its formula, the seeds, and what quantization loses."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from vista.config.checks import Codec, Mixing
from vista.log.histories import Histories
from vista.model import inference
from vista.model.history_states import embed
from vista.model.vista_model import VistaModel
from vista.store.record import dequantize_rows
from vista.store.record_encoding import quantize_rows


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
                outputs.append(silu(q) @ silu(z))
            x = layer.feed_forward(layer.output(x, torch.stack(outputs, 1), gate))
        return stage.final_norm(x[-len(stage.seeds) :])


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_summaries_are_the_papers_set_attention(make: SimpleNamespace, num_layers: int) -> None:
    model = make.model(seed=1, mixing=Mixing.bidirectional, num_layers=num_layers)
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


@pytest.mark.parametrize(("codec", "lost_share"), [(Codec.int8, 0.01), (Codec.float16, 0.002), (Codec.int4, 0.15)])
@pytest.mark.parametrize("options", [{"mixing": Mixing.separable}, {"mixing": Mixing.bidirectional}], ids=str)
def test_stored_summaries_change_scores_little(
    make: SimpleNamespace, options: dict[str, Any], codec: Codec, lost_share: float
) -> None:
    model = make.model(seed=1, **({"dim": 32, "num_seeds": 8} | options))
    packed = make.histories([0, 3, 40, 200], 1)
    summary = inference.summarize(model, packed)
    rows = np.ascontiguousarray(summary.numpy().reshape(-1, 32))
    stored = torch.from_numpy(dequantize_rows(quantize_rows(rows, codec), codec, 32)).view_as(summary)
    assert not torch.equal(stored, summary)
    tail = make.tail(model, packed)
    candidates = torch.arange(1, make.num_items + 1).expand(4, -1)
    exact, served = (inference.request_context(model, s, tail) for s in (summary, stored))
    logits, quantized = (inference.candidate_logits(model, c, None, candidates) for c in (exact, served))
    lost = logits - quantized
    assert lost.std() < lost_share * logits.std() and lost.abs().max() < 10 * lost_share * logits.std()
    items = inference.item_vectors(model)
    cosines, rounded = (inference.user_vectors(model, c, None) @ items.t() for c in (exact, served))
    lost = cosines - rounded
    assert lost.std() < lost_share * cosines.std() and lost.abs().max() < 10 * lost_share * cosines.std()
    assert codec is Codec.int4 or torch.equal(cosines.argmax(1), rounded.argmax(1))
    # The summary does matter: without it, scores change far more.
    none = inference.request_context(model, torch.zeros_like(summary), tail)
    assert (logits - inference.candidate_logits(model, none, None, candidates)).abs().max() > 0.2 * logits.std()
