"""Summaries through the store's int8 rows: what is lost is small beside what candidates differ by."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vista.choices import Mixing
from vista.model import inference
from vista.store.record import dequantize_rows, quantize_rows


@pytest.mark.parametrize("mixing", Mixing)
def test_int8_summaries_change_scores_little(make: SimpleNamespace, mixing: Mixing) -> None:
    model = make.model(seed=1, dim=32, num_seeds=8, mixing=mixing)
    packed = make.histories([0, 3, 40, 200], 1)
    summary = inference.summarize(model, packed)
    rows = np.ascontiguousarray(summary.numpy().reshape(-1, 32))
    stored = torch.from_numpy(dequantize_rows(quantize_rows(rows))).view_as(summary)
    # A row's error is at most half a step of its 255.
    step = (summary.amax(-1) - summary.amin(-1)) / 255
    assert ((stored - summary).abs().amax(-1) <= 0.51 * step + 1e-6).all()
    assert not torch.equal(stored, summary)
    tail = make.tail(model, packed)
    candidates = torch.arange(1, make.num_items + 1).expand(4, -1)
    exact, served = (inference.request_context(model, s, tail) for s in (summary, stored))
    logits, quantized = (inference.candidate_logits(model, c, None, candidates) for c in (exact, served))
    lost = logits - quantized
    assert lost.std() < 0.01 * logits.std() and lost.abs().max() < 0.1 * logits.std()
    items = inference.item_vectors(model)
    cosines, rounded = (inference.user_vectors(model, c, None) @ items.t() for c in (exact, served))
    lost = cosines - rounded
    assert lost.std() < 0.01 * cosines.std() and lost.abs().max() < 0.1 * cosines.std()
    assert torch.equal(cosines.argmax(1), rounded.argmax(1))
    # And the summary matters: without it scores move by far more.
    none = inference.request_context(model, torch.zeros_like(summary), tail)
    assert (logits - inference.candidate_logits(model, none, None, candidates)).abs().max() > 0.2 * logits.std()
