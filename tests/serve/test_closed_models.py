"""Requests that wait while their model is closed, or not open yet: the thread that scores opens no models, because the
requests for all other models wait for it."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import ITEMS, START, USERS, Served
from tests.serve.model_files import save_other_stage_2
from vista.config import ServeConfig
from vista.errors import StoreError
from vista.scorer import Scorer
from vista.serve import served_models
from vista.serve.application import make_application
from vista.serve.scoring_queue import ScoringQueue
from vista.serve.served_models import ServedModels
from vista.serve.service_metrics import ServiceMetrics

NOW = START + 200 * 86_400_000
TOLERANCE = 2e-5
"""Between calls with other users, for a model whose K is below 16 (docs/guides/serve.md)."""
TIMEOUT_S = 60


class BusyService:
    """The application of two models with memory for one, whose only scoring thread is busy until it is released."""

    def __init__(self, folders: dict[str, Path], store: Path) -> None:
        configs = {
            name: ServeConfig(model=str(folder), store=str(store), deadline_s=TIMEOUT_S)
            for name, folder in folders.items()
        }
        metrics = ServiceMetrics()
        self.models = ServedModels(configs, None, 1, metrics)
        self.queue, self.openings = ScoringQueue(1, 8), ScoringQueue(1, 8)
        self.app = make_application(self.models, self.queue, self.openings, metrics, configs["a"], [])
        self._begun, self.released = threading.Event(), threading.Event()
        self.scoring_thread = 0

    def hold(self) -> None:
        """Keep the scoring thread busy."""
        self.scoring_thread = threading.get_ident()
        self._begun.set()
        assert self.released.wait(TIMEOUT_S)

    async def busy(self) -> asyncio.Task[None]:
        """Start to keep it busy."""
        task = asyncio.create_task(self.queue.run(self.hold, TIMEOUT_S))
        await asyncio.to_thread(self._begun.wait)
        return task

    async def scores(self, model: str) -> Any:
        """Scores of USERS from a model."""
        body = json.dumps({"users": USERS, "candidates": ITEMS, "now": NOW, "model": model}).encode()
        sent: list[dict[str, Any]] = []
        received = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            return received.pop() if received else await asyncio.Event().wait()  # type: ignore[return-value]

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "http_version": "1.1", "method": "POST", "scheme": "http", "path": "/v1/score"}
        await self.app({**scope, "query_string": b"", "headers": []}, receive, send)
        assert sent[0]["status"] == 200, sent
        return json.loads(sent[1]["body"])["scores"]

    def close(self) -> None:
        self.released.set()
        for part in (self.openings, self.queue, self.models):
            part.close()


@pytest.fixture
def folders(served: Served, tmp_path: Path) -> dict[str, Path]:
    shutil.copytree(served.model_dir, tmp_path / "a")
    return {"a": tmp_path / "a", "b": save_other_stage_2(tmp_path / "a", tmp_path / "b")}


@pytest.fixture
def service(
    served: Served, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[BusyService, list[int]]]:
    """The service, and the threads that opened models."""
    opener, threads = served_models.open_warm_scorer, list[int]()

    def open_warm_scorer(config: ServeConfig) -> Scorer:
        threads.append(threading.get_ident())
        return opener(config)

    monkeypatch.setattr(served_models, "open_warm_scorer", open_warm_scorer)
    with closing(BusyService(folders, served.store)) as opened:
        yield opened, threads


def expected(served: Served, folder: Path) -> Any:
    with Scorer.open(folder, served.store) as scorer:
        return scorer.score(USERS, ITEMS, now=NOW)


def ran(scenario: Callable[[], Awaitable[Any]]) -> Any:
    async def limited() -> Any:
        return await asyncio.wait_for(scenario(), TIMEOUT_S)

    return asyncio.run(limited())


def test_a_model_that_is_closed_while_a_request_waits(
    served: Served, folders: dict[str, Path], service: tuple[BusyService, list[int]]
) -> None:
    busy, threads = service

    async def scenario() -> Any:
        busy.models.open("a")
        held = await busy.busy()
        waiting = asyncio.create_task(busy.scores("a"))
        while busy.queue.depth < 2:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(busy.models.open, "b")
        assert not busy.models.is_open("a")
        busy.released.set()
        await held
        return await waiting

    np.testing.assert_allclose(ran(scenario), expected(served, folders["a"]), atol=TOLERANCE)
    assert len(threads) == 3 and busy.scoring_thread not in threads


def test_a_model_that_is_opened_answers_before_it_can_be_closed(
    served: Served, folders: dict[str, Path], service: tuple[BusyService, list[int]]
) -> None:
    """Requests for two models that are not open, with memory for one: both are answered although the scoring thread is
    busy, and each model is opened once."""
    busy, threads = service

    async def scenario() -> Any:
        await busy.busy()
        answers = await asyncio.gather(busy.scores("a"), busy.scores("b"))
        assert not busy.released.is_set()
        busy.released.set()
        return answers

    for scores, folder in zip(ran(scenario), folders.values(), strict=True):
        np.testing.assert_allclose(scores, expected(served, folder), atol=TOLERANCE)
    assert len(threads) == 2 and busy.scoring_thread not in threads


def test_a_slow_close_delays_no_request(
    served: Served, folders: dict[str, Path], service: tuple[BusyService, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as the close of a model whose running reload has to end first."""
    models, begun, released = service[0].models, threading.Event(), threading.Event()
    models.open("a")
    with models.use_if_open("a") as first:
        assert first is not None
        close = first.scorer.close

        def close_slowly() -> None:
            begun.set()
            assert released.wait(TIMEOUT_S)
            close()

        monkeypatch.setattr(first.scorer, "close", close_slowly)
        models.open("b")  # a, which is in use, is closed later.
    assert begun.wait(TIMEOUT_S) and not released.is_set()
    with models.use_if_open("b") as second:
        assert second is not None
        found = second.scorer.score(USERS, ITEMS, now=NOW)
    np.testing.assert_allclose(found, expected(served, folders["b"]), atol=TOLERANCE)
    assert not models.is_open("a")
    released.set()
    models.open("a")  # waits until it is closed
    with pytest.raises(StoreError, match="is closed"):
        first.scorer.score(USERS, ITEMS, now=NOW)
