"""Features of requests that differ between the candidates, such as prices: what scores read, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.conftest import DAY, draw_counter_weights, small_config
from tests.scorer.test_scorer_exactness import same
from tests.scorer.test_scorer_request_features import DEVICES, READER
from vista.config.choices import TargetAttentionKind
from vista.log.event_log import EventLog
from vista.model import inference
from vista.model.vista_model import VistaModel
from vista.refresh import refresh
from vista.scorer import Scorer
from vista.scorer.reading import read_request
from vista.scorer.request_projections import RequestProjections
from vista.training.log_schema import schema_of

Known = tuple[list[Any], NDArray[Any], int]
NUM_ITEMS = 21


@pytest.fixture(
    scope="module", params=[(TargetAttentionKind.pointwise, True), (TargetAttentionKind.quasi_linear, False)]
)
def opened(
    request: pytest.FixtureRequest, impression_log: EventLog, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Scorer]:
    """A scorer with counters, and one without, whose models read features of requests."""
    folder = tmp_path_factory.mktemp("pairs")
    config = small_config(impression_log, "unused", model__dim=32, model__num_seeds=16, model__tail_len=16)
    config.model.target_attention, has_counters = request.param
    config.model.counters = config.model.popularity = has_counters
    config.model.counter_keys = 10
    schema = replace(schema_of(impression_log, config), request_features=READER.columns)
    torch.manual_seed(3)
    model = VistaModel(config.model, schema, impression_log.items, config.data).eval()
    model.request_features = READER
    assert model.request_encoder is not None
    for weight in model.request_encoder.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    draw_counter_weights(model)
    refresh(model, impression_log, folder / "store")
    with Scorer.open(model, folder / "store") as scorer:
        yield scorer


@pytest.fixture(scope="module")
def ids(opened: Scorer) -> Known:
    """All users, 21 items, and a time after all events."""
    users = list(opened.store.keys())
    newest = int(opened.store.get_many(users).last_event_ts.max())
    return users, opened.model.items.ids(np.arange(NUM_ITEMS)), newest + DAY


@pytest.fixture(scope="module")
def drawn(ids: Known) -> dict[str, NDArray[Any]]:
    """One device per user, and one hour and one premium per candidate; some are missing, or unknown to the model."""
    rng, shape = np.random.default_rng(0), (len(ids[0]), NUM_ITEMS)
    hour = np.where(rng.random(shape) < 0.2, np.nan, rng.integers(0, 24, shape))
    device = np.array([*DEVICES, "watch", None], object)[rng.integers(0, 5, len(ids[0]))]
    return {"hour": hour, "device": device, "premium": rng.random(shape) < 0.5}


@pytest.fixture(scope="module")
def whole(opened: Scorer, ids: Known, drawn: dict[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
    users, items, now = ids
    return opened.predict(users, items, now=now, request=drawn)


def part_of(drawn: dict[str, NDArray[Any]], rows: NDArray[Any], columns: NDArray[Any]) -> dict[str, Any]:
    """Features of pairs: rows and columns of one shape, whose first axis is that of users."""
    return {name: drawn[name][rows, columns] for name in ("hour", "premium")} | {"device": drawn["device"][rows[:, 0]]}


def test_scores_are_those_of_the_model(opened: Scorer, ids: Known, drawn: Any, whole: Any) -> None:
    users, items, now = ids
    snapshot, model = opened._snapshots.current, opened.model
    request = read_request(snapshot, users, None, now, opened.on_missing, None, opened._recorder)
    context = inference.request_context(model, request.summary, request.tail)
    candidates = np.broadcast_to(np.arange(1, NUM_ITEMS + 1), (len(users), NUM_ITEMS))
    for column in range(NUM_ITEMS):
        own = {"hour": drawn["hour"][:, column], "premium": drawn["premium"][:, column], "device": drawn["device"]}
        encoded = READER.encode(READER.parse(own, len(users)), len(users))
        asked = inference.request_vectors(model, request.now, request.tail, encoded)
        item, codes = torch.from_numpy(candidates[:, [column]].copy()), None
        if request.counters is not None:
            own_codes = [request.counters.select(slice(n, n + 1)).of_items(item[n].numpy()) for n in range(len(users))]
            codes = torch.from_numpy(np.stack(own_codes))
        expected = inference.candidate_logits(model, context, asked, item, codes)[:, 0].sigmoid().numpy()
        for index, task in enumerate(model.schema.tasks):
            np.testing.assert_allclose(whole[task][:, column], expected[:, index], atol=2e-5)
    plain = opened.predict(users, items, now=now, request={"device": drawn["device"]})
    assert (np.abs(whole["click"] - plain["click"]).max(1) > 1e-3).all()
    np.testing.assert_array_equal(whole["next"], plain["next"])


def test_equal_values_score_as_one_value_per_user(opened: Scorer, ids: Known) -> None:
    users, items, now = ids
    rng = np.random.default_rng(1)
    hour = rng.integers(0, 24, len(users)).astype(float)
    per_user = opened.predict(users, items, now=now, request={"hour": hour, "device": "tv"})
    repeated = {"hour": np.repeat(hour[:, None], NUM_ITEMS, 1), "device": [["tv"] * NUM_ITEMS] * len(users)}
    for request in (repeated, {"hour": hour} | {"device": repeated["device"]}):
        for task, scores in opened.predict(users, items, now=now, request=request).items():
            same(scores, per_user[task])


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_score_does_not_depend_on_the_other_pairs(
    data: st.DataObject, opened: Scorer, ids: Known, drawn: Any, whole: dict[str, NDArray[np.float32]]
) -> None:
    users, items, now = ids
    rows = np.array(data.draw(st.lists(st.integers(0, len(users) - 1), min_size=1, max_size=6), label="users"))
    columns = data.draw(st.lists(st.integers(0, NUM_ITEMS - 1), min_size=1, max_size=40), label="candidates")
    asked = [users[row] for row in rows]
    grid = np.stack([np.roll(columns, shift) for shift in range(len(rows))])
    lengths = np.array(data.draw(st.lists(st.integers(0, len(columns)), min_size=len(rows), max_size=len(rows))))
    shared = np.broadcast_to(columns, grid.shape)
    row = np.broadcast_to(rows[:, None], grid.shape)
    kept = np.arange(len(columns)) < lengths[:, None]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    of_shared, of_grid = part_of(drawn, row, shared), part_of(drawn, row, grid)
    of_ragged = {name: (of_grid[name][kept], offsets) for name in ("hour", "premium")} | {"device": of_grid["device"]}
    for candidates, request, expected in (
        (items[columns], of_shared, (row, shared)),
        (opened.encode(items[grid]), of_grid, (row, grid)),
        ((items[grid[kept]], offsets), of_ragged, (row[kept], grid[kept])),
    ):
        predicted = opened.predict(asked, candidates, now=now, request=request)
        for task, scores in whole.items():
            same(predicted[task], scores[expected])


def test_passes_are_bounded(opened: Scorer, ids: Known, monkeypatch: pytest.MonkeyPatch) -> None:
    users, items, now = ids
    count = 3000
    columns = np.arange(count) % NUM_ITEMS
    hours = np.arange(2 * count).reshape(2, count) % 24.0
    whole = opened.score(users[:2], items[columns], now=now, request={"hour": hours})
    projected, rows_of = [], RequestProjections.of

    def counted(projections: RequestProjections, features: Any, num_rows: int) -> torch.Tensor:
        projected.append(num_rows)
        return rows_of(projections, features, num_rows)

    monkeypatch.setattr(RequestProjections, "of", counted)
    same(opened.score(users[:2], items[columns], now=now, request={"hour": hours}), whole)
    assert max(projected) <= 1024 and 2 * count <= sum(projected) < 2 * count + 16 * len(projected)
    few = opened.score(users[:1], items[columns[2990:2995]], now=now, request={"hour": hours[:1, 2990:2995]})
    same(few[0], whole[0, 2990:2995])


def test_rankings_and_explanations_read_them(opened: Scorer, ids: Known, drawn: Any) -> None:
    users, items, now = ids
    request = {"hour": drawn["hour"][:1], "device": "phone"}
    scores = opened.score(users[:1], items, now=now, request=request)[0]
    for order in (np.arange(NUM_ITEMS), np.arange(NUM_ITEMS)[::-1]):
        asked = request | {"hour": request["hour"][:, order]}
        ranking = opened.rank(users[0], candidates=items[order], top_k=NUM_ITEMS, now=now, request=asked)
        best = np.argsort(-scores, kind="stable")
        assert ranking.items.tolist() == items[best].tolist()
        same(ranking.scores, scores[best])
    twice = {"hour": [[3.0, 12.0, 20.0]]}
    ranking = opened.rank(users[0], candidates=items[[5, 4, 5]], now=now, request=twice)
    first = opened.score(users[:1], items[[5, 4]], now=now, request={"hour": [[3.0, 12.0]]})[0]
    np.testing.assert_allclose(np.sort(ranking.scores), np.sort(first), rtol=1e-5)
    told = opened.explain(users[0], items, now=now, request=request)
    np.testing.assert_allclose(1 / (1 + np.exp(-told.value)), scores, atol=2e-5)
    total = told.summary.sum(1) + told.state + told.tail.sum(1) + told.own + told.counted + told.remainder
    np.testing.assert_allclose(total, told.value, atol=1e-5)
    one = opened.explain(users[0], items[3:4], now=now, request=request | {"hour": request["hour"][0, 3]})
    np.testing.assert_allclose(one.own[0], told.own[3], atol=1e-5)


def test_values_have_many_forms(opened: Scorer, ids: Known) -> None:
    users, items, now = ids
    hours = np.array([[3.0, 12.0, 20.0], [np.nan, 1.0, 2.0]])
    listed = [[3, 12, 20], [None, 1, 2]]

    def scores(values: Any, candidates: Any = items[:3]) -> Any:
        return opened.score(users[:2], candidates, now=now, request={"hour": values})

    expected = scores(hours)
    for values in (listed, tuple(map(tuple, listed)), torch.from_numpy(hours), list(hours), pl.Series(listed)):
        np.testing.assert_array_equal(scores(values), expected)
    ragged = (np.tile(items[:3], 2), np.array([0, 3, 6]))
    same(scores((hours.ravel(), ragged[1]), ragged), expected.ravel())
    same(scores(hours.tolist(), ragged), expected.ravel())
    same(scores((pl.Series(hours.ravel()), torch.tensor([0, 3, 6])), ragged), expected.ravel())
    lonely = (items[:2], np.array([0, 2, 2]))  # as many candidates as users, but not one each
    same(scores(([3, 12], lonely[1]), lonely), expected[0, :2])
    np.testing.assert_array_equal(scores((3.0, None), lonely), scores([3.0, None], lonely))
    np.testing.assert_array_equal(scores((None, None), lonely), scores(None, lonely))
    assert opened.score([], items, request={"hour": np.zeros((0, NUM_ITEMS))}).shape == (0, NUM_ITEMS)
    assert scores([[], []], items[:0]).shape == (2, 0)
    assert scores(([], [0, 0, 0]), (items[:0], [0, 0, 0])).shape == (0,)


@pytest.mark.usefixtures("no_warnings")
def test_other_shapes_are_refused(opened: Scorer, ids: Known) -> None:
    users, items, _ = ids
    ragged = (items[:3], np.array([0, 2, 3]))
    expected = r"but must be one value, \[2\] \(one per user\), or"
    for candidates, values, message in (
        (items[:3], [[1.0, 2.0]] * 2, rf"'hour' has shape \[2, 2\], {expected} \[2, 3\] \(one per candidate\)"),
        (items[:3], [1.0, 2.0, 3.0], rf"'hour' has shape \[3\], {expected} \[2, 3\] \(one per candidate\)"),
        (items[:3], [[1.0, 2.0], [3.0]], "'hour': the rows differ in length"),
        (items[:3], [1.0, [3.0]], "'hour' needs numbers"),
        (items[:3], np.zeros((2, 3, 1)), rf"'hour' has shape \[2, 3, 1\], {expected} \[2, 3\]"),
        (ragged, [1.0, 2.0, 3.0], rf"'hour' has shape \[3\], {expected} \(values \[3\], offsets \[3\]\), or a list"),
        (ragged, [[1.0], [2.0, 3.0]], "'hour' must have as many values as the candidates, 3, and the same"),
        (ragged, ([1.0, 2.0, 3.0], [0, 1, 3]), "'hour' must have as many values as the candidates, 3, and the same"),
        (ragged, ([1.0, 2.0], [0, 2, 3]), r"'hour' .* and the same number per user, got values of shape \[2\]"),
    ):
        with pytest.raises(ValueError, match=f"request: {message}"):
            opened.score(users[:2], candidates, request={"device": "tv", "hour": values})
    with pytest.raises(ValueError, match="request: 'price' is not one of this model's features"):
        opened.score(users[:1], items[:2], request={"price": [[2.99, 3.49]]})
    message = r"'hour' has shape \[1, 2\], but must be one value, or \[1\] .* per candidate, pass candidates"
    with pytest.raises(ValueError, match=message):
        opened.rank(users[0], request={"hour": [[1.0, 2.0]]})
