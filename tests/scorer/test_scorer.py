"""The scorer compared with the model: all shapes of arguments, policies for unknown ids, rankings."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.conftest import (
    DAY,
    ITEMS,
    ROUNDING,
    START,
    USERS,
    Served,
    candidate_inputs,
    pooled_of,
    run_python,
    tail_of,
    untrained,
)
from tests.required_program import require_library
from vista.config.checks import OnMissing
from vista.errors import UnknownItemError, UnknownUserError, UserKeyError
from vista.log.event_log import EventLog
from vista.model import inference
from vista.model.serving_model import pad_tail
from vista.model.vista_model import VistaModel
from vista.refresh import refresh
from vista.scorer import CandidateSet, Scorer, Tail

pytestmark = pytest.mark.usefixtures("no_warnings")


@torch.no_grad()
def expected_scores(
    given: Served, users: list[int], items: list[int], now: list[int] | None
) -> dict[str, NDArray[np.float32]]:
    """Scores computed from the log and the model, one user and one candidate at a time."""
    model, log = given.model, given.log
    scores: dict[str, list[list[float]]] = {task: [] for task in [*model.schema.tasks, "next"]}
    for index, user in enumerate(users):
        history = log[user]
        rows = model.item_rows(log.items.ids(history.item))
        history = dataclasses.replace(history, item=rows)
        tail = pad_tail(model, rows, history.timestamp, history.action, history.offsets)
        context = inference.request_context(model, inference.summarize(model, history), tail)
        gap = inference.request_gap(model, None if now is None else np.array(now[index : index + 1]), tail)
        pooled = pooled_of(model, rows, len(rows), len(rows))
        vector, dim = inference.user_vectors(model, context, gap, pooled)[0], model.config.dim
        lines: dict[str, list[float]] = {task: [] for task in scores}
        for row in model.item_rows(items).tolist():
            item = torch.nn.functional.normalize(model.item_table[row], dim=0)
            own = float(vector[:dim] @ item) / model.config.softmax_temperature
            lines["next"].append(own if pooled is None else own + float(vector[dim:] @ model.item_space[row]))
            if model.schema.tasks:
                candidates = torch.tensor([[row]])
                inputs = candidate_inputs(model, pooled, candidates)
                logits = inference.candidate_logits(model, context, gap, candidates, inputs=inputs)[0, 0]
                for task, logit in zip(model.schema.tasks, logits, strict=True):
                    lines[task].append(float(logit.sigmoid()))
        for task, line in lines.items():
            scores[task].append(line)
    return {task: np.array(lines, np.float32) for task, lines in scores.items()}


@pytest.mark.parametrize("now", [None, [START + 400 * DAY + 1000 * i for i in range(5)]])
def test_next_item_scores_equal_the_models(scorer: Scorer, served: Served, now: list[int] | None) -> None:
    expected = expected_scores(served, USERS, ITEMS, now)["next"]
    scores = scorer.score(USERS, ITEMS, now=now)
    assert scores.dtype == np.float32 and (scorer.task, scorer.tasks) == ("next", ["next"])
    np.testing.assert_allclose(scores, expected, atol=0.05)  # int8 summaries
    with Scorer.open(served.model, served.exact_store) as exact:
        np.testing.assert_allclose(exact.score(USERS, ITEMS, now=now), expected, atol=1e-4)
    assert np.abs(scores - scores.mean(0)).max() > 0.5  # The users differ.


def test_task_scores_equal_the_models_probabilities(task_scorer: Scorer, served_tasks: Served) -> None:
    users = served_tasks.log.users.ids(np.arange(5)).tolist()
    items = served_tasks.log.items.ids(np.arange(7)).tolist()
    now = int(served_tasks.log.slice(0).timestamp[-1]) + DAY
    expected = expected_scores(served_tasks, users, items, [now] * 5)
    predicted = task_scorer.predict(users, items, now=now)
    assert list(predicted) == ["click", "like", "long_view", "next"] == task_scorer.tasks
    with Scorer.open(served_tasks.model, served_tasks.exact_store) as exact:
        for task, scores in exact.predict(users, items, now=now).items():
            np.testing.assert_allclose(scores, expected[task], atol=1e-4)
            np.testing.assert_allclose(predicted[task], expected[task], atol=0.05)  # int8 summaries
    np.testing.assert_array_equal(task_scorer.score(users, items, now=now), predicted["click"])
    with Scorer.open(served_tasks.model, served_tasks.store, task="long_view") as other:
        np.testing.assert_array_equal(other.score(users, items, now=now), predicted["long_view"])


@pytest.mark.parametrize("kind", ["scorer", "task_scorer"])
def test_all_shapes_agree(kind: str, request: pytest.FixtureRequest) -> None:
    import pandas as pd

    opened: Scorer = request.getfixturevalue(kind)
    users = list(opened.store.keys())[:3]
    items = opened.model.items.ids(np.arange(6))
    whole = opened.predict(users, items)
    grid = np.stack([items[:4], items[2:], items[1:5]])
    ragged = (items[[0, 1, 5, 2, 2, 3]], np.array([0, 2, 2, 6]))
    for task, scores in whole.items():
        assert scores.shape == (3, 6)

        def close(actual: Any, expected: Any) -> None:  # float32 products of other shapes round differently
            np.testing.assert_allclose(actual, expected, atol=ROUNDING)

        close(opened.predict(users, items.tolist())[task], scores)
        close(opened.predict(np.array(users), opened.encode(items))[task], scores)
        close(opened.predict(pd.Series(users), tuple(items[:2].tolist()))[task], scores[:, :2])
        close(opened.predict(users, grid)[task], [scores[0, :4], scores[1, 2:], scores[2, 1:5]])
        close(opened.predict(users, opened.encode(grid))[task], opened.predict(users, grid)[task])
        flat = [scores[0, 0], scores[0, 1], scores[2, 5], scores[2, 2], scores[2, 2], scores[2, 3]]
        close(opened.predict(users, ragged)[task], flat)
        close(opened.predict(users, (opened.encode(ragged[0]), ragged[1].tolist()))[task], flat)
        close(opened.predict([users[1]], items)[task], scores[1:2])
        close(opened.predict([users[1], users[1]], items)[task], scores[[1, 1]])
    for empty in ([], np.zeros((3, 0), np.int64), ([], [0, 0, 0, 0])):
        assert opened.score(users, empty).size == 0
    assert opened.score(users, []).shape == (3, 0)
    assert opened.score([], items).shape == (0, 6)


def test_tensors_in_tensors_out(scorer: Scorer) -> None:
    expected = scorer.score(USERS, ITEMS)
    scores = scorer.score(torch.tensor(USERS), torch.tensor(ITEMS))
    assert isinstance(scores, torch.Tensor) and scores.dtype == torch.float32
    np.testing.assert_array_equal(scores.numpy(), expected)
    scores += 1  # It is an ordinary, writable tensor.
    ragged = scorer.score(USERS, (torch.tensor(ITEMS[:5]), torch.tensor([0, 1, 2, 3, 4, 5])))
    np.testing.assert_allclose(ragged.numpy(), expected[np.arange(5), np.arange(5)], atol=ROUNDING)
    assert isinstance(scorer.score(torch.tensor(USERS), ITEMS), np.ndarray)
    now = torch.tensor([START + DAY] * 5)
    np.testing.assert_array_equal(scorer.score(USERS, ITEMS, now=now), scorer.score(USERS, ITEMS, now=START + DAY))


def test_scores_depend_on_the_time_of_the_request(scorer: Scorer) -> None:
    near, far = (scorer.score(USERS, ITEMS, now=START + days * DAY) for days in (300, 20_000))
    assert np.abs(near - far).max() > 1e-3 and np.abs(scorer.score(USERS, ITEMS) - far).max() > 1e-3


def test_user_and_item_vectors_rank_like_the_scores(scorer: Scorer, served: Served) -> None:
    ids, items = scorer.item_vectors()
    users = scorer.user_vectors(USERS)
    assert ids.tolist() == served.log.items.ids(np.arange(served.log.num_items)).tolist()
    np.testing.assert_allclose(np.linalg.norm(users[:, : scorer.model.config.dim], axis=1), 1, atol=1e-5)
    scores = scorer.score(USERS, ids)
    np.testing.assert_allclose(users @ items.T / scorer.model.config.softmax_temperature, scores, atol=1e-4)
    items[:] = 0  # The array is the caller's own copy.
    np.testing.assert_array_equal(scorer.score(USERS, ids), scores)


def test_catalog_scores_of_too_many_users_are_refused(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vista.scorer.scorer.MAX_SCORES", 100)
    with pytest.raises(ValueError, match=r"users: \d+ pairs of a user and an item, but at most 100 per call"):
        scorer.catalog_scores(USERS)


def test_unknown_users(served: Served, tmp_path: Path) -> None:
    with Scorer.open(served.model, served.store) as empty:
        scores = empty.score([100, 999, 103], ITEMS)
        np.testing.assert_allclose(scores[[0, 2]], empty.score([100, 103], ITEMS), atol=ROUNDING)
        with empty._call([999], None, None) as call:
            nobody, _ = call.snapshot.torch_scoring.context(call.request)  # the seeds alone
        history = inference.summarize(served.model, served.log.slice(0, 0, 0))
        tail = pad_tail(served.model, *(np.zeros(0, np.int64),) * 3, np.zeros(2, np.int64))
        expected = inference.request_context(served.model, history, tail)
        torch.testing.assert_close(nobody.values, expected.values)
        np.testing.assert_allclose(scores[1], empty.score([-5], ITEMS)[0], atol=ROUNDING)
    with Scorer.open(served.model, served.store, on_missing="nan") as nan:
        scores = nan.score([100, 999], ITEMS)
        assert np.isfinite(scores[0]).all() and np.isnan(scores[1]).all()
        vectors = nan.user_vectors([100, 999])
        assert np.isfinite(vectors[0]).all() and np.isnan(vectors[1]).all()
        catalog = nan.catalog_scores([100, 999])
        assert np.isfinite(catalog[0]).all() and np.isnan(catalog[1]).all()
        ranking = nan.rank(999)
        assert len(ranking.items) == 0 and ranking.num_dropped == served.log.num_items
    with Scorer.open(served.model, served.store, on_missing=OnMissing.error) as strict:
        with pytest.raises(
            UnknownUserError, match=r"users \[999, 5\] have no record in .*refresh the store .*, or pass on_missing"
        ):
            strict.score([100, 999, 5], ITEMS)
        assert strict.score([100], ITEMS).shape == (1, 6)


def test_unknown_candidates(served: Served) -> None:
    items = [0, 7, 390, -1]  # 7 and -1 are not items
    with Scorer.open(served.model, served.store) as empty:
        scores = empty.score([100, 103], items)
        np.testing.assert_allclose(scores[:, [0, 2]], empty.score([100, 103], [0, 390]), atol=ROUNDING)
        assert (scores[:, [1, 3]] == 0).all()  # neutral, because orthogonal to every user
        ranking = empty.rank(100, candidates=[0, 7, 390, -1, 0])
        assert sorted(ranking.items.tolist()) == [0, 390] and ranking.num_dropped == 2
    with Scorer.open(served.model, served.store, on_missing="nan") as nan:
        scores = nan.score([100, 103], items)
        assert np.isnan(scores[:, [1, 3]]).all() and np.isfinite(scores[:, [0, 2]]).all()
        grid = nan.score([100, 103], [[0, 7], [7, 390]])
        assert np.isnan(grid).tolist() == [[False, True], [True, False]]
        ragged = nan.score([100, 103], ([7, 0, 390], [0, 1, 3]))
        assert np.isnan(ragged).tolist() == [True, False, False]
    with Scorer.open(served.model, served.store, on_missing="raise") as strict:
        for candidates in (items, [items, items], (items, [0, 2, 4])):
            with pytest.raises(UnknownItemError, match=r"candidates: items \[7, -1"):
                strict.score([100, 103], candidates)
        # Padding of ragged candidates does not count as unknown items.
        assert strict.score([100, 103], ([0, 390, 10], [0, 1, 3])).shape == (3,)


def test_invalid_policies_and_tasks(served: Served) -> None:
    with pytest.raises(ValueError, match=r"on_missing: 'ignore' is not one of \['empty', 'nan', 'raise'\]"):
        Scorer.open(served.model, served.store, on_missing="ignore")
    with pytest.raises(ValueError, match=r"task: 'buy' is not one of this model's tasks, \['next'\]"):
        Scorer.open(served.model, served.store, task="buy")


def test_a_diverse_ranking_is_that_of_maximal_marginal_relevance(scorer: Scorer) -> None:
    pool = scorer.rank(103, top_k=20)
    known, vectors = scorer.item_vectors()
    vector = dict(zip(known.tolist(), vectors / np.linalg.norm(vectors, axis=1, keepdims=True), strict=True))
    span = pool.scores[0] - pool.scores[-1]
    relevance = dict(zip(pool.items.tolist(), (pool.scores - pool.scores[-1]) / span, strict=True))
    for diversity in (0.3, 1.0):
        expected: list[int] = []
        while len(expected) < 2:
            value = {
                item: (1 - diversity) * relevance[item]
                - diversity * max((float(vector[item] @ vector[other]) for other in expected), default=-1.0)
                for item in relevance
                if item not in expected
            }
            expected.append(max(value, key=lambda item: value[item]))
        ranking = scorer.rank(103, top_k=2, diversity=diversity)
        assert ranking.items.tolist() == expected
        scores = dict(zip(pool.items.tolist(), pool.scores.tolist(), strict=True))
        np.testing.assert_allclose(ranking.scores, [scores[item] for item in expected], atol=ROUNDING)
    assert scorer.rank(103, top_k=20, diversity=0.0).items.tolist() == pool.items.tolist()
    assert sorted(scorer.rank(103, top_k=1000, diversity=0.5).items) == sorted(known)
    assert not len(scorer.rank(103, candidates=[-1], diversity=0.5).items)
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="diversity: must lie in"):
            scorer.rank(103, diversity=wrong)


def test_best_of_the_catalog(scorer: Scorer, served: Served) -> None:
    everything = served.log.items.ids(np.arange(served.log.num_items))
    scores = scorer.score([103], everything)[0]
    order = np.argsort(-scores, kind="stable")
    ranking = scorer.rank(103, top_k=7)
    assert ranking.items.tolist() == everything[order[:7]].tolist() and ranking.num_dropped == 0
    np.testing.assert_allclose(ranking.scores, scores[order[:7]], atol=ROUNDING)
    assert len(scorer.rank(103, top_k=1000).items) == len(everything)
    best = ranking.items[:2].tolist()
    for excluded in (best, np.array(best), torch.tensor(best), [*best, 12345]):
        assert scorer.rank(103, top_k=5, exclude=excluded).items.tolist() == ranking.items[2:].tolist()
    tail = set(served.log.items.ids(served.log[108].item[-6:]).tolist())
    without = scorer.rank(108, top_k=1000, exclude_tail=True).items.tolist()
    assert set(everything.tolist()) - set(without) == tail
    new = tail_of([(108, [(everything[5], START + 900 * DAY, 0)])])
    assert everything[5] not in scorer.rank(108, top_k=1000, exclude_tail=True, tail=new).items


def test_best_of_candidates(scorer: Scorer) -> None:
    scores = scorer.score([103], ITEMS)[0]
    expected = [ITEMS[i] for i in np.argsort(-scores)]
    for candidates in (ITEMS, np.array(ITEMS * 2), torch.tensor(ITEMS), scorer.encode(ITEMS)):
        assert scorer.rank(103, candidates=candidates).items.tolist() == expected
    assert scorer.rank(103, candidates=[], top_k=3).items.tolist() == []
    assert scorer.rank(103, candidates=[10], exclude=[10]).items.tolist() == []


def test_non_finite_scores_are_left_out_and_counted(served: Served) -> None:
    model = VistaModel.from_pretrained(served.model_dir)
    with Scorer.open(model, served.store) as scorer:
        assert scorer._current.items.retrieval is not None
        scorer._current.items.retrieval[[3, 9]] = torch.tensor([[np.nan], [np.inf]], dtype=torch.float32)
        ranking = scorer.rank(103, top_k=1000)
        assert ranking.num_dropped == 2 and len(ranking.items) == len(model.items) - 2
        assert not set(ranking.items.tolist()) & set(model.items.ids([2, 8]).tolist())
        assert np.isfinite(ranking.scores).all()


def test_encoded_candidates_are_model_rows(scorer: Scorer) -> None:
    encoded = scorer.encode(np.array([[0, 390], [7, 10]]))
    assert isinstance(encoded, CandidateSet) and scorer.encode(encoded) is encoded
    assert encoded.rows.tolist() == [[1, 40], [0, 2]]


def test_string_ids(order_log: EventLog, tmp_path: Path) -> None:
    model = untrained(order_log)
    model.save_pretrained(tmp_path / "model")
    refresh(model, order_log, tmp_path / "store")
    with Scorer.open(tmp_path / "model", tmp_path / "store", on_missing="nan") as scorer:
        scores = scorer.score(["u100", "u999"], [["i0", "i10"], ["i0", "i20"]])
        assert np.isfinite(scores[0]).all() and np.isnan(scores[1]).all()
        assert (
            scorer.rank("u103", top_k=3, exclude=["i0"]).items.tolist()
            == [item for item in scorer.rank("u103", top_k=4).items.tolist() if item != "i0"][:3]
        )
        tail = Tail(np.array(["i0", "i70"]), np.array([90, 91]), np.zeros(2, np.uint8), np.array([0, 2]))
        assert np.abs(scorer.score(["u100"], ["i0"], tail=tail) - scores[0, 0]).max() > 1e-4
        with pytest.raises(UserKeyError, match="user 100: the user ids of the store are of type str"):
            scorer.score([100], ["i0"])


LIGHT = """
import json, sys
from vista.scorer import Scorer, Tail
import numpy as np
with Scorer.open(sys.argv[1], sys.argv[2]) as scorer:
    tail = Tail(np.array([10]), np.array([1_700_000_000_000]), np.array([0], np.uint8), np.array([0, 1]))
    scores = scorer.score([103], [0, 390, 10], tail=tail, now=1_700_000_000_000)
    items = scorer.rank(103, top_k=2).items.tolist()
print(json.dumps({"modules": sorted(sys.modules), "scores": scores.tolist(), "items": items}))
"""


def test_scores_of_the_library_load_neither_torch_nor_a_training_library(served: Served, scorer: Scorer) -> None:
    import json

    require_library()

    done = run_python(LIGHT, str(served.model_dir), str(served.store))
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    tops = {name.partition(".")[0] for name in report["modules"]}
    assert not tops & {"torch", "hydra", "omegaconf", "polars", "triton", "matplotlib", "pandas", "pyarrow", "sklearn"}
    assert report["items"] == scorer.rank(103, top_k=2).items.tolist()
