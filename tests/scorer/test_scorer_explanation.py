"""Shares add up to the score minus the mean score, and those of attention are what a token adds with weights, gates and
norms held fixed."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.conftest import DAY, ROUNDING, START, Served, tail_of, untrained
from vista.config.checks import TargetAttentionKind
from vista.errors import UnknownItemError
from vista.log.event_log import EventLog
from vista.model import inference
from vista.model.attribution import attribute
from vista.model.serving_model import pad_tail
from vista.model.target_attention import PointwiseLayer, TargetContext
from vista.model.vista_model import VistaModel
from vista.refresh import refresh
from vista.scorer import Scorer
from vista.scorer.score_shares import shapley

POINTWISE = TargetAttentionKind.pointwise


@pytest.fixture(scope="module", params=TargetAttentionKind)
def opened(
    request: pytest.FixtureRequest, impression_log: EventLog, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Scorer]:
    """A scorer with three target layers with different biases, three tasks and the next item."""
    options = {"model__num_target_layers": 3, "model__target_attention": request.param}
    model = untrained(impression_log, 5, **options)
    with torch.no_grad():
        for name, weight in model.target_attention.named_parameters():
            noisy = name.endswith("bias") or "norm" in name
            weight.add_(0.3 * torch.randn_like(weight) if noisy else 0)
    folder = tmp_path_factory.mktemp("explained")
    refresh(model, impression_log, folder / "store")
    with Scorer.open(model, folder / "store") as scorer:
        yield scorer


@pytest.mark.parametrize(("task", "with_now"), [("like", True), ("next", True), ("next", False)])
def test_contributions_add_up_to_the_score(opened: Scorer, task: str, with_now: bool) -> None:
    user = list(opened.store.keys())[2]
    now = int(opened.store.get_many([user]).last_event_ts[0]) + DAY if with_now else None
    items = opened.model.items.ids(np.arange(9))
    told = opened.explain(user, items, task=task, now=now)
    scores = opened.predict([user], items, now=now)[task][0]
    value = told.value if task == "next" else 1 / (1 + np.exp(-told.value))
    np.testing.assert_allclose(value, scores, atol=1e-5)
    np.testing.assert_allclose(sum(told.shares.values()), told.value - told.mean, atol=1e-12)
    assert told.items == items.tolist() and [*told.shares] == ["tail", "summary", "own"]
    np.testing.assert_allclose(told.tail.sum(1), told.shares["tail"], atol=1e-6)
    assert told.tail.shape == (9, 6) and all(np.abs(shares).max() > 1e-3 for shares in told.shares.values())
    tail = opened.store.get_many([user]).tail
    assert told.tail_items == opened.model.items.ids(tail.items.astype(np.int64) - 1).tolist()
    every = opened.explain(user, opened.model.items.ids(np.arange(len(opened.model.items))), task=task, now=now)
    for name, shares in every.shares.items():
        assert abs(shares.mean()) < 1e-6, name
        np.testing.assert_allclose(told.shares[name], shares[:9], atol=ROUNDING)
    assert abs(every.value.mean() - told.mean) < 1e-6
    best = every.tail[np.arange(len(every.tail)), every.tail.argmax(1)]
    of_tail = [(place, each) for place, found in enumerate(every.reasons) for each in found if each.part == "tail"]
    assert of_tail and all(best[place] > 0 for place, _ in of_tail)
    for place, reason in of_tail:
        item = every.tail_items[every.tail[place].argmax()]
        assert reason.words() == f"attention to the newest events, most of all to {item}"
    some = opened.explain(user, items[:2], candidates=items, task=task, now=now)
    assert abs(some.mean - told.value.mean()) < 1e-5
    for name, shares in some.shares.items():
        np.testing.assert_allclose(shares, (told.shares[name] - told.shares[name].mean())[:2], atol=ROUNDING)


def frozen(model: VistaModel, context: TargetContext, vector: Tensor, task: int) -> Any:
    """The score as a function of factors on each token's values (summary and tail) and on the vector.

    Weights, gates and standard deviations are held at their values for all factors 1. Computed in float64, one head at
    a time.
    """
    stage = model.target_attention
    held: list[Tensor] = []

    def run(factors: Tensor, own: float, keep: bool) -> float:
        place = iter(range(10_000))

        def hold(value: Tensor) -> Tensor:
            if keep:
                held.append(value)
            return held[next(place)]

        def norm(layer: torch.nn.LayerNorm, x: Tensor) -> Tensor:
            spread = hold(torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + layer.eps))
            return (x - x.mean(-1, keepdim=True)) / spread * layer.weight

        x = own * vector * stage.scale
        for index, layer in enumerate(stage.layers):
            heads, width = layer.num_heads, layer.head_dim
            normed = norm(layer.norm, own * vector if index == 0 else x)
            query, gate, *pair = layer.projections(normed).chunk(4, -1)
            if isinstance(layer, PointwiseLayer):
                query, pair = F.silu(query), [F.silu(pair[0]), pair[1] * hold(pair[1].sigmoid())]
            key, value = (part.view(heads, width) for part in pair)
            mixed = []
            for head in range(heads):
                keys, values = context.keys[index][0, head], context.values[index][0, head] * factors[:, None]
                q = query.view(heads, width)[head]
                bias = F.pad(layer.bias[head, torch.arange(stage.tail_len, 0, -1)], (stage.num_seeds, 0))
                seen = F.pad(context.tail_valid[0], (stage.num_seeds, 0), value=True)
                scale = 1.0 if isinstance(layer, PointwiseLayer) else width**-0.5
                scores = torch.cat([keys @ q * scale + bias, (q @ key[head] * scale + layer.bias[head, 0])[None]])
                visible = F.pad(seen, (0, 1), value=True)
                if isinstance(layer, PointwiseLayer):
                    weights = hold(torch.where(visible, scores * scores.sigmoid(), 0.0))
                else:
                    weights = hold(torch.softmax(scores.masked_fill(~visible, -torch.inf), 0))
                mixed.append(weights[:-1] @ values + weights[-1] * value[head])
            if isinstance(layer, PointwiseLayer):
                x = x + layer.out(norm(layer.head_norm, torch.stack(mixed).flatten()) * hold(F.silu(gate)))
                continue
            out = norm(layer.output.head_norm, torch.stack(mixed)).flatten() * hold(gate.sigmoid())
            x = x + layer.output.out(out)
            up_gate, up = layer.feed_forward.up(norm(layer.feed_forward.norm, x)).chunk(2, -1)
            x = x + layer.feed_forward.down(hold(F.silu(up_gate)) * up)
        assert model.task_head is not None
        return float(norm(stage.final_norm, x) @ model.task_head.weight[task])

    return run


@torch.no_grad()
def test_a_contribution_is_the_difference_without_the_token(opened: Scorer, impression_log: EventLog) -> None:
    """The function is linear, so a contribution is the difference that leaving out the token's values makes."""
    model = opened.model
    log = impression_log[1]
    rows = model.item_rows(impression_log.items.ids(log.item))
    tail = pad_tail(model, rows[-4:], log.timestamp[-4:], log.action[-4:], np.array([0, 4]))  # two are empty
    summary = torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(1))
    context = inference.request_context(model, summary, tail)
    vector = model.item_vectors(torch.tensor([7]))
    assert model.task_head is not None
    weight = model.task_head.weight
    made_of = attribute(model.target_attention, [vector], None, context, lambda out: out @ weight[1])
    double = VistaModel(model.config, model.schema, model.items, model.data).double().eval()
    double.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    widened = TargetContext(
        [k.clone().double() for k in context.keys],
        [v.clone().double() for v in context.values],
        context.tail_valid,
        context.tail,
    )
    run = frozen(double, widened, vector[0].double(), 1)
    ones = torch.ones(9, dtype=torch.float64)
    whole = run(ones, 1.0, True)
    expected = []
    for token in range(9):
        without = ones.clone()
        without[token] = 0
        expected.append(whole - run(without, 1.0, False))
    contributions = torch.cat([made_of.summary[0], made_of.tail[0]])
    np.testing.assert_allclose(contributions.numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(float(made_of.query[0]), whole - run(ones, 0.0, False), atol=1e-5)
    assert (made_of.tail[0, :2] == 0).all()


def test_tails_of_requests_are_explained_but_not_unknown_items(scorer: Scorer, served: Served) -> None:
    fresh = tail_of([(108, [(777, START + 900 * DAY, 0), (20, START + 901 * DAY, 1)])])
    explanation = scorer.explain(108, [0, 390], tail=fresh)
    assert explanation.tail_items[-2:] == [None, 20] and explanation.tail.shape == (2, 6)
    assert explanation.items == [0, 390]
    with pytest.raises(UnknownItemError, match="items: the model does not know the item in place 1"):
        scorer.explain(108, [0, 777])
    nobody = scorer.explain(999, [0, 390])
    assert nobody.tail.shape == (2, 0) and nobody.tail_items == []
    assert scorer.explain(108, []).value.shape == (0,)
    with pytest.raises(ValueError, match=r"task: 'buy' is not one of this model's tasks, \['next'\]"):
        scorer.explain(103, [0], task="buy")
    with pytest.raises(ValueError, match=r"items: must be of shape \[C\], got \(1, 1\)"):
        scorer.explain(103, [[0]])
    with pytest.raises(ValueError, match="items: the item in place 1 is not one of the candidates"):
        scorer.explain(103, [0, 390], candidates=[10, 0])
    with pytest.raises(ValueError, match="candidates: must name at least one item"):
        scorer.explain(103, [], candidates=[])
    alone = scorer.explain(103, [0], candidates=[0])
    assert alone.why(0) == "nothing raises it above the average candidate"


def test_shapley_values_are_means_over_all_orders() -> None:
    """Of a function with products of its parts, against gains along each of the 24 orders."""
    generator = torch.Generator().manual_seed(0)
    given = {name: torch.randn(5, 2, generator=generator) for name in "abcd"}
    absent = {name: torch.randn(1, 2, generator=generator) for name in "abcd"}

    def value(parts: Any) -> Tensor:
        a, b, c, d = (parts[name].double() for name in "abcd")
        return (a * b * c).sum(1) + (a[:, 0] - d[:, 1]) ** 2 + d[:, 0] * torch.relu(b[:, 1])

    found = shapley(value, given, absent)
    hidden = {name: part.expand(5, 2) for name, part in absent.items()}
    expected = {name: torch.zeros(5, dtype=torch.float64) for name in "abcd"}
    for order in permutations("abcd"):
        parts = dict(hidden)
        for name in order:
            before = value(parts)
            parts[name] = given[name]
            expected[name] += (value(parts) - before) / 24
    for name in "abcd":
        torch.testing.assert_close(found[name], expected[name])
    torch.testing.assert_close(torch.stack(list(found.values())).sum(0), value(given) - value(hidden))
