"""A service while its store, its model and its workers change: no request fails."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import ITEMS, START, USERS, Served
from tests.serve.running_service import TIMEOUT_S, RunningService, command, environment, running, until
from tests.store.remote.valkey_server import ValkeyServer
from vista.cli.main import main
from vista.config import ServeConfig
from vista.refresh import refresh
from vista.scorer import Scorer
from vista.serve.worker_pool import WorkerPool
from vista.store.admin.copying import copy_generation
from vista.store.erasure import erase

NOW = START + 200 * 86_400_000
TOLERANCE = 2e-5
"""Between calls with other users, for a model whose K is below 16 (docs/guides/serve.md)."""
ATTEMPTS = 6
NUMBERS = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(tempfile.gettempdir())
"""Where the workers share what they count."""


class Load:
    """Clients that send requests until they are stopped, each on a connection that stays open.

    A client whose connection breaks connects again and repeats the request, as the page of the service says.
    """

    def __init__(self, service: RunningService, expected: dict[int, list[Any]]) -> None:
        self._service = service
        self._expected = expected
        self.counts: Counter[str] = Counter()
        self.wrong: list[Any] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=(place,)) for place in range(4)]

    @contextmanager
    def applied(self) -> Iterator[Load]:
        """Send requests for the duration of the context."""
        for thread in self._threads:
            thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join()

    def until_more(self, number: int) -> None:
        """Wait until so many more requests have been answered."""
        goal = self.counts["answered"] + number
        until(lambda: self.counts["answered"] >= goal or self.wrong)

    def _work(self, place: int) -> None:
        connection = self._connection()
        turn = place
        while not self._stop.is_set():
            user = USERS[turn % len(USERS)]
            turn += 1
            body = json.dumps({"users": [user], "candidates": ITEMS, "now": NOW})
            for attempt in range(ATTEMPTS):
                try:
                    connection.request("POST", "/v1/score", body)
                    answer = connection.getresponse()
                    held = json.loads(answer.read())
                    break
                except (http.client.HTTPException, ConnectionError) as error:
                    self.counts["broken"] += 1
                    connection.close()
                    connection = self._connection()
                    if attempt == ATTEMPTS - 1:
                        self.wrong.append(error)
                        return
                    time.sleep(0.1 * 2**attempt)  # The port of a dying process stays open for a moment.
            self.counts["answered"] += 1
            if answer.status == 429:
                self.counts["refused"] += 1
            elif answer.status != 200 or not self._is_right(user, held["scores"][0]):
                self.wrong.append((user, answer.status, held))
        connection.close()

    def _is_right(self, user: int, scores: list[float]) -> bool:
        return any(np.allclose(scores, expected, atol=TOLERANCE) for expected in self._expected[user])

    def _connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self._service.port, timeout=TIMEOUT_S)


def scores_of(scorer: Scorer) -> dict[int, list[Any]]:
    """By user: the scores that are right."""
    return {user: [scorer.score([user], ITEMS, now=NOW)[0].tolist()] for user in USERS}


def test_reloads_erasures_and_killed_workers(served: Served, tmp_path: Path) -> None:
    """Two workers under load: refreshes and an erasure lose no request, a killed worker only breaks connections."""
    store = tmp_path / "store"
    refresh(served.model, served.log, store)
    with Scorer.open(served.model_dir, store) as scorer:
        expected = scores_of(scorer)
    before = set(NUMBERS.glob("vista-serve-*"))
    with running(f"model={served.model_dir}", f"store={store}", "workers=2", "reload_s=0.1") as service:
        with Load(service, expected).applied() as load:
            load.until_more(20)
            for generation in (2, 3):
                refresh(served.model, served.log, store)
                until(lambda generation=generation: service.number('vista_generation{model="default"}') == generation)
                load.until_more(20)
            assert load.counts["broken"] == 0
            # Of users who are erased, a request gets the scores of the record or, from now on, those without one.
            with Scorer.open(served.model_dir, store) as scorer:
                expected[108].append(scorer.score([10**9], ITEMS, now=NOW)[0].tolist())
            erase(store, [108])
            load.until_more(40)
            first, second = service.workers()
            os.kill(first, signal.SIGKILL)
            until(lambda: len(service.workers()) == 2 and first not in service.workers())
            load.until_more(40)
        assert not load.wrong
        assert load.counts["broken"] < 4 * ATTEMPTS
        assert second in service.workers()
        assert f"worker {first} ended with status -9; another one starts" in service.log
        answer = service.fetch("/v1/score", {"users": [108], "candidates": ITEMS, "now": NOW})[1]
        assert answer["scores"][0] == expected[108][1]
        total = sum(
            service.number(f'vista_requests_total{{endpoint="score",model="default",status="{status}"}}')
            for status in ([200, 429] if load.counts["refused"] else [200])
        )
        assert total >= load.counts["answered"] + 1 - 4  # Those of a worker that died still count.
        assert service.stop() == 0
    assert "stopped" in service.log
    assert set(NUMBERS.glob("vista-serve-*")) <= before
    with pytest.raises(OSError):
        service.connect()


def test_running_requests_finish_after_sigterm(served: Served) -> None:
    with running(f"model={served.model_dir}", f"store={served.store}", "stop_s=100") as service:
        body = json.dumps({"users": [103], "candidates": ITEMS}).encode()
        with service.connect() as connection, service.connect() as idle:
            head = f"POST /v1/score HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode())
            assert connection.recv(1000).startswith(b"HTTP/1.1 100")  # The service waits for the body.
            idle.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            held = b""
            while b"ok" not in held:
                held += idle.recv(1000)
            service.process.send_signal(signal.SIGTERM)
            assert idle.recv(1000) == b""  # It closes connections without a running request.
            connection.sendall(body)
            assert connection.recv(10_000).startswith(b"HTTP/1.1 200")
        assert service.process.wait(TIMEOUT_S) == 0
        assert "stopped" in service.log


def test_a_model_that_vanishes_stays_in_service(served: Served, tmp_path: Path) -> None:
    model, away = tmp_path / "model", tmp_path / "away"
    shutil.copytree(served.model_dir, model)
    with running(f"model={model}", f"store={served.store}", "reload_s=0.1") as service:
        asked = {"users": USERS, "candidates": ITEMS, "now": NOW}
        before = service.fetch("/v1/score", asked)
        model.rename(away)
        _, ready = service.fetch("/readyz")
        assert ready["ready"] and "the loaded model stays in service" in ready["problems"][0]
        assert service.fetch("/v1/score", asked) == before
        assert service.fetch("/v1/model")[1]["num_items"] == 40
        away.rename(model)
        assert service.fetch("/readyz")[1]["problems"] == []
        (served_current := tmp_path / "broken").mkdir()
        shutil.copy(model / "config.json", served_current / "config.json")
        model.rename(away)
        served_current.rename(model)  # another model, without its weights
        until(lambda: any("reload failed" in problem for problem in service.fetch("/readyz")[1]["problems"]))
        assert service.fetch("/v1/score", asked) == before
        assert service.number('vista_reloads_total{model="default",outcome="failed"}') >= 1


def test_a_server_of_the_store_that_stops(served: Served, tmp_path: Path) -> None:
    """Requests and readiness fail with 503 until the server is back; the process stays."""
    pytest.importorskip("redis", reason="the extra `redis` is not installed")
    server = ValkeyServer(tmp_path / "server", "--appendonly", "yes", "--appendfsync", "always")
    try:
        copy_generation(served.store, server.url())
        with running(f"model={served.model_dir}", f"store={server.url(options='?timeout_s=30')}") as service:
            asked = {"users": USERS, "candidates": ITEMS, "now": NOW}
            before = service.fetch("/v1/score", asked)
            assert before[0] == 200 and service.fetch("/readyz")[0] == 200
            server.kill()
            status, answer = service.fetch("/v1/score", asked)
            assert status == 503 and answer["error"]["type"] == "StoreUnavailableError"
            status, ready = service.fetch("/readyz")
            assert status == 503 and not ready["ready"] and "does not answer" in ready["problems"][0]
            assert service.fetch("/healthz")[0] == 200
            server.start()
            until(lambda: service.fetch("/readyz")[0] == 200)
            assert service.fetch("/v1/score", asked) == before
    finally:
        server.kill()


def test_a_full_disk_for_logs(served: Served) -> None:
    """Messages that cannot be written are lost; requests are not."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = command(f"port={port}", "deadline_s=100", f"model={served.model_dir}", f"store={served.store}")
    with (
        open("/dev/full", "w") as full,
        subprocess.Popen(words, env=environment(), stderr=full, stdout=full) as process,
    ):
        try:
            until(lambda: _answers(port) or process.poll() is not None)
            assert process.poll() is None
            for _ in range(3):
                with socket.create_connection(("127.0.0.1", port), TIMEOUT_S) as connection:
                    connection.sendall(b"not HTTP\r\n\r\n")  # which is logged
                    assert connection.recv(1000).startswith(b"HTTP/1.1 400")
            assert _answers(port)
            process.send_signal(signal.SIGTERM)
            assert process.wait(TIMEOUT_S) == 0
        finally:
            process.kill()


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        connection.request("POST", "/v1/score", json.dumps({"users": [103], "candidates": [0]}))
        return connection.getresponse().status == 200
    except ConnectionError:
        return False
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model=nowhere"], "nowhere"),
        (["host=192.0.2.1"], "host: cannot listen on 192.0.2.1"),
        (["host=no.such.host.invalid"], "host: no.such.host.invalid is not an address"),
        (["port=70000"], "port: must be at most 65535"),
        (["token_file=nowhere"], "token_file: nowhere: No such file or directory; write one with"),
        (["task=buy"], "task: 'buy' is not one of"),
        (["workers=0"], "workers: must be at least 1"),
    ],
)
def test_what_cannot_be_served(
    served: Served, words: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["serve", f"model={served.model_dir}", f"store={served.store}", "port=0", *words]) in (1, 2)
    assert said in capsys.readouterr().err


def test_an_index_that_is_missing(served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"model={served.model_dir}", f"store={served.store}", f"index={tmp_path / 'nowhere'}", "port=0"]
    assert main(["serve", *words]) == 1
    assert "nowhere" in capsys.readouterr().err


def test_workers_that_cannot_start(served: Served) -> None:
    """The service ends, and says why once."""
    words = command("port=0", "model=nowhere", f"store={served.store}", "workers=3")
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.count("error: nowhere") == 1
    assert "the first worker ended before it could listen" in done.stderr.splitlines()[-1]


def test_sigterm_before_the_first_worker_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker that ends because of it is not an error."""
    pool = WorkerPool(ServeConfig(workers=2), None, "127.0.0.1", 0)
    watch = pool._watch

    def watch_too_late() -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        for worker in pool._workers:
            worker.process.join(TIMEOUT_S)
        return watch()

    monkeypatch.setattr(pool, "_watch", watch_too_late)
    pool.run(lambda: pytest.fail("no worker could listen"))


def test_a_port_that_is_taken(served: Served, service: RunningService) -> None:
    words = command(f"port={service.port}", f"model={served.model_dir}", f"store={served.store}", "workers=2")
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and f"cannot listen on 127.0.0.1:{service.port}" in done.stderr
