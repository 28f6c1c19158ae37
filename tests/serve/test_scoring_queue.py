"""What waits in a worker: joint calls, the queue, requests for models that are closed, probes, and metrics."""

from __future__ import annotations

import asyncio
import gc
import json
import shutil
import threading
import weakref
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.conftest import ITEMS, USERS, Served, run_python, untrained
from tests.scorer.test_adapters import write_adapter
from tests.serve.conftest import NOW, TOLERANCE, save_other_stage_2
from vista.config import ServeConfig
from vista.errors import DeadlineError, OverloadedError, UnknownUserError
from vista.log.event_log import EventLog
from vista.refresh import refresh
from vista.scorer import Scorer
from vista.serve import application, served_models, worker
from vista.serve.application import ScoringQueue, make_application
from vista.serve.scoring_service import (
    JSON,
    MAX_BYTES,
    MAX_REQUESTS,
    MAX_VALUES,
    MSGPACK,
    Entry,
    ScoreBatches,
    ScoringService,
    TailEvent,
    parsed,
    tail_of,
)
from vista.serve.served_models import ServedModels
from vista.serve.service_metrics import ServiceMetrics

EVENT = {"item": 10, "time": NOW - 1000, "action": "like"}


@pytest.fixture
def service(served: Served) -> Iterator[ScoringService]:
    with Scorer.open(served.model_dir, served.store) as scorer:
        yield ScoringService(scorer, ServeConfig(max_users=20))


@pytest.fixture(scope="module")
def named(order_log: EventLog, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScoringService]:
    """A service of a model whose ids are texts, and which has no times."""
    folder = tmp_path_factory.mktemp("named")
    model = untrained(order_log)
    model.save_pretrained(folder / "model")
    refresh(model, order_log, folder / "store")
    with Scorer.open(folder / "model", folder / "store") as scorer:
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
        given, expected = json.loads(answer.body), json.loads(alone.body)
        for row, of_alone in zip(given.pop("scores"), expected.pop("scores"), strict=True):
            np.testing.assert_allclose(row, of_alone, atol=TOLERANCE)
        assert given == expected and len(given["known_users"]) == len(body["users"])
    held = np.frombuffer(msgspec.msgpack.decode(answers[-1].body)["scores"], np.float32)
    np.testing.assert_allclose(held, service.scorer.score([103], ITEMS, now=NOW)[0], atol=TOLERANCE)


def test_requests_that_wait_together_have_their_own_adapters(served: Served, tmp_path: Path) -> None:
    for seed, name in enumerate(("de", "fr")):
        write_adapter(served.model, tmp_path / f"{name}.adapter", np.random.default_rng(seed))
    names = [None, "de", "fr", "de", None, "nl", "fr"]
    bodies = [{"users": [103], "candidates": ITEMS, "now": NOW, "adapter": name} for name in names]
    with Scorer.open(served.model_dir, served.store, adapter=tmp_path) as scorer:
        service, batches = ScoringService(scorer, ServeConfig()), ScoreBatches()
        entries = entered(batches, *bodies)
        for name, entry in zip(names, entries, strict=True):
            if name == "nl":
                with pytest.raises(ValueError, match="adapter: 'nl' is not one of this scorer's adapters"):
                    batches.answer(entry, service)
                continue
            expected = scorer.score([103], ITEMS, now=NOW, adapter=name)[0]
            np.testing.assert_allclose(scores(batches.answer(entry, service).body)[0], expected, atol=TOLERANCE)
        ranking = json.loads(
            service.rank(json.dumps({"user": 103, "now": NOW, "adapter": "fr"}).encode(), JSON, 10).body
        )
        expected, plain = (scorer.rank(103, now=NOW, adapter=name).items.tolist() for name in ("fr", None))
        assert ranking["items"] == expected != plain


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
        ({"users": [103, 104], "candidates": [ITEMS]}, "has 1 lists, but there are 2 users"),
        ({"users": [103] * 21, "candidates": ITEMS}, "max_users"),
    ],
)
def test_a_bad_request_fails_alone(service: ScoringService, bad: dict[str, Any], words: str) -> None:
    good = {"users": [103], "candidates": ITEMS, "now": NOW}
    expected = service.scorer.score([103], ITEMS, now=NOW)[0]
    assert_fails_alone(service, good, bad, expected, words)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"users": ["u3"], "candidates": [["i0", 10]]}, "candidates: this vocabulary has string ids"),
        ({"users": [3], "candidates": ["i0"]}, "user ids of the store are of type str"),
        ({"users": ["u3"], "candidates": ["i0"], "tail": [[{"item": 10, "time": 0}]]}, "tail.items: this vocabulary"),
    ],
)
def test_ids_of_the_wrong_type_fail_alone(named: ScoringService, bad: dict[str, Any], words: str) -> None:
    """A request has the same answer whether or not others are scored in the same call."""
    good = {"users": ["u3"], "candidates": ["i0", "i10"], "tail": [[{"item": "i20", "time": 0}]]}
    expected = named.scorer.score(["u3"], ["i0", "i10"], tail=tail_of([[TailEvent("i20", 0)]], named.scorer.model))[0]
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


