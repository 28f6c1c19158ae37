"""Probes while a store hangs, and metrics that cannot be updated: neither keeps the worker from its requests."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from vista.config import ServeConfig
from vista.serve import application, worker
from vista.serve.scoring_queue import ScoringQueue
from vista.serve.served_models import ServedModels
from vista.serve.service_metrics import ServiceMetrics

TIMEOUT_S = 60


async def status_of(app: Any, path: str) -> int:
    """The status of the answer to a GET."""
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "http_version": "1.1", "method": "GET", "scheme": "http", "path": path}
    await app({**scope, "query_string": b"", "headers": []}, receive, send)
    return int(sent[0]["status"])


def test_probes_that_come_while_one_runs_share_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, free, is_ready = threading.Event(), threading.Event(), [False, True]

    def hanging(_: ServedModels) -> dict[str, Any]:
        begun.set()
        assert free.wait(TIMEOUT_S)
        return {"ready": is_ready.pop(0), "generation": 1, "problems": []}

    monkeypatch.setattr(application, "readiness", hanging)
    config, metrics, queue = ServeConfig(), ServiceMetrics(), ScoringQueue(1, 1)
    models = ServedModels({"default": config}, None, None, metrics)
    app = application.make_application(models, queue, queue, metrics, config, [])

    async def use() -> None:
        probes = [asyncio.create_task(status_of(app, "/readyz")) for _ in range(100)]
        assert await asyncio.to_thread(begun.wait, TIMEOUT_S)
        probes.pop(0).cancel()
        await asyncio.sleep(0)
        free.set()
        assert set(await asyncio.gather(*probes)) == {503}
        assert await status_of(app, "/readyz") == 200

    asyncio.run(use())
    assert not is_ready
    queue.close()
    models.close()


def test_metrics_that_cannot_be_updated_are_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    num_calls = 0

    class Models:
        def update_metrics(self, depth: int) -> None:
            nonlocal num_calls
            num_calls += 1
            if num_calls < 3:
                raise OSError("no memory is left")

    async def use() -> None:
        task = asyncio.create_task(worker._update(Models()))  # type: ignore[arg-type]
        while num_calls < 4 and not task.done():
            await asyncio.sleep(0)
        task.cancel()

    monkeypatch.setattr(worker, "UPDATE_S", 0)
    asyncio.run(use())
    assert num_calls >= 4
    assert caplog.text.count("OSError: no memory is left") == 1
