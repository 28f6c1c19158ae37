"""The scorer reads counters as of the request, and scores counted items by them, as a model does on a raw history."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.conftest import (
    DAY,
    ROUNDING,
    START,
    candidate_inputs,
    draw_counter_weights,
    event_vectors,
    small_config,
    tail_of,
)
from tests.counters.counter_histories import category, counters_of_request
from vista.arrays import Int
from vista.config.checks import Codec
from vista.counters.keys import UserCounters
from vista.errors import UnknownItemError
from vista.evaluation.cases import case_requests
from vista.examples.item_statistics import HistoryCounters
from vista.log.event_log import EventLog
from vista.log.histories import NO_TIMESTAMP, Histories
from vista.log.splits import Until
from vista.log.vocabulary import Vocabulary
from vista.model import inference
from vista.model.vista_model import VistaModel
from vista.refresh import RefreshOptions, refresh
from vista.scorer import Scorer, Tail
from vista.scorer.request import Request, RequestCounters
from vista.training.log_schema import schema_of

TAIL_LEN = 6
STALE = {"fresh": 4, "stale": 11}
"""Events of each user that the records lack: fewer and more than a tail holds."""
TASKS = ("click", "like", "long_view", "next")


@dataclass(frozen=True)
class Opened:
    """A scorer of a model with counters, whose store lacks the newest events of all users."""

    scorer: Scorer
    log: EventLog
    rows: Int
    """Model rows of the log's items; the model does not know some."""
    num_missing: int

    @property
    def users(self) -> list[Any]:
        ids: list[Any] = self.log.users.ids(np.arange(self.log.num_users)).tolist()
        return ids

    def tail(self, count: int, users: Int | None = None) -> Tail:
        """The newest `count` events of users, with the log's ids."""
        users = np.arange(self.log.num_users) if users is None else users
        lengths = self.log.lengths[users]
        events = self.log.gather_ranges(users, lengths - count, lengths)
        return Tail(
            self.log.items.ids(events.item), np.asarray(events.timestamp), np.asarray(events.action), events.offsets
        )

    def request(self, users: list[Any], tail: Tail | None, now: Any) -> Request:
        with self.scorer._call(users, tail, now) as call:
            return call.request

    def pooled(self, tail_len: int = TAIL_LEN) -> NDArray[np.float64]:
        """Pooled vectors of a request for all users with their newest `tail_len` events, made from the log."""
        model, pooled = self.scorer.model, []
        for user in self.users:
            history = self.log[user]
            vectors = event_vectors(model, self.rows[history.item], history.action)
            known = [*vectors[: len(vectors) - self.num_missing], *vectors[-min(self.num_missing, tail_len) :]]
            sums = [sum(chosen) for chosen in (known, vectors[-tail_len:])]
            pooled.append([total / np.linalg.norm(total) for total in sums])
        return np.array(pooled)

    def counters(self, users: list[Any], tail: Tail | None, now: Any) -> RequestCounters:
        counters = self.request(users, tail, now).counters
        assert counters is not None
        return counters

    def expected(self, now: Any) -> UserCounters:
        """Counters of a request for all users, made from the log."""
        seen, keys = self.log.lengths, self.scorer.model.item_keys
        assert keys is not None
        histories, requests = case_requests(
            self.log,
            self.rows,
            np.arange(len(seen)),
            seen,
            now,
            covered=seen - self.num_missing,
            tail_len=self.scorer.model.config.tail_len,
        )
        return HistoryCounters.of(keys, histories).at(requests)


def untrained(log: EventLog, items: Vocabulary, **changes: Any) -> VistaModel:
    """A model with counters, and weights of the heads as if it were trained.

    If it counts categories, its items have the feature `brand`: 12 values, and none for every tenth item.
    """
    config = small_config(
        log,
        "unused",
        **{"model__counter_keys": ["item"], "model__tail_len": TAIL_LEN, "model__pooled_dim": 16, **changes},
    )
    torch.manual_seed(5)
    counted, config.model.counter_keys = config.model.counter_keys, ["item"]  # the log has no categories
    schema, table = schema_of(log, config), None
    if "brand" in counted:
        has_brand = np.arange(len(items)) % 10 > 0
        columns, table = category("brand", np.where(has_brand, np.arange(len(items)) % 12, -1))
        schema = replace(schema, item_features=columns, residual_task="click")
        config.model.counter_keys = counted
    model = VistaModel(config.model, schema, items, config.data).eval()
    model.set_item_features(table)
    draw_counter_weights(model)
    return model


