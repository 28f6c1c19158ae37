"""Shadow scoring: the challenger's answers are logged next to those of the service, which do not change."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from tests.conftest import ITEMS, USERS, Served
from tests.serve.conftest import ASKED, NOW, save_other_stage_2
from tests.serve.running_service import RunningService, running
from vista.config import ServeConfig
from vista.errors import ConfigError
from vista.scorer import Scorer
from vista.serve import shadow
from vista.serve.scoring_service import JSON, ScoringService
from vista.serve.shadow import ShadowProcess, compared

DEADLINE_S = 60
RANKED = {"user": USERS[0], "top_k": 5, "now": NOW}


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_answers_are_compared_and_unchanged(served: Served, service: RunningService, tmp_path: Path) -> None:
    challenger = save_other_stage_2(served.model_dir, tmp_path / "challenger")
    file = tmp_path / "shadow.jsonl"
    words = f"shadow_model={challenger}", f"shadow_store={served.store}", f"shadow_file={file}"
    with running(f"model={served.model_dir}", f"store={served.store}", *words) as shadowed:

        def has_compared() -> bool:  # What arrives before the challenger is open is dropped.
            assert shadowed.fetch("/v1/score", ASKED) == service.fetch("/v1/score", ASKED)
            return bool(lines_of(file))

        eventually(has_compared)
        assert shadowed.fetch("/v1/rank", RANKED) == service.fetch("/v1/rank", RANKED)
        packed = {"headers": {"content-type": "application/msgpack"}}
        own, plain = (one.send("/v1/score", msgspec.msgpack.encode(ASKED), **packed)[2] for one in (shadowed, service))
        assert own == plain
        assert shadowed.fetch("/v1/predict", ASKED)[0] == 200
        eventually(lambda: {line["endpoint"] for line in lines_of(file)} == {"score", "rank"})
        count = shadowed.number('vista_shadow_requests_total{outcome="sent"}')
        assert count >= 3
        large = ASKED | {"candidates": (ITEMS * 9900)[:9900], "users": USERS[:1]}  # beyond MAX_MESSAGE
        assert shadowed.fetch("/v1/score", large)[0] == 200
        eventually(lambda: shadowed.number('vista_shadow_requests_total{outcome="dropped"}') == 1)
    with Scorer.open(challenger, served.store) as scorer:
        expected = scorer.score(USERS, ITEMS, now=NOW).reshape(-1)
    for line in lines_of(file):
        if line["endpoint"] == "rank":
            assert 0 <= line["overlap"] <= 1 and line["users"] == [USERS[0]]
            continue
        assert line["users"] == USERS
        np.testing.assert_allclose(line["challenger"]["scores"], expected[:100], atol=1e-4)
        assert line["difference"] > 0 and -1 <= line["correlation"] < 1
        assert line["champion"]["model_checksum"] != line["challenger"]["model_checksum"]


def test_a_challenger_that_cannot_be_opened_changes_nothing(served: Served, tmp_path: Path) -> None:
    words = f"shadow_model={tmp_path / 'none'}", f"shadow_store={served.store}", f"shadow_file={tmp_path / 'file'}"
    with running(f"model={served.model_dir}", f"store={served.store}", *words) as shadowed:
        for _ in range(3):
            assert shadowed.fetch("/v1/score", ASKED)[0] == 200
        eventually(lambda: "cannot be opened" in shadowed.log)
        assert shadowed.fetch("/readyz")[0] == 200
    assert not (tmp_path / "file").exists()


def test_an_error_of_the_challenger_is_a_line(served: Served) -> None:
    config = ServeConfig(model=str(served.model_dir), store=str(served.store), max_candidates=1)
    with Scorer.open(served.model_dir, served.store) as scorer:
        body = json.dumps(ASKED).encode()
        answer = ScoringService(scorer, ServeConfig()).scored(
            ScoringService(scorer, ServeConfig()).checked(body, JSON), JSON
        )
        line = compared(ScoringService(scorer, config), "score", body, JSON, answer.body)
        same = compared(ScoringService(scorer, ServeConfig()), "score", body, JSON, answer.body)
    assert "max_candidates" in line["error"] and "challenger" not in line
    assert same["difference"] == pytest.approx(0) and same["correlation"] == pytest.approx(1)


def test_an_unexpected_error_costs_one_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    outcomes: list[Any] = [RuntimeError("no memory"), OSError("no disk"), {"at": "a"}, {"at": "b"}, {"at": "c"}]

    def answered(*_: object) -> dict[str, Any]:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return dict(outcome)

    class Opened:
        scorer = socket.socket()

    monkeypatch.setattr(shadow, "open_warm_scorer", lambda config: None)
    monkeypatch.setattr(shadow, "ScoringService", lambda scorer, config: Opened)
    monkeypatch.setattr(shadow, "compared", answered)
    monkeypatch.setattr(shadow, "MOST_FILE_BYTES", 15)
    file = tmp_path / "file"
    config = ServeConfig(shadow_model="a", shadow_store="b", shadow_file=str(file))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        with ours:
            for _ in range(5):
                ours.send(msgspec.msgpack.encode(("score", b"", JSON, b"")))
        shadow.run(theirs, config)
    assert "no memory" in caplog.text and "no disk" in caplog.text
    assert lines_of(tmp_path / "file.1") == [{"at": "a"}, {"at": "b"}] and lines_of(file) == [{"at": "c"}]


def test_a_process_that_ended_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    offered: list[str] = []
    process = ShadowProcess(ServeConfig(shadow_model="a", shadow_store="b"), offered.append)
    process._process.kill()
    process._process.wait()
    for _ in range(3):
        process.offer("score", b"", JSON, b"")
    process.close()
    assert offered == ["dropped"] * 3 and caplog.text.count("has ended") == 1


def test_a_challenger_needs_a_store() -> None:
    with pytest.raises(ConfigError, match="name both"):
        ServeConfig(shadow_model="a")
    with pytest.raises(ConfigError, match="service of one model"):
        ServeConfig(models="models.yaml", shadow_model="a", shadow_store="b")