def test_an_error_after_the_deadline_keeps_no_body(service: ScoringService) -> None:
    """The frames of its traceback refer to the request, which refers to the error: a cycle until they are cleared."""
    queue, batches, begun, free = ScoringQueue(1, 1), ScoreBatches(), threading.Event(), threading.Event()

    def answer(entry: Entry) -> Any:
        begun.set()
        assert free.wait(60)
        return batches.answer(entry, service)

    async def use() -> weakref.ref[Any]:
        (entry,) = entered(batches, {"users": [103], "candidates": [0], "request": {"device": "phone"}})
        late = asyncio.create_task(queue.run(partial(answer, entry), 0.5))
        await asyncio.wait([late])
        assert begun.is_set() and isinstance(late.exception(), DeadlineError)
        return weakref.ref(entry.result)

    gc.collect()
    gc.disable()
    try:
        kept = asyncio.run(use())
        free.set()
        queue.close()
        assert kept() is None
    finally:
        gc.enable()


TIMEOUT_S = 60


class BusyService:
    """The application of two models, whose only scoring thread is busy until it is released."""

    def __init__(self, two_models: dict[str, Path], store: Path) -> None:
        configs = {
            name: ServeConfig(model=str(folder), store=str(store), deadline_s=TIMEOUT_S)
            for name, folder in two_models.items()
        }
        metrics = ServiceMetrics()
        self.models = ServedModels(configs, None, metrics)
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

    async def scores(self, model: str, *, spaces: int = 0) -> Any:
        """Scores of USERS from a model; so many spaces are added to the body."""
        body = json.dumps({"users": USERS, "candidates": ITEMS, "now": NOW, "model": model}).encode() + b" " * spaces
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
def two_models(served: Served, tmp_path: Path) -> dict[str, Path]:
    shutil.copytree(served.model_dir, tmp_path / "a")
    return {"a": tmp_path / "a", "b": save_other_stage_2(tmp_path / "a", tmp_path / "b")}


@pytest.fixture
def opened_models(
    served: Served, two_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[BusyService, list[int]]]:
    """The service, and the threads that opened models."""
    opener, threads = served_models.open_warm_scorer, list[int]()

    def open_warm_scorer(config: ServeConfig) -> Scorer:
        threads.append(threading.get_ident())
        return opener(config)

    monkeypatch.setattr(served_models, "open_warm_scorer", open_warm_scorer)
    with closing(BusyService(two_models, served.store)) as opened:
        yield opened, threads


def expected(served: Served, folder: Path) -> Any:
    with Scorer.open(folder, served.store) as scorer:
        return scorer.score(USERS, ITEMS, now=NOW)


def ran(scenario: Callable[[], Awaitable[Any]]) -> Any:
    async def limited() -> Any:
        return await asyncio.wait_for(scenario(), TIMEOUT_S)

    return asyncio.run(limited())


def test_large_bodies_do_not_hold_up_the_event_loop(
    opened_models: tuple[BusyService, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their values are counted once, in another thread; also the model that they name is found there."""
    service, _ = opened_models
    threads, parsers = list[int](), list[int]()

    def has_few_values(*_: Any, **__: Any) -> bool:
        threads.append(threading.get_ident())
        return True

    def noted(*arguments: Any) -> Any:
        parsers.append(threading.get_ident())
        return parsed(*arguments)

    monkeypatch.setattr("vista.serve.scoring_service.has_few_values", has_few_values)
    monkeypatch.setattr(application, "parsed", noted)
    ran(lambda: service.scores("a", spaces=MAX_VALUES))
    assert len(threads) == len(parsers) == 1 and threading.get_ident() not in threads + parsers


def test_models_are_opened_beside_a_busy_thread(
    served: Served, two_models: dict[str, Path], opened_models: tuple[BusyService, list[int]]
) -> None:
    """Requests for two models that are not open: both are answered although the scoring thread is
    busy, and each model is opened once."""
    busy, threads = opened_models

    async def scenario() -> Any:
        await busy.busy()
        answers = await asyncio.gather(busy.scores("a"), busy.scores("b"))
        assert not busy.released.is_set()
        busy.released.set()
        return answers

    for scores, folder in zip(ran(scenario), two_models.values(), strict=True):
        np.testing.assert_allclose(scores, expected(served, folder), atol=TOLERANCE)
    assert len(threads) == 2 and busy.scoring_thread not in threads


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
    models = ServedModels({"default": config}, None, metrics)
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


def test_the_parent_of_workers_loads_neither_torch_nor_the_packages_of_the_service() -> None:
    """It would keep their memory, and prometheus_client reads a variable that `run_server` removes first."""
    code = (
        "import sys, vista.serve.worker_pool; print({'torch', 'lmdb', 'fastapi', 'prometheus_client'} & {*sys.modules})"
    )
    assert run_python(code).stdout == "set()\n"