@pytest.fixture(scope="module", params=["items", "keys"])
def model(request: pytest.FixtureRequest, impression_log: EventLog) -> VistaModel:
    """Knows 36 of the log's 40 items."""
    changes: dict[str, Any] = {
        "items": {},
        "keys": {"model__counter_keys": ["item", "brand", "brand*month", "previous*item", "action", "brand*action"]},
    }[request.param]
    items = Vocabulary.from_ids(impression_log.items.ids(np.arange(4, impression_log.num_items)))
    return untrained(impression_log, items, model__num_counters=8, **changes)


@pytest.fixture(scope="module", params=STALE)
def opened(
    request: pytest.FixtureRequest, model: VistaModel, impression_log: EventLog, tmp_path_factory: Any
) -> Iterator[Opened]:
    folder, num_missing = tmp_path_factory.mktemp("counters"), STALE[request.param]
    options = RefreshOptions(codec=Codec.float32)
    refresh(model, impression_log, folder / "store", until=Until(held_out=num_missing), options=options)
    with Scorer.open(model, folder / "store") as scorer:
        yield Opened(scorer, impression_log, model.rows_of(impression_log.items), num_missing)


@pytest.fixture(params=["now", "no time"])
def now(request: pytest.FixtureRequest, impression_log: EventLog) -> NDArray[np.int64] | None:
    """Another time after the newest event for each user, or None."""
    if request.param == "no time":
        return None
    newest = [int(impression_log[user].timestamp[-1]) for user in impression_log.users.ids(np.arange(12)).tolist()]
    return np.array(newest) + np.arange(12) ** 2 * DAY


def same_codes(actual: UserCounters, expected: UserCounters) -> None:
    fields = zip((actual.codes, *actual.others), (expected.codes, *expected.others), strict=True)
    for own, other in fields:
        for name in ("key", "codes", "offsets"):
            np.testing.assert_array_equal(getattr(own, name), getattr(other, name))
    np.testing.assert_array_equal(actual.num_events, expected.num_events)
    np.testing.assert_array_equal(actual.newest, expected.newest)


def test_a_request_has_the_codes_of_the_raw_history(opened: Opened, now: Any) -> None:
    counters, expected = opened.counters(opened.users, opened.tail(TAIL_LEN), now), opened.expected(now)
    same_codes(counters, expected)
    assert (np.diff(counters.codes.offsets) > 4).all() and counters.codes.key.min() > 0
    stored = opened.scorer.store.get_many(opened.users)
    num_new = min(opened.num_missing, TAIL_LEN)
    np.testing.assert_array_equal(counters.num_events, stored.event_count + num_new)


def test_a_request_has_the_pooled_vectors_of_the_raw_history(opened: Opened) -> None:
    for tail_len in (TAIL_LEN, 2):
        with Scorer.open(opened.scorer.model.with_tail(tail_len), opened.scorer.store.path) as scorer:
            request = replace(opened, scorer=scorer).request(opened.users, opened.tail(TAIL_LEN + 3), None)
        assert request.pooled is not None and request.pooled.dtype == np.float32
        np.testing.assert_allclose(request.pooled, opened.pooled(tail_len), atol=ROUNDING)
        assert np.abs(request.pooled[:, 0] - request.pooled[:, 1]).max() > 0.1
    nobody = opened.request([999], None, None).pooled
    assert nobody is not None and not nobody.any()
    item = opened.scorer.model.items.ids(np.array([3]))
    asked = opened.request([999], Tail(item, np.array([START]), np.zeros(1, int), np.array([0, 1])), None).pooled
    own = event_vectors(opened.scorer.model, np.array([4, 4]), np.zeros(2, int))
    assert asked is not None and np.allclose(asked[0], own / np.linalg.norm(own, axis=1, keepdims=True))


def test_events_that_the_record_covers_count_once(opened: Opened, now: Any) -> None:
    """A caller sends more events than the record lacks, or some twice."""
    expected = opened.counters(opened.users, opened.tail(TAIL_LEN), now)
    same_codes(opened.counters(opened.users, opened.tail(TAIL_LEN + 5), now), expected)
    tail = opened.tail(TAIL_LEN)
    rows = np.arange(TAIL_LEN * opened.log.num_users).reshape(opened.log.num_users, -1)
    twice = np.concatenate([rows, rows[:, ::-1]], 1).ravel()
    doubled = Tail(tail.items[twice], tail.times[twice], tail.actions[twice], 2 * tail.offsets)
    same_codes(opened.counters(opened.users, doubled, now), expected)
    once, again = (opened.request(opened.users, sent, now).pooled for sent in (tail, doubled))
    assert once is not None and again is not None and np.array_equal(once, again)


