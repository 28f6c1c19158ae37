"""Soak test of the service: HTTP requests while its store, its model, and its workers change.

`vista serve` runs with two workers. Eight clients ask for scores, rankings, predictions, and records at a steady rate,
each on a connection of its own. Meanwhile, a keeper appends events to the log, refreshes incrementally and in full,
erases users, compacts the store, and replaces the model, and workers are killed (SIGKILL) at random. This process is
the judge: it asks every question again of a scorer of frozen copies. An answer is right if it equals that of one
generation and one model that the worker had in service during the request. It is wrong if it contains a user whose
erasure ended before the request. Failed are all requests without an answer of status 200 (or 404 for the record of a
missing user), except for those with status 429, which are counted, and those whose connection broke, which are sent
once more on a new one.

    python -m scripts.benchmarks.soak_serve --minutes 10
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from itertools import count, pairwise
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from scripts.benchmarks.benchmark import RESULTS, BenchmarkRecorder
from scripts.benchmarks.serve_load import Connection, ServiceProcess, encoded, get, serving
from scripts.benchmarks.soak import (
    HANGS_S,
    LATER_MS,
    Arrays,
    Soak,
    SoakAnswer,
    SoakFailure,
    SoakJudge,
    SoakRefusal,
    SoakStage,
    record,
)
from scripts.benchmarks.workloads import ACTIONS
from vista.arrays import offsets_of
from vista.device import set_threads
from vista.scorer import Scorer, Tail

TASK = "click"
MSGPACK = "application/msgpack"
HOUR_MS = 3_600_000
Body = dict[str, Any]
CLIENTS = 8
QUESTIONS_PER_CONNECTION = 10
"""On average. New connections reach the workers that were started meanwhile."""
RETRY_PAUSE_S = 0.5
TIMEOUT_S = 60.0
FOLLOW_S = 20.0
"""Longest time in which a worker follows a publication on a busy core."""
OVERLOADED = 429
START_S = 600.0
"""Longest time until another worker listens."""
WORKERS = 2
SETTINGS = (f"workers={WORKERS}", "on_missing=nan", f"task={TASK}", "reload_s=0.2", "deadline_s=20")
"""All processes share a core or two, hence the long deadline."""
LOG_CHARACTERS = 20_000
"""Most characters of the service's log that are printed after a failure."""
LAG = 2
"""Generations that one worker may be behind another."""


