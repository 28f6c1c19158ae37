"""Counters in the model: heads and terms, and that training with counters is serving with counters.

The reference for each request counts the events that its record covers with `CounterTable`, quantizes the counters, and
advances them by the events of the tail that the record lacks, as the scorer does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.conftest import NEXT_ONLY, draw_counter_weights
from tests.counters.counter_histories import counters_of_request
from tests.model.test_sequence_baselines import LIMIT
from vista.arrays import Int
from vista.config import OptimConfig
from vista.counters.counters import MAX_CODE, CounterSpec
from vista.counters.keys import ItemKeys, UserCounters
from vista.examples.batch import Batch, BatchStatistics
from vista.examples.item_spaces import NUM_POOLED
from vista.examples.item_statistics import num_statistics
from vista.examples.transitions import NUM_SUMS, anchor_events, transition_sums
from vista.log.histories import Histories
from vista.model import inference
from vista.model.layers import CandidateHead, CountedItemHead, StatisticsTerm
from vista.model.losses import CountedSlots, attention_alone, log_others, window_loss
from vista.model.ranking_model import RankingModel
from vista.model.serving_model import PaddedTail
from vista.model.target_attention import TargetContext
from vista.scorer.native_scoring import code_vectors


def asked(rows: int, slots: int) -> dict[str, torch.Tensor]:
    """Arguments of the head for 4 codes, 3 statistics, and M = 8."""
    return {
        "codes": torch.randint(0, 64, (rows, slots, 4), dtype=torch.uint8),
        "score": torch.randn(rows, slots) * 5,
        "statistics": torch.randn(rows, slots, 3),
        "num_events": torch.randint(0, 1000, (rows,)),
        "user": nn.functional.normalize(torch.randn(rows, 8), dim=-1),
    }


@pytest.mark.parametrize(("temperature", "num_negatives"), [(0.05, 1000), (0.4, 400)])
def test_before_training_counted_items_have_the_share_of_returns(temperature: float, num_negatives: int) -> None:
    """30 percent of the labels are counted items: so is 30 percent of the probability, as the loss has it."""
    torch.manual_seed(0)
    num_users, num_items = 300, 1000
    users, items = (nn.functional.normalize(torch.randn(n, 64), dim=-1) for n in (num_users, num_items))
    item = torch.rand(num_users, num_items).argsort(1)  # each user has between 1 and 60 of the items
    item = item[:, :60].masked_fill(torch.arange(60) >= torch.randint(1, 61, (num_users, 1)), -1)
    negatives = torch.randperm(num_items)[:num_negatives].sort().values
    log_weight = torch.full((num_negatives,), math.log(num_items / num_negatives))
    head = CountedItemHead(4, 64, 3)
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
    head = CountedItemHead(4, 8, 3)
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
    head = CountedItemHead(4, 8, 3, dropout=0.5)
    for weight in head.parameters():
        nn.init.normal_(weight)
    inputs = asked(400, 5)
    with_cosine = head.eval()(**inputs)
    without = head(**inputs | {"score": torch.zeros_like(inputs["score"])})
    trained = head.train()(**inputs)
    dropped = (trained == without).all(1)
    assert torch.equal(trained[~dropped], with_cosine[~dropped]) and 150 < dropped.sum() < 250


def test_the_weights_of_statistics_are_linear_in_the_user_vector() -> None:
    torch.manual_seed(2)
    term = StatisticsTerm(8, 3)
    unit = nn.functional.normalize(torch.randn(3, 8), dim=-1)
    started = term(unit)
    torch.testing.assert_close(started, torch.cat([0.1 * unit, torch.tensor([[1.0, 0.0, 0.0]]).expand(3, -1)], 1))
    nn.init.constant_(term.gain, 0.5)
    nn.init.normal_(term.weight.weight)
    nn.init.normal_(term.weight.bias)
    strength = 0.5 * unit @ term.weight.weight.t() * math.sqrt(8) + term.weight.bias
    torch.testing.assert_close(term(unit), torch.cat([0.5 * unit, strength], 1))


@pytest.mark.parametrize("has_time", [True, False])
def test_scores_follow_the_statistics(make: SimpleNamespace, has_time: bool) -> None:
    """Scores with the term minus scores without it are the products of β(u) and the statistics."""
    model = make.model(counter_keys=["item"], temperature=0.3, has_time=has_time)
    width = num_statistics(has_time=has_time)
    assert model.item_statistics.shape == (1 + make.num_items, width)
    packed = make.histories([9, 0, 4], 3)
    context = inference.request_context(model, inference.summarize(model, packed), make.tail(model, packed))
    users, items = inference.user_vectors(model, context, None), inference.item_vectors(model)
    dim = model.config.dim
    assert users.shape == (3, model.retrieval_dim) and items.shape == (make.num_items, dim + width + NUM_SUMS)
    cosine = users[:, :dim] @ items[:, :dim].t() / 0.3
    with torch.inference_mode():
        strength = model.statistics(users[:, :dim] / model.statistics.gain)[:, dim : dim + width]
    expected = cosine + strength @ model.item_statistics[1:].t()
    torch.testing.assert_close(inference.catalog_scores(model, users, items), expected, atol=1e-5, rtol=1e-5)
    retrieval, _ = model.project_items(np.arange(make.num_items + 1))
    np.testing.assert_allclose(retrieval[1:], items, rtol=1.3e-6, atol=1e-5)
    assert not retrieval[0, dim:].any() and not retrieval[:, dim + width :].any()


WIDTH, NUM_TASKS = 6, 2
ITEMS, CATEGORIES = CounterSpec(), CounterSpec(("item", "genre"), (64, 8))


@pytest.fixture(params=[ITEMS, CATEGORIES], ids=["items", "categories"])
def counters(request: pytest.FixtureRequest) -> CandidateHead:
    """With drawn weights."""
    torch.manual_seed(0)
    module = CandidateHead(request.param, WIDTH, NUM_TASKS).double()
    for weight in module.parameters():
        torch.nn.init.normal_(weight)
    return module.requires_grad_(False)


@pytest.fixture
def codes(counters: CandidateHead) -> Tensor:
    """uint8 [50, G * F + 1] of candidates, counted in every field."""
    shape = 50, counters.num_values + 1
    return torch.randint(1, MAX_CODE + 1, shape, generator=torch.Generator().manual_seed(1)).byte()


def test_the_rows_of_codes_add_up_to_what_is_added(counters: CandidateHead, codes: Tensor) -> None:
    """Also for candidates that only some fields count."""
    codes[:10, : counters.num_columns] = 0
    codes[10:20, -1 - counters.num_columns :] = 0
    assert counters.added is not None
    vectors = code_vectors(counters.added.weight.detach().numpy(), counters.num_values)
    rows = torch.from_numpy(vectors).view(-1, MAX_CODE + 1, WIDTH)
    sums = torch.stack([rows[column, codes[:, column].long()] for column in range(counters.num_values)]).sum(0)
    torch.testing.assert_close(sums, counters(codes))


def test_only_logits_depend_on_the_number_of_events(counters: CandidateHead, codes: Tensor) -> None:
    other = codes.clone()
    other[:, -1] = MAX_CODE + 1 - other[:, -1]
    changed = other[:, -1] != codes[:, -1]
    assert torch.equal(counters(other), counters(codes))
    assert ((counters.logits(other) != counters.logits(codes)).any(1) == changed).all()


def test_candidates_without_counters_get_nothing(counters: CandidateHead) -> None:
    codes = torch.zeros(3, counters.num_values + 1, dtype=torch.uint8)
    assert not counters(codes).any() and not counters.logits(codes).any()


def test_nothing_is_added_before_training(counters: CandidateHead, codes: Tensor) -> None:
    spec = ITEMS if counters.num_columns == counters.num_values else CATEGORIES
    fresh = CandidateHead(spec, WIDTH, NUM_TASKS)
    assert not fresh(codes).any() and not fresh.logits(codes).any()


PRODUCTS = ["item", "brand*month", "previous*item", "brand", "weekday*brand", "brand*action", "action"]
OPTIM = OptimConfig(next_weight=0.5, window_weight=1.0, task_weight=0.0, reconstruction_weight=0.0)


@dataclass(frozen=True)
class Request:
    """What a request sees of one history: events up to `covered` by the record, and from `first` to `seen` by the tail.
    `gap_start` is the first event that stage 2 sees."""

    history: Histories
    covered: int
    first: int
    seen: int
    gap_start: int
    now: Int | None

    def counters(self, keys: ItemKeys) -> UserCounters:
        return counters_of_request(
            keys, self.history, covered=self.covered, tail_start=self.gap_start, seen=self.seen, now=self.now
        )


def request(
    packed: Histories, batch: Batch, window: int, position: int, now: Int | None, *, exact: bool = False
) -> Request:
    """The request at a position of a window's chunk."""
    tail = batch.windows.tail_index[window].numpy()
    cut = int(batch.cuts.stop[batch.windows.cut[window]])
    chunk_start = int(batch.cuts.start[batch.windows.cut[window]])
    user = int(np.searchsorted(packed.offsets, chunk_start, side="right")) - 1
    start = int(packed.offsets[user])
    visible = tail[(tail >= 0) & (tail < chunk_start + position)]
    seen = chunk_start + position - start
    gap_start = int(visible[0]) - start if len(visible) else seen
    covered = seen if exact else cut - start
    return Request(packed.slice(user), covered, min(max(covered, gap_start), seen), seen, gap_start, now)


