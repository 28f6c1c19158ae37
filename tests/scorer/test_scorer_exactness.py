"""A score does not depend on the other pairs of a call, bit for bit if matrix products compute rows independently."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from tests.conftest import DAY, ROUNDING, draw_counter_weights, small_config
from tests.counters.counter_histories import category
from tests.required_program import require_library
from vista.arrays import Int
from vista.config.checks import TargetAttentionKind
from vista.errors import DeadlineError
from vista.examples.transitions import NUM_SUMS
from vista.log.event_log import EventLog
from vista.model.inference import ROW_TILE
from vista.model.layers import HIDDEN, FrozenLinear
from vista.model.ranking_model import NEXT_TASK
from vista.model.vista_model import VistaModel
from vista.refresh import refresh
from vista.scorer import Scorer, Tail
from vista.scorer.request import Request
from vista.scorer.serving_snapshot import ServingSnapshot
from vista.training.log_schema import schema_of

"""If products do not compute rows independently: a few float32 rounding errors of values around 1."""
DIM = 32
Known = tuple[list[Any], NDArray[Any], int]


@cache
def products_keep_to_rows() -> bool:
    """Whether a row of a product has the same bits in whole tiles of any number of rows; the last: the task head's.

    Both torch's products and those of frozen maps, whose weights the processor may have packed.
    """
    torch.manual_seed(0)
    # Of the head of tasks, and of that of counted items, also with a category; then what follows both.
    of_heads = *((size, HIDDEN) for size in (10, 15, 19, 12 + NUM_SUMS, 16 + NUM_SUMS)), (HIDDEN, HIDDEN), (HIDDEN, 1)
    for inner, outer in ((DIM, 4 * DIM), (DIM, DIM), (2 * DIM, DIM), (DIM, 3), (HIDDEN, 3), (DIM, 1), *of_heads):
        linear, rows = nn.Linear(inner, outer, bias=False), torch.randn(1024, inner)
        with torch.no_grad():
            for multiply in (linear, FrozenLinear(linear, torch.float32)):
                whole = multiply(rows)
                counts = (1, 2, 3, 5, 13, 64, 127)
                if not all(torch.equal(multiply(rows[: ROW_TILE * n]), whole[: ROW_TILE * n]) for n in counts):
                    return False
    return True


def same(actual: Any, expected: Any) -> None:
    if products_keep_to_rows():
        np.testing.assert_array_equal(actual, expected)
    else:
        np.testing.assert_allclose(actual, expected, atol=ROUNDING, rtol=ROUNDING)


@pytest.fixture(
    scope="module",
    params=[
        (TargetAttentionKind.pointwise, 18, "", "torch"),
        (TargetAttentionKind.softmax, 16, "items and a category", "torch"),
        (TargetAttentionKind.softmax, 16, "", "native"),
        (TargetAttentionKind.pointwise, 16, "items", "native"),
    ],
)
def opened(
    request: pytest.FixtureRequest, impression_log: EventLog, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Scorer]:
    """A scorer for each kind of layers and each backend, with and without counters; three tasks and the next item."""
    folder = tmp_path_factory.mktemp("exact")
    kind, tail_len, counted, backend = request.param
    if backend == "native":
        require_library()
    config = small_config(impression_log, "unused", model__dim=DIM, model__num_seeds=16, model__tail_len=tail_len)
    config.model.target_attention = kind
    config.model.counter_keys = ["item"] if counted else []
    config.model.num_counters = 10
    config.model.pooled_dim = 12 if counted == "items" else 0
    schema, table = schema_of(impression_log, config), None
    if "category" in counted:
        columns, table = category("brand", np.arange(impression_log.num_items) % 6 - 1)
        schema, config.model.counter_keys = replace(schema, item_features=columns), ["item", "brand"]
    torch.manual_seed(3)
    model = VistaModel(config.model, schema, impression_log.items, config.data).eval()
    model.set_item_features(table)
    draw_counter_weights(model)
    refresh(model, impression_log, folder / "store")
    with Scorer.open(model, folder / "store", backend=backend) as scorer:
        yield scorer


@pytest.fixture(scope="module")
def ids(opened: Scorer) -> Known:
    """All users, all items, and a time after all events."""
    users = list(opened.store.keys())
    newest = int(opened.store.get_many(users).last_event_ts.max())
    return users, opened.model.items.ids(np.arange(len(opened.model.items))), newest + DAY


@pytest.fixture(scope="module")
def whole(opened: Scorer, ids: Known) -> dict[str, NDArray[np.float32]]:
    users, items, now = ids
    return opened.predict(users, items, now=now)


@pytest.mark.processor
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_a_score_does_not_depend_on_the_other_pairs(
    data: st.DataObject, opened: Scorer, ids: Known, whole: dict[str, NDArray[np.float32]]
) -> None:
    users, items, now = ids
    rows = data.draw(st.lists(st.integers(0, len(users) - 1), min_size=1, max_size=6), label="users")
    columns = data.draw(st.lists(st.integers(0, len(items) - 1), min_size=1, max_size=70), label="candidates")
    asked = [users[row] for row in rows]
    shared = opened.predict(asked, items[columns], now=now)
    grid = np.stack([np.roll(columns, shift) for shift in range(len(rows))])
    own = opened.predict(asked, items[grid], now=now)
    for task, scores in whole.items():
        same(shared[task], scores[np.ix_(rows, columns)])
        same(own[task], scores[np.array(rows)[:, None], grid])
    same(opened.score(asked, items[columns], now=now), shared[opened.task])
    with opened.in_service() as snapshot:  # without labeled tasks, users have a pass of their own
        request = snapshot.read(asked, None, now, opened.on_missing)
        rows = opened.encode(items[columns]).rows
        same(snapshot.scores(request, rows, [NEXT_TASK])[NEXT_TASK], shared[NEXT_TASK])


@pytest.mark.processor
def test_a_ranking_has_the_bits_of_the_scores(opened: Scorer, ids: Known) -> None:
    users, items, now = ids
    scores = opened.score(users[3:4], items, now=now)[0]
    for ranking in (
        opened.rank(users[3], top_k=1000, now=now),
        opened.rank(users[3], top_k=1000, candidates=items[::-1], now=now),
        opened.rank(users[3], top_k=1000, candidates=items[[5, 5, 7]], now=now),
    ):
        place = {item: index for index, item in enumerate(items.tolist())}
        same(ranking.scores, scores[[place[item] for item in ranking.items.tolist()]])
    vectors = opened.user_vectors(users, now=now)
    counted, scores, offsets = opened.counted_items(users, now=now)
    next_scores = opened.predict(users, items, now=now)["next"]
    for index, user in enumerate(users):
        same(opened.user_vectors([user], now=now)[0], vectors[index])
        own = slice(offsets[index], offsets[index + 1])
        same(scores[own], next_scores[index, [place[item] for item in counted[own].tolist()]])
    assert (
        np.diff(offsets) > 10 if opened.model.config.counter_keys else np.diff(offsets) == 0
    ).all()  # with followers


@pytest.mark.processor
def test_a_catalog_is_ranked_in_tiles(opened: Scorer, ids: Known, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranking is that of all items at once, and no call scores more items than a tile has."""
    (users, items, now), tile = ids, 7
    asked = {"top_k": 11, "exclude": items[:5], "now": now}
    whole = opened.rank(users[3], **asked)
    sizes = []
    scores = ServingSnapshot.scores

    def scores_of_tile(self: ServingSnapshot, request: Request, rows: Int, tasks: list[str]) -> Any:
        sizes.append(len(rows))
        return scores(self, request, rows, tasks)

    monkeypatch.setattr(ServingSnapshot, "scores", scores_of_tile)
    monkeypatch.setattr("vista.scorer.ranking.CATALOG_TILE", tile)
    tiled = opened.rank(users[3], **asked)
    assert max(sizes) == tile and sum(sizes) == len(opened.model.items) + 1
    same(tiled.scores, whole.scores)
    assert (tiled.num_scored, tiled.num_dropped) == (whole.num_scored, whole.num_dropped)
    score = dict(zip(items.tolist(), opened.score(users[3:4], items, now=now)[0].tolist(), strict=True))
    same(tiled.scores, np.float32([score[item] for item in tiled.items.tolist()]))
    assert not {*items[:5].tolist()} & {*tiled.items.tolist()}


