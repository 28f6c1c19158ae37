"""The heads of counters and of popularity."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from vista.model import inference
from vista.model.counted_item_head import CountedItemHead
from vista.model.popularity_term import PopularityTerm
from vista.model.window_loss import CountedSlots, log_others, window_loss


def asked(rows: int, slots: int) -> dict[str, torch.Tensor]:
    """Arguments of the head for F = 4 and M' = 8."""
    return {
        "codes": torch.randint(0, 64, (rows, slots, 4), dtype=torch.uint8),
        "score": torch.randn(rows, slots) * 5,
        "popularity": torch.randn(rows, slots),
        "num_events": torch.randint(0, 1000, (rows,)),
        "user": nn.functional.normalize(torch.randn(rows, 8), dim=-1),
    }


@pytest.mark.parametrize("temperature", [0.05, 0.1, 0.4])
@pytest.mark.parametrize("num_negatives", [1000, 400])
def test_before_training_counted_items_have_the_share_of_returns(temperature: float, num_negatives: int) -> None:
    """30 percent of the labels are counted items: so is 30 percent of the probability, as the loss has it."""
    torch.manual_seed(0)
    num_users, num_items = 300, 1000
    users, items = (nn.functional.normalize(torch.randn(n, 64), dim=-1) for n in (num_users, num_items))
    item = torch.rand(num_users, num_items).argsort(1)  # each user has between 1 and 60 of the items
    item = item[:, :60].masked_fill(torch.arange(60) >= torch.randint(1, 61, (num_users, 1)), -1)
    negatives = torch.randperm(num_items)[:num_negatives].sort().values
    log_weight = torch.full((num_negatives,), math.log(num_items / num_negatives))
    head = CountedItemHead(4, 64)
    head.start(0.3, (item >= 0).sum(1), log_others(users, items, item, negatives, log_weight, temperature))

    inputs = asked(num_users, 60) | {"user": users}
    counted = CountedSlots(item, head(**inputs).detach().requires_grad_())
    is_label = ~(torch.arange(num_items) == item[:, :, None]).any(1)  # one item that is not counted
    label = is_label.int().argmax(1, keepdim=True)
    window_loss(users, items, label, negatives, log_weight, temperature, None, counted).backward()
    assert counted.logit.grad is not None
    share = float(counted.logit.grad.sum())  # the gradient of log Z is the probability
    assert share == pytest.approx(0.3, rel=0.01 if num_negatives == num_items else 0.03)


def test_a_logit_depends_on_its_own_inputs_only() -> None:
    torch.manual_seed(1)
    head = CountedItemHead(4, 8)
    for parameter in head.parameters():
        nn.init.normal_(parameter)
    inputs = asked(3, 5)
    logits = head(**inputs)
    alone = {name: x[1:2] if x.ndim < 2 or name == "user" else x[1:2, 2:3] for name, x in inputs.items()}
    torch.testing.assert_close(head(**alone), logits[1:2, 2:3])
    for name, x in inputs.items():
        other = inputs | {name: x.flip(0)}
        assert not torch.allclose(head(**other), logits, atol=1e-3), name


def test_training_leaves_out_the_cosines_of_some_requests() -> None:
    torch.manual_seed(3)
    head = CountedItemHead(4, 8, dropout=0.5)
    for weight in head.parameters():
        nn.init.normal_(weight)
    inputs = asked(400, 5)
    with_cosine = head.eval()(**inputs)
    without = head(**inputs | {"score": torch.zeros_like(inputs["score"])})
    trained = head.train()(**inputs)
    dropped = (trained == without).all(1)
    assert torch.equal(trained[~dropped], with_cosine[~dropped]) and 150 < dropped.sum() < 250


def test_popularity_is_one_more_dimension() -> None:
    torch.manual_seed(2)
    term = PopularityTerm(8, temperature=0.05)
    nn.init.normal_(term.weight.weight)
    nn.init.constant_(term.weight.bias, 0.7)
    unit = nn.functional.normalize(torch.randn(3, 8), dim=-1)
    users = term(unit)
    strength = unit @ term.weight.weight[0] * math.sqrt(8) + 0.7
    torch.testing.assert_close(users, torch.cat([unit, 0.05 * strength[:, None]], 1))


@pytest.mark.parametrize("counters", [False, True])
def test_users_and_items_have_the_popularity(make: SimpleNamespace, counters: bool) -> None:
    """Scores with the term minus scores without it are β(u) times the standardized log frequency."""
    model = make.model(popularity=True, counters=counters)
    frequency = np.arange(make.num_items + 1) ** 2
    model.set_item_frequency(frequency)
    log_frequency = np.log(frequency[1:])
    expected = (log_frequency - log_frequency.mean()) / log_frequency.std()
    torch.testing.assert_close(model.item_popularity[1:], torch.from_numpy(expected).float())

    packed = make.histories([9, 0, 4], 3)
    context = inference.request_context(model, inference.summarize(model, packed), make.tail(model, packed))
    users, items = inference.user_vectors(model, context, None), inference.item_vectors(model)
    assert users.shape == (3, model.retrieval_dim) and items.shape == (make.num_items, model.config.dim + 1)
    cosine, scores = (users[:, :-1] @ items[:, :-1].t(), users @ items.t())
    with torch.inference_mode():
        strength = model.popularity(users[:, :-1])[:, -1:]
    torch.testing.assert_close(scores - cosine, strength * items[:, -1], atol=1e-6, rtol=1e-5)
    assert (model.counted is not None) == counters
    retrieval, _ = model.project_items(torch.arange(make.num_items + 1))
    torch.testing.assert_close(retrieval[1:], items)
    assert retrieval[0, -1] == 0


def test_a_saved_model_keeps_the_popularity_of_items(make: SimpleNamespace, tmp_path: Path) -> None:
    model = make.model(popularity=True, counters=True)
    model.set_item_frequency(np.arange(make.num_items + 1))
    model.save_pretrained(tmp_path / "model")
    back = type(model).from_pretrained(tmp_path / "model")
    assert torch.equal(inference.item_vectors(back), inference.item_vectors(model))
    assert torch.equal(back.with_tail(2).item_popularity, model.item_popularity)
    assert back.summarizer_id() == model.summarizer_id()
    assert make.model(popularity=True).summarizer_id() != model.summarizer_id()