def drawn_setting(data: st.DataObject) -> dict[str, Any]:
    return {
        "seed": data.draw(st.integers(0, 10_000)),
        "lengths": data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=3)),
        "tail_len": data.draw(st.integers(1, 6)),
        "chunk_len": data.draw(st.sampled_from([7, 100])),
        "is_timed": data.draw(st.booleans()),
        "staleness": data.draw(st.sampled_from([0.0, 0.7])),
        "counter_keys": data.draw(st.sampled_from([["item"], ["item", "brand"], PRODUCTS])),
    }


def anchor_requests(
    packed: Histories, batch: Batch, positions: Any, *, is_timed: bool, exact: bool = False
) -> list[Request]:
    """The requests of a batch's anchors, whose places `make.anchor_predictions` tells; all have a time, or none."""
    assert batch.anchors is not None
    found = []
    for window, event, position in zip(batch.anchors.window, positions.number, positions.position, strict=True):
        now = packed.timestamp[[event]] if is_timed else None
        found.append(request(packed, batch, int(window), position, now, exact=exact))
    return found


def with_served_statistics(batch: Batch, model: RankingModel) -> Batch:
    """A batch whose questions read the statistics and the transitions that serving reads."""
    values, transitions, anchors = model.item_statistics[batch.rows].unsqueeze(0), model.transitions, batch.anchors
    assert transitions is not None and anchors is not None
    recent, _, _ = anchor_events(batch, len(model.items))
    sums = transition_sums(transitions, recent, batch.rows)
    statistics = BatchStatistics(torch.zeros(1, dtype=torch.int64), values)
    batch = replace(batch, statistics=statistics, anchors=replace(anchors, transitions=sums))
    return with_served_space(batch, model)


