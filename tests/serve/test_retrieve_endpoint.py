"""`/v1/retrieve`: the rankings of `Scorer.retrieve`, and an index that is reloaded with the model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from tests.conftest import ITEMS, START, USERS, Served, small_frame
from tests.scorer.test_retrieval import export, item_table
from tests.serve.running_service import RunningService, running, until
from vista.cli.index_command import run_index
from vista.config import IndexConfig, ServeConfig
from vista.log.event_log import EventLog
from vista.scorer import Scorer, Tail
from vista.serve.request_bodies import JSON
from vista.serve.scoring_service import ScoringService

NOW = START + 400 * 86_400_000
ALL = np.unique(small_frame()["item"])


@pytest.fixture(scope="module")
def indexed(served: Served, index: Path) -> Iterator[Scorer]:
    with Scorer.open(served.model_dir, served.store, index=index) as scorer:
        yield scorer


def require_same(answer: Any, expected: list[Any]) -> None:
    assert len(answer["rankings"]) == len(expected)
    for ranking, wanted in zip(answer["rankings"], expected, strict=True):
        assert ranking["items"] == wanted.items.tolist() and ranking["num_dropped"] == wanted.num_dropped
        np.testing.assert_allclose(ranking["scores"], wanted.scores, atol=2e-5)


def test_rankings(service: RunningService, indexed: Scorer) -> None:
    for asked in (
        {},
        {"top_k": 4, "num_candidates": 6},
        {"top_k": 5, "within": ITEMS, "exclude": [10, 77_777]},
        {"top_k": 40, "exclude_tail": True},
        {"within": []},
    ):
        status, answer = service.fetch("/v1/retrieve", {"users": USERS, "now": NOW, **asked})
        assert (status, answer["task"]) == (200, "next")
        require_same(answer, indexed.retrieve(USERS, now=NOW, **asked))  # type: ignore[arg-type]
    assert service.fetch("/v1/retrieve", {"users": []})[1]["rankings"] == []
    assert len(service.fetch("/v1/retrieve", {"users": [999], "top_k": 3})[1]["rankings"][0]["items"]) == 3


def test_events_since_the_refresh(service: RunningService, indexed: Scorer) -> None:
    events = [{"item": 10, "time": NOW - 2000, "action": "like"}]
    asked = {"users": USERS[:2], "tail": [events, []], "now": [NOW, NOW + 1], "top_k": 3, "exclude_tail": True}
    tail = Tail([10], [NOW - 2000], [indexed.model.schema.actions.index("like")], [0, 1, 1])  # type: ignore[arg-type]
    status, answer = service.fetch("/v1/retrieve", asked)
    assert status == 200 and 10 not in answer["rankings"][0]["items"]
    require_same(answer, indexed.retrieve(USERS[:2], tail=tail, now=[NOW, NOW + 1], top_k=3, exclude_tail=True))


def test_messagepack(service: RunningService, indexed: Scorer) -> None:
    body = {"users": USERS, "within": np.array(ITEMS, "<i8").tobytes(), "top_k": 3, "now": NOW}
    headers = {"Content-Type": "application/msgpack"}
    status, _, answer = service.send("/v1/retrieve", msgspec.msgpack.encode(body), headers=headers)
    held = msgspec.msgpack.decode(answer)
    for ranking in held["rankings"]:
        ranking["scores"] = np.frombuffer(ranking["scores"], "<f4")
    assert status == 200
    require_same(held, indexed.retrieve(USERS, within=ITEMS, top_k=3, now=NOW))


def test_own_items_count_as_candidates(indexed: Scorer) -> None:
    """They are scored in addition to `num_candidates`."""
    body, before = {"users": USERS, "num_candidates": 2, "top_k": 2, "now": NOW}, indexed.stats().candidates
    answer = ScoringService(indexed, ServeConfig()).retrieve(json.dumps(body).encode(), JSON)
    assert answer.num_candidates == indexed.stats().candidates - before > 2 * len(USERS)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"users": [103], "top_k": 0}, 422, "top_k"),
        ({"users": [103], "num_candidates": 0}, 422, "num_candidates"),
        ({"users": [103], "num_candidates": 10_001}, 413, "max_candidates"),
        ({"users": [103], "top_k": 2**70}, 413, "max_candidates"),
        ({"users": [103] * 257, "num_candidates": 1}, 413, "max_users"),
        ({"users": [103], "within": ["a"]}, 422, "within: this vocabulary has integer ids"),
        ({"users": [103], "within": "AAAA"}, 422, "$.within"),
        ({"users": [103], "where": {"brand": ["acme"]}}, 422, "'brand' is not a category"),
        ({"users": [103], "where": ["acme"]}, 422, "$.where"),
        ({"users": [103], "candidates": [0]}, 422, "candidates"),
        ({"users": [103], "request": {"price": [[1.0]]}}, 422, "request"),
    ],
)
def test_what_is_refused(service: RunningService, body: Any, status: int, words: str) -> None:
    code, answer = service.fetch("/v1/retrieve", body)
    assert code == status and words in answer["error"]["message"], answer


def test_a_service_without_an_index(strict: RunningService) -> None:
    status, answer = strict.fetch("/v1/retrieve", {"users": [103]})
    assert status == 400 and answer["error"]["type"] == "ItemIndexError"
    assert "start the service, with index=… and the folder that the command wrote" in answer["error"]["message"]


def test_filters_by_category_and_a_new_model(tmp_path: Path) -> None:
    """The index goes into service together with its model, and answers until then are those of the old ones."""
    log = EventLog.from_frame(small_frame(), tmp_path / "log", time_unit="ms", items=item_table(ALL))
    model, store, index = (str(tmp_path / name) for name in ("model", "store", "model.index"))
    export(tmp_path, log)
    run_index(IndexConfig(model=model))
    asked: dict[str, Any] = {"top_k": 5, "num_candidates": 5, "where": {"brand": ["brand 1", "brand 2"]}, "now": NOW}

    def expected() -> list[Any]:
        with Scorer.open(model, store, index=index) as scorer:
            return scorer.retrieve(USERS, **asked)

    before = expected()
    with running(f"model={model}", f"store={store}", f"index={index}", "reload_s=0.1") as service:

        def answer() -> Any:
            status, held = service.fetch("/v1/retrieve", {"users": USERS, **asked})
            assert status == 200
            return held

        require_same(answer(), before)
        export(tmp_path, log, seed=6)  # and its summaries, but not its index
        until(lambda: "the old one stays in service" in service.log)
        require_same(answer(), before)
        run_index(IndexConfig(model=model))
        until(lambda: service.number('vista_reloads_total{model="default",outcome="moved"}') >= 1)
        after = expected()
        assert any(not np.array_equal(one.scores, other.scores) for one, other in zip(before, after, strict=True))
        require_same(answer(), after)
        Path(index).rename(tmp_path / "away")
        assert any("the loaded index stays" in problem for problem in service.fetch("/readyz")[1]["problems"])
        require_same(answer(), after)
