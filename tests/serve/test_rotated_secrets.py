"""docs/guides/rotate-keys.md: a service takes over new keys and tokens without a failed request."""

from __future__ import annotations

import http.client
import logging
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ITEMS, START, USERS, Served
from tests.serve.running_service import RunningService, running, until
from vista.config import ServeConfig
from vista.refresh import refresh
from vista.scorer import Scorer
from vista.serve.shared_numbers import shared_numbers
from vista.serve.worker_pool import WorkerPool, _Worker
from vista.store.format.authentication import read_key

NOW = START + 200 * 86_400_000
ASKED = {"users": USERS, "candidates": ITEMS, "now": NOW}
TOLERANCE = 2e-5
"""Between calls with other users, for a model whose K is below 16 (docs/guides/serve.md)."""
OLD, NEW = "an-old-token-of-some-length", "a-new-token-of-some-length"


def replace(path: Path, text: str) -> None:
    other = path.with_name("other")
    other.write_text(text)
    other.rename(path)


def restart_workers(service: RunningService, **headers: str) -> None:
    """One after the other, as the page says: each ends by itself, and the next one only if two are in service again."""

    for worker in service.workers():
        before = service.log.count("ended with status 0")
        os.kill(worker, signal.SIGTERM)
        until(lambda before=before: service.log.count("ended with status 0") == before + 1)
        until(lambda: b'vista_model_open{model="default"} 2.0' in service.send("/metrics", headers=headers)[2])


@contextmanager
def asked_without_end(
    service: RunningService, statuses: Counter[int], generations: set[int], **headers: str
) -> Iterator[None]:
    """A client that repeats a request if its connection breaks, as docs/guides/serve.md says."""
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            for attempt in range(6):
                try:
                    status, answer = service.fetch("/v1/score", ASKED, headers=headers)
                    break
                except (http.client.HTTPException, ConnectionError):
                    time.sleep(0.1 * 2**attempt)
            else:
                status, answer = 0, {}
            statuses[status] += 1
            generations.add(answer.get("generation", 0))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_a_new_key_of_records(served: Served, tmp_path: Path) -> None:
    store, key = tmp_path / "store", tmp_path / "key"
    replace(key, "01" * 32)
    refresh(served.model, served.log, store, key=read_key(str(key)))
    with Scorer.open(served.model_dir, store, key=read_key(str(key))) as scorer:
        expected = scorer.score(USERS, ITEMS, now=NOW)
    words = (f"model={served.model_dir}", f"store={store}", f"authentication_key_file={key}", "workers=2")
    statuses, generations = Counter[int](), set[int]()
    with running(*words, "reload_s=0.2") as service, asked_without_end(service, statuses, generations):
        refresh(served.model, served.log, store, key=b"\2" * 32)
        until(lambda: any("the last reload failed" in text for text in service.fetch("/readyz")[1]["problems"]))
        assert service.fetch("/readyz")[0] == 200
        status, answer = service.fetch("/v1/score", ASKED)
        assert (status, answer["generation"]) == (200, 1)
        np.testing.assert_allclose(answer["scores"], expected, atol=TOLERANCE)
        os.kill(service.workers()[0], signal.SIGKILL)  # Until the file has the new key, no other can take its place.
        until(lambda: "error: gen-2 was written with authentication key" in service.log)
        assert service.fetch("/v1/score", ASKED)[1]["generation"] == 1
        replace(key, "02" * 32)
        until(lambda: service.number('vista_model_open{model="default"}') == 2)
        restart_workers(service)
        for _ in range(10):
            status, answer = service.fetch("/v1/score", ASKED)
            assert (status, answer["generation"]) == (200, 2)
            np.testing.assert_allclose(answer["scores"], expected, atol=TOLERANCE)
    assert set(statuses) == {200} and generations == {1, 2}


def test_a_new_token(served: Served, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    replace(tokens, OLD)

    def statuses(service: RunningService, token: str) -> set[int]:
        return {service.fetch("/v1/score", ASKED, headers={"Authorization": f"Bearer {token}"})[0] for _ in range(10)}

    with running(f"model={served.model_dir}", f"store={served.store}", f"token_file={tokens}", "workers=2") as service:
        assert statuses(service, OLD) == {200} and statuses(service, NEW) == {401}
        replace(tokens, f"{OLD}\n{NEW}\n")
        old, new = ({"Authorization": f"Bearer {token}"} for token in (OLD, NEW))
        asked, generations = Counter[int](), set[int]()
        with asked_without_end(service, asked, generations, **old):
            restart_workers(service, **old)
        assert statuses(service, OLD) == statuses(service, NEW) == {200}
        replace(tokens, NEW)
        with asked_without_end(service, asked, generations, **new):
            restart_workers(service, **new)
        assert set(asked) == {200} and generations == {1}
        assert statuses(service, OLD) == {401} and statuses(service, NEW) == {200}


def test_a_planned_stop_of_a_worker_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("prometheus_client")  # imported before the variable that makes it share numbers is set
    with shared_numbers(), caplog.at_level(logging.INFO, "vista.serve.worker_pool"):
        pool = WorkerPool(ServeConfig(), None, "127.0.0.1", 0)
        for number, level in ((signal.SIGTERM, logging.INFO), (signal.SIGKILL, logging.ERROR)):
            process = get_context("spawn").Process(target=time.sleep, args=(60,))
            process.start()
            os.kill(process.pid or 0, number)
            process.join()
            pool._replace_later(_Worker(process, None))
            assert caplog.records[-1].levelno == level and "another one starts in" in caplog.text
