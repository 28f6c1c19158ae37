"""DIN, SIM and TWIN: the published formulas, event by event; and a score depends only on its user's events."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.conftest import NEXT_ONLY
from vista.errors import ConfigError
from vista.log.features import Column
from vista.log.histories import Histories, gap_bucket
from vista.log.vocabulary import Vocabulary
from vista.model.baselines.candidate_models import DIN, SIM, TWIN, CandidateModel, SearchModel, newest_of_highest
from vista.model.inference import user_feature_vectors
from vista.model.registry import load_model

LENGTHS = [0, 1, 9, 4, 0, 7, 12, 30]
HOUR = 3_600_000
OTHER_TABLES = [(False, 0), (True, 37)]
"""Without times, or over a unified table."""
NAMES = ["din", "sim", "sim-hard", "twin"]
LIMITED = [("din", 6), ("sim", 0), ("sim", 8), ("sim-hard", 0), ("sim-hard", 8), ("twin", 0), ("twin", 8)]


def baseline(make: SimpleNamespace, name: str, *, limit: int = 0, top_k: int = 4, **options: Any) -> CandidateModel:
    """A small float64 model in which every parameter matters."""
    options |= {"search_category": "topic"} if name == "sim-hard" else {}
    limit = limit or (6 if name == "din" else 0)
    model = make.architecture(name.removesuffix("-hard"), has_retrieval=False, history_limit=limit, **options)
    assert isinstance(model, CandidateModel)
    if isinstance(model, SearchModel):
        model.top_k = top_k
    if isinstance(model, SIM) and model.category is not None:
        model.category.copy_(torch.randint(0, 4, model.category.shape))
    return model


def requests(make: SimpleNamespace, lengths: list[int], seed: int) -> tuple[Histories, np.ndarray, Tensor]:
    """Histories, the times of their requests, and candidates int64 [B, 6]."""
    packed = make.histories(lengths, seed)
    now = np.append(packed.timestamp, 0)[np.maximum(packed.offsets[1:] - 1, 0)] + 3 * HOUR
    rng = np.random.default_rng(seed)
    return packed, now, torch.from_numpy(rng.integers(0, make.num_items + 1, (len(lengths), 6)))


def age_of(model: CandidateModel, history: Histories, event: int) -> int:
    """Bucket of the time, or of the number of events, from an event to the newest."""
    clock = history.timestamp if model.encoder.gap is not None else 1000 * np.arange(history.num_events)
    return int(gap_bucket(np.array(clock[-1] - clock[event])))


def item_of(model: CandidateModel, row: int) -> Tensor:
    """[M], times sqrt(16)."""
    return model.item_vectors(torch.tensor(row)) * 4


def event_of(model: CandidateModel, history: Histories, event: int) -> Tensor:
    """[M]: item, action and rating."""
    assert model.encoder.action is not None and model.encoder.rating is not None and history.rating is not None
    vector = item_of(model, int(history.item[event])) + 4 * model.encoder.action(
        torch.tensor(history.action[event]).long()
    )
    return vector + (float(history.rating[event]) - 3) / 2 * model.encoder.rating * 4


def din_by_event(model: DIN, history: Histories, query: Tensor) -> Tensor:
    total = torch.zeros_like(query)
    for event in range(max(0, history.num_events - model.config.history_limit), history.num_events):
        key = event_of(model, history, event) + model.age.weight[age_of(model, history, event)]
        hidden = model.activation(model.activation_in(torch.cat([query, key, query - key, query * key])))
        total = total + model.activation_out(hidden) * key
    return total


def heads_by_event(query: Tensor, keys: list[Tensor], values: list[Tensor], bias: list[Tensor]) -> Tensor:
    """Softmax attention of two heads over some events; bias [2] each."""
    if not keys:
        return torch.zeros_like(query)
    mixed = []
    for head, part in enumerate((slice(0, 8), slice(8, 16))):
        scores = [query[part] @ key[part] / 8**0.5 + b[head] for key, b in zip(keys, bias, strict=True)]
        weight = torch.softmax(torch.stack(scores), 0)
        mixed.append(sum(w * value[part] for w, value in zip(weight, values, strict=True)))
    return torch.cat(mixed)  # type: ignore[arg-type]


def highest(scores: dict[int, float], count: int) -> list[int]:
    """Events of the highest scores, the newest of equal ones."""
    return sorted(scores, key=lambda event: (np.float32(scores[event]), event))[-count:]


def visible(model: CandidateModel, history: Histories) -> range:
    limit = model.config.history_limit
    return range(max(0, history.num_events - limit) if limit else 0, history.num_events)


def sim_by_event(model: SIM, history: Histories, candidate: int, query: Tensor, count: int) -> Tensor:
    items = [item_of(model, int(row)) for row in history.item]
    if model.category is None:
        scores = {j: float(model.of_candidate(query) @ model.of_event(items[j])) for j in visible(model, history)}
    else:
        category = [int(model.category[row]) for row in history.item]
        wanted = int(model.category[candidate])
        scores = {j: 0.0 for j in visible(model, history) if category[j] == wanted != 0}
    keys, values = [], []
    for event in highest(scores, count):
        age = age_of(model, history, event)
        keys.append(model.key(event_of(model, history, event)) + model.age_key.weight[age])
        values.append(model.value(event_of(model, history, event)) + model.age_value.weight[age])
    return heads_by_event(model.query(query), keys, values, [torch.zeros(2)] * len(keys))


def sim_search_by_event(model: SIM, history: Histories, query: Tensor) -> Tensor:
    """Task logits of the search unit."""
    seen = visible(model, history)
    total = torch.zeros_like(query)
    for event in seen:
        item = item_of(model, int(history.item[event]))
        total = total + (model.of_candidate(query) @ model.of_event(item)) * item / len(seen)
    logits: Tensor = model.search_network(torch.cat([total, query]))
    return logits


def twin_by_event(model: TWIN, history: Histories, query: Tensor, count: int) -> Tensor:
    assert model.action_bias is not None
    keys, values, bias, scores = {}, {}, {}, {}
    projected = model.query(query)
    for event in visible(model, history):
        age, action = age_of(model, history, event), int(history.action[event])
        keys[event] = model.key(item_of(model, int(history.item[event])))
        values[event] = model.value(event_of(model, history, event)) + model.age_value.weight[age]
        bias[event] = model.age_bias.weight[age] + model.action_bias.weight[action]
        by_head = [projected[:8] @ keys[event][:8], projected[8:] @ keys[event][8:]]
        scores[event] = float(sum(by_head) / 8**0.5 + bias[event].sum())
    picked = highest(scores, count)
    mixed: Tensor = model.out(
        heads_by_event(projected, *([each[event] for event in picked] for each in (keys, values, bias)))
    )
    return mixed


def logits_by_event(model: CandidateModel, history: Histories, candidate: int, gap: Tensor | None) -> Tensor:
    """Task logits of one candidate of one user."""
    query = item_of(model, candidate) if gap is None else item_of(model, candidate) + 4 * gap
    if isinstance(model, DIN):
        interest = din_by_event(model, history, query)
    elif isinstance(model, SIM):
        interest = sim_by_event(model, history, candidate, query, model.top_k)
    else:
        assert isinstance(model, TWIN)
        interest = twin_by_event(model, history, query, model.top_k)
    logits: Tensor = model.network(torch.cat([interest, query, interest * query]))
    return logits


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "limit", "has_time", "rows"),
    [*((*case, True, 0) for case in LIMITED), *((name, 0, *other) for name in NAMES for other in OTHER_TABLES)],
)
def test_a_score_is_the_published_formula(
    make: SimpleNamespace, name: str, limit: int, has_time: bool, rows: int
) -> None:
    """For users without events, with fewer than a search finds, and with more; also over a unified table."""
    model = baseline(make, name, limit=limit, has_time=has_time, embedding_rows=rows)
    packed, now, candidates = requests(make, LENGTHS, 3)
    logits, gap = model.candidate_logits(packed, candidates, now), model.request_gap(packed, now)
    for user in range(packed.num_users):
        for column, candidate in enumerate(candidates[user].tolist()):
            expected = logits_by_event(model, packed.slice(user), candidate, None if gap is None else gap[user])
            torch.testing.assert_close(logits[user, column], expected)


@pytest.mark.parametrize("count", [1, 3, 7])
def test_the_highest_scores_are_found_and_the_last_of_equal_ones(count: int) -> None:
    rng = np.random.default_rng(count)
    scores = rng.choice([-np.inf, -1e30, -2.5, -2.5 - 3e-7, -1e-40, 0.0, 1e-40, 2.5, 3e20], (50, 7)).astype(np.float32)
    highest_places = newest_of_highest(torch.from_numpy(scores), count).sort(-1).values.numpy()
    for row, places in zip(scores, highest_places, strict=True):
        assert places.tolist() == sorted(highest(dict(enumerate(row.tolist())), count))


@pytest.mark.parametrize("name", NAMES)
def test_neighbors_padding_and_other_candidates_change_nothing(make: SimpleNamespace, name: str) -> None:
    model = baseline(make, name)
    packed, now, candidates = requests(make, LENGTHS, 5)
    logits = model.candidate_logits(packed, candidates, now)
    torch.testing.assert_close(model.candidate_logits(packed, candidates.flip(1), now), logits.flip(1))
    for size in (1, 16):
        model.tile_tokens = model.scores_at_once = model.found_at_once = size
        torch.testing.assert_close(model.candidate_logits(packed, candidates, now), logits)
    for user in range(packed.num_users):
        alone, at = packed.slice(user), now[user : user + 1]
        for column in range(6):
            one = model.candidate_logits(alone, candidates[user : user + 1, column : column + 1], at)
            torch.testing.assert_close(one[0, 0], logits[user, column])


@torch.inference_mode()
@pytest.mark.parametrize(("name", "limit"), LIMITED)
def test_training_at_a_position_is_a_request_after_its_events(make: SimpleNamespace, name: str, limit: int) -> None:
    """Losses of a batch equal those of single requests, also for windows that begin inside a chunk."""
    model = baseline(make, name, limit=limit, features=True)
    packed = make.histories([1, 11, 8, 0, 19], 5)
    chunks, shown_at = make.chunks(packed, 5, impressions=60, requests=True)
    batch = make.batch(chunks, make.plan(model, timeless_share=0.0), 5)
    losses = model.losses(batch, model.item_vectors(batch.rows), replace(NEXT_ONLY, task_weight=0.5))

    logits, search = [], []
    for n, (owner, seen) in enumerate(zip(chunks.impressions.chunk, chunks.impressions.position, strict=True)):
        before = packed.slice(int(owner), 0, int(seen))
        item = torch.from_numpy(chunks.impressions.item[None, n : n + 1])
        features = chunks.impressions.features.select([n])
        now, user = shown_at[n : n + 1], make.users(packed).select([owner])
        logits.append(model.candidate_logits(before, item, now, features=features, users=user)[0, 0])
        if isinstance(model, SIM) and model.category is None:
            asked, own = model.vectors_of_requests(before, now, features), user_feature_vectors(model, user, 1)
            assert asked is not None and own is not None
            query = item_of(model, int(item[0, 0])) + 4 * (asked[0, 0] + own[0])
            search.append(sim_search_by_event(model, before, query))

    def means(each: list[Tensor]) -> Tensor:
        label, mask = torch.from_numpy(chunks.impressions.label), torch.from_numpy(chunks.impressions.mask)
        loss = F.binary_cross_entropy_with_logits(torch.stack(each), label.double(), reduction="none")
        return (loss * mask).sum(0) / mask.sum(0)

    close = {"rtol": 1e-6, "atol": 1e-6, "check_dtype": False}
    expected = means(logits)
    for index, task in enumerate(model.schema.tasks):
        torch.testing.assert_close(losses.parts[task], expected[index], **close)
    total = expected.sum()
    units = [f"search_unit/{task}" for task in model.schema.tasks] if search else []
    for name, mean in zip(units, means(search) if search else [], strict=True):
        torch.testing.assert_close(losses.parts[name], mean, **close)
        total = total + mean
    assert set(losses.parts) == {*model.schema.tasks, *units}
    torch.testing.assert_close(losses.total, 0.5 * total, **close)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_trained(make: SimpleNamespace, name: str) -> None:
    model = baseline(make, name, features=True).float().train()
    chunks, _ = make.chunks(make.histories([5, 12, 8, 3], 7), 7, impressions=25, requests=True)
    batch = make.batch(chunks, make.plan(model))
    vectors = model.item_table.detach()[batch.rows].requires_grad_()
    torch.autograd.backward(model.losses(batch, vectors, NEXT_ONLY).total)
    assert vectors.grad is not None and vectors.grad.any()
    idle = [n for n, p in model.named_parameters() if n != "item_table" and (p.grad is None or not p.grad.any())]
    assert idle == []


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_without_impressions_has_nothing_to_train(make: SimpleNamespace, name: str) -> None:
    model = baseline(make, name).float()
    chunks, _ = make.chunks(make.histories([5, 12], 7), 7, impressions=3)
    batch = make.batch(chunks, make.plan(model))
    batch = replace(batch, impressions=replace(batch.impressions, mask=torch.zeros_like(batch.impressions.mask)))
    losses = model.losses(batch, model.item_vectors(batch.rows), NEXT_ONLY)
    assert losses.parts == {} and not losses.total.requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_a_baseline_survives_saving_and_loading(make: SimpleNamespace, name: str, tmp_path: Path) -> None:
    model = baseline(make, name, top_k=SearchModel.top_k).float()
    model.save_pretrained(tmp_path / "model")
    again = load_model(tmp_path / "model")
    packed, _, candidates = requests(make, LENGTHS, 3)
    assert isinstance(again, CandidateModel) and again.config == model.config and not again.has_retrieval
    assert torch.equal(
        again.candidate_logits(packed, candidates, None), model.candidate_logits(packed, candidates, None)
    )


def test_they_have_no_user_vectors(make: SimpleNamespace) -> None:
    with pytest.raises(ConfigError, match=r"model\.architecture=twin: only ranks candidates"):
        baseline(make, "twin").user_vectors(make.histories([3]), None)


def test_hard_search_reads_a_category_of_the_log(make: SimpleNamespace) -> None:
    """The first item has no value, and the others have one of three."""
    model, count = baseline(make, "sim-hard"), make.num_items
    assert isinstance(model, SIM) and model.category is not None
    codes = (np.arange(count - 1) % 3).astype(np.int32)
    topic = Column(codes, Vocabulary.empty("str").extended(["a", "b", "c"]), np.r_[0, 0, 1 + np.arange(count - 1)])
    tags = Column(np.tile(np.int32([0, 2]), count), topic.values, 2 * np.arange(count + 1))
    price = Column(np.ones(count, np.float32))
    features = {"topic": topic, "tags": tags, "price": price}
    model.read_item_table(features)
    assert model.category.tolist() == [0, 0, *(1 + codes)]
    for name, given, message in (
        (
            "price",
            features,
            "model.search_category=price: is not a category of the log's items, which have topic, tags;",
        ),
        ("category", {}, "model.search_category=category: is not a category of the log's items, which have none;"),
        ("tags", features, "model.search_category=tags: some items have several values"),
    ):
        with pytest.raises(ConfigError, match=message):
            model.config.search_category = name
            model.read_item_table(given)