@pytest.mark.parametrize("start", [-1000 * DAY, 0])
def test_a_user_without_a_record_is_a_user_without_earlier_events(opened: Opened, start: int) -> None:
    """Also if the events came before 1970."""
    item, time = np.array([3, 5, 3]), start + np.array([0, 3, 7]) * DAY
    history = Histories(item.astype(np.int32), time, np.zeros(3, np.uint8), None, np.array([0, 3]))
    tail = Tail(history.item, time, history.action, history.offsets)
    batch, keys = opened.scorer.store.get_many(opened.users[:1]), opened.scorer.model.item_keys
    assert keys is not None
    for stored in (opened.scorer.store.get_many([999]), batch.without(np.ones(1, bool))):
        actual = RequestCounters.of(keys, stored, tail, np.ones(3, bool), None)
        same_codes(actual, counters_of_request(keys, history, covered=0, tail_start=0, seen=3, now=None))
    nobody = batch.without(np.ones(1, bool)).spread(np.array([1]), 2)
    assert nobody.counters[0].clock.tolist() == [NO_TIMESTAMP] * 2


def test_a_shorter_tail_counts_fewer_fresh_events(opened: Opened, now: Any) -> None:
    with Scorer.open(opened.scorer.model.with_tail(2), opened.scorer.store.path) as scorer:
        shorter = replace(opened, scorer=scorer)
        counters, expected = shorter.counters(opened.users, opened.tail(TAIL_LEN), now), shorter.expected(now)
    same_codes(counters, expected)
    full = opened.counters(opened.users, opened.tail(TAIL_LEN), now)
    assert (counters.num_events < full.num_events).all()