def test_a_ranking_gives_up_after_its_time(opened: Scorer, ids: Known, monkeypatch: pytest.MonkeyPatch) -> None:
    users, _, now = ids
    monkeypatch.setattr("vista.scorer.ranking.CATALOG_TILE", 4)
    monkeypatch.setattr("vista.scorer.ranking.time", Mock(perf_counter=Mock(side_effect=range(100))))
    with pytest.raises(DeadlineError, match=r"the ranking took longer than 3 s; rank fewer candidates, or use"):
        opened.rank(users[3], now=now, timeout_s=3.0)


@pytest.mark.processor
def test_a_score_does_not_depend_on_the_threads(opened: Scorer, ids: Known) -> None:
    users, items, now = ids
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        expected = opened.predict(users, items, now=now)
        for count in (1, 7, 9, 33):
            predicted = opened.predict(users[1:2], items[-count:], now=now)
            for task, scores in expected.items():
                same(predicted[task][0], scores[1, -count:])
    finally:
        torch.set_num_threads(before)


def test_repeated_events_count_once_and_an_empty_tail_equals_no_tail(opened: Scorer, ids: Known) -> None:
    users, items, now = ids
    fresh = [(items[4], now - 3000, 0), (items[9], now - 2000, 1)]

    def tail(events: list[Any]) -> Tail:
        item, time, action = (np.array(column) for column in zip(*events, strict=True))
        return Tail(item, time, action, np.array([0, len(events)]))

    once = opened.predict(users[:1], items, tail=tail(fresh), now=now)
    twice = opened.predict(users[:1], items, tail=tail(fresh + fresh[::-1]), now=now)
    none, empty = (
        opened.predict(users, items, now=now),
        opened.predict(users, items, tail=Tail.empty(len(users)), now=now),
    )
    for task, scores in once.items():
        np.testing.assert_array_equal(twice[task], scores)
        np.testing.assert_array_equal(empty[task], none[task])
        assert np.abs(scores - none[task][:1]).max() > 1e-4


