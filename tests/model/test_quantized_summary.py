"""Quantized summaries: the errors of int8 and float16 are small compared with the differences between candidates."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vista.config.choices import Codec, Mixing, TargetAttentionKind
from vista.model import inference
from vista.store.format.codecs import dequantize_rows, quantize_rows


@pytest.mark.parametrize(("codec", "lost_share"), [(Codec.int8, 0.01), (Codec.float16, 0.002), (Codec.int4, 0.15)])
@pytest.mark.parametrize(
    "options",
    [
        {"mixing": Mixing.separable},
        {"mean_token": True},
        {"num_interests": 11},
        {"mixing": Mixing.bidirectional},
        {"target_attention": TargetAttentionKind.quasi_linear},
        {"target_attention": TargetAttentionKind.quasi_linear, "num_seeds": 0},
    ],
    ids=str,
)
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
