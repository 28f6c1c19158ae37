"""Requests that wait at the same time are scored in one call, and each gets its own answer or error."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import CancelledError
from functools import partial
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.conftest import ITEMS, START, USERS, Served, small_config
from vista.config import ServeConfig
from vista.errors import DeadlineError, OverloadedError, UnknownUserError
from vista.log.event_log import EventLog
from vista.refresh import refresh
from vista.scorer import Scorer
from vista.serve.request_bodies import JSON, MSGPACK, TailEvent, tail_of
from vista.serve.score_batches import MAX_BYTES, MAX_REQUESTS, Entry, ScoreBatches
from vista.serve.scoring_queue import ScoringQueue
from vista.serve.scoring_service import ScoringService
from vista.training.trainer import train

NOW = START + 200 * 86_400_000
EVENT = {"item": 10, "time": NOW - 1000, "action": "like"}
TOLERANCE = 2e-5
"""Between calls with other users, for a model whose K is below 16 (docs/guides/serve.md)."""


@pytest.fixture
def service(served: Served) -> Iterator[ScoringService]:
    with Scorer.open(served.model_dir, served.store) as scorer:
        yield ScoringService(scorer, ServeConfig(max_users=20))


@pytest.fixture(scope="module")
def named(order_log: EventLog, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScoringService]:
    """A service of a model whose ids are texts, and which has no times."""
    folder = tmp_path_factory.mktemp("named")
    config = small_config(order_log, folder / "run", optim__epochs=1)
    refresh(train(config, order_log), order_log, folder / "store")
    with Scorer.open(folder / "run" / "best", folder / "store") as scorer:
        yield ScoringService(scorer, ServeConfig())


def entered(batches: ScoreBatches, *bodies: dict[str, Any]) -> list[Entry]:
    return [batches.enter(json.dumps(body).encode(), JSON) for body in bodies]


def scores(answer: bytes) -> list[Any]:
    return json.loads(answer)["scores"]  # type: ignore[no-any-return]


def test_one_call_gives_the_scores_of_each(service: ScoringService) -> None:
    bodies = [
        {"users": [USERS[0]], "candidates": ITEMS, "now": NOW},
        {"users": USERS[1:3], "candidates": ITEMS[:3], "now": [NOW, NOW - 5]},
        {"users": USERS[2:4], "candidates": [ITEMS[:1], []], "now": NOW},
        {"users": [USERS[4]], "candidates": ITEMS, "now": NOW, "tail": [[EVENT]]},
        {"users": [999], "candidates": [7, 10], "now": NOW},
        {"users": [USERS[0]], "candidates": [], "now": NOW},
    ]
    batches = ScoreBatches()
    entries = entered(batches, *bodies)
    packed = batches.enter(
        msgspec.msgpack.encode({"users": [103], "candidates": np.array(ITEMS).tobytes(), "now": NOW}), MSGPACK
    )
    answers = [batches.answer(entry, service) for entry in (*entries, packed)]
    assert service.scorer.stats().calls == 1
    for body, answer in zip(bodies, answers, strict=False):
        alone = service.scored(service.checked(json.dumps(body).encode(), JSON), JSON)
        assert (answer.media_type, answer.num_candidates) == (JSON, alone.num_candidates)
        for row, expected in zip(scores(answer.body), scores(alone.body), strict=True):
            np.testing.assert_allclose(row, expected, atol=TOLERANCE)
    held = np.frombuffer(msgspec.msgpack.decode(answers[-1].body)["scores"], np.float32)
    np.testing.assert_allclose(held, service.scorer.score([103], ITEMS, now=NOW)[0], atol=TOLERANCE)


def assert_fails_alone(
    service: ScoringService, good: dict[str, Any], bad: dict[str, Any], expected: NDArray[np.float32], words: str
) -> None:
    """A bad request between two good ones fails, and they have their answers."""
    batches = ScoreBatches()
    first, wrong, last = entered(batches, good, bad, good)
    for entry in (first, last):
        np.testing.assert_allclose(scores(batches.answer(entry, service).body)[0], expected, atol=TOLERANCE)
    with pytest.raises(Exception, match=words):
        batches.answer(wrong, service)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"users": ["bob"], "candidates": ITEMS}, "bob"),
        ({"users": [103], "candidates": ["a"]}, "integer"),
        ({"users": [103], "candidates": ITEMS, "now": [NOW, NOW]}, "now"),
        ({"users": [103], "candidates": ITEMS, "now": []}, "now"),
        ({"users": [103], "candidates": ITEMS, "tail": []}, "tail"),
        ({"users": [103, 104], "candidates": [ITEMS]}, "has 1 lists, but there are 2 users"),
        ({"users": [103], "candidates": ITEMS, "now": 1}, "now"),
        ({"users": [103], "candidates": ITEMS, "request": {"device": "phone"}}, "request"),
        ({"users": [103] * 21, "candidates": ITEMS}, "max_users"),
        ({"users": 7}, "users"),
    ],
)
def test_a_bad_request_fails_alone(service: ScoringService, bad: dict[str, Any], words: str) -> None:
    good = {"users": [103], "candidates": ITEMS, "now": NOW}
    expected = service.scorer.score([103], ITEMS, now=NOW)[0]
    assert_fails_alone(service, good, bad, expected, words)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"users": ["u3"], "candidates": [10]}, "candidates: this vocabulary has string ids, got int 10"),
        ({"users": ["u3"], "candidates": ["i0", 10]}, "candidates: this vocabulary has string ids"),
        ({"users": ["u3"], "candidates": [["i0", 10]]}, "candidates: this vocabulary has string ids"),
        ({"users": [3], "candidates": ["i0"]}, "user ids of the store are of type str"),
        ({"users": ["u3", 3], "candidates": ["i0"]}, "user ids of the store are of type str"),
        ({"users": ["u3"], "candidates": ["i0"], "tail": [[{"item": 10, "time": 0}]]}, "tail.items: this vocabulary"),
    ],
)
def test_ids_of_the_wrong_type_fail_alone(named: ScoringService, bad: dict[str, Any], words: str) -> None:
    """A request has the same answer whether or not others are scored in the same call."""
    good = {"users": ["u3"], "candidates": ["i0", "i10"], "tail": [[{"item": "i20", "time": 0}]]}
    expected = named.scorer.score(["u3"], ["i0", "i10"], tail=tail_of([[TailEvent("i20", 0)]]))[0]
    with pytest.raises(Exception, match=words):
        named.scored(named.checked(json.dumps(bad).encode(), JSON), JSON)
    assert_fails_alone(named, good, bad, expected, words)


def test_a_panic_of_a_joint_call_leaves_nobody_waiting(
    service: ScoringService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Panics of extensions in Rust are not Exceptions."""

    class PanicError(BaseException):
        pass

    score = service.scorer.score

    def panicking(users: list[int], *arguments: Any, **options: Any) -> Any:
        if len(users) > 1:
            raise PanicError
        return score(users, *arguments, **options)

    monkeypatch.setattr(service.scorer, "score", panicking)
    batches, body = ScoreBatches(), {"users": [103], "candidates": ITEMS, "now": NOW}
    entries = entered(batches, body, body, {**body, "users": [103, 103]})
    for entry in entries[:2]:
        assert len(scores(batches.answer(entry, service).body)) == 1
    assert all(entry.result.done() for entry in entries)
    with pytest.raises(PanicError):
        batches.answer(entries[2], service)