def test_item_projections_from_a_file_have_the_bits_of_computed_ones(
    opened: Scorer, ids: Known, tmp_path: Path
) -> None:
    users, items, now = ids
    opened.model.save_pretrained(tmp_path / "model")
    backend = opened.backend.partition(",")[0].partition(":")[0]
    with Scorer.open(tmp_path / "model", opened.store.path, backend=backend) as mapped:
        for task, scores in mapped.predict(users, items, now=now).items():
            np.testing.assert_array_equal(scores, opened.predict(users, items, now=now)[task])


@pytest.mark.processor
@settings(max_examples=5, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), min_size=12, max_size=12), seed=st.integers(0, 99))
def test_ragged_candidates_have_the_bits_of_full_rows(
    lengths: list[int], seed: int, opened: Scorer, ids: Known, whole: dict[str, NDArray[np.float32]]
) -> None:
    users, items, now = ids
    rng = np.random.default_rng(seed)
    columns = [rng.integers(0, len(items), length) for length in lengths]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    predicted = opened.predict(users, (items[np.concatenate(columns)], offsets), now=now)
    for task, scores in whole.items():
        same(predicted[task], np.concatenate([scores[user, chosen] for user, chosen in enumerate(columns)]))


def test_two_unknown_items_at_one_time_are_two_events(opened: Scorer, ids: Known) -> None:
    users, items, now = ids

    def tail(*names: int) -> Tail:
        count = len(names)
        return Tail(np.array(names), np.full(count, now - 1000), np.zeros(count, int), np.array([0, count]))

    one, two, again = (
        opened.explain(users[0], items[:2], tail=tail(*names), now=now)
        for names in ((7777,), (7777, 8888), (7777, 7777))
    )
    assert one.tail_items[-2:] != [None, None] == two.tail_items[-2:]
    np.testing.assert_array_equal(one.value, again.value)
