"""SASRec, HSTU, and FuXi-Linear: the published formulas, event by event; and independence of neighbors and padding."""

from __future__ import annotations

from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vista.config import OptimConfig
from vista.log.histories import gap_bucket
from vista.model.baselines.history_model import TILE_TOKENS
from vista.model.baselines.sequence_models import (
    HSTU,
    LONGEST_HELD,
    FuXiLinear,
    SASRec,
    SequenceModel,
    attend_causally,
    decayed_attention,
)
from vista.model.registry import load_model

LENGTHS = [0, 1, 9, 4, 0, 7, 12]
LIMIT = 12
NAMES = ["sasrec", "hstu", "fuxi_linear"]


def baseline(make: SimpleNamespace, name: str, **options: Any) -> SequenceModel:
    """A small float64 model in which every parameter matters."""
    model = make.architecture(name, history_limit=LIMIT, **options)
    assert isinstance(model, SequenceModel)
    return model


def events_of(model: SequenceModel, histories: object) -> Tensor:
    """[L, M] inputs of one history."""
    events = model.embed(histories)  # type: ignore[arg-type]
    return events.vectors * model.config.dim**0.5 + model.position[: len(events.vectors)]


def sasrec_by_event(model: SASRec, x: Tensor) -> Tensor:
    """States [L, M]: each position attends to itself and those before it."""
    width = model.config.dim // model.config.num_heads
    for block in model.blocks:
        rows = []
        for t in range(len(x)):
            h = block.attention_norm(x[t])
            key, value = block.key_value(x[: t + 1]).chunk(2, -1)
            heads = []
            for a in range(0, model.config.dim, width):
                part = slice(a, a + width)
                weight = torch.softmax(key[:, part] @ block.query(h)[part] / width**0.5, 0)
                heads.append(weight @ value[:, part])
            y = h + block.out(torch.cat(heads))
            z = block.network_norm(y)
            rows.append(z + block.down(F.relu(block.up(z))))
        x = torch.stack(rows)
    return model.final_norm(x)


def hstu_by_event(model: HSTU, x: Tensor, time: np.ndarray) -> Tensor:
    """States [L, M] by the sums of the publication."""
    heads, width = model.config.num_heads, model.config.dim // model.config.num_heads
    for layer in model.layers:
        gate, value, query, key = F.silu(layer.projection(layer.norm(x))).chunk(4, -1)
        rows = []
        for t in range(len(x)):
            mixed = []
            for head in range(heads):
                part = slice(head * width, (head + 1) * width)
                total = torch.zeros(width, dtype=x.dtype)
                for s in range(t + 1):
                    score = query[t, part] @ key[s, part] + layer.position_bias[head, t - s]
                    if layer.time_bias is not None:
                        score = score + layer.time_bias[head, int(gap_bucket(np.array(time[t] - time[s])))]
                    total = total + F.silu(score) * value[s, part] / LIMIT
                mixed.append(total)
            rows.append(x[t] + layer.out(layer.head_norm(torch.cat(mixed)) * gate[t]))
        x = torch.stack(rows)
    return x


