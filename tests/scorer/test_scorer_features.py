"""Features of events, of requests, and of pairs with candidates: what scores read, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.conftest import DAY, ROUNDING, candidate_inputs, draw_counter_weights, small_config
from tests.refresh.conftest import HOUR, START, append, events
from tests.refresh.conftest import model as event_model
from tests.scorer.test_scorer_exactness import same
from vista.cli.serving_commands import run_score
from vista.config import ScoreConfig
from vista.config.checks import Codec
from vista.config.composition import compose_config
from vista.errors import ConfigError, StoreError
from vista.evaluation.answers import ScorerAnswers
from vista.log.event_log import EventLog
from vista.log.histories import RowFeatures
from vista.log.vocabulary import Vocabulary
from vista.model import inference
from vista.model.features import EncodedRows, RowFeatureReader
from vista.model.vista_model import VistaModel
from vista.refresh import RefreshOptions, refresh
from vista.scorer import Scorer, Tail
from vista.scorer.torch_scoring import RequestProjections
from vista.training.log_schema import schema_of

EVENT_USERS = [1, 2, 3, 4]
EVENT_ITEMS = list(range(0, 300, 10))
EVENT_NOW = START + 900 * HOUR


def refreshed(made: VistaModel, log: EventLog, path: Path) -> Path:
    refresh(made, log, path, options=RefreshOptions(codec=Codec.float32))
    return path


def tail_of(log: EventLog, since: int, users: list[int] = EVENT_USERS) -> Tail:
    """The events of users from `since` on, as a caller knows them."""
    rows = log.users.rows(users)
    history = log.gather(rows)
    first = [int(np.searchsorted(history.slice(row).timestamp, since)) for row in range(len(users))]
    fresh = history.select(np.array(first), history.lengths)
    features = fresh.features.named(log.event_features)
    return Tail(log.items.ids(fresh.item), fresh.timestamp, fresh.action, fresh.offsets, features)


@pytest.fixture
def log(tmp_path: Path) -> EventLog:
    return append(tmp_path / "log", events({1: 12, 2: 3, 3: 8, 4: 5}))


@pytest.mark.parametrize("num_tail_features", [0, 1])
def test_fresh_events_are_read_as_stored_ones(tmp_path: Path, log: EventLog, num_tail_features: int) -> None:
    """Without summaries, a score depends only on the tail, which holds the fresh events once they are refreshed."""
    made = event_model(num_seeds=0, pooled_dim=0, num_tail_features=num_tail_features, dim=32, tail_len=16)
    old = refreshed(made, log, tmp_path / "old")
    later = START + 500 * HOUR
    log = append(tmp_path / "log", events({1: 2, 2: 4, 4: 9}, later))
    tail = tail_of(log, later)
    assert set(tail.features["surface"].tolist()) > {None, "tv"} and np.isnan(tail.features["dwell"]).any()
    with Scorer.open(made, refreshed(made, log, tmp_path / "new")) as scorer:
        expected = scorer.score(EVENT_USERS, EVENT_ITEMS, now=EVENT_NOW)
    with Scorer.open(made, old) as scorer:
        found = scorer.score(EVENT_USERS, EVENT_ITEMS, tail=tail, now=EVENT_NOW)
        np.testing.assert_array_equal(found, expected)
        for row, user in enumerate(EVENT_USERS):  # and one user at a time
            own = scorer.score([user], EVENT_ITEMS, tail=tail_of(log, later, [user]), now=EVENT_NOW)
            same(own[0], expected[row])
        without = Tail(tail.items, tail.times, tail.actions, tail.offsets)
        changes = (scorer.score(EVENT_USERS, EVENT_ITEMS, tail=without, now=EVENT_NOW) != expected).any(1).tolist()
        assert changes == ([False] * 4 if num_tail_features == 0 else [True, True, False, True])
        # Evaluation passes the events after each record like a caller.
        counts = log.lengths[log.users.rows(EVENT_USERS)]
        given = ScorerAnswers(scorer, log, requests_per_batch=9)._fresh_tail(log.users.rows(EVENT_USERS), counts, None)
        assert given is not None and list(given.features) == ["surface", "dwell"]
        np.testing.assert_array_equal(scorer.score(EVENT_USERS, EVENT_ITEMS, tail=given, now=EVENT_NOW), expected)


def fresh_event(**features: Any) -> Tail:
    return Tail(np.array([10]), np.array([EVENT_NOW - HOUR]), np.zeros(1, int), np.array([0, 1]), features)


def test_what_a_value_changes(tmp_path: Path, log: EventLog) -> None:
    made = event_model(num_tail_features=1)  # stage 2 reads the surface only
    with Scorer.open(made, refreshed(made, log, tmp_path / "store")) as scorer:

        def scores(**features: Any) -> Any:
            return scorer.score([1], EVENT_ITEMS, tail=fresh_event(**features), now=EVENT_NOW)

        missing = scores()
        for same in ({"surface": [None]}, {"surface": ["radio"]}, {"surface": np.array(["tv"])}, {"dwell": [3.0]}):
            np.testing.assert_array_equal(scores(**same), missing)
        app = scores(surface=["app"])
        assert (app != missing).any() and (scores(surface=["web"]) != app).any()
        np.testing.assert_array_equal(scores(surface=np.array(["app"]), dwell=torch.tensor([2.0])), app)


def test_event_features_that_are_refused(tmp_path: Path, log: EventLog) -> None:
    made = event_model(num_tail_features=1)
    with Scorer.open(made, refreshed(made, log, tmp_path / "store")) as scorer:
        for features, message in (
            ({"surface": ["app", "web"]}, "'surface' has 2 values, but 1 are needed"),
            ({"surface": "app"}, "'surface' must be a list of values, or one-dimensional"),
        ):
            with pytest.raises(ValueError, match=rf"tail\.features: {message}"):
                scorer.score([1], EVENT_ITEMS, tail=fresh_event(**features), now=EVENT_NOW)
        broken = Tail(np.array([10]), np.array([EVENT_NOW]), np.zeros(1, int), np.array([0, 1]), [("surface", ["app"])])  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"tail\.features: must be a mapping of names to values, got a list"):
            scorer.score([1], EVENT_ITEMS, tail=broken, now=EVENT_NOW)


def test_a_model_without_features_refuses_them(tmp_path: Path, log: EventLog) -> None:
    made = event_model()
    with Scorer.open(made, refreshed(made, log, tmp_path / "store")) as scorer:
        assert scorer.store.get_many([1]).tail.features == {}
        with pytest.raises(ValueError, match=r"tail\.features: 'surface' is not a feature that this model reads"):
            scorer.score([1], EVENT_ITEMS, tail=fresh_event(surface=["app"]), now=EVENT_NOW)


def test_a_store_must_hold_what_the_model_reads(tmp_path: Path, log: EventLog) -> None:
    one, two = event_model(num_tail_features=1), event_model(num_tail_features=2)
    assert one.summarizer_id() == two.summarizer_id()
    fewer, more = refreshed(one, log, tmp_path / "fewer"), refreshed(two, log, tmp_path / "more")
    with pytest.raises(StoreError, match=r"its tails do not hold the event features dwell as the model reads them"):
        Scorer.open(two, fewer)
    with Scorer.open(one, fewer) as scorer, Scorer.open(one, more) as other:
        np.testing.assert_array_equal(
            scorer.score(EVENT_USERS, EVENT_ITEMS, now=EVENT_NOW), other.score(EVENT_USERS, EVENT_ITEMS, now=EVENT_NOW)
        )
        tail = fresh_event(surface=["app"])
        np.testing.assert_array_equal(
            scorer.score([1], EVENT_ITEMS, tail=tail, now=EVENT_NOW),
            other.score([1], EVENT_ITEMS, tail=tail, now=EVENT_NOW),
        )


DEVICES = ["desktop", "phone", "tv"]
READER = RowFeatureReader.of(
    RowFeatures(
        {
            "device": np.array([0, 1, 2, -1], np.int32),
            "premium": np.array([0, 1, 0, 1], np.int32),
            "hour": np.array([3.0, 12.0, 20.0, np.nan], np.float32),
        }
    ),
    {"device": Vocabulary.from_ids(DEVICES), "premium": Vocabulary.from_ids(["false", "true"]), "hour": None},
)


def test_what_is_not_given_is_missing(opened: Scorer, ids: Known) -> None:
    users, items, now = ids

    def scores(**request: Any) -> Any:
        return opened.score(users[:2], items, now=now, request=request)

    nothing = opened.score(users[:2], items, now=now)
    np.testing.assert_array_equal(scores(), nothing)
    np.testing.assert_array_equal(scores(device=None, hour=[None, np.nan]), nothing)
    np.testing.assert_array_equal(scores(device=["watch", "toaster"]), nothing)
    np.testing.assert_array_equal(scores(device="tv"), scores(device=["tv", "tv"]))
    np.testing.assert_array_equal(scores(hour=np.array([3.0, 4.0])), scores(hour=torch.tensor([3, 4])))
    np.testing.assert_array_equal(scores(device=np.array(["tv", "phone"]))[1], scores(device=[None, "phone"])[1])
    assert np.abs(scores(device="tv") - nothing).max() > 1e-3
    assert opened.score([], items, request={"device": []}).shape == (0, 21)


@pytest.mark.parametrize(
    ("request_features", "error", "message"),
    [
        ({"devise": ["tv"]}, ValueError, r"request: 'devise' is not one of this model's features, \['device', "),
        ({"device": [[["tv"]] * 21]}, ValueError, "request: 'device' is a category and needs"),
        ({"hour": [[[1.0]] * 21]}, ValueError, "request: 'hour' needs numbers"),
        ({"hour": 1e300}, ValueError, "request: 'hour': value number 0 is infinite, or too large"),
        ({"hour": {3}}, TypeError, "request: 'hour' must be one value, one per user, or one per candidate, got"),
        (["device"], TypeError, "request: must be a mapping from names of features to values, got"),
    ],
)
@pytest.mark.usefixtures("no_warnings")
def test_features_that_are_refused(
    opened: Scorer, ids: Known, request_features: Any, error: type[Exception], message: str
) -> None:
    def explained(users: Any, items: Any, **asked: Any) -> Any:
        return opened.explain(users[0], items, candidates=items, **asked)

    users, items, _ = ids
    for call in (opened.score, opened.predict, explained):
        with pytest.raises(error, match=message):
            call(users[:1], items, request=request_features)


def test_the_command_reads_them_from_words(opened: Scorer, ids: Known) -> None:
    users, items, now = ids
    settings: dict[str, Any] = {
        "model": str(opened.store.path.parent / "model"),
        "store": str(opened.store.path),
        "users": [str(users[0])],
        "now": str(now),
    }
    words = compose_config(ScoreConfig, ["request=[device:phone,hour:14.5]"]).request
    line = run_score(ScoreConfig(**settings, candidates=[str(items[3])], request=words)).splitlines()[1]
    score = opened.score(users[:1], items[3:4], now=now, request={"device": "phone", "hour": 14.5})[0, 0]
    assert line == f"user {users[0]}: {items[3]} {score:.4f}"
    three = [str(item) for item in items[3:6]]
    words = ["hour:1", "device:tv", "hour:2", "hour:23.5"]
    line = run_score(ScoreConfig(**settings, candidates=three, request=words)).splitlines()[1]
    scores = opened.score(users[:1], items[3:6], now=now, request={"device": "tv", "hour": [[1, 2, 23.5]]})[0].tolist()
    named = ", ".join(f"{item} {score:.4f}" for item, score in zip(three, scores, strict=True))
    assert line == f"user {users[0]}: {named}" and len({*scores}) == 3
    best = opened.rank(users[0], top_k=1, now=now, request={"device": "phone"})
    line = run_score(ScoreConfig(**settings, top_k=1, request=["device:phone"])).splitlines()[1]
    assert line == f"user {users[0]}: {best.items[0]} {best.scores[0]:.4f}"
    for words, message in (
        (["device"], "request: 'device' must be name:value, such as device:phone"),
        (["hour:1", "hour:2"], "request: 'hour' has 2 values, but there are 0 candidates; give it once, or once per"),
        (["devise:tv"], "request: 'devise' is not one of this model's features"),
        (["hour:noon"], "request: 'hour' needs numbers"),
    ):
        with pytest.raises(ConfigError, match=message):
            run_score(ScoreConfig(**settings, request=words))


def test_a_model_without_them_refuses_them(task_scorer: Scorer) -> None:
    user = next(task_scorer.store.keys())
    with pytest.raises(ValueError, match="request: this model reads no features of requests; leave the argument out"):
        task_scorer.rank(user, request={"device": "tv"})
    np.testing.assert_array_equal(task_scorer.score([user], [1], request={}), task_scorer.score([user], [1]))


Known = tuple[list[Any], NDArray[Any], int]
NUM_ITEMS = 21


@pytest.fixture(scope="module")
def opened(impression_log: EventLog, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scorer]:
    """A scorer with counters, whose model reads features of requests."""
    folder = tmp_path_factory.mktemp("pairs")
    config = small_config(impression_log, "unused", model__dim=32, model__num_seeds=16, model__tail_len=16)
    config.model.counter_keys = ["item"]
    config.model.num_counters = 10
    schema = replace(schema_of(impression_log, config), request_features=READER.columns)
    torch.manual_seed(3)
    model = VistaModel(config.model, schema, impression_log.items, config.data).eval()
    model.request_features = READER
    assert model.request_encoder is not None
    for weight in model.request_encoder.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    draw_counter_weights(model)
    refresh(model, impression_log, folder / "store")
    model.save_pretrained(folder / "model")
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
    snapshot, model = opened._current, opened.model
    request = snapshot.read(users, None, now, opened.on_missing)
    context = inference.request_context(model, request.summary, request.tail)
    candidates = np.broadcast_to(np.arange(1, NUM_ITEMS + 1), (len(users), NUM_ITEMS))
    for column in range(NUM_ITEMS):
        own = {"hour": drawn["hour"][:, column], "premium": drawn["premium"][:, column], "device": drawn["device"]}
        encoded = READER.encode(READER.parse(own, len(users)), len(users))
        asked = inference.request_vectors(model, request.now, request.tail, encoded)
        item = torch.from_numpy(candidates[:, [column]].copy())
        assert request.counters is not None
        own_codes = [request.counters.select(slice(n, n + 1)).of_items(item[n].numpy()) for n in range(len(users))]
        codes = torch.from_numpy(np.stack(own_codes))
        pooled = None if request.pooled is None else torch.from_numpy(request.pooled)
        inputs = candidate_inputs(model, pooled, item)
        expected = inference.candidate_logits(model, context, asked, item, codes, inputs)[:, 0].sigmoid().numpy()
        for index, task in enumerate(model.schema.tasks):
            np.testing.assert_allclose(whole[task][:, column], expected[:, index], atol=ROUNDING)
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


@settings(max_examples=8, deadline=None)
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
    opened = Scorer.open(opened.model, opened.store.path, backend="torch")
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
    opened.close()


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
    told = opened.explain(users[0], items[3:5], candidates=items, now=now, request=request)
    np.testing.assert_allclose(1 / (1 + np.exp(-told.value)), scores[3:5], atol=ROUNDING)
    np.testing.assert_allclose(sum(told.shares.values()), told.value - told.mean, atol=1e-12)
    np.testing.assert_allclose(told.mean, np.log(scores / (1 - scores)).mean(), atol=1e-4)
    one = opened.explain(users[0], items[3:4], now=now, request=request | {"hour": request["hour"][0, 3]})
    np.testing.assert_allclose(one.value[0], told.value[0], atol=1e-5)


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


@pytest.fixture(scope="module")
def request_rows() -> EncodedRows:
    """100 requests; some values are missing."""
    rng = np.random.default_rng(0)
    given = {
        "hour": np.where(rng.random(100) < 0.2, np.nan, rng.uniform(-5, 30, 100)),
        "device": np.array([*DEVICES, None], object)[rng.integers(0, len(DEVICES) + 1, 100)],
        "premium": rng.random(100) < 0.5,
    }
    return READER.encode(READER.parse({name: values.tolist() for name, values in given.items()}, 100), 100)


@pytest.fixture(params=["prepared", "large"])
def projections(request: pytest.FixtureRequest, opened: Scorer, monkeypatch: pytest.MonkeyPatch) -> RequestProjections:
    """Those of few values, which are projected once, and those of too many."""
    if request.param == "large":
        monkeypatch.setattr("vista.scorer.torch_scoring.MAX_PREPARED_ROWS", 3)
    made = RequestProjections(opened.model)
    assert (made.table is None) == (request.param == "large")
    return made


def test_they_equal_a_plain_reading(projections: RequestProjections, opened: Scorer, request_rows: EncodedRows) -> None:
    model = opened.model
    encoder, projection = model.request_encoder, model.target_attention.request_projection
    assert encoder is not None and encoder.dense is not None
    for asked in (request_rows, None):
        read = READER.missing(100) if asked is None else asked
        values, dense = (part.detach().double().numpy() for part in (encoder.values, encoder.dense))
        vectors = values[read.entry].sum(1) + read.dense.astype(np.float64) @ dense
        expected = np.concatenate([vectors, vectors @ projection.weight.detach().double().numpy().T], 1)
        np.testing.assert_allclose(projections.of(asked, 100).numpy(), expected, rtol=1e-5, atol=1e-6)


def test_their_bits_do_not_depend_on_the_other_rows(projections: RequestProjections, request_rows: EncodedRows) -> None:
    whole = projections.of(request_rows, 100)
    for some in ([0], [7, 3], [*range(50, 61)], [99, 99, 4, 5, 6, 7, 8, 9], []):
        index = np.array(some, np.int64)
        assert torch.equal(projections.of(request_rows.select(index), len(index)), whole[index])
