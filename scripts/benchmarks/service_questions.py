"""Questions for the soak test of the service: as an HTTP request, and as calls of a scorer with the same answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from scripts.benchmarks.serve_load import encoded, get
from scripts.benchmarks.soak_load import LATER_MS, Arrays
from scripts.benchmarks.workloads import ACTIONS
from vista.arrays import offsets_of
from vista.scorer import Scorer, Tail

TASK = "click"
MSGPACK = "application/msgpack"
HOUR_MS = 3_600_000
Body = dict[str, Any]


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