def fuxi_linear_by_event(model: FuXiLinear, x: Tensor, time: np.ndarray) -> Tensor:
    """States [L, M]: each channel by its weights of all pairs of events."""
    heads, dim = model.config.num_heads, model.config.dim
    width = dim // heads
    periods = np.array([3_600_000.0, 31_557_600_000.0])  # of two heads
    for layer in model.layers:
        normed = layer.norm(x)
        projected = F.silu(layer.projection(normed))
        query, key, value, gate = (
            projected[:, :dim],
            projected[:, dim : 2 * dim],
            projected[:, 2 * dim : 3 * dim],
            projected[:, 3 * dim :],
        )
        rate = F.softplus(layer.rate).cumsum(0)
        rows = []
        for t in range(len(x)):
            semantic, temporal, positional = (torch.zeros(dim, dtype=x.dtype) for _ in range(3))
            for s in range(t + 1):
                for head in range(heads):
                    part = slice(head * width, (head + 1) * width)
                    weight = query[t, part] @ key[s, part] * torch.exp(-rate[head] * (t - s))
                    semantic[part] += weight * value[s, part]
                if layer.temporal is not None:
                    moved = layer.temporal(normed[s])
                    for number in range(2 * heads):
                        angle = 2 * np.pi * float(time[t] - time[s]) / periods[number % heads]
                        fading = torch.sigmoid(layer.time_rate[number % heads]) ** angle
                        part = slice(number * width // 2, (number + 1) * width // 2)
                        wave = np.cos(angle) if number < heads else np.sin(angle)
                        temporal[part] += wave * fading * moved[part]
                positional += layer.position_query[t] @ layer.position_key[s] * layer.positional(normed[s])
            channels = [semantic, temporal, positional] if layer.temporal is not None else [semantic, positional]
            mixed = torch.cat([own(each) for own, each in zip(layer.channel_norms, channels, strict=True)])
            y = x[t] + layer.out(mixed * gate[t])
            open_, wide = layer.up(layer.network_norm(y)).chunk(2)
            rows.append(y + layer.down(F.silu(open_) * wide))
        x = torch.stack(rows)
    return x


@pytest.mark.parametrize("has_time", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_user_vector_is_the_published_sum(make: SimpleNamespace, name: str, has_time: bool) -> None:
    model = baseline(make, name, has_time=has_time)
    model.queries_at_once = 5  # HSTU's, so that a history takes several blocks
    packed = make.histories(LENGTHS, 3)
    now = np.append(packed.timestamp, 0)[np.maximum(packed.offsets[1:] - 1, 0)] + 3 * 3_600_000
    users = model.user_vectors(packed, now)
    gap = model.request_gap(packed, now)
    with torch.no_grad():
        for user, length in enumerate(LENGTHS):
            alone = packed.slice(user)
            state = model.start
            if length:
                x = events_of(model, alone)
                if isinstance(model, SASRec):
                    state = sasrec_by_event(model, x)[-1]
                else:
                    by_event = hstu_by_event if isinstance(model, HSTU) else fuxi_linear_by_event
                    state = by_event(model, x, alone.timestamp)[-1]  # type: ignore[operator]
            state = state if gap is None else state + model.config.dim**0.5 * gap[user]
            torch.testing.assert_close(users[user], F.normalize(state, dim=-1))


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_decayed_attention_is_a_sum_over_pairs(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vista.model.baselines.sequence_models.CHUNK", chunk)
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 9, 3, size, dtype=torch.float64, requires_grad=True) for size in (4, 4, 5))
    clock = (torch.rand(2, 9, 3, dtype=torch.float64) * 40).cumsum(1).requires_grad_()
    expected = torch.zeros(2, 9, 3, 5, dtype=torch.float64)
    for t in range(9):
        for s in range(t + 1):
            weight = (query[:, t] * key[:, s]).sum(-1, keepdim=True) * torch.exp(clock[:, s] - clock[:, t])[..., None]
            expected[:, t] += weight * value[:, s]
    out = decayed_attention(query, key, value, clock)
    torch.testing.assert_close(out, expected)
    probe = torch.randn_like(out)
    for got, want in zip(
        torch.autograd.grad((out * probe).sum(), (query, key, value, clock)),
        torch.autograd.grad((expected * probe).sum(), (query, key, value, clock)),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_a_falling_clock_after_the_last_event_makes_no_gradient_infinite() -> None:
    """Padding may hold any times: they must not reach the events before."""
    query, key, value = (torch.randn(1, 70, 1, 2) for _ in range(3))
    clock = torch.cat([torch.arange(66.0), torch.full((4,), -1e6)])[None, :, None].requires_grad_()
    out = decayed_attention(query, key, value, clock)
    (grad,) = torch.autograd.grad(out[:, :66].sum(), clock)
    assert torch.isfinite(out[:, :66]).all() and torch.isfinite(grad).all()


@pytest.mark.parametrize("name", NAMES)
def test_neighbors_padding_and_other_candidates_change_nothing(make: SimpleNamespace, name: str) -> None:
    model = baseline(make, name)
    packed = make.histories([*LENGTHS, 30], 4)
    now = np.append(packed.timestamp, 0)[np.maximum(packed.offsets[1:] - 1, 0)] + 3_600_000
    candidates = torch.from_numpy(np.random.default_rng(0).integers(1, make.num_items, (packed.num_users, 6)))
    users, logits = model.user_vectors(packed, now), model.candidate_logits(packed, candidates, now)
    for tokens in (1, 16):
        model.tile_tokens = tokens
        torch.testing.assert_close(model.user_vectors(packed, now), users)
    for user in range(packed.num_users):
        alone, at = packed.slice(user), now[user : user + 1]
        torch.testing.assert_close(model.user_vectors(alone, at)[0], users[user])
        for column in range(6):
            one = model.candidate_logits(alone, candidates[user : user + 1, column : column + 1], at)
            torch.testing.assert_close(one[0, 0], logits[user, column])


@torch.inference_mode()
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("tile_tokens", "unknown_share"), [(10, 0.4), (TILE_TOKENS, 0.0)])
def test_training_at_a_position_is_a_request_after_its_events(
    make: SimpleNamespace, name: str, unknown_share: float, tile_tokens: int
) -> None:
    """Losses of a batch equal those of single requests, for every label and every labeled impression. The first
    impression, whose index pads others, sees more events than the smaller tiles hold."""
    model = baseline(make, name, features=True)
    model.tile_tokens = tile_tokens
    packed = make.histories([11, 1, 8, 4], 5)
    chunks, shown_at = make.chunks(packed, 5, impressions=40, requests=True)
    late = (chunks.impressions.chunk > 0) | (chunks.impressions.position > 8)
    assert not late.all() and chunks.impressions.chunk[late][0] == 0
    shown = chunks.impressions
    parts = {field.name: getattr(shown, field.name) for field in fields(shown) if field.name != "features"}
    parts = {name: part for name, part in parts.items() if part is not None}
    # Of the features, the last row is that of requests without them.
    features = shown.features.select(np.append(late, True))
    shown = replace(shown, features=features, **{name: part[late] for name, part in parts.items()})
    chunks, shown_at = replace(chunks, impressions=shown), shown_at[late]
    plan = make.plan(model, timeless_share=0.0, anchors=make.anchor_plan())
    batch = make.batch(chunks, plan, 5)
    batch = replace(batch, negatives=replace(batch.negatives, log_weight=batch.negatives.log_weight.double()))
    known = np.random.default_rng(0).random(len(packed.item)) >= unknown_share
    with torch.no_grad():
        model.item_table[0] = 0.0  # as in every real model; here all parameters got noise
    hidden = torch.from_numpy(~known) if unknown_share else None
    batch = replace(batch, events=replace(batch.events, hidden=hidden))
    asked = replace(packed, item=np.where(known, packed.item, 0))
    trained = model.losses(batch, model.item_table[batch.rows], OptimConfig(next_weight=1.0, window_weight=1.0))

    items, own = F.normalize(model.item_table[1:], dim=-1), make.users(packed)
    losses = []
    for user in range(packed.num_users):
        for seen in range(int(packed.lengths[user])):
            before = asked.slice(user, 0, seen)
            label = packed.slice(user, seen, seen + 1)
            users = model.user_vectors(before, label.timestamp, own.select([user]))
            scores = items @ users[0] / model.config.softmax_temperature
            losses.append(F.cross_entropy(scores[None], torch.from_numpy(label.item.astype(np.int64)) - 1))
    torch.testing.assert_close(trained.parts["next"], torch.stack(losses).mean())

    losses = []
    for event in make.anchor_predictions(chunks, plan, 5).number:
        user = int(np.searchsorted(packed.offsets, event, side="right")) - 1
        seen = int(event - packed.offsets[user])
        users = model.user_vectors(asked.slice(user, 0, seen), packed.timestamp[[event]], own.select([user]))
        window = np.unique(packed.slice(user, seen, seen + 6).item).astype(np.int64)
        shares = torch.log_softmax(items @ users[0] / model.config.softmax_temperature, 0)
        losses.append(-shares[torch.from_numpy(window) - 1].sum())
    assert len(losses) == 3 + 1 + 2 + 1
    torch.testing.assert_close(trained.parts["window"], torch.stack(losses).mean())

    labeled = {task: [] for task in model.schema.tasks}
    for n, (owner, seen) in enumerate(zip(chunks.impressions.chunk, chunks.impressions.position, strict=True)):
        before = asked.slice(int(owner), 0, int(seen))
        item = torch.from_numpy(chunks.impressions.item[None, n : n + 1])
        features = chunks.impressions.features.select([n])
        now, user = shown_at[n : n + 1], own.select([owner])
        logits = model.candidate_logits(before, item, now, features=features, users=user)[0, 0]
        for index, task in enumerate(model.schema.tasks):
            if chunks.impressions.mask[n, index]:
                label = torch.tensor(chunks.impressions.label[n, index]).double()
                labeled[task].append(F.binary_cross_entropy_with_logits(logits[index], label))
    for task, each in labeled.items():
        expected = torch.stack(each).mean()
        torch.testing.assert_close(trained.parts[task], expected.to(trained.parts[task].dtype), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_trained(make: SimpleNamespace, name: str) -> None:
    model = baseline(make, name, features=True).float().train()
    chunks, _ = make.chunks(make.histories([5, 12, 8, 3], 7), 7, impressions=25, requests=True)
    batch = make.batch(chunks, make.plan(model, anchors=make.anchor_plan()))
    vectors = model.item_table.detach()[batch.rows].requires_grad_()
    torch.autograd.backward(model.losses(batch, vectors, OptimConfig(next_weight=1.0, window_weight=1.0)).total)
    idle = [n for n, p in model.named_parameters() if n != "item_table" and (p.grad is None or not p.grad.any())]
    assert idle == []


@pytest.mark.parametrize("name", NAMES)
def test_a_baseline_survives_saving_and_loading(make: SimpleNamespace, name: str, tmp_path: object) -> None:
    model = baseline(make, name).float()
    model.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    again = load_model(tmp_path / "model")  # type: ignore[operator]
    packed = make.histories(LENGTHS, 3)
    assert isinstance(again, SequenceModel)
    assert torch.equal(again.user_vectors(packed, None), model.user_vectors(packed, None))


@pytest.mark.parametrize("length", [1, 2, 40, LONGEST_HELD + 1])
def test_sasrecs_attention_is_causal_softmax_attention(length: int) -> None:
    torch.manual_seed(length)
    inputs = [torch.randn(1, 2, length, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    weight = torch.randn(1, 2, length, 4, dtype=torch.float64)
    attended = attend_causally(*inputs)
    scores = inputs[0] @ inputs[1].transpose(2, 3) / 2
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    expected = torch.softmax(scores.masked_fill(future, -torch.inf), -1) @ inputs[2]
    torch.testing.assert_close(attended, expected)
    gradients = torch.autograd.grad((attended * weight).sum(), inputs, retain_graph=True)
    of_expected = torch.autograd.grad((expected * weight).sum(), inputs)
    for one, other in zip(gradients, of_expected, strict=True):
        torch.testing.assert_close(one, other)