def with_served_space(batch: Batch, model: RankingModel) -> Batch:
    """A batch whose questions read the item space that serving reads, if the model has pooled vectors."""
    return replace(batch, spaces=model.item_space[batch.rows]) if model.config.space_dim else batch


def pooled_of(asked: Request, model: RankingModel) -> Tensor | None:
    """float32 [1, J, r] pooled vectors of a request, by sums of float64 vectors; None for a model without."""
    if not model.config.space_dim:
        return None
    item, space = asked.history.item.astype(np.int64), model.item_space.double().numpy()
    known = np.concatenate([item[: asked.covered], item[asked.first : asked.seen]])
    recent = item[max(asked.seen - min(NUM_POOLED, model.config.tail_len), 0) : asked.seen]
    sums = np.stack([space[rows].sum(0) for rows in (known, recent)])
    length = np.linalg.norm(sums, axis=1, keepdims=True)
    return torch.from_numpy((sums / np.where(length > 0, length, 1))[None]).float()


def newest_items(history: Histories, model: RankingModel) -> Int:
    """int64 [1, L] the newest `tail_len` items of a history, right-aligned; 0 pads."""
    length = model.config.tail_len
    return np.concatenate([np.zeros(length, np.int64), history.item])[None, -length:]


def served_losses(scores: list[torch.Tensor], batch: Batch) -> dict[str, float]:
    """The losses of anchors whose scores of all items are [V]."""
    anchors, window, following = batch.anchors, [], []
    assert anchors is not None
    for row, own in enumerate(scores):
        log_share = own.double().log_softmax(-1)
        label = anchors.item[row][anchors.item[row] >= 0]
        window.append(-log_share[batch.rows[label] - 1].sum())
        if anchors.next_item[row] >= 0:
            following.append(-log_share[batch.rows[anchors.next_item[row]] - 1])
    return {"next": float(torch.stack(following).mean()), "window": float(torch.stack(window).mean())}


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_losses_are_those_of_served_scores(make: SimpleNamespace, data: st.DataObject) -> None:
    """All items are negatives, so the losses are exact: log shares of what serving scores, counted items included."""
    drawn = drawn_setting(data)
    model = make.model(
        seed=3,
        counter_keys=drawn["counter_keys"],
        num_counters=3,
        num_seeds=data.draw(st.sampled_from([0, 2])),
        tail_len=drawn["tail_len"],
        temperature=0.5,
        pooled_dim=data.draw(st.sampled_from([0, 6])),
    )
    packed = make.histories(drawn["lengths"], drawn["seed"])
    options = {"chunk_len": drawn["chunk_len"], "keys": model.item_keys, "space": make.space(model)}
    chunks, _ = make.chunks(packed, drawn["seed"], **options)
    anchors = make.anchor_plan(timeless_share=float(not drawn["is_timed"]), keeps_other_windows=False)
    plan = make.plan(
        model, label_spacing=min(4, drawn["tail_len"]), staleness_share=drawn["staleness"], anchors=anchors
    )
    batch = make.batch(chunks, plan, drawn["seed"])
    batch = with_served_statistics(batch, model)
    with torch.no_grad():
        trained = model.losses(batch, model.item_vectors(batch.rows), OPTIM)

    items, scores = inference.item_vectors(model), []
    places = make.anchor_predictions(chunks, plan, drawn["seed"])
    requests = anchor_requests(packed, batch, places, is_timed=drawn["is_timed"])
    for row, asked in enumerate(requests):
        # The summary covers the chunk's own events only; the counters cover the whole history.
        cut = batch.windows.cut[batch.anchors.window[row]]
        covered = int(batch.cuts.stop[cut] - batch.cuts.start[cut])
        summary = inference.summarize(model, asked.history.slice(0, asked.covered - covered, asked.covered))
        tail = make.tail(model, asked.history.slice(0, asked.gap_start, asked.seen))
        context = inference.request_context(model, summary, tail)
        pooled = pooled_of(asked, model)
        users = inference.user_vectors(model, context, inference.request_gap(model, asked.now, tail), pooled)
        counters = asked.counters(model.item_keys)
        newest = newest_items(asked.history.slice(0, asked.covered - covered, asked.seen), model)  # of the chunk
        scores.append(inference.catalog_scores(model, users, items, counters, newest, pooled)[0])
        assert len(counters.codes.key) <= 3 + drawn["tail_len"]
    expected = served_losses(scores, batch)
    # Scores are float32 sums of 16 products divided by the temperature 0.5, so a loss is off by a few units of 1e-6.
    assert {name: float(value) for name, value in trained.parts.items()} == pytest.approx(expected, rel=1e-4)
    assert float(trained.total) == pytest.approx(0.5 * expected["next"] + expected["window"], rel=1e-4)


