"""Training with counters is serving with counters: the same codes, and so the same scores.

The reference for each request counts the events that its record covers with `CounterTable`, quantizes the counters, and
advances them by the events of the tail that the record lacks, as the scorer does.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.counters.counter_histories import counters_of_request
from tests.model.test_sequence_baselines import LIMIT
from vista.arrays import Int
from vista.config import DataConfig, ModelConfig, OptimConfig
from vista.config.choices import Architecture
from vista.counters.item_keys import ItemKeys
from vista.counters.user_counters import UserCounters
from vista.examples.batch import Batch
from vista.log.histories import Histories
from vista.log.vocabulary import Vocabulary
from vista.model import inference
from vista.model.registry import ARCHITECTURES
from vista.model.schema import Schema

OPTIM = OptimConfig(next_weight=0.5, window_weight=1.0, task_weight=0.0, reconstruction_weight=0.0)


@dataclass(frozen=True)
class Request:
    """What a request sees of one history: events up to `covered` by the record, and from `first` to `seen` by the tail.

    `gap_start` is the first event that stage 2 sees.
    """

    history: Histories
    covered: int
    first: int
    seen: int
    gap_start: int
    now: Int | None

    def counters(self, keys: ItemKeys) -> UserCounters:
        return counters_of_request(
            keys, self.history, covered=self.covered, first=self.first, seen=self.seen, now=self.now
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
        "categories": data.draw(st.sampled_from([{}, {"counter_categories": ["brand"]}])),
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


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_losses_are_those_of_served_scores(make: SimpleNamespace, data: st.DataObject) -> None:
    """All items are negatives, so the losses are exact: log shares of what serving scores, counted items included."""
    drawn = drawn_setting(data)
    seeds, popularity = data.draw(st.sampled_from([0, 2])), data.draw(st.booleans())
    model = make.model(
        seed=3,
        counters=True,
        counter_keys=3,
        num_seeds=seeds,
        popularity=popularity,
        tail_len=drawn["tail_len"],
        temperature=0.5,
        **drawn["categories"],
    )
    model.set_item_frequency(np.arange(make.num_items + 1))
    packed = make.histories(drawn["lengths"], drawn["seed"])
    chunks, _ = make.chunks(packed, drawn["seed"], chunk_len=drawn["chunk_len"], keys=model.item_keys)
    anchors = make.anchor_plan(timeless_share=float(not drawn["is_timed"]), keeps_other_windows=False)
    plan = make.plan(
        model, label_spacing=min(4, drawn["tail_len"]), staleness_share=drawn["staleness"], anchors=anchors
    )
    batch = make.batch(chunks, plan, drawn["seed"])
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
        users = inference.user_vectors(model, context, inference.request_gap(model, asked.now, tail))
        counters = asked.counters(model.item_keys)
        scores.append(inference.catalog_scores(model, users, items, counters)[0])
        assert len(counters.codes.key) <= 3 + drawn["tail_len"]
    expected = served_losses(scores, batch)
    assert {name: float(value) for name, value in trained.parts.items()} == pytest.approx(expected, rel=1e-4)
    assert float(trained.total) == pytest.approx(0.5 * expected["next"] + expected["window"], rel=1e-4)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_impressions_have_the_counters_of_their_items(make: SimpleNamespace, data: st.DataObject) -> None:
    drawn = drawn_setting(data)
    options = {"counters": True, "counter_keys": 3, "num_seeds": 0, "tail_len": drawn["tail_len"]}
    model = make.model(seed=4, **options, **drawn["categories"])
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
        torch.testing.assert_close(logits[window, column], one[0, 0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["sasrec", "hstu"])
def test_baselines_count_all_events_before_a_request(make: SimpleNamespace, name: str) -> None:
    """They have no record, in training and in evaluation."""
    torch.manual_seed(1)
    config = ModelConfig(
        architecture=Architecture(name),
        dim=16,
        num_heads=2,
        history_limit=LIMIT,
        tail_len=5,
        dropout=0.0,
        temperature=0.5,
        counters=True,
        counter_keys=3,
        popularity=True,
    )
    schema = Schema(["view", "click", "buy"], True, (1.0, 5.0), [])
    items = Vocabulary.from_ids(np.arange(make.num_items) + 100)
    model = ARCHITECTURES[config.architecture](config, schema, items, DataConfig()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.set_item_frequency(np.arange(make.num_items + 1))
    packed = make.histories([LIMIT, 9, 1], 2)
    chunks, _ = make.chunks(packed, 2, keys=model.item_keys)
    anchors = make.anchor_plan(spacing=2, keeps_other_windows=False)
    plan = make.plan(model, staleness_share=0.5, anchors=anchors, exact_counters=True)
    batch = make.batch(chunks, plan, 2)
    with torch.no_grad():
        trained = model.losses(batch, model.item_vectors(batch.rows), OPTIM)

    catalog, scores = inference.item_vectors(model), []
    places = make.anchor_predictions(chunks, plan, 2)
    for asked in anchor_requests(packed, batch, places, is_timed=True, exact=True):
        assert asked.covered == asked.seen
        users = model.user_vectors(asked.history.slice(0, 0, asked.seen), asked.now)
        scores.append(inference.catalog_scores(model, users, catalog, asked.counters(model.item_keys))[0])
    expected = served_losses(scores, batch)
    assert {part: float(value) for part, value in trained.parts.items()} == pytest.approx(expected, rel=1e-4)
    assert len(scores) == 12


def test_no_label_is_in_its_own_counters(make: SimpleNamespace) -> None:
    """Every event has an item of its own, so counted items name the events that they come from."""
    model = make.model(counters=True, counter_keys=100, num_seeds=0, num_items=200)
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
    model = make.model(counters=True, counter_keys=100, num_seeds=0, num_items=60, counter_categories=["brand"])
    assert model.item_keys is not None
    packed = make.histories([40], 5)
    brand_1, others = np.flatnonzero(model.item_keys.category[0] == 1), np.flatnonzero(model.item_keys.category[0] > 1)
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
        if model.item_keys.category[0, shown] == 1:
            is_counted = bool(codes[window, column, num_columns] > 0)
            assert not is_counted or position > 30
            seen_brand += is_counted
    assert seen_brand > 0