class ServiceQuestion:
    """Scores, rankings, and records of some users, also of unknown ones; the number determines it.

    Args:
        number: of the question.
        num_users: users 1, 2, … have records at first.
        num_items: items 1, 2, … are known.
    """

    def __init__(self, number: int, num_users: int, num_items: int) -> None:
        self._rng = np.random.default_rng(number)
        self._num_users, self._num_items = num_users, num_items
        kinds = (self._score, self._packed, self._ragged, self._tails, self._predict, self._rank, self._user)
        self.request = b""
        self._decode: Callable[[bytes], Any] = json.loads
        self._of_scorer: Callable[[Scorer], Arrays]
        self._of_body: Callable[[Any], Arrays]
        make = kinds[self._rng.integers(len(kinds))]
        self.kind = make.__name__
        make()

    def of_scorer(self, scorer: Scorer) -> Arrays:
        """The answer of a scorer, and the generation that it read."""
        arrays = self._of_scorer(scorer)
        if self.kind == "_user":
            return arrays
        assert scorer.answered_from is not None
        return [*arrays, np.array([scorer.answered_from.generation])]

    def of_answer(self, status: int, body: bytes) -> Arrays:
        """The service's answer in the same form.

        Raises:
            ValueError: the status is neither 200 nor, for a user's record, 404.
        """
        if status == 404 and self.request.startswith(b"GET"):
            return [np.zeros(0)]
        if status != 200:
            raise ValueError(f"status {status}: {body.decode(errors='replace')}")
        answer = self._decode(body)
        arrays = self._of_body(answer)
        return arrays if self.kind == "_user" else [*arrays, np.array([answer["generation"]])]

    def _users(self, size: int) -> list[int]:
        return list(self._rng.integers(1, self._num_users + self._num_users // 50 + 1, size).tolist())

    def _items(self, size: int) -> list[int]:
        return list(self._rng.integers(1, self._num_items + self._num_items // 50 + 1, size).tolist())

    def _post(self, path: str, body: Body) -> None:
        self.request = encoded(path, json.dumps({**body, "now": LATER_MS}).encode())

    def _score(self) -> None:
        """Few candidates, so that the service scores several such requests in one call if they wait together."""
        users, items = self._users(1), self._items(20)
        self._post("/v1/score", {"users": users, "candidates": items})
        self._of_body = lambda answer: [_scores(answer["scores"])]
        self._of_scorer = lambda scorer: [scorer.score(users, items, now=LATER_MS).ravel()]

    def _packed(self) -> None:
        users, items = self._users(2), np.array(self._items(150), "<i8")
        body = {"users": users, "candidates": items.tobytes(), "now": LATER_MS}
        self.request = encoded("/v1/score", msgspec.msgpack.encode(body), MSGPACK)
        self._decode = msgspec.msgpack.decode
        self._of_body = lambda answer: [np.frombuffer(answer["scores"], "<f4")]
        self._of_scorer = lambda scorer: [scorer.score(users, items, now=LATER_MS).ravel()]

    def _ragged(self) -> None:
        users, rows = self._users(5), [self._items(int(count)) for count in self._rng.integers(1, 30, 5)]
        values, offsets = [item for row in rows for item in row], offsets_of(np.array(list(map(len, rows))))
        self._post("/v1/score", {"users": users, "candidates": rows})
        self._of_body = lambda answer: [_scores([one for row in answer["scores"] for one in row])]
        self._of_scorer = lambda scorer: [scorer.score(users, (values, offsets), now=LATER_MS)]

    def _tails(self) -> None:
        """With events since the refresh, which models with a shorter tail read in part."""
        users, items, counts = self._users(4), self._items(50), self._rng.integers(0, 12, 4)
        total = int(counts.sum())
        of_tail, times = self._items(total), LATER_MS - self._rng.integers(1, HOUR_MS, total)
        actions, offsets = self._rng.integers(0, len(ACTIONS), total), offsets_of(counts)
        events = [
            {"item": item, "time": int(time), "action": ACTIONS[action]}
            for item, time, action in zip(of_tail, times, actions, strict=True)
        ]
        tails = [events[start:stop] for start, stop in pairwise(offsets)]
        self._post("/v1/score", {"users": users, "candidates": items, "tail": tails})
        self._of_body = lambda answer: [_scores(answer["scores"])]

        def of_scorer(scorer: Scorer) -> Arrays:
            tail = Tail(np.array(of_tail, np.int32), times, np.array(ACTIONS)[actions], offsets)
            return [scorer.score(users, items, tail=tail, now=LATER_MS).ravel()]

        self._of_scorer = of_scorer

    def _predict(self) -> None:
        users, items = self._users(8), self._items(25)
        self._post("/v1/predict", {"users": users, "candidates": items})
        self._of_body = lambda answer: _by_name(answer["scores"])
        self._of_scorer = lambda scorer: _by_name(scorer.predict(users, items, now=LATER_MS))

    def _rank(self) -> None:
        """The best items of the whole catalog."""
        user = self._users(1)[0]
        self._post("/v1/rank", {"user": user, "top_k": 20, "exclude_tail": True})

        def of_body(answer: Any) -> Arrays:
            return [np.array(answer["items"], np.int64), _scores(answer["scores"]), np.array([answer["num_dropped"]])]

        def of_scorer(scorer: Scorer) -> Arrays:
            ranking = scorer.rank(user, top_k=20, exclude_tail=True, now=LATER_MS)
            return [ranking.items.astype(np.int64), ranking.scores, np.array([ranking.num_dropped])]

        self._of_body, self._of_scorer = of_body, of_scorer

    def _user(self) -> None:
        user = self._users(1)[0]
        self.request = get(f"/v1/users/{user}")

        def of_body(answer: Any) -> Arrays:
            numbers = [answer["generation"], answer["num_events"], answer["newest_event_at"]]
            tail = [[event["time"], event["item"], ACTIONS.index(event["action"])] for event in answer["tail"]]
            return [np.array(numbers, np.int64), np.array(answer["summary_norms"]), np.array(tail, np.int64)]

        def of_scorer(scorer: Scorer) -> Arrays:
            found, model = scorer.store.get_many([user]), scorer.model
            if not found.found[0]:
                return [np.zeros(0)]
            numbers = [scorer.manifest.generation, found.event_count[0], found.last_event_ts[0]]
            norms = np.linalg.norm(found.summary[0].astype(np.float64), axis=1)
            names = [model.schema.actions[code] for code in found.tail.actions]
            items = model.items.ids(found.tail.items - 1)
            columns = [found.tail.times, items, [ACTIONS.index(name) for name in names]]
            return [np.array(numbers, np.int64), norms, np.array(columns, np.int64).T]

        self._of_body, self._of_scorer = of_body, of_scorer


def _scores(values: Any) -> NDArray[Any]:
    """Scores of JSON in one row; null is NaN."""
    return np.array(values, np.float32).ravel()


def _by_name(scores: dict[str, Any]) -> Arrays:
    return [_scores(scores[name]) for name in sorted(scores)]


def send_questions(stage: SoakStage, port: int, per_second: float) -> None:
    """A process: all clients together send so many questions per second until the stage stops."""
    clients = [ServiceClient(stage, port, number) for number in range(CLIENTS)]
    threads = [threading.Thread(target=client.run, args=(CLIENTS / per_second,)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class ServiceClient:
    """One connection, and what it has learned of the service.

    Around each question, it asks on the same connection, and so the same worker, what is in service. If the connection
    breaks, it does what the guide says: it waits briefly, connects again, and sends the question again, but only once.
    """

    def __init__(self, stage: SoakStage, port: int, number: int) -> None:
        self._stage, self._port, self._number = stage, port, number
        self._random = random.Random(number)
        self._connection: Connection | None = None
        self._published, self._noticed_s = 0, 0.0

    def run(self, gap_s: float) -> None:
        """Send a question every `gap_s` seconds, or as soon as the last one is answered."""
        due = time.perf_counter() + self._random.random() * gap_s
        for question in count(self._number * 10**9):
            if self._stage.stop.wait(max(0.0, due - time.perf_counter())):
                break
            try:
                self._ask(question)
            except Exception:
                where = f"client {self._number}, question {question}"
                self._stage.said.put(SoakFailure(f"{where}: {traceback.format_exc()}"))
                self._disconnect()
            if self._random.random() * QUESTIONS_PER_CONNECTION < 1:
                self._disconnect()
            due = max(due + gap_s, time.perf_counter())
        self._disconnect()

    def _ask(self, number: int) -> None:
        """Send a question and report its answer.

        Raises:
            ConnectionError: the connection broke twice.
            ValueError: the answer is an error.
            AssertionError: the service is not ready, or does not follow the store.
        """
        question = ServiceQuestion(number, self._stage.num_users, self._stage.num_items)
        for attempt in range(2):
            try:
                if self._connection is None:
                    self._connection = Connection(self._port, TIMEOUT_S)
                    status, ready = self._connection.send(get("/readyz"))
                    assert status == 200, ready
                since, before = self._stage.done.value, self._in_service(self._connection)
                self._require_following(before)
                began = time.perf_counter()
                status, body = self._connection.send(question.request)
                latency = time.perf_counter() - began
                until = self._stage.begun.value
                if status == OVERLOADED:
                    self._stage.said.put(SoakRefusal())
                    return
                after = self._in_service(self._connection)
            except ConnectionError:
                self._disconnect()
                if attempt:
                    raise
                time.sleep(RETRY_PAUSE_S)
                continue
            generations, tail_lens = zip(before, after, strict=True)
            arrays = question.of_answer(status, body)
            self._stage.said.put(
                SoakAnswer(self._number, number, since, until, generations, tail_lens, latency, arrays, attempt)
            )
            return

    def _in_service(self, connection: Connection) -> tuple[int, int]:
        """Generation of the store, and length of the model's tail."""
        status, body = connection.send(get("/v1/model"))
        while status == OVERLOADED:
            time.sleep(RETRY_PAUSE_S)
            status, body = connection.send(get("/v1/model"))
        if status != 200:
            raise ValueError(f"/v1/model: status {status}: {body.decode(errors='replace')}")
        answer = json.loads(body)
        return answer["generation"], answer["tail_len"]

    def _require_following(self, before: tuple[int, int]) -> None:
        published, now = self._stage.served.value, time.monotonic()
        if published != self._published:
            self._published, self._noticed_s = published, now
        late = now - self._noticed_s
        assert before[0] >= self._published or late < FOLLOW_S, f"gen-{published} is not in service after {late:.0f} s"

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class WorkerKiller:
    """A thread that sends SIGKILL to a random worker, again and again, between `start` and `stop`.

    It waits until all workers listen before it kills the next one: without any, nobody could answer.

    Args:
        service: with several workers.
        num_workers: number of its workers.
        gap_s: mean time from a complete service to the next kill; gaps are random (exponential).
    """

    def __init__(self, service: ServiceProcess, num_workers: int, gap_s: float) -> None:
        self._service, self._num_workers, self._gap_s = service, num_workers, gap_s
        self._random = random.Random(0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.restarts_s: list[float] = []
        """Per kill, the time until another worker listened."""
        self.failures: list[str] = []

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End, once all workers listen."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._random.expovariate(1 / self._gap_s)):
            worker = self._random.choice(self._service.workers())
            os.kill(worker, signal.SIGKILL)
            began = time.monotonic()
            while not self._is_complete(without=worker):
                if time.monotonic() - began > START_S:
                    self.failures.append(f"no worker replaced {worker} within {START_S:.0f} s")
                    return
                time.sleep(0.1)
            self.restarts_s.append(time.monotonic() - began)

    def _is_complete(self, without: int) -> bool:
        """Whether all workers listen. The port of a process that was killed may be open for a moment longer."""
        workers = self._service.workers()
        enough = len(workers) == self._num_workers == self._service.num_listening()
        return enough and without not in workers


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the soak test; return 1 if anything failed or was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--users", type=int, default=2000)
    parser.add_argument("--pause", type=float, default=2.0, metavar="SECONDS", help="pause between operations")
    parser.add_argument("--out", type=Path, default=RESULTS / "bench_soak_serve.jsonl", metavar="FILE")
    parser.add_argument("--rate", type=float, default=8.0, help="requests per second of all clients together")
    parser.add_argument("--kill", type=float, default=10.0, metavar="SECONDS", help="mean time between two kills")
    options = parser.parse_args(arguments)
    set_threads(1)
    seconds = 60 * options.minutes
    with tempfile.TemporaryDirectory(prefix="vista-soak-") as folder:
        stage = SoakStage(Path(folder), options.users, num_items=500)

        def ask(scorer: Scorer, question: int) -> Arrays:
            return ServiceQuestion(question, stage.num_users, stage.num_items).of_scorer(scorer)

        with serving(stage.model, stage.store, *SETTINGS) as service:
            clients = stage.context.Process(target=send_questions, args=(stage, service.port, options.rate))
            killer = WorkerKiller(service, WORKERS, options.kill)
            soak = Soak(stage, SoakJudge(stage, ask, LAG), [clients], CLIENTS, options.pause)
            try:
                soak.run(seconds, min(60.0, seconds / 5), killer.start)
            finally:
                killer.stop()
            soak.failures += killer.failures
            scrape_ms = wait_until_current(service, stage, soak)
    status, log = service.process.returncode, "".join(service.lines)
    if status or "Traceback" in log or not log.endswith("stopped\n"):
        soak.failures.append(f"the service ended with {status}, or its log has a traceback")
    if soak.failures:
        print("".join(line for line in service.lines if " stays in service" not in line)[-LOG_CHARACTERS:])
    recorder = BenchmarkRecorder("soak_serve", out=options.out)
    case = f"{options.minutes:g} minutes, {WORKERS} workers, {CLIENTS} clients"
    record(soak, recorder, case)
    recorder.add(f"{case}: refused with 429", soak.num_refused, "requests")
    recorder.add(f"{case}: workers killed", len(killer.restarts_s), "workers", bar="value > 0")
    recorder.add(f"{case}: sent again after a broken connection", soak.num_retries, "requests")
    if killer.restarts_s:
        restart = median(killer.restarts_s)
        recorder.add(f"{case}: median time until another worker listens", restart, "s")
    recorder.add(f"{case}: time of /metrics in the end", scrape_ms, "ms")
    recorder.print_summary()
    return int(any(row["met"] is False for row in recorder.rows))


def wait_until_current(service: ServiceProcess, stage: SoakStage, soak: Soak) -> float:
    """Require that all workers reach the published generation; returns the time of the last scrape in ms."""
    connection, deadline = Connection(service.port), time.monotonic() + HANGS_S
    while time.monotonic() < deadline:
        began = time.perf_counter()
        status, page = connection.send(get("/metrics"))
        took = time.perf_counter() - began
        if status == 200 and f'\nvista_generation{{model="default"}} {stage.served.value:.1f}\n' in page.decode():
            break
        time.sleep(0.2)
    else:
        soak.failures.append(f"gen-{stage.served.value} is not in service in all workers: {page.decode()[-2000:]}")
    connection.close()
    return 1e3 * took


if __name__ == "__main__":
    sys.exit(main())