@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_next_items_and_impressions_read_the_pooled_vectors_of_requests(
    make: SimpleNamespace, data: st.DataObject
) -> None:
    """Without counters, next items are trained at all positions."""
    drawn = drawn_setting(data)
    num_seeds = data.draw(st.sampled_from([0, 2]))
    model = make.model(seed=5, num_seeds=num_seeds, tail_len=drawn["tail_len"], temperature=0.5, pooled_dim=6)
    packed = make.histories(drawn["lengths"], drawn["seed"])
    options = {"impressions": 12, "chunk_len": drawn["chunk_len"], "space": make.space(model)}
    chunks, shown_at = make.chunks(packed, drawn["seed"], **options)
    chunks.impressions = replace(chunks.impressions, measured=measured_of(chunks.impressions.item, model))
    spacing = min(4, drawn["tail_len"])
    plan = make.plan(model, label_spacing=spacing, staleness_share=drawn["staleness"], timeless_share=0.0)
    batch = with_served_space(make.batch(chunks, plan, drawn["seed"]), model)
    users, logits = make.outputs(model, batch)
    next_items, places = make.predictions(chunks, plan, drawn["seed"])
    for window, column in np.argwhere(next_items.number >= 0):
        now = packed.timestamp[[next_items.number[window, column]]]
        asked = request(packed, batch, window, int(next_items.position[window, column]), now)
        context, tail = context_of(make, model, batch, window, asked)
        pooled = pooled_of(asked, model)
        one = inference.user_vectors(model, context, inference.request_gap(model, asked.now, tail), pooled)
        # As in test_serving_path.py: float32 sums in another order.
        torch.testing.assert_close(users[window, column], one[0], atol=2e-5, rtol=1e-4)
    items = model.training_items(batch, model.item_vectors(batch.rows))
    known = batch.rows > 0
    torch.testing.assert_close(items[known], inference.item_vectors(model)[batch.rows[known] - 1])
    for window, column in np.argwhere(places.position >= 0):
        number = places.number[window, column]
        asked = request(packed, batch, window, int(places.position[window, column]), shown_at[[number]])
        context, tail = context_of(make, model, batch, window, asked)
        row = torch.from_numpy(chunks.impressions.item[[number]])
        cosines = inference.pooled_cosines(pooled_of(asked, model), model.item_space[row])
        inputs = model.candidate_inputs(cosines, row)
        gap = inference.request_gap(model, asked.now, tail)
        one = inference.candidate_logits(model, context, gap, row[None], inputs=inputs[None])
        torch.testing.assert_close(logits[window, column], one[0, 0], atol=2e-5, rtol=1e-4)


