"""Features of requests in calls of the scorer: what they change, and which ones are refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import DAY, small_config
from tests.scorer.test_scorer_exactness import same
from vista.cli.score_command import run_score
from vista.config import ScoreConfig
from vista.config.composition import compose_config
from vista.errors import ConfigError
from vista.log.event_log import EventLog
from vista.log.row_features import RowFeatures
from vista.log.vocabulary import Vocabulary
from vista.model import inference
from vista.model.row_feature_reader import RowFeatureReader
from vista.model.vista_model import VistaModel
from vista.refresh import refresh
from vista.scorer import Scorer
from vista.scorer.reading import read_request
from vista.training.log_schema import schema_of

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


@pytest.fixture(scope="module")
def opened(impression_log: EventLog, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scorer]:
    """A scorer of three tasks and the next item, whose model reads features of requests."""
    folder = tmp_path_factory.mktemp("requests")
    config = small_config(impression_log, "unused", model__dim=32, model__num_seeds=16, model__tail_len=16)
    schema = replace(schema_of(impression_log, config), request_features=READER.columns)
    torch.manual_seed(3)
    model = VistaModel(config.model, schema, impression_log.items, config.data).eval()
    model.request_features = READER
    assert model.request_encoder is not None
    for weight in model.request_encoder.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(folder / "model")
    refresh(model, impression_log, folder / "store")
    with Scorer.open(folder / "model", folder / "store") as scorer:
        yield scorer


@pytest.fixture(scope="module")
def ids(opened: Scorer) -> tuple[list[Any], Any, int]:
    """All users, 21 items, and a time after all events."""
    users = list(opened.store.keys())
    newest = int(opened.store.get_many(users).last_event_ts.max())
    return users, opened.model.items.ids(np.arange(21)), newest + DAY


def drawn(count: int) -> dict[str, list[Any]]:
    """Features of requests; some are missing, or unknown to the model."""
    rng = np.random.default_rng(0)
    return {
        "hour": [None if hour > 20 else float(hour) for hour in rng.integers(0, 24, count)],
        "device": [[*DEVICES, "watch", None][row] for row in rng.integers(0, 5, count)],
        "premium": [bool(one) for one in rng.integers(0, 2, count)],
    }


def of_rows(features: dict[str, list[Any]], rows: list[int]) -> dict[str, list[Any]]:
    return {name: [values[row] for row in rows] for name, values in features.items()}


def test_scores_are_those_of_the_model(opened: Scorer, ids: tuple[list[Any], Any, int]) -> None:
    users, items, now = ids
    features, model = drawn(len(users)), opened.model
    predicted = opened.predict(users, items, now=now, request=features)
    encoded = READER.encode(READER.parse(features, len(users)), len(users))
    snapshot = opened._snapshots.current
    request = read_request(snapshot, users, None, now, opened.on_missing, None, opened._recorder)
    context = inference.request_context(model, request.summary, request.tail)
    candidates = torch.arange(1, 22).expand(len(users), -1)
    asked = inference.request_vectors(model, request.now, request.tail, encoded)
    with torch.inference_mode():
        expected = inference.candidate_logits(model, context, asked, candidates).sigmoid().numpy()
    for index, task in enumerate(model.schema.tasks):
        np.testing.assert_allclose(predicted[task], expected[..., index], atol=2e-5)
    without = opened.predict(users, items, now=now)
    assert (np.abs(predicted["click"] - without["click"]).max(1) > 1e-3).mean() > 0.8
    np.testing.assert_array_equal(predicted["next"], without["next"])


def test_a_score_does_not_depend_on_the_other_pairs(opened: Scorer, ids: tuple[list[Any], Any, int]) -> None:
    users, items, now = ids
    features = drawn(len(users))
    whole = opened.predict(users, items, now=now, request=features)
    for rows in ([0], [3, 1], [5, 4, 4, 9, 11, 0, 2, 7, 8, 6]):
        asked = {"now": now, "request": of_rows(features, rows)}
        part = opened.predict([users[row] for row in rows], items[4:9], **asked)
        ragged = opened.predict(
            [users[row] for row in rows], (np.tile(items[4:9], len(rows)), np.arange(len(rows) + 1) * 5), **asked
        )
        for task, scores in whole.items():
            same(part[task], scores[rows, 4:9])
            same(ragged[task], scores[rows, 4:9].ravel())


def test_rankings_and_explanations_read_them(opened: Scorer, ids: tuple[list[Any], Any, int]) -> None:
    users, items, now = ids
    request = {"device": "phone", "hour": 12}
    scores = opened.score(users[:1], items, now=now, request=request)[0]
    ranking = opened.rank(users[0], candidates=items, top_k=5, now=now, request=request)
    best = np.argsort(-scores, kind="stable")[:5]
    assert ranking.items.tolist() == items[best].tolist()
    same(ranking.scores, scores[best])
    told, silent = (opened.explain(users[0], items, now=now, **given) for given in ({"request": request}, {}))
    np.testing.assert_allclose(1 / (1 + np.exp(-told.value)), scores, atol=2e-5)
    total = told.summary.sum(1) + told.state + told.tail.sum(1) + told.own + told.counted + told.remainder
    np.testing.assert_allclose(total, told.value, atol=1e-5)
    assert np.abs(told.own - silent.own).max() > 1e-3


def test_what_is_not_given_is_missing(opened: Scorer, ids: tuple[list[Any], Any, int]) -> None:
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
        (
            {"device": ["tv", "tv"]},
            ValueError,
            r"request: 'device' has shape \[2\], but must be one value, \[1\] \(one",
        ),
        ({"device": 1.5}, ValueError, "request: 'device' is a category and needs texts, integers, or booleans, got"),
        ({"device": [[["tv"]] * 21]}, ValueError, "request: 'device' is a category and needs"),
        ({"hour": "noon"}, ValueError, "request: 'hour' needs numbers"),
        ({"hour": [[[1.0]] * 21]}, ValueError, "request: 'hour' needs numbers"),
        ({"hour": 1e300}, ValueError, "request: 'hour': value number 0 is infinite, or too large"),
        ({"hour": {3}}, TypeError, "request: 'hour' must be one value, one per user, or one per candidate, got"),
        (["device"], TypeError, "request: must be a mapping from names of features to values, got"),
    ],
)
@pytest.mark.usefixtures("no_warnings")
def test_features_that_are_refused(
    opened: Scorer, ids: tuple[list[Any], Any, int], request_features: Any, error: type[Exception], message: str
) -> None:
    users, items, _ = ids
    for call in (opened.score, opened.predict, lambda users, items, **asked: opened.explain(users[0], items, **asked)):
        with pytest.raises(error, match=message):
            call(users[:1], items, request=request_features)


def test_the_command_reads_them_from_words(opened: Scorer, ids: tuple[list[Any], Any, int]) -> None:
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