def test_next_equals_the_scores_of_the_raw_history(opened: Opened, now: Any) -> None:
    """The user vectors come from the store; all that follows is what evaluation on raw histories computes."""
    scorer, tail, counters = opened.scorer, opened.tail(TAIL_LEN), opened.expected(now)
    ids, items = scorer.item_vectors()
    users = torch.from_numpy(scorer.user_vectors(opened.users, tail=tail, now=now))
    request = opened.request(opened.users, tail, now)
    pooled = None if request.pooled is None else torch.from_numpy(request.pooled)
    asked = users, torch.from_numpy(items), counters, request.tail.item, pooled
    expected = inference.catalog_scores(scorer.model, *asked).numpy()
    linear = users.numpy() @ items.T / scorer.model.config.softmax_temperature
    assert (np.abs(expected - linear) > 1e-2).mean() > 0.1
    close = {"rtol": ROUNDING, "atol": ROUNDING}
    scores = scorer.predict(opened.users, ids, tail=tail, now=now)["next"]
    np.testing.assert_allclose(scores, expected, **close)
    np.testing.assert_allclose(scorer.catalog_scores(opened.users, tail=tail, now=now), expected, **close)
    offsets = np.arange(len(opened.users) + 1) * 7
    values = ids[np.arange(offsets[-1]) % len(ids)]
    ragged = scorer.predict(opened.users, (values, offsets), tail=tail, now=now)["next"]
    np.testing.assert_array_equal(
        ragged, scores[np.arange(offsets[-1]) // 7, np.arange(offsets[-1]) % len(ids)].ravel()
    )


def test_tasks_equal_those_of_the_raw_history(opened: Opened) -> None:
    scorer, model, tail = opened.scorer, opened.scorer.model, opened.tail(TAIL_LEN)
    for now in (None, np.full(len(opened.users), int(tail.times.max()) + DAY)):
        context, gap = _context(opened, tail, now)
        candidates = torch.arange(len(model.items) + 1).expand(len(opened.users), -1)
        item = candidates.numpy().ravel()
        user = np.repeat(np.arange(len(opened.users)), candidates.shape[1])
        codes = opened.expected(now).of_pairs(user, item).reshape(*candidates.shape, -1)
        inputs = candidate_inputs(model, torch.from_numpy(opened.pooled()).float(), candidates)
        with_codes, without = (
            inference.candidate_logits(model, context, gap, candidates, each, inputs).sigmoid().numpy()[:, 1:]
            for each in (torch.from_numpy(codes), torch.zeros(codes.shape, dtype=torch.uint8))
        )
        assert (np.abs(with_codes - without).max(-1) > 1e-3).mean() > 0.1
        predicted = scorer.predict(opened.users, scorer.item_vectors()[0], tail=tail, now=now)
        for index, task in enumerate(TASKS[:3]):
            np.testing.assert_allclose(predicted[task], with_codes[..., index], atol=ROUNDING)


def test_unknown_items_are_not_counted(opened: Opened) -> None:
    """Items that the model does not know share a row, but events with one say nothing about another."""
    scorer, user = opened.scorer, opened.users[:1]
    time = int(opened.tail(1).times.max()) + DAY
    for item in (-1, -2):
        tail = Tail(np.array([item]), np.array([time]), np.zeros(1, int), np.array([0, 1]))
        assert scorer.predict(user, [-1], tail=tail)["next"].tolist() == [[0.0]]
        with pytest.raises(UnknownItemError, match="does not know the item in place 0"):
            scorer.explain(user[0], [-1], tail=tail)


def test_users_without_a_usable_record_have_no_scores(opened: Opened) -> None:
    with Scorer.open(opened.scorer.model, opened.scorer.store.path, on_missing="nan") as scorer:
        tail = opened.tail(TAIL_LEN, np.array([0, 0]))
        _, scores, offsets = scorer.counted_items([opened.users[0], 999], tail=tail)
        assert np.isfinite(scores[: offsets[1]]).all() and np.isnan(scores[offsets[1] :]).all()
        assert np.diff(offsets).min() > 0


@pytest.mark.parametrize("opened", ["fresh"], indirect=True)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("now", ["now"], indirect=True)
def test_parts_have_shares_of_the_score(opened: Opened, task: str, now: Any) -> None:
    user, tail = opened.users[2], opened.tail(TAIL_LEN, np.array([2]))
    time = None if now is None else int(now[2])
    scorer, items = opened.scorer, opened.scorer.item_vectors()[0]
    told = scorer.explain(user, items, task=task, tail=tail, now=time)
    scores = scorer.predict([user], items, tail=tail, now=time)[task][0]
    value = told.value if task == "next" else 1 / (1 + np.exp(-told.value))
    np.testing.assert_allclose(value, scores, rtol=ROUNDING, atol=ROUNDING)
    np.testing.assert_allclose(sum(told.shares.values()), told.value - told.mean, atol=1e-12)
    model, dim, width = scorer.model, scorer.model.config.dim, scorer.model.config.space_dim
    only = "transitions" if task == "next" else "rate"
    assert {"counters", "history", "recent", "popularity", only, "tail", "own"} <= told.shares.keys()
    counts = told.counts[:, :1] if task == "next" else told.counts[:, np.isnan(told.counts).any(0)]  # not actions
    is_counted = np.isfinite(counts).any(1)
    assert 4 < is_counted.sum() < len(items)
    if task != "next":
        return
    # Items that are not counted have a sum of products, so their shares differ as its terms do.
    vector = scorer.user_vectors([user], tail=tail, now=time)[0].astype(np.float64)
    statistics = model.item_statistics[1:].double().numpy()
    terms = {
        "history": model.item_space[1:].double().numpy() @ vector[dim : dim + width],
        "popularity": statistics @ vector[dim + width :][: statistics.shape[1]],
        "own": scorer.item_vectors()[1][:, :dim].astype(np.float64) @ vector[:dim] / model.temperature,
    }
    found = dict(told.shares)
    found["history"] = found["history"] + found["recent"]
    found["own"] = found["own"] + found["tail"] + found.get("summary", 0)
    for name, term in terms.items():
        np.testing.assert_allclose(
            np.diff(found[name][~is_counted]), np.diff(term[~is_counted]), atol=1e-4, err_msg=name
        )
    assert np.ptp(told.shares["counters"][~is_counted]) == 0
    assert np.ptp(told.shares["counters"][is_counted]) > 1e-3


def circumstance(model: VistaModel, counts: NDArray[np.float32]) -> str | None:
    """What a reason says about the first product of keys that is counted, from the item's counters float32 [G * F]."""
    words = {"brand*month": "items of its brand {} before in the same month", "previous*item": "{} before right after"}
    assert model.counter_spec is not None
    keys = model.counter_spec.fields
    for key, (number, *_) in zip(keys, np.split(counts, len(keys)), strict=True):
        if key in words and np.isfinite(number):
            return words[key].format(times(number))
    return None


def of_actions(model: VistaModel, counts: NDArray[np.float32], task: str) -> str | None:
    """What a reason says about the actions of the events with the item's brand, as `circumstance`."""
    assert model.counter_spec is not None
    keys = model.counter_spec.fields
    numbers = dict(zip(keys, counts.reshape(len(keys), -1)[:, 0].tolist(), strict=True))
    names = model.schema.actions
    own = {name: number for name in names if np.isfinite(number := numbers.get(f"brand*action:{name}", np.nan))}
    if not own:
        return None
    told = task if task in own else max(own, key=own.__getitem__)
    total = max(sum(own.values()), numbers["brand"] if np.isfinite(numbers["brand"]) else 0)
    return f"{told} in {'' if total < 10 else 'about '}{own[told]:,.0f} of {total:,.0f} events with items of its brand"


def times(number: float) -> str:
    """Codes of counts are exact below 10."""
    return "once" if round(number) == 1 else f"{'' if number < 10 else 'about '}{number:.0f} times"


@pytest.mark.parametrize("opened", ["fresh"], indirect=True)
@pytest.mark.parametrize("task", ["click", "next"])
def test_reasons_say_what_parts_with_positive_shares_hold(opened: Opened, task: str) -> None:
    user, tail = opened.users[2], opened.tail(TAIL_LEN, np.array([2]))
    model, items = opened.scorer.model, opened.scorer.item_vectors()[0].tolist()
    told = opened.scorer.explain(user, items, task=task, tail=tail)
    space, texts, parts, products = model.item_space.double(), set[str](), set[str](), set[str]()
    actions = set[str]()
    newest = [item for item in told.tail_items if item is not None]
    rows = dict(zip(items, range(1, 1 + len(items)), strict=True))
    for place, reasons in enumerate(told.reasons):
        shares = {part: float(of_items[place]) for part, of_items in told.shares.items()}
        largest = sorted(shares.values(), reverse=True)[:3]
        least = max(0.05 * largest[0], 0.005)
        assert [reason.share for reason in reasons] == [share for share in largest if share >= least]
        for reason in reasons:
            assert reason.share == shares[reason.part] and f"{reason.words()} ({reason.share:+.2f})" in told.why(place)
            parts.add(reason.part)
            texts.add(re.sub(r"\d.*", "", reason.text))
            number, own = told.counts[place, 0], space[1 + place]
            if reason.part == "counters" and np.isfinite(number):
                assert reason.text.startswith(f"{times(number)} before")
                assert re.search(r"last (about \d+ (day|hour|minute)s?|less than a minute) ago", reason.text)
            if reason.part == "counters" and (said := circumstance(model, told.counts[place])):
                assert said in reason.text
                products.add(said.split(" before ")[1])
            if reason.part == "counters" and (said := of_actions(model, told.counts[place], task)):
                assert reason.text.endswith(said)
                actions.add(said.split(" ")[0])
            if reason.part in ("recent", "tail", "transitions"):
                assert set(reason.items) <= set(newest)
            if reason.part in ("history", "recent"):
                assert all(space[rows[item]] @ own >= 0.2 and item != items[place] for item in reason.items)
            if reason.part == "transitions" and reason.items:
                assert model.transitions is not None
                row = rows[reason.items[0]]
                weight = model.transitions.weight[row][model.transitions.item[row] == 1 + place].item()
                share = (np.exp(weight) - 1) / 100  # n / (m + 10) of m events after the item
                assert reason.text == f"{'often comes' if share >= 0.2 else 'has come'} right after"
            if reason.part == "rate":
                odds = float(model.item_rates[1 + place, 0].exp())
                assert reason.text == f"the odds of click are {odds:.1f} times those of all impressions"
    assert {"history", "recent", "popularity", "rate" if task == "click" else "transitions"} <= parts
    # The drawn weights decide which counters raise scores.
    assert bool(products if task == "next" else actions) == (len(model.config.counter_keys or []) > 1)
    more, less = "click is more likely after similar items of", "click is less likely after similar items of"
    verbs = ("goes with", "is unlike") if model.item_space_weights is None else (more, less)
    assert {text.split(" the")[0] for text in texts} & {*verbs}
    assert any("events than " in text for text in texts)
    reasons = next(found for found in told.reasons if found and found[0].items)
    assert f"item {reasons[0].items[0]}" in reasons[0].words(lambda ids: [f"item {one}" for one in ids])


@pytest.mark.parametrize("opened", ["fresh"], indirect=True)
def test_counts_are_those_of_the_request(opened: Opened) -> None:
    user, tail = opened.users[2], opened.tail(TAIL_LEN, np.array([2]))
    items = opened.scorer.item_vectors()[0]
    explanation = opened.scorer.explain(user, items, tail=tail, now=None)
    counters = opened.counters([user], tail, None)
    fields = np.split(explanation.counts, counters.keys.spec.num_fields, axis=1)
    clock, newest = np.repeat(counters.codes.clock, len(items)), np.repeat(counters.newest, len(items))
    keys = counters.keys.of(np.arange(1, len(items) + 1), clock, newest)
    names = counters.keys.spec.fields
    for name, values, codes, key in zip(names, fields, (counters.codes, *counters.others), keys, strict=True):
        expected = dict(zip(codes.key.tolist(), codes.values().tolist(), strict=True))
        assert (np.isfinite(values).all(1) == np.isin(key, codes.key)).all()
        assert np.isin(codes.key, key).all() or "*" in name  # of other months, and after other items
        for row in np.flatnonzero(np.isin(key, codes.key)).tolist():
            np.testing.assert_allclose(values[row], expected[int(key[row])], rtol=1e-6)


@pytest.mark.parametrize("sent", [slice(None), slice(0, 3), slice(2, 8, 3)], ids=["all", "some", "scattered"])
def test_a_basket_that_the_record_covers_may_be_sent_again(tmp_path: Path, sent: slice) -> None:
    """Two users buy 9 items at one time, of which the tail holds 6."""
    user, item = np.repeat([1, 2], 18), np.concatenate([np.arange(18), np.arange(18)[::-1]]) % 11
    frame = {"user": user, "item": item, "timestamp": START + np.arange(36) // 9 % 2 * DAY}
    log = EventLog.from_frame(frame, tmp_path / "log", time_unit="ms")
    model = untrained(log, log.items)
    refresh(model, log, tmp_path / "store")
    with Scorer.open(model, tmp_path / "store") as scorer:
        basket = [(bought, START + DAY, 0) for bought in item[9:18].tolist()]
        tail, now = tail_of([(1, basket[sent]), (2, [])]), START + 3 * DAY
        expected = scorer.catalog_scores([1, 2], now=now)
        np.testing.assert_array_equal(scorer.catalog_scores([1, 2], tail=tail, now=now), expected)
        _, counted, _ = scorer.counted_items([1, 2], now=now)
        np.testing.assert_array_equal(scorer.counted_items([1, 2], tail=tail, now=now)[1], counted)


def test_a_log_without_times(order_log: EventLog, tmp_path: Path) -> None:
    """Ages are numbers of events, and the time of a request changes nothing."""
    model = untrained(order_log, order_log.items)
    refresh(model, order_log, tmp_path / "store")
    with Scorer.open(model, tmp_path / "store") as scorer:
        users = list(scorer.store.keys())
        scores = scorer.catalog_scores(users)
        np.testing.assert_array_equal(scores, scorer.catalog_scores(users, now=5 * DAY))
        items, counted, offsets = scorer.counted_items(users)
        for row, user in enumerate(users):
            own = slice(offsets[row], offsets[row + 1])
            assert set(items[own]) >= set(order_log.items.ids(np.asarray(order_log[user].item)))
            found = scorer.predict([user], items[own])["next"][0]
            np.testing.assert_allclose(found, counted[own], rtol=1e-5, atol=1e-5)


def _ranked(scorer: Scorer, user: Any, tail: Tail, now: int | None) -> Any:
    task, scorer.task = scorer.task, "next"
    try:
        return scorer.rank(user, top_k=5, tail=tail, now=now)
    finally:
        scorer.task = task


def _context(opened: Opened, tail: Tail, now: Any) -> tuple[Any, Any]:
    model = opened.scorer.model
    request = opened.request(opened.users, tail, now)
    context = inference.request_context(model, request.summary, request.tail)
    return context, inference.request_gap(model, request.now, request.tail)
