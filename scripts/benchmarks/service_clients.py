"""Clients of the service in a soak test: each sends questions at a steady rate on a connection of its own.

Around each question, a client asks on the same connection, and so the same worker, what is in service. A client whose
connection breaks does what the guide says: it waits briefly, connects again, and sends the question again, but only
once.
"""

from __future__ import annotations

import json
import random
import threading
import time
import traceback
from itertools import count

from scripts.benchmarks.serve_load import Connection, get
from scripts.benchmarks.service_questions import ServiceQuestion
from scripts.benchmarks.soak_load import SoakAnswer, SoakFailure, SoakRefusal, SoakStage

CLIENTS = 8
QUESTIONS_PER_CONNECTION = 10
"""On average. New connections reach the workers that were started meanwhile."""
RETRY_PAUSE_S = 0.5
TIMEOUT_S = 60.0
FOLLOW_S = 20.0
"""Longest time in which a worker follows a publication on a busy core."""
OVERLOADED = 429


def send_questions(stage: SoakStage, port: int, per_second: float) -> None:
    """A process: all clients together send so many questions per second until the stage stops."""
    clients = [ServiceClient(stage, port, number) for number in range(CLIENTS)]
    threads = [threading.Thread(target=client.run, args=(CLIENTS / per_second,)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class ServiceClient:
    """One connection, and what it has learned of the service."""

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
