"""Requests that read the store themselves, while a reload moves the scorer to another model or generation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ITEMS, START, Served, small_config, small_frame
from tests.serve.model_files import retrained
from vista.cli.index_command import run_index
from vista.config import IndexConfig, ServeConfig, SourceColumns
from vista.log.event_log import EventLog
from vista.model.vista_model import VistaModel
from vista.refresh import refresh
from vista.scorer import Scorer
from vista.serve import scoring_service
from vista.serve.request_bodies import JSON
from vista.serve.score_batches import ScoreBatches
from vista.serve.scoring_service import ScoringService
from vista.store import StoreReader
from vista.training.trainer import train

USER, NOW = 103, START + 200 * 86_400_000


def at_the_first_read(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], None], *, after: bool = False) -> None:
    """Let something happen in the middle of a request, just before or after it reads a record."""
    bare, waiting = StoreReader.get_many, [happens]

    def get_many(reader: StoreReader, users: list[int]) -> object:
        found = bare(reader, users) if after else None
        if waiting:
            waiting.pop()()
        return found or bare(reader, users)

    monkeypatch.setattr(StoreReader, "get_many", get_many)


def publish(served: Served, store: Path, scorer: Scorer) -> None:
    """Another generation, which the scorer takes into service."""
    refresh(served.model, served.log, store)
    assert scorer.reload()


def test_another_model_does_not_close_the_store_of_a_request(
    served: Served, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, store = folders
    with Scorer.open(model, store) as scorer:
        service = ScoringService(scorer, ServeConfig())
        expected = json.loads(service.user(str(USER)).body)
        for call, answer in ((lambda: json.loads(service.user(str(USER)).body), expected), (service.reads_store, True)):
            other = retrained(served.model)

            def replace(other: VistaModel = other) -> None:
                other.save_pretrained(model)
                refresh(other, served.log, store)
                assert scorer.reload()

            at_the_first_read(monkeypatch, replace)
            assert call() == answer
            monkeypatch.undo()
            assert scorer.model.summarizer_id() == other.summarizer_id()
            served.model.save_pretrained(model)
            refresh(served.model, served.log, store)
            assert scorer.reload()


def test_a_record_names_its_generation(
    served: Served, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, store = folders
    with Scorer.open(model, store) as scorer:
        service = ScoringService(scorer, ServeConfig())
        at_the_first_read(monkeypatch, lambda: publish(served, store, scorer), after=True)
        before, after = (json.loads(service.user(str(USER)).body) for _ in range(2))
        assert (before["generation"], after["generation"]) == (1, 2)
        assert before["created_at"] < after["created_at"] == scorer.manifest.created_at


@pytest.mark.parametrize("after", [False, True])
def test_scores_name_the_generation_that_they_read(
    served: Served, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, *, after: bool
) -> None:
    """Although another one is published just before or after the records are read."""
    model, store = folders
    with Scorer.open(model, store) as scorer:
        service = ScoringService(scorer, ServeConfig())
        at_the_first_read(monkeypatch, lambda: publish(served, store, scorer), after=after)
        body = json.dumps({"users": [USER], "candidates": ITEMS, "now": NOW}).encode()
        assert json.loads(service.predict(body, JSON).body)["generation"] == (1 if after else 2)
        assert scorer.manifest.generation == 2


@pytest.mark.parametrize("endpoint", ["score", "predict", "rank", "retrieve", "explain", "several scores"])
def test_actions_of_a_tail_are_those_of_the_model_that_answers(
    served: Served, folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    """Although another model, which orders its actions differently, goes into service after the body was read."""
    model, store = folders
    frame, columns = small_frame(), SourceColumns(action="action", rating="rating")
    is_like = frame["action"] == "like"
    EventLog.from_frame(_rows(frame, is_like), tmp_path / "log", time_unit="ms", columns=columns)
    log = EventLog.from_frame(_rows(frame, ~is_like), tmp_path / "log", time_unit="ms", columns=columns, append=True)
    other = train(small_config(log, tmp_path / "run", optim__epochs=1), log)
    assert served.model.schema.actions == ["click", "like"] and other.schema.actions == ["like", "click"]
    event, index = {"item": 10, "time": NOW - 1000, "action": "like"}, str(tmp_path / "index")
    run_index(IndexConfig(model=str(model), out=index))
    with Scorer.open(model, store, index=index) as scorer:
        service, bare, waiting = ScoringService(scorer, ServeConfig()), scoring_service.tail_of, [True]

        def then_another_model(given: Any) -> Any:
            tail = bare(given)
            if waiting:
                waiting.pop()
                other.save_pretrained(model)
                refresh(other, log, store)
                run_index(IndexConfig(model=str(model), out=index))
                assert scorer.reload()
            return tail

        def answer() -> Any:
            asked: dict[str, Any] = {"candidates": ITEMS, "now": NOW}
            if endpoint in ("rank", "explain"):
                body = json.dumps({**asked, "user": USER, "tail": [event]}).encode()
                return json.loads(getattr(service, endpoint)(body, JSON).body)
            if endpoint == "retrieve":
                del asked["candidates"]
            body = json.dumps({**asked, "users": [USER], "tail": [[event]]}).encode()
            if endpoint in ("predict", "retrieve"):
                return json.loads(getattr(service, endpoint)(body, JSON).body)
            batches = ScoreBatches()
            entries = [batches.enter(body, JSON) for _ in range(1 if endpoint == "score" else 2)]
            return [json.loads(batches.answer(entry, service).body) for entry in entries]

        monkeypatch.setattr(scoring_service, "tail_of", then_another_model)
        during = answer()
        assert not waiting and during == answer()  # The second answer is of the other model alone.


def _rows(frame: dict[str, Any], chosen: Any) -> dict[str, Any]:
    return {name: values[chosen] for name, values in frame.items()}


def test_the_page_of_the_model_costs_little(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not compute the digest of all weights, during which no other request is answered."""
    with Scorer.open(*folders) as scorer:
        expected = scorer.model.summarizer_id().hex()
        monkeypatch.setattr(VistaModel, "summarizer_id", lambda _: pytest.fail("computes the digest"))
        assert json.loads(ScoringService(scorer, ServeConfig()).model().body)["summarizer_id"] == expected