def test_batches_are_limited(service: ScoringService) -> None:
    body = {"users": [103], "candidates": [0], "now": NOW}
    batches = ScoreBatches()
    for entry in entered(batches, *[body] * (2 * MAX_REQUESTS)):
        batches.answer(entry, service)
    assert service.scorer.stats().calls == 2
    long = {"users": [103], "candidates": [1_000_000] * (MAX_BYTES // 9), "now": NOW}
    for entry in entered(batches, long, body, body):
        batches.answer(entry, service)
    assert service.scorer.stats().calls == 4


def test_who_leaves_is_not_scored(service: ScoringService) -> None:
    body = {"users": [103], "candidates": [0], "now": NOW}
    batches = ScoreBatches()
    first, gone, last = entered(batches, body, body, body)
    batches.leave(gone)
    batches.answer(first, service)
    assert service.scorer.stats().candidates == 2
    assert gone.result.cancelled() and last.result.done()


def test_a_call_that_starts_after_its_client_left_ends(service: ScoringService) -> None:
    """Such as one that waited for its model to be opened."""
    batches = ScoreBatches()
    (entry,) = entered(batches, {"users": [103], "candidates": [0], "now": NOW})
    batches.leave(entry)
    with pytest.raises(CancelledError):
        batches.answer(entry, service)
    assert service.scorer.stats().candidates == 0


def test_unknown_users_are_refused_one_by_one(served: Served) -> None:
    with Scorer.open(served.model_dir, served.store, on_missing="raise") as scorer:
        batches, service = ScoreBatches(), ScoringService(scorer, ServeConfig())
        known, unknown = entered(
            batches, {"users": [103], "candidates": [0], "now": NOW}, {"users": [999], "candidates": [0], "now": NOW}
        )
        assert batches.answer(known, service).num_candidates == 1
        with pytest.raises(UnknownUserError):
            batches.answer(unknown, service)


def test_the_queue_refuses_and_forgets() -> None:
    """Beyond the limit at once, and after the deadline without starting."""
    queue, begun, free, ran = ScoringQueue(1, 2), threading.Event(), threading.Event(), []

    def hold() -> int:
        begun.set()
        assert free.wait(60)
        return 7

    async def use() -> None:
        running = asyncio.create_task(queue.run(hold, 60))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        body = {1}
        kept = weakref.ref(body)
        with pytest.raises(DeadlineError):
            await queue.run(partial(ran.append, body), 0.01)
        del body
        gc.collect()
        assert kept() is None
        waiting = asyncio.create_task(queue.run(lambda: 8, 60))
        await asyncio.sleep(0)
        assert queue.depth == 2
        with pytest.raises(OverloadedError):
            await queue.run(lambda: ran.append(2), 60)
        free.set()
        assert (await running, await waiting) == (7, 8)

    asyncio.run(use())
    queue.close()
    assert not ran and queue.depth == 0
