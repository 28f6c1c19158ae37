"""The commands of docs/guides/serve.md print what the page shows, and what it says about fork is true."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Served, run_python
from tests.docs.page import blocks_of
from tests.serve.running_service import environment, running

pytestmark = pytest.mark.research

PAGE = Path(__file__).resolve().parent.parent / "docs" / "guides" / "serve.md"
NUMBER = re.compile(r"-?\d+\.\d+(e-?\d+)?|sku-\d+|[0-9a-f]{16}")
"""What depends on the trained weights."""


def masked(text: str) -> str:
    return re.sub(r" +", " ", NUMBER.sub("…", text)).replace(" ]", "]").strip()  # NumPy aligns columns


def test_the_commands_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = blocks_of(PAGE)
    first = next(block for block in blocks if block.language == "python")
    subprocess.run([sys.executable, "-c", first.code], cwd=tmp_path, env=environment(), check=True, capture_output=True)
    unrun = [place for place, block in enumerate(blocks) if block.no_run == "runs until stopped"]
    console, *others = unrun
    clients = [place for place in others if blocks[place].language == "python"]
    assert len(clients) == 2
    serve, *requests = re.split(r"^\$ ", blocks[console].code, flags=re.MULTILINE)[1:]
    words = serve.split()
    assert words[:2] == ["vista", "serve"]
    monkeypatch.chdir(tmp_path)
    with running(*(word for word in words[2:] if not word.startswith("port="))) as service:
        assert len(requests) >= 5
        for request in requests:
            command, shown = request.split("\n", 1)
            command = command.replace("localhost:8000", f"127.0.0.1:{service.port}")
            done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
            assert masked(done.stdout) == masked(shown), command
        for client in clients:
            code = blocks[client].code.replace("localhost:8000", f"127.0.0.1:{service.port}")
            printed = subprocess.run([sys.executable, "-c", code], env=environment(), check=True, capture_output=True)
            assert masked(printed.stdout.decode()) == masked(blocks[client + 1].code)


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


@pytest.mark.parametrize(("before", "inside"), [("one thread", ""), ("two threads", "one thread"), ("two threads", "")])
def test_a_scorer_that_has_scored_is_forked(served: Served, before: str, inside: str) -> None:
    done = run_python(FORKED, str(served.model_dir), str(served.store), before, inside)
    assert (done.stdout.strip(), done.stderr) == ("[0, 0]", "")