def measured_of(item: Int, model: RankingModel) -> np.ndarray:
    """float32 [N, Z + num_tasks] statistics and rates of items as serving has them."""
    return torch.cat([model.item_statistics[item], model.item_rates[item]], 1).numpy()


def context_of(
    make: SimpleNamespace, model: RankingModel, batch: Batch, window: int, asked: Request
) -> tuple[TargetContext, PaddedTail]:
    """What stage 2 reads of a request, whose summary covers the events of its chunk only."""
    cut = batch.windows.cut[window]
    covered = int(batch.cuts.stop[cut] - batch.cuts.start[cut])
    summary = inference.summarize(model, asked.history.slice(0, asked.covered - covered, asked.covered))
    tail = make.tail(model, asked.history.slice(0, asked.gap_start, asked.seen))
    return inference.request_context(model, summary, tail), tail


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_impressions_have_the_counters_of_their_items(make: SimpleNamespace, data: st.DataObject) -> None:
    drawn = drawn_setting(data)
    options = {"counter_keys": drawn["counter_keys"], "num_counters": 3, "num_seeds": 0, "tail_len": drawn["tail_len"]}
    model = make.model(seed=4, **options)
    packed = make.histories(drawn["lengths"], drawn["seed"], num_items=6)
    options = {"impressions": 12, "num_items": 6, "chunk_len": drawn["chunk_len"], "keys": model.item_keys}
    chunks, shown_at = make.chunks(packed, drawn["seed"], **options)
    plan = make.plan(
        model,
        label_spacing=min(4, drawn["tail_len"]),
        staleness_share=drawn["staleness"],
        timeless_share=float(not drawn["is_timed"]),
    )
    batch = make.batch(chunks, plan, drawn["seed"])
    _, places = make.predictions(chunks, plan, drawn["seed"])
    _, logits = make.outputs(model, batch)
    assert batch.impressions.codes is not None
    for window, column in np.argwhere(places.position >= 0):
        number, position = places.number[window, column], int(places.position[window, column])
        now = shown_at[[number]] if drawn["is_timed"] else None
        asked = request(packed, batch, window, position, now)
        item = chunks.impressions.item[[number]]
        codes = asked.counters(model.item_keys).of_pairs(np.zeros(1, np.int64), item)
        np.testing.assert_array_equal(batch.impressions.codes[window, column], codes[0])

        tail = make.tail(model, asked.history.slice(0, asked.gap_start, asked.seen))
        context = inference.request_context(model, inference.summarize(model, asked.history), tail)
        gap = inference.request_gap(model, now, tail)
        one = inference.candidate_logits(
            model, context, gap, torch.from_numpy(item[None]), torch.from_numpy(codes[None])
        )
        # As in test_serving_path.py: float32 sums in another order.
        torch.testing.assert_close(logits[window, column], one[0, 0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["sasrec", "hstu"])
def test_baselines_count_all_events_before_a_request(make: SimpleNamespace, name: str) -> None:
    """They have no record, in training and in evaluation."""
    options = {"temperature": 0.5, "counter_keys": ["item"], "num_counters": 3}
    model = make.architecture(name, dtype=torch.float32, tasks=(), history_limit=LIMIT, **options)
    packed = make.histories([LIMIT, 9, 1], 2)
    chunks, _ = make.chunks(packed, 2, keys=model.item_keys)
    anchors = make.anchor_plan(spacing=2, keeps_other_windows=False)
    plan = make.plan(model, staleness_share=0.5, anchors=anchors, exact_counters=True)
    batch = make.batch(chunks, plan, 2)
    batch = with_served_statistics(batch, model)
    with torch.no_grad():
        trained = model.losses(batch, model.item_vectors(batch.rows), OPTIM)

    catalog, scores = inference.item_vectors(model), []
    places = make.anchor_predictions(chunks, plan, 2)
    for asked in anchor_requests(packed, batch, places, is_timed=True, exact=True):
        assert asked.covered == asked.seen
        users = model.user_vectors(asked.history.slice(0, 0, asked.seen), asked.now)
        newest, counters = newest_items(asked.history.slice(0, 0, asked.seen), model), asked.counters(model.item_keys)
        scores.append(inference.catalog_scores(model, users, catalog, counters, newest)[0])
    expected = served_losses(scores, batch)
    assert {part: float(value) for part, value in trained.parts.items()} == pytest.approx(expected, rel=1e-4)
    assert len(scores) == 12


def test_no_label_is_in_its_own_counters(make: SimpleNamespace) -> None:
    """Every event has an item of its own, so counted items name the events that they come from."""
    model = make.model(counter_keys=["item"], num_counters=100, num_seeds=0, num_items=200)
    packed = make.histories([60, 31], 5)
    packed = Histories(
        np.arange(1, 92).astype(np.int32), packed.timestamp, packed.action, packed.rating, packed.offsets
    )
    chunks, _ = make.chunks(packed, 5, chunk_len=11, keys=model.item_keys)
    plan = make.plan(model, staleness_share=0.5, anchors=make.anchor_plan(by_time=True, keeps_other_windows=False))
    batch, places = make.batch(chunks, plan, 5, num_items=200), make.anchor_predictions(chunks, plan, 5)
    assert batch.anchors is not None and batch.anchors.counters is not None
    known = 0
    for row, event in enumerate(places.number):
        user = int(np.searchsorted(packed.offsets, event, side="right")) - 1
        slots = batch.anchors.counters.item[row]
        counted = batch.rows[slots[slots >= 0]] - 1  # events
        assert (counted >= packed.offsets[user]).all() and (counted < event).all()
        known += len(counted)
    assert known > 500


def test_no_label_is_in_its_own_counters_of_a_category(make: SimpleNamespace) -> None:
    """The brand of a label is new to its user, so no brand is counted as often as it would be with the label."""
    model = make.model(counter_keys=["item", "brand"], num_counters=100, num_seeds=0, num_items=60)
    assert model.item_keys is not None
    packed = make.histories([40], 5)
    brand = model.item_keys.categories["brand"]
    brand_1, others = np.flatnonzero(brand == 1), np.flatnonzero(brand > 1)
    item = np.where(np.arange(40) < 30, others[np.arange(40) % len(others)], brand_1[0]).astype(np.int32)
    packed = Histories(item, packed.timestamp, packed.action, packed.rating, packed.offsets)
    options = {"impressions": 60, "num_items": 60, "keys": model.item_keys}
    chunks, _ = make.chunks(packed, 5, **options)
    plan = make.plan(model, staleness_share=0.5)
    batch = make.batch(chunks, plan, 5)
    _, places = make.predictions(chunks, plan, 5)
    codes, num_columns = batch.impressions.codes, model.item_keys.spec.num_columns
    assert codes is not None
    seen_brand = 0
    for window, column in np.argwhere(places.number >= 0):
        position, shown = places.position[window, column], chunks.impressions.item[places.number[window, column]]
        if brand[shown] == 1:
            is_counted = bool(codes[window, column, num_columns] > 0)
            assert not is_counted or position > 30
            seen_brand += is_counted
    assert seen_brand > 0


@pytest.mark.parametrize("counters", [False, True])
def test_epoch_0_trains_what_scores_read_without_attention(make: SimpleNamespace, counters: bool) -> None:
    """Its losses are those of the model that it exports, and all its gradients are of what that model reads."""
    model = make.model(counter_keys=["item"] if counters else [], pooled_dim=6, counted_dropout=0.0, dropout=0.0)
    draw_counter_weights(model)
    chunks, _ = make.chunks(make.histories([30, 9]), 1, impressions=5, space=make.space(model), keys=model.item_keys)
    chunks.impressions = replace(chunks.impressions, measured=measured_of(chunks.impressions.item, model))
    batch = make.batch(chunks, make.plan(model, anchors=make.anchor_plan()))
    batch = with_served_statistics(batch, model) if counters else with_served_space(batch, model)
    optim = OptimConfig(next_weight=0.5, window_weight=1.0, task_weight=1.0, reconstruction_weight=0.0)
    wide = model.wide_losses(batch, optim)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with model.wide_alone(), torch.no_grad():
        whole = model.losses(batch, model.item_table[batch.rows], optim)
    of_attention = {attention_alone("click"), attention_alone("like")}
    assert wide.parts.keys() == whole.parts.keys() - of_attention == {"next", "window", "click", "like"}
    for name, value in wide.parts.items():
        torch.testing.assert_close(value.detach(), whole.parts[name], rtol=1e-5, atol=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "the norm is back"
    wide.total.backward()
    trained = {name.split(".")[0] for name, weight in model.named_parameters() if weight.grad is not None}
    assert trained <= {"statistics", "counted", "candidate_head", "task_head"} and "statistics" in trained


def test_attention_learns_to_predict_labels_by_itself(make: SimpleNamespace) -> None:
    """A head of its own trains it, besides that of all parts. No score reads it, and a frozen one has no loss."""
    model = make.model(counter_keys=["item"], dropout=0.0)
    draw_counter_weights(model)
    chunks, _ = make.chunks(make.histories([30, 9]), 1, impressions=5, keys=model.item_keys)
    batch, optim = make.batch(chunks, make.plan(model)), OptimConfig(next_weight=0.0, window_weight=0.0)
    before = make.outputs(model, batch)[1]
    own = model.losses(batch, model.item_table[batch.rows], optim).parts[attention_alone("click")]
    own.backward()
    trained = {name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()}
    assert {"item_table", "attention_head.weight", "summarizer.seeds"} <= trained
    assert not any(name.startswith(("task_head.", "candidate_head.network.")) for name in trained)
    torch.nn.init.normal_(model.attention_head.weight)
    assert torch.equal(make.outputs(model, batch)[1], before)
    frozen = model.requires_grad_(False)
    assert attention_alone("click") not in frozen.losses(batch, model.item_table[batch.rows], optim).parts


def test_where_users_never_return_attention_learns_every_next_item(make: SimpleNamespace) -> None:
    """By the loss of the model without counters, at all positions. The loss at anchors trains what is added to it."""
    counting, plain = make.model(counter_keys=["item"], temperature=0.05, dropout=0.0), make.model(dropout=0.0)
    counting.data.exclude_seen = True
    plain.load_state_dict({name: counting.state_dict()[name] for name in plain.state_dict()})
    chunks, _ = make.chunks(make.histories([30, 9]), 1, keys=counting.item_keys)
    batch = make.batch(chunks, make.plan(counting, anchors=make.anchor_plan()))
    batch, optim = with_served_statistics(batch, counting), replace(NEXT_ONLY, next_weight=0.5)
    found, alone = counting.losses(batch, counting.item_table[batch.rows], optim), attention_alone("next")
    assert torch.equal(found.parts[alone], plain.losses(batch, plain.item_table[batch.rows], optim).parts["next"])
    assert alone not in counting.wide_losses(batch, optim).parts
    torch.testing.assert_close(found.total, 0.5 * (found.parts["next"] + found.parts[alone]))
    attention, added = {"item_table", "summarizer", "request"}, {"statistics", "counted"}
    for name, trained, frozen in ((alone, attention, added), ("next", added, attention)):
        counting.zero_grad()
        found.parts[name].backward(retain_graph=True)
        names = {name.split(".")[0] for name, weight in counting.named_parameters() if weight.grad is not None}
        assert trained <= names and not frozen & names
    for other in (replace(optim, window_weight=1.0), optim):
        assert alone not in counting.losses(batch, counting.item_table[batch.rows], other).parts
        counting.requires_grad_(False)
