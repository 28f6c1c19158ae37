"""What the scorer's benchmark measures against: the products of a call, a server without a store, worker processes.

Letters: B users, C candidates of each, K summary tokens, L tail length, H heads, D head dim, M model dim.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray

from scripts.benchmarks import scorer_worker
from scripts.benchmarks.rooflines import (
    CHUNKS,
    Roofline,
    Work,
    copying,
    fastest,
    packed_products,
    product_dtypes,
    products,
)
from scripts.benchmarks.scorer_worker import Opening, Order, WorkerAnswer, private_dirty_bytes
from vista.config import ModelConfig
from vista.config.choices import Precision, TargetAttentionKind
from vista.log.event_log import EventLog
from vista.model import inference
from vista.model.vista_model import VistaModel
from vista.refresh import refresh
from vista.refresh.log_items import LogItems
from vista.refresh.user_records import last_times, stored_tail
from vista.store import NO_TIMESTAMP
from vista.store.stored_batch import StoredBatch

Int = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class World:
    """A model, its folder, the log and the store of all its users."""

    model: VistaModel
    log: EventLog
    model_dir: Path
    store: Path

    @classmethod
    def make(cls, model: VistaModel, log: EventLog, folder: Path) -> World:
        """Save the model and refresh its store under `folder`."""
        world = cls(model, log, folder / "model", folder / "store")
        model.save_pretrained(world.model_dir)
        print(f"{world}: {refresh(model, log, world.store)}", flush=True)
        return world

    def __str__(self) -> str:
        return f"d={self.model.config.dim}, K={self.model.config.num_seeds}"

    def candidates(self, *shape: int) -> Int:
        """Distinct item ids of that shape, spread over the catalogue."""
        ids = self.log.items.ids(np.arange(self.log.num_items))
        return np.asarray(np.random.default_rng(7).choice(ids, shape, replace=False))

    def request(self, num_users: int, num_candidates: int) -> tuple[list[int], Int]:
        """Users 1, 2, … and their candidates: [B, C], or [C] of one user."""
        ids = self.candidates(num_users, num_candidates)
        return list(range(1, num_users + 1)), ids[0] if num_users == 1 else ids


# The roofline -------------------------------------------------------------------------------------------------------


def scorer_roofline(config: ModelConfig, num_users: int, num_candidates: int, precision: Precision) -> Roofline:
    """Of scoring: what is left to multiply when layer 1's projections of all items were made beforehand.

    Context: each layer's projections of summary and tail together, in all but the last layer (which needs keys and
    values alone) attention, output projection and, of softmax layers, feed-forward. Candidates: attention over K + L
    keys and the same of each layer, projections of all layers but the first. Bytes are the candidates' gathered vectors
    and projections.
    """
    dtype = torch.float32 if precision is Precision.float32 else torch.bfloat16
    dtypes = product_dtypes(dtype)
    dim, heads, layers = config.dim, config.num_heads, config.num_target_layers
    head_dim, hidden = dim // heads, max(8, int(dim * config.feed_forward_ratio))
    softmax = config.target_attention is TargetAttentionKind.softmax
    seeds, tail, keys = config.num_seeds, config.tail_len, config.num_seeds + config.tail_len

    def attention(rows: int, columns: int) -> list[Work]:
        several, batches = num_users * heads, (1, heads, num_users * heads)
        return [
            row_product(rows, columns, head_dim, dtypes, count=several, batches=batches),
            row_product(rows, head_dim, columns, dtypes, count=several, batches=batches),
        ]

    def mixing(rows: int) -> list[Work]:
        shapes = [(dim, dim), *([(2 * hidden, dim), (dim, hidden)] if softmax else [])]
        return [row_product(rows, n, k, dtypes, weights=True) for n, k in shapes]

    context, queries = num_users * keys, num_users * num_candidates
    last = [row_product(context, 2 * dim, dim, dtypes, weights=True)]
    inner = [row_product(context, 4 * dim, dim, dtypes, weights=True), *attention(seeds, seeds), *attention(tail, keys)]
    inner += [*mixing(context), row_product(queries, 4 * dim, dim, dtypes, weights=True)]
    each = [*attention(num_candidates, keys), *mixing(queries)]
    works = [*last, *(work.scaled(layers - 1) for work in inner), *(work.scaled(layers) for work in each)]
    return Roofline(copying(5 * queries * dim * dtype.itemsize), tuple(works))


@cache
def row_product(
    rows: int,
    n: int,
    k: int,
    dtypes: tuple[torch.dtype, ...],
    *,
    count: int = 1,
    batches: tuple[int, ...] = (1,),
    weights: bool = False,
) -> Work:
    """`count` products [rows, k] @ [k, n] in the fastest form, all rows at a time or in chunks.

    Args:
        weights: the right matrix is constant.
    """
    tried = []
    for chunk in (rows, *(chunk for chunk in CHUNKS if chunk < rows)):
        several = tuple(dict.fromkeys(batches))
        tried += products(chunk, n, k, count=count * rows / chunk, dtypes=dtypes, batches=several)
        if weights:
            tried += packed_products(chunk, n, k, count=count * rows / chunk, dtypes=dtypes)
    return fastest(tried)


# Without a store -------------------------------------------------------------------------------------------------


def recomputed_summaries(world: World, precision: Precision) -> Callable[[Sequence[int]], StoredBatch]:
    """In place of `StoreReader.get_many`: reads whole histories from the memory-mapped log, and summarizes them.

    It gives what a store that was refreshed this moment in float32 would, for users who are all in the log.
    """
    model, log, items = world.model.with_frozen("summarizer", precision), world.log, LogItems.of(world.model, world.log)

    def get_many(user_ids: Sequence[int]) -> StoredBatch:
        histories = items.model_rows(log.gather(log.users.rows(user_ids)))
        summary = inference.summarize(model, histories).numpy()
        count = histories.num_users
        return StoredBatch(
            found=np.ones(count, bool),
            summary=summary,
            tail=stored_tail(histories, model.config.tail_len),
            event_count=histories.lengths,
            last_event_ts=last_times(histories),
            created_at=np.full(count, NO_TIMESTAMP),
            history_digest=np.zeros(count, np.uint64),
        )

    return get_many


# Processes -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Worker:
    """A process of scorer_worker.py."""

    stdin: IO[str]
    stdout: IO[str]

    def send(self, order: Opening | Order) -> None:
        """Hand it its opening, or an order that `answer` will wait for."""
        self.stdin.write(json.dumps(dataclasses.asdict(order)) + "\n")
        self.stdin.flush()

    def answer(self) -> WorkerAnswer:
        """Of the order sent last.

        Raises:
            SystemExit: the process has ended.
        """
        line = self.stdout.readline()
        if not line:
            raise SystemExit("error: a worker process failed; see above")
        return WorkerAnswer(**json.loads(line))

    def serve(self, order: Order) -> WorkerAnswer:
        self.send(order)
        return self.answer()


@contextmanager
def worker(opening: Opening) -> Iterator[Worker]:
    """A fresh process of one thread that has opened a scorer, until the context ends."""
    command = [sys.executable, scorer_worker.__file__]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=_one_thread()
    ) as child:
        assert child.stdin is not None and child.stdout is not None
        found = Worker(child.stdin, child.stdout)
        found.send(opening)
        found.serve(Order(requests=3))
        yield found


def idle_torch_bytes() -> int:
    """Private memory of a fresh process that has imported torch and nothing else."""
    command = "import torch; print(open('/proc/self/smaps_rollup').read())"
    done = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, check=True, env=_one_thread()
    )
    return private_dirty_bytes(done.stdout)


def _one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}
