"""A service while its store, its model, its workers, and its secrets change: no request fails."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import re
import resource
import shutil
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import ITEMS, USERS, Served
from tests.forked_child import in_child
from tests.serve.conftest import ASKED, NOW, TOLERANCE, retrained
from tests.serve.running_service import TIMEOUT_S, ForkedProcess, RunningService, running, until
from tests.store.remote.valkey_server import ValkeyServer
from vista.cli.item_commands import run_index
from vista.cli.main import main
from vista.config import IndexConfig, ServeConfig
from vista.errors import CheckpointError, ConfigError
from vista.model.item_projections import RETRIEVAL_FILE
from vista.model.vista_model import VistaModel
from vista.refresh import refresh
from vista.scorer import Scorer
from vista.serve.served_models import ONE_MODEL, ServedModels
from vista.serve.service_metrics import ServiceMetrics
from vista.serve.shared import TOKEN_VARIABLE, shared_numbers
from vista.serve.worker_pool import WorkerPool, _Worker, run_server
from vista.store.admin import copy_generation
from vista.store.record_encoding import read_key
from vista.store.writer import erase

ATTEMPTS = 6


class Load:
    """Clients that send requests until they are stopped, each on a connection that stays open. A client whose
    connection breaks connects again and repeats the request, as the page of the service says."""

    def __init__(self, service: RunningService, expected: dict[int, list[Any]], **headers: str) -> None:
        self._service = service
        self._expected, self._headers = expected, headers
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
                    connection.request("POST", "/v1/score", body, self._headers)
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


@pytest.mark.parametrize("fresh", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_reloads_erasures_and_killed_workers(served: Served, tmp_path: Path, fresh: bool) -> None:
    """Two workers under load: refreshes and an erasure lose no request, a killed worker only breaks connections."""
    store = tmp_path / "store"
    refresh(served.model, served.log, store)
    with Scorer.open(served.model_dir, store) as scorer:
        expected = scores_of(scorer)
    with running(f"model={served.model_dir}", f"store={store}", "workers=2", "reload_s=0.1", fresh=fresh) as service:
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
        mapped = Path(f"/proc/{second}/maps").read_text()
        (shared,) = set(re.findall(r"/\S*/vista-serve-[^/\s]+(?=/)", mapped))  # where workers share what they count
        assert Path(shared).is_dir()
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
    assert not Path(shared).exists()
    with pytest.raises(OSError):
        service.connect()


def test_running_requests_finish_after_sigterm(served: Served) -> None:
    with running(f"model={served.model_dir}", f"store={served.store}", "deadline_s=100") as service:
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
            server.command("FLUSHALL")
            assert service.fetch("/v1/score", asked)[0] == service.fetch("/readyz")[0] == 503
            copy_generation(served.store, server.url())
            assert service.fetch("/v1/score", asked) == before
    finally:
        server.kill()


def test_a_full_disk_for_logs(served: Served) -> None:
    """Messages that cannot be written are lost; requests are not."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = (f"port={port}", "deadline_s=100", f"model={served.model_dir}", f"store={served.store}")
    process = ForkedProcess(words, log="/dev/full")
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
        (["host=192.0.2.1"], "host: cannot listen on 192.0.2.1"),
        (["token_file=nowhere"], "token_file: nowhere: No such file or directory; write one with"),
        (["task=buy"], "task: 'buy' is not one of"),
    ],
)
def test_what_cannot_be_served(served: Served, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", f"model={served.model_dir}", f"store={served.store}", "port=0", *words]) in (1, 2)
    assert said in capsys.readouterr().err


def test_an_open_address_without_a_token(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("vista.serve.worker.run_worker", lambda *_: None)
    for host, token, warns in (("0.0.0.0", None, True), ("0.0.0.0", "a" * 16, False), ("127.0.0.1", None, False)):
        monkeypatch.setenv(TOKEN_VARIABLE, token) if token else monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
        caplog.clear()
        run_server(ServeConfig(host=host, port=0))
        assert ("anyone who can reach 0.0.0.0 may send requests; set token_file" in caplog.text) == warns


def test_connections_that_the_system_does_not_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The soft limit on open files is raised as needed; a hard limit that is too low is an error."""
    monkeypatch.setattr("vista.serve.worker.run_worker", lambda *_: None)

    def limit_for(num_connections: int) -> int | str:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, 1000))
        try:
            run_server(ServeConfig(port=0, max_connections=num_connections))
        except ConfigError as error:
            return str(error)
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]

    assert [in_child(lambda number=number: limit_for(number)) for number in (100, 500, 900)] == [200, 600, 1000]
    for number, needed in ((901, "1,001"), ((1 << 63) - 1, "9,223,372,036,854,775,907")):
        said = in_child(lambda number=number: limit_for(number))
        assert f"{needed} file descriptors per worker, but a process may have 1,000 here (ulimit -Hn)" in said, said


def test_workers_that_cannot_start(served: Served) -> None:
    """The service ends, and says why once."""
    process = ForkedProcess(("port=0", "model=nowhere", f"store={served.store}", "workers=3"))
    said = process.stderr.read()
    assert process.wait(TIMEOUT_S) == 1 and "Traceback" not in said
    assert said.count("error: nowhere") == 1
    assert "the first worker ended before it could listen" in said.splitlines()[-1]


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


def test_a_port_that_is_taken(served: Served, service: RunningService, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"port={service.port}", f"model={served.model_dir}", f"store={served.store}", "workers=2"]
    assert main(["serve", *words]) == 2
    assert f"cannot listen on 127.0.0.1:{service.port}" in capsys.readouterr().err


OLD, NEW = "an-old-token-of-some-length", "a-new-token-of-some-length"


def replace(path: Path, text: str) -> None:
    other = path.with_name("other")
    other.write_text(text)
    other.rename(path)


def restart_workers(service: RunningService) -> None:
    """One after the other: each ends by itself, and the next one only if two listen again."""
    for worker in service.workers():
        before = service.log.count("ended with status 0")
        os.kill(worker, signal.SIGTERM)
        until(lambda before=before: service.log.count("ended with status 0") == before + 1)
        until(lambda: service.num_listening() == 2)


def test_a_new_key_of_records_and_a_new_token(served: Served, tmp_path: Path) -> None:
    store, key, tokens = (tmp_path / name for name in ("store", "key", "tokens"))
    replace(key, "01" * 32)
    replace(tokens, OLD)
    refresh(served.model, served.log, store, key=read_key(str(key)))
    with Scorer.open(served.model_dir, store, key=read_key(str(key))) as scorer:
        expected, rows = scorer.score(USERS, ITEMS, now=NOW), scores_of(scorer)
    words = (f"model={served.model_dir}", f"store={store}", f"authentication_key_file={key}", f"token_file={tokens}")
    old, new = ({"Authorization": f"Bearer {token}"} for token in (OLD, NEW))

    def statuses(service: RunningService, headers: dict[str, str]) -> set[int]:
        return {service.fetch("/v1/score", ASKED, headers=headers)[0] for _ in range(10)}

    with running(*words, "workers=2", "reload_s=0.2") as service:
        with Load(service, rows, **old).applied() as load:
            refresh(served.model, served.log, store, key=b"\2" * 32)
            until(lambda: any("the last reload failed" in text for text in service.fetch("/readyz")[1]["problems"]))
            assert service.fetch("/readyz")[0] == 200
            status, answer = service.fetch("/v1/score", ASKED, headers=old)
            assert (status, answer["generation"]) == (200, 1)
            np.testing.assert_allclose(answer["scores"], expected, atol=TOLERANCE)
            os.kill(service.workers()[0], signal.SIGKILL)
            # Until the file has the new key, no other worker can take its place.
            until(lambda: "error: gen-2 was written with authentication key" in service.log)
            assert service.fetch("/v1/score", ASKED, headers=old)[1]["generation"] == 1
            replace(key, "02" * 32)
            until(lambda: service.num_listening() == 2)
            assert statuses(service, new) == {401}
            replace(tokens, f"{OLD}\n{NEW}\n")
            restart_workers(service)
            for _ in range(10):
                status, answer = service.fetch("/v1/score", ASKED, headers=new)
                assert (status, answer["generation"]) == (200, 2)
                np.testing.assert_allclose(answer["scores"], expected, atol=TOLERANCE)
        assert statuses(service, old) == statuses(service, new) == {200}
        replace(tokens, NEW)
        with Load(service, rows, **new).applied() as second:
            restart_workers(service)
        assert statuses(service, old) == {401} and statuses(service, new) == {200}
    for each in (load, second):
        assert each.counts["answered"] and not each.counts["refused"] and not each.wrong


def test_a_mapped_file_that_is_overwritten_in_place(folders: tuple[Path, Path]) -> None:
    """The system ends the workers, others take their place, and the log says why."""
    model, store = folders
    file = model / RETRIEVAL_FILE
    asked, content = {"users": USERS, "candidates": ITEMS, "now": NOW}, file.read_bytes()
    with running(f"model={model}", f"store={store}", "workers=2") as service:
        expected = service.fetch("/v1/score", asked)[1]

        def answer() -> Any:
            with contextlib.suppress(OSError, http.client.HTTPException):
                return service.fetch("/v1/score", asked)[1]

        file.write_bytes(b"")
        until(lambda: answer() is None and "was overwritten in place (copy into another folder" in service.log)
        file.write_bytes(content)
        until(lambda: answer() == expected)
        assert "Fatal Python error: Bus error" in service.log


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


NO_SUMMARIES = "the store has no summaries of this model yet; the model waits for the rest of its upgrade (see the log)"


def scores_after(model: VistaModel, store: Path) -> np.ndarray:
    with Scorer.open(model, store) as scorer:
        found: np.ndarray = scorer.score(USERS, ITEMS, now=NOW)
        return found


def test_a_service_that_starts_before_the_summaries_are_published(served: Served, folders: tuple[Path, Path]) -> None:
    model, store = folders
    other = retrained(served.model)
    other.save_pretrained(model)
    with running(f"model={model}", f"store={store}", "reload_s=0.2") as service:
        assert service.fetch("/healthz") == (200, {"status": "ok"})
        assert service.fetch("/readyz") == (503, {"ready": False, "generation": None, "problems": [NO_SUMMARIES]})
        status, headers, answer = service.send("/v1/score", ASKED)
        assert status == 503 and b"ModelUnavailableError" in answer and headers["Retry-After"] == "1"
        assert NO_SUMMARIES.encode() in answer and str(model).encode() not in answer
        assert service.number('vista_model_openings_total{model="default",outcome="failed"}') >= 1
        refresh(other, served.log, store)
        until(lambda: service.fetch("/readyz") == (200, {"ready": True, "generation": 2, "problems": []}))
        status, scored = service.fetch("/v1/score", ASKED)
        np.testing.assert_allclose(scored["scores"], scores_after(other, store), atol=TOLERANCE)
        said = "model default waits, and is tried again every 0.2 s, because the store has no summaries of this model"
        assert service.log.count(said) == 1 and "opened model default in" in service.log
        assert "Traceback" not in service.log and service.stop() == 0


def test_a_worker_that_restarts_before_the_summaries_are_published(served: Served, folders: tuple[Path, Path]) -> None:
    """It gets no requests, so that none fails; the other worker keeps the old model in service."""
    model, store = folders
    other, expected = retrained(served.model), scores_after(served.model, store)
    with running(f"model={model}", f"store={store}", "workers=2", "reload_s=0.2") as service:
        other.save_pretrained(model)
        first, second = service.workers()
        os.kill(first, signal.SIGKILL)
        until(lambda: "model default waits" in service.log)
        for _ in range(10):  # The kernel assigns each connection to a worker that listens.
            status, answer = service.fetch("/v1/score", ASKED)
            assert status == 200
            np.testing.assert_allclose(answer["scores"], expected, atol=TOLERANCE)
            assert service.fetch("/readyz")[0] == 200
        (waiting,) = set(service.workers()) - {second}
        refresh(other, served.log, store)
        until(lambda: service.number('vista_model_open{model="default"}') == 2)
        until(lambda: service.number('vista_generation{model="default"}') == 2)
        expected = scores_after(other, store)
        for _ in range(10):
            np.testing.assert_allclose(service.fetch("/v1/score", ASKED)[1]["scores"], expected, atol=TOLERANCE)
        assert set(service.workers()) == {second, waiting}  # It was not started again and again.
        assert service.stop() == 0


def test_a_worker_that_waits_can_be_stopped(served: Served, folders: tuple[Path, Path]) -> None:
    model, store = folders
    with running(f"model={model}", f"store={store}", "workers=2", "reload_s=1000") as service:
        retrained(served.model).save_pretrained(model)
        os.kill(service.workers()[0], signal.SIGKILL)
        until(lambda: "model default waits" in service.log)
        assert service.stop() == 0
        assert "did not stop in time" not in service.log and "Traceback" not in service.log


def test_what_a_model_waits_for(
    served: Served, served_tasks: Served, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """Records with as many events as a new stage 2 reads, and the index of the model."""
    (model, store), index = folders, str(tmp_path / "index")
    refresh(served.model.with_tail(3), served.log, store)
    run_index(IndexConfig(model=str(served_tasks.model_dir), out=index))
    for more, problem, mend in (
        ({}, "the records of the store lack what this model reads", lambda: refresh(served.model, served.log, store)),
        (
            {"index": index},
            "the index is not of this model yet",
            lambda: run_index(IndexConfig(model=str(model), out=index)),
        ),
    ):
        config = ServeConfig(model=str(model), store=str(store), reload_s=1e-6, **more)
        models = ServedModels({ONE_MODEL: config}, None, ServiceMetrics())
        try:
            models.open_first()
            assert (models.problem(ONE_MODEL) or "").startswith(problem)
            mend()
            models.open_waiting()
            assert models.is_open(ONE_MODEL)
        finally:
            models.close()


def test_what_happens_to_a_model_that_waits(
    served: Served, folders: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Other errors end the start, but not the wait. The log names each reason once."""
    model, store = folders
    retrained(served.model).save_pretrained(model)
    config = ServeConfig(model=str(model), store=str(store), reload_s=1e-6)
    models = ServedModels({ONE_MODEL: config}, None, ServiceMetrics())
    try:
        with caplog.at_level(logging.INFO, "vista.serve.served_models"):
            models.open_first()
            for _ in range(2):
                models.open_waiting()
            assert models.waiting == [ONE_MODEL] and len(caplog.records) == 1
            model.rename(tmp_path / "away")
            models.open_waiting()
            assert models.waiting == [ONE_MODEL] and "cannot be opened: CheckpointError" in caplog.records[-1].message
            shutil.copytree(served.model_dir, model)
            models.open_waiting()
            assert not models.waiting and models.problem(ONE_MODEL) is None and models.is_open(ONE_MODEL)
    finally:
        models.close()
    model.rename(tmp_path / "gone")
    models = ServedModels({ONE_MODEL: config}, None, ServiceMetrics())
    with pytest.raises(CheckpointError):
        models.open_first()
