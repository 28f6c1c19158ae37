"""The service of docs/guides/serve.md runs as it is, and what that page says about fork is true."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vista
from tests.conftest import ITEMS, Served, run_python
from tests.docs.page import blocks_of
from vista.refresh import refresh
from vista.scorer import Scorer

pytestmark = pytest.mark.research

PAGE = Path(__file__).resolve().parent.parent / "docs" / "guides" / "serve.md"
TIMEOUT_S = 60


@pytest.fixture
def process(served: Served, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The page's program, which serves `runs/mine/best` and `stores/mine` of the temporary folder, and its port."""
    (service,) = (block for block in blocks_of(PAGE) if block.no_run == "runs until stopped")
    (tmp_path / "service.py").write_text(service.code)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "best").symlink_to(served.model_dir)
    refresh(served.model, served.log, tmp_path / "stores" / "mine")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    root = Path(vista.__file__).parents[1]
    process = subprocess.Popen(
        [sys.executable, "service.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{root}:{root / 'kernels'}", "PORT": str(port), "RELOAD_S": "0.2"},
    )
    try:
        yield process, port
    finally:
        process.terminate()  # and its workers
        try:
            process.wait(TIMEOUT_S)
        finally:
            process.kill()


@pytest.fixture
def service(process: tuple[subprocess.Popen[bytes], int]) -> Iterator[int]:
    """Port of the program, which is told to end and does."""
    yield process[1]
    process[0].send_signal(signal.SIGTERM)
    assert process[0].wait(TIMEOUT_S) == 0


def fetch(port: int, body: Any = None) -> tuple[int, Any]:
    """Status and body of the answer; waits for the service to start."""
    data = None if body is None else json.dumps(body).encode()
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", data, timeout=TIMEOUT_S) as reply:
                return reply.status, json.loads(reply.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())
        except urllib.error.URLError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_the_service(served: Served, service: int, tmp_path: Path) -> None:
    with Scorer.open(served.model, tmp_path / "stores" / "mine") as scorer:
        expected = scorer.score([103], ITEMS, now=time.time_ns() // 1_000_000)[0]
    status, body = fetch(service, {"user": 103, "items": ITEMS})
    assert status == 200
    np.testing.assert_allclose(body["scores"], expected, atol=2e-5)
    assert fetch(service, {"user": 999, "items": [0, 10]}) == (200, {"scores": [None, None]})
    assert fetch(service, {"user": 103, "items": [0, 7]})[1]["scores"][1] is None
    for bad, word in (
        ({"user": "bob", "items": [0]}, "bob"),
        ({"user": 103, "items": ["a"]}, "integer ids"),
        ({}, "user"),
    ):
        status, body = fetch(service, bad)
        assert status == 400 and word in body["error"]
    assert fetch(service)[1]["generation"] == 1

    refresh(served.model, served.log, tmp_path / "stores" / "mine")
    deadline, in_a_row = time.monotonic() + TIMEOUT_S, 0
    while in_a_row < 10:  # both workers
        assert time.monotonic() < deadline
        _, watched = fetch(service)
        in_a_row = in_a_row + 1 if watched["generation"] == 2 else 0
    np.testing.assert_allclose(fetch(service, {"user": 103, "items": ITEMS})[1]["scores"], expected, atol=2e-5)
    assert 0 <= watched["age_s"] < TIMEOUT_S * 10 and watched["calls"] > 0 and watched["p99_ms"] > 0
    assert watched["failed_reloads"] == 0


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_where_one_worker_dies_the_service_ends(
    process: tuple[subprocess.Popen[bytes], int], how: signal.Signals
) -> None:
    parent, port = process
    assert fetch(port)[0] == 200
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    deadline = time.monotonic() + TIMEOUT_S
    while len(children.read_text().split()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    first, second = map(int, children.read_text().split())
    os.kill(first, how)
    assert parent.wait(TIMEOUT_S) == 1
    assert not Path(f"/proc/{second}").exists()
    socket.create_server(("127.0.0.1", port)).close()


FORKED = """
import os, sys, time
import numpy as np, torch
from vista.scorer import Scorer

model, store, before, inside = sys.argv[1:]
users, items = [103, 100] * 400, [0, 390, 10]  # enough for torch to use its threads
torch.set_num_threads(2 if "two threads" in before else 1)
scorer = Scorer.open(model, store)
expected = scorer.score(users, items)
children = []
for _ in range(2):
    children.append(os.fork())
    if children[-1] == 0:
        if inside == "one thread":
            torch.set_num_threads(1)
        same = np.allclose(scorer.score(users, items), expected, atol=2e-5) and scorer.stats().calls == 1
        scorer.reload()
        os._exit(0 if same else 1)
deadline = time.monotonic() + 60
ended = {}
while len(ended) < 2 and time.monotonic() < deadline:
    for child in set(children) - set(ended):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            ended[pid] = os.waitstatus_to_exitcode(status)
    time.sleep(0.02)
for child in set(children) - set(ended):
    os.kill(child, 9)
print(sorted(ended.values()))
"""


@pytest.mark.parametrize(
    ("before", "inside"),
    [
        ("one thread", ""),
        ("two threads", "one thread"),
        ("two threads", ""),
    ],
)
def test_a_scorer_that_has_scored_is_forked(served: Served, before: str, inside: str) -> None:
    done = run_python(FORKED, str(served.model_dir), str(served.store), before, inside)
    assert (done.stdout.strip(), done.stderr) == ("[0, 0]", "")
