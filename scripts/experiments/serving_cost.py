"""Costs of a model: the time of a request with 500 candidates, and the speed of training.

VISTA answers through the scorer, from its store. A baseline reads the user's raw history from the log in the request.
Requests have one user each and run one after the other; all models get the same users and candidates.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vista.arrays import Int
from vista.evaluation.answers import RawHistoryAnswers
from vista.log.event_log import EventLog
from vista.model.baselines.history_model import HistoryModel
from vista.model.inference import item_vectors
from vista.scorer import Scorer

NUM_CANDIDATES, NUM_REQUESTS, WARM_UP = 500, 60, 10


def scorer_latency_ms(scorer: Scorer, log: EventLog) -> float:
    """Median over requests at the end of the log, for the first task, or for the next item if there is no task."""
    users, items = _workload(log)
    candidates, ids = scorer.encode(log.items.ids(items)), log.users.ids(users)
    _, now = log.time_range() or (0, 0)
    return _median_ms(lambda request: scorer.score(ids[request : request + 1], candidates, now=now))


def history_model_latency_ms(model: HistoryModel, log: EventLog) -> float:
    """Median over requests, including the lookup of the history in the memory-mapped log."""
    users, items = _workload(log)
    ask = history_model_server(model, log, items)
    return _median_ms(lambda request: ask(users[request : request + 1]))


def history_model_server(model: HistoryModel, log: EventLog, items: Int) -> Callable[[Int], Tensor]:
    """A function from users int64 [B] to a baseline's scores [B, C] from all their events.

    Args:
        items: int64 [C] candidates. Users and items are rows of the log.
    """
    rows = model.rows_of(log.items)
    candidates = torch.from_numpy(rows[items]).to(model.device)
    vectors = item_vectors(model)[candidates - 1] if not model.schema.tasks else None
    answers = RawHistoryAnswers(model, log, rows)

    def ask(users: Int) -> Tensor:
        history = answers.histories(users, log.lengths[users])
        if vectors is None:
            return model.candidate_logits(history, candidates.expand(len(users), -1), None)[..., 0].cpu()
        return (model.user_vectors(history, None) @ vectors.t()).cpu()

    return ask


def training_speed(metrics: Path) -> float:
    """Median of the events per second in a run's metrics.jsonl; NaN if the run was too short to record any."""
    rows = (json.loads(line) for line in metrics.read_text().splitlines())
    noted = [row["tokens_per_s"] for row in rows if "tokens_per_s" in row]
    return statistics.median(noted) if noted else float("nan")


def _workload(log: EventLog) -> tuple[Int, Int]:
    """Users [WARM_UP + NUM_REQUESTS] and candidates [NUM_CANDIDATES], rows of the log."""
    rng = np.random.default_rng(0)
    users = rng.choice(np.flatnonzero(log.lengths > 0), WARM_UP + NUM_REQUESTS)
    return users, rng.integers(0, log.num_items, NUM_CANDIDATES)


def _median_ms(ask: Callable[[int], object]) -> float:
    times = []
    for request in range(WARM_UP + NUM_REQUESTS):
        began = time.perf_counter()
        ask(request)
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times[WARM_UP:])
