"""Benchmark requests against the length of the history, the roofline, and models without counters and features.

    python -m scripts.benchmarks.bench_scorer

A request is `scorer.score(users, candidates)`: the store's look-up, checksum and dequantization, and target attention
of all candidates over summary and tail. Users are complete: their events are in an EventLog, a refresh writes their
summaries (int8) and tails to a store, and a Scorer opens the store and the model's folder. Weights are random, and
nothing is cached between calls.

- history: users with 10^3 and 10^6 events and the same candidates, and candidate lists of other lengths; also the CPU
  time of one thread, to which `fit_planner` fits what `vista plan` assumes.
- roofline: the matrix products that no implementation can avoid, in their fastest forms on this machine, for several
  numbers of candidates and users, encoded beforehand.
- counters: models with counters of 64 items per user, the default, against the same models without; and those with
  counters of a category too.
- backends: the C++ library against torch, and against onnxruntime, which runs an export (`vista export`) over what the
  store returns. Each has one thread, and its CPU time is measured.
- features: models with eight features of items and four of requests, against the same models with ids alone.
- recompute: the same scorer without a store, which reads and summarizes the history in the request, with bidirectional
  mixing: the paper without a cache.

bench_lengths compares with models that read the whole history in the request.

Contestants alternate, so that a slow phase of the machine affects all of them.

Letters: B users, C candidates of each.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnxruntime
import torch

from scripts.benchmarks.benchmark import BenchmarkRecorder, benchmark_parser, interleaved, recording
from scripts.benchmarks.rooflines import (
    CHUNKS,
    Roofline,
    RooflineWork,
    copying,
    fastest,
    packed_products,
    product_dtypes,
    products,
)
from scripts.benchmarks.workloads import TASK, lifelong_log, untrained, with_drawn_weights
from vista.arrays import Int
from vista.config import DataConfig, ModelConfig
from vista.config.checks import Mixing, Precision
from vista.device import choose_precision, cpu_settings, keep_freed_memory, set_threads
from vista.export.formats import ONNX_FILE, write_onnx
from vista.export.serving_graph import ServingGraph, graph_inputs, request_arrays
from vista.log.event_log import EventLog
from vista.log.features import Column
from vista.log.histories import RowFeatures
from vista.log.vocabulary import Vocabulary
from vista.model import inference
from vista.model.features import FeatureSpec, RowFeatureReader
from vista.model.item_feature_table import ItemFeatureTable
from vista.model.ranking_model import NEXT_TASK
from vista.model.vista_model import VistaModel
from vista.refresh import refresh
from vista.refresh.full import last_times, stored_tail
from vista.refresh.log_reading import LogItems
from vista.scorer import Scorer
from vista.store import NO_TIMESTAMP, StoredBatch

NUM_CANDIDATES = 500
SMALL, PUBLISHED = (64, 16), (256, 128)
"""(d, K) of the models."""
CALLS = {
    "500 candidates": (1, 500),
    "50 candidates": (1, 50),
    "5,000 candidates": (1, 5000),
    "32 users x 100 candidates": (32, 100),
}
"""(B, C) of the calls that are compared with their rooflines; the other ratios are compared with the first."""
FEATURE_CALLS = {case: CALLS[case] for case in ("500 candidates", "32 users x 100 candidates")}
ROOFLINE_BARS = {Precision.float32: 1.5, Precision.bfloat16: 2.5}
PAPERS_SPEEDUP = 16.7
TOLERANCE = {Precision.float32: 1e-4, Precision.bfloat16: 2e-2}
"""Of probabilities, between calls of different shapes."""
INT8_TOLERANCE = 2e-2
"""Of probabilities, between int8 and float32 summaries; users differ by 0.1."""
NUM_VALUES = 100
"""Of the category."""
CATEGORIES_OF_ITEMS, NUMBERS_OF_ITEMS = 5, 3
REQUEST = {"device": "value 3", "surface": "value 7", "hour": 14.0, "position": 2.0}
"""The features of every request."""


@dataclass(frozen=True, slots=True)
class ScorerWorkload:
    """A model, its folder, the log, and the store of all users."""

    model: VistaModel
    log: EventLog
    model_dir: Path
    store: Path

    @classmethod
    def make(cls, model: VistaModel, log: EventLog, folder: Path) -> ScorerWorkload:
        """Save the model and refresh its store under `folder`."""
        workload = cls(model, log, folder / "model", folder / "store")
        model.save_pretrained(workload.model_dir)
        print(f"{workload}: {refresh(model, log, workload.store)}", flush=True)
        return workload

    def __str__(self) -> str:
        return f"d={self.model.config.dim}, K={self.model.config.num_seeds}"

    def candidates(self, *shape: int) -> Int:
        """Distinct item ids of this shape, from the whole catalog."""
        ids = self.log.items.ids(np.arange(self.log.num_items))
        return np.asarray(np.random.default_rng(7).choice(ids, shape, replace=False))

    @property
    def now(self) -> int:
        """The time of all requests: that of the log's newest event."""
        times = self.log.time_range()
        assert times is not None
        return times[1]

    def request(self, num_users: int, num_candidates: int) -> tuple[list[int], Int]:
        """Users 1, 2, … and their candidates: [B, C], or [C] for one user."""
        ids = self.candidates(num_users, num_candidates)
        return list(range(1, num_users + 1)), ids[0] if num_users == 1 else ids


def scorer_roofline(config: ModelConfig, num_users: int, num_candidates: int, precision: Precision) -> Roofline:
    """Roofline of scoring, with layer 1's projections of all items computed beforehand.

    Context: each layer's projections of summary and tail. All layers but the last, which needs only keys and values,
    also have attention and an output projection. Candidates: in each layer attention over K + L keys and an output
    projection, and projections in all layers but the first. Bytes are the candidates' gathered vectors and projections.
    For pointwise layers, the default.
    """
    dtype = torch.float32 if precision is Precision.float32 else torch.bfloat16
    dtypes = product_dtypes(dtype)
    dim, heads, layers = config.dim, config.num_heads, config.num_target_layers
    head_dim, seeds, tail, keys = dim // heads, config.num_seeds, config.tail_len, config.num_seeds + config.tail_len

    def attention(rows: int, columns: int) -> list[RooflineWork]:
        several, batches = num_users * heads, (1, heads, num_users * heads)
        return [
            row_product(rows, columns, head_dim, dtypes, count=several, batches=batches),
            row_product(rows, head_dim, columns, dtypes, count=several, batches=batches),
        ]

    context, queries = num_users * keys, num_users * num_candidates
    last = row_product(context, 2 * dim, dim, dtypes, weights=True)
    inner = [*attention(seeds, seeds), *attention(tail, keys), row_product(context, dim, dim, dtypes, weights=True)]
    inner += [row_product(rows, 4 * dim, dim, dtypes, weights=True) for rows in (context, queries)]
    each = [*attention(num_candidates, keys), row_product(queries, dim, dim, dtypes, weights=True)]
    works = [last, *(work.scaled(layers - 1) for work in inner), *(work.scaled(layers) for work in each)]
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
) -> RooflineWork:
    """`count` products [rows, k] @ [k, n] in the fastest form, with all rows at once or in chunks.

    Args:
        weights: whether the right matrix is constant.
    """
    tried = []
    for chunk in (rows, *(chunk for chunk in CHUNKS if chunk < rows)):
        several = tuple(dict.fromkeys(batches))
        tried += products(chunk, n, k, count=count * rows / chunk, dtypes=dtypes, batches=several)
        if weights:
            tried += packed_products(chunk, n, k, count=count * rows / chunk, dtypes=dtypes)
    return fastest(tried)


def recomputed_summaries(workload: ScorerWorkload, precision: Precision) -> Callable[[Sequence[int]], StoredBatch]:
    """A replacement of `StoreReader.get_many` that summarizes whole histories from the memory-mapped log.

    Its result equals that of a store that was just refreshed in float32. All users must be in the log.
    """
    model, log, items = (
        workload.model.with_frozen("summarizer", precision),
        workload.log,
        LogItems.of(workload.model, workload.log),
    )

    def get_many(user_ids: Sequence[int]) -> StoredBatch:
        histories = items.model_rows(log.gather(log.users.rows(user_ids)))
        summary = inference.summarize(model, histories).numpy()
        count = histories.num_users
        return StoredBatch(
            found=np.ones(count, bool),
            summary=summary,
            tail=stored_tail(model, histories),
            event_count=histories.lengths,
            last_event_ts=last_times(histories),
            created_at=np.full(count, NO_TIMESTAMP),
            history_digest=np.zeros(count, np.uint64),
            generation=1,
        )

    return get_many


def untrained_with_category(log: EventLog, *, dim: int, num_seeds: int) -> VistaModel:
    """`untrained` with counters of items and of a category, which every item has."""
    plain = untrained(log, dim=dim, num_seeds=num_seeds, counter_keys=["item"])
    codes = np.random.default_rng(0).integers(0, NUM_VALUES, log.num_items).astype(np.int32)
    values = Vocabulary.from_ids([f"value {number}" for number in range(NUM_VALUES)])
    column = Column(codes, values, np.arange(log.num_items + 1))
    columns = [FeatureSpec.of("category", column)]
    config = replace(plain.config, counter_keys=["item", "category"])
    model = VistaModel(config, replace(plain.schema, item_features=columns), log.items, DataConfig()).eval()
    model.set_item_features(ItemFeatureTable.of({"category": column}, columns))
    return model


def untrained_with_features(log: EventLog, *, dim: int, num_seeds: int) -> VistaModel:
    """`untrained` with eight features of items and four of requests, and random weights for them."""
    plain, rng = untrained(log, dim=dim, num_seeds=num_seeds), np.random.default_rng(0)
    count, values = log.num_items, Vocabulary.from_ids([f"value {number}" for number in range(100)])
    columns = {
        f"category {number}": Column(rng.integers(0, len(values), count).astype(np.int32), values, np.arange(count + 1))
        for number in range(CATEGORIES_OF_ITEMS)
    }
    columns |= {
        f"number {number}": Column(rng.lognormal(size=count).astype(np.float32)) for number in range(NUMBERS_OF_ITEMS)
    }
    of_items = [FeatureSpec.of(name, column) for name, column in columns.items()]
    drawn = {
        name: rng.integers(0, len(values), 1000).astype(np.int32)
        if isinstance(value, str)
        else rng.normal(size=1000).astype(np.float32)
        for name, value in REQUEST.items()
    }
    known = {name: values if isinstance(value, str) else None for name, value in REQUEST.items()}
    reader = RowFeatureReader.of(RowFeatures(drawn), known)
    schema = replace(plain.schema, item_features=of_items, request_features=reader.columns)
    model = VistaModel(plain.config, schema, log.items, DataConfig()).eval()
    model.set_item_features(ItemFeatureTable.of(columns, of_items))
    model.request_features = reader
    return with_drawn_weights(model)


def check(scorer: Scorer, users: Sequence[int], ids: Int, now: int, precision: Precision = Precision.float32) -> None:
    """Require probabilities that differ between users and do not depend on the other candidates of the list."""
    tolerance = TOLERANCE[precision]
    together = scorer.score(users, ids, now=now)
    rows = np.broadcast_to(ids, together.shape)
    alone = np.concatenate([scorer.score([user], row, now=now) for user, row in zip(users, rows, strict=True)])
    few = scorer.score(users, ids[..., :20], now=now)
    assert together.shape == (len(users), ids.shape[-1]) and ((together > 0) & (together < 1)).all()
    assert np.allclose(together, alone, atol=tolerance) and np.allclose(few, together[:, :20], atol=tolerance)
    assert len(users) == 1 or not np.allclose(together[0], together[1], atol=tolerance)


def open_scorer(workload: ScorerWorkload, precision: Precision = Precision.float32) -> Scorer:
    """Open a scorer as a service does."""
    return Scorer.open(workload.model_dir, workload.store, task=TASK, precision=precision)


def bench_history(recorder: BenchmarkRecorder, workload: ScorerWorkload, lengths: tuple[int, int]) -> None:
    """Time a short and a long history (users 1 and 2), and lists of candidates."""
    rounds = 9 if recorder.quick else 41
    with open_scorer(workload) as scorer:
        ids = workload.candidates(NUM_CANDIDATES)
        check(scorer, [1, 2], ids, workload.now)
        ask = partial(scorer.score, now=workload.now)
        users = interleaved(
            {"short": partial(ask, [1], ids), "long": partial(ask, [2], ids)},
            rounds=rounds,
            warmup=5,
            min_sample_s=0.02,
        )
        recorder.add_time(
            f"{workload}, {NUM_CANDIDATES} candidates: a user of {lengths[1]:,} events against one of {lengths[0]:,}",
            users["long"],
            "ms",
            baseline=users["short"],
            bar="value <= 1.05 * baseline",
        )
        lists = {count: workload.candidates(count) for count in (50, 500, 5000)}
        contestants: dict[str, Callable[[], object]] = {
            f"{count} candidates": partial(ask, [2], some) for count, some in lists.items()
        }
        contestants["500 candidates, encoded beforehand"] = partial(ask, [2], scorer.encode(lists[500]))
        for case, timing in interleaved(contestants, rounds=rounds // 2 + 1, warmup=3).items():
            recorder.add_time(f"{workload}, {case}: median", timing, "ms")
            recorder.add(f"{workload}, {case}: p99", timing.p99_s * 1e3, "ms")
        with cpu_settings(1):
            for case, timing in interleaved(contestants, rounds=rounds, warmup=3, clock=time.thread_time).items():
                recorder.add_time(f"{workload}, {case}: one core", timing, "CPU ms")


def bench_roofline(recorder: BenchmarkRecorder, workload: ScorerWorkload, precision: Precision) -> None:
    """Time calls of several shapes over the time of their matrix products."""
    rounds, first = 9 if recorder.quick else 41, None
    with open_scorer(workload, precision) as scorer:
        for case, (num_users, num_candidates) in CALLS.items():
            users, ids = workload.request(num_users, num_candidates)
            check(scorer, users, ids, workload.now, precision)
            roofline = scorer_roofline(workload.model.config, num_users, num_candidates, precision)
            call = partial(scorer.score, users, scorer.encode(ids), now=workload.now)
            assert np.allclose(call(), scorer.score(users, ids, now=workload.now), atol=TOLERANCE[precision])
            timing = interleaved(
                {"ours": call, **roofline.calls()},
                rounds=rounds,
                warmup=3,
                min_sample_s=0.005
                if recorder.quick
                else 0.02,  # as long as a call, so that interruptions affect all contestants alike
            )
            seconds, ours = roofline.seconds(timing), timing["ours"]
            name = f"{workload}, {case}, {precision.value}"
            print(f"{name}: {roofline.describe(timing)}")
            recorder.add(
                f"{name}: over the roofline of its matrix products",
                ours.median_s * 1e3,
                "ms",
                baseline=seconds * 1e3,
                bar=None if first else f"value <= {ROOFLINE_BARS[precision]} * baseline",
                spread=ours.spread_s * 1e3,
            )
            ratio = ours.median_s / seconds
            if first:
                case = f"{name}: times over its roofline, against those of {NUM_CANDIDATES} candidates"
                recorder.add(case, ratio, "times", baseline=first, bar="value <= 1.3 * baseline")
            first = first or ratio


def bench_recompute(recorder: BenchmarkRecorder, workload: ScorerWorkload, user: int, precision: Precision) -> None:
    """Time requests with the stored summary against requests that compute it."""
    ids = workload.candidates(NUM_CANDIDATES)
    with open_scorer(workload, precision) as cached, open_scorer(workload, precision) as recomputing:
        pool = cached.encode(ids)
        scorers = {"cached": cached, "recomputed": recomputing}
        calls = {name: partial(scorer.score, [user], pool, now=workload.now) for name, scorer in scorers.items()}
        with (
            patch.object(recomputing.store, "get_many", recomputed_summaries(workload, precision)),
            patch.object(recomputing.store, "record", lambda *_: None),  # so that `get_many` answers
        ):
            check(recomputing, [user, user - 1], ids, workload.now, precision)
            stored, made = (call() for call in calls.values())
            assert np.allclose(stored, made, atol=INT8_TOLERANCE + TOLERANCE[precision])
            assert not np.array_equal(stored, made)
            timing = interleaved(calls, rounds=5 if recorder.quick else 15)
    recorder.add_time(
        f"{workload}, {NUM_CANDIDATES} candidates, {workload.log.lengths[user - 1]:,} events, "
        f"{workload.model.config.mixing.value}, {precision.value}: stored against recomputed in the request",
        timing["cached"],
        "ms",
        baseline=timing["recomputed"],
        bar=f"ratio >= {PAPERS_SPEEDUP}" if precision is Precision.float32 else None,
    )


def bench_counters(
    recorder: BenchmarkRecorder,
    workload: ScorerWorkload,
    counted: ScorerWorkload,
    with_category: ScorerWorkload,
    num_candidates: int,
) -> None:
    """Compare requests of models without and with counters, of items and of a category; all workloads have the same log
    and sizes."""
    user = workload.log.num_users  # the last one, whose history is long enough for all keys
    newest = int(workload.log[user].timestamp[-1])
    with (
        Scorer.open(workload.model_dir, workload.store) as plain,
        Scorer.open(counted.model_dir, counted.store) as ours,
        Scorer.open(with_category.model_dir, with_category.store) as both,
    ):
        users, ids = [user], workload.candidates(num_candidates)
        codes = ours.store.get_many(users).counters[0]
        assert len(codes.key) == counted.model.config.num_counters
        # A tenth of the candidates are counted.
        had = counted.model.items.ids(codes.key[: num_candidates // 10].astype(np.int64) - 1)
        ids = np.concatenate([had, np.setdiff1d(ids, had)])[:num_candidates]
        for task in (TASK, NEXT_TASK):
            plain.task = ours.task = both.task = task
            timing = interleaved(
                {
                    "with": partial(ours.score, users, ours.encode(ids), now=newest),
                    "without": partial(plain.score, users, plain.encode(ids), now=newest),
                    "category": partial(both.score, users, both.encode(ids), now=newest),
                },
                rounds=9 if recorder.quick else 41,
                warmup=3,
                min_sample_s=0.02,
            )
            recorder.add_time(
                f"{workload}, {num_candidates} candidates, {task}: with counters against without",
                timing["with"],
                "ms",
                baseline=timing["without"],
                bar="value <= 1.1 * baseline",
            )
            recorder.add_time(
                f"{workload}, {num_candidates} candidates, {task}: with counters of a category too",
                timing["category"],
                "ms",
                baseline=timing["with"],
            )


def bench_backends(recorder: BenchmarkRecorder, workload: ScorerWorkload, name: str) -> None:
    """Compare requests of one user that the C++ library, torch, and onnxruntime score, from the look-up on."""
    users: list[Any] = [1]
    now = int(workload.log[1].timestamp[-1]) + 5000
    with (
        cpu_settings(1),  # Time of other threads would not be counted.
        Scorer.open(workload.model_dir, workload.store, backend="native") as native,
        Scorer.open(workload.model_dir, workload.store, backend="torch") as by_torch,
        native.in_service() as snapshot,
    ):
        model = snapshot.model
        export = recorder.folder / f"onnx-{workload}-{name}"
        export.mkdir()
        write_onnx(ServingGraph(model, snapshot.items), graph_inputs(model), export)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(export / ONNX_FILE, options, providers=["CPUExecutionProvider"])
        names = {given.name for given in session.get_inputs()}
        pool = native.encode(workload.candidates(NUM_CANDIDATES))

        def by_onnx(output: str) -> Any:
            stored = snapshot.store.get_many(users)
            is_new = np.zeros(len(stored.tail.items), np.bool_)
            arrays = request_arrays(model, stored, stored.tail, is_new, np.array([now]), pool.rows[None], {})
            return session.run([output], {name: array for name, array in arrays.items() if name in names})[0]

        for task, output in ((TASK, "logits"), (NEXT_TASK, NEXT_TASK)):
            native.task = by_torch.task = task
            calls = {
                "native": partial(native.score, users, pool, now=now),
                "torch": partial(by_torch.score, users, pool, now=now),
                "onnx": partial(by_onnx, output),
            }
            expected = calls["torch"]()
            given = calls["onnx"]()[0] if task == NEXT_TASK else 1 / (1 + np.exp(-calls["onnx"]()[0, :, 0]))
            assert np.allclose(calls["native"](), expected, atol=1e-3) and np.allclose(given, expected, atol=1e-3)
            rounds = 9 if recorder.quick else 41
            timing = interleaved(calls, rounds=rounds, warmup=5, min_sample_s=0.01, clock=time.thread_time)
            case = f"{workload}, {name}, {NUM_CANDIDATES} candidates, {task}: the C++ library against"
            recorder.add_time(f"{case} torch", timing["native"], "ms", baseline=timing["torch"])
            recorder.add_time(
                f"{case} store and onnxruntime",
                timing["native"],
                "ms",
                baseline=timing["onnx"],
                bar="value <= 1 * baseline",
            )


def bench_features(recorder: BenchmarkRecorder, workload: ScorerWorkload, featured: ScorerWorkload) -> None:
    """Compare requests of models with and without features; both workloads have the same log and sizes."""
    with (
        Scorer.open(workload.model_dir, workload.store, task=TASK) as plain,
        Scorer.open(featured.model_dir, featured.store, task=TASK) as ours,
    ):
        newest = workload.now
        for case, (num_users, num_candidates) in FEATURE_CALLS.items():
            users, ids = workload.request(num_users, num_candidates)
            request: dict[str, Any] = {name: [value] * num_users for name, value in REQUEST.items()}
            told, silent = (ours.score(users, ids, now=newest, request=given) for given in (request, None))
            assert np.abs(told - silent).max() > 1e-4
            calls = {
                "features": partial(ours.score, users, ours.encode(ids), now=newest, request=request),
                "ids": partial(plain.score, users, plain.encode(ids), now=newest),
            }
            timing = interleaved(calls, rounds=9 if recorder.quick else 41, warmup=3, min_sample_s=0.02)
            num_of_items = CATEGORIES_OF_ITEMS + NUMBERS_OF_ITEMS
            recorder.add_time(
                f"{workload}, {case}: with {num_of_items} features of items and {len(REQUEST)} of requests against ids "
                "alone",
                timing["features"],
                "ms",
                baseline=timing["ids"],
                bar="value <= 1.15 * baseline",
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    options = benchmark_parser("scorer", __doc__).parse_args(arguments)
    set_threads(0)
    quick = options.quick
    models = (SMALL,) if quick else (SMALL, PUBLISHED)
    histories, num_items = ((200, 20_000), 10_000) if quick else ((1_000, 1_000_000), 50_000)
    lengths = (50, 200, 500, 2_000) if quick else (200, 1_000, 4_000, 16_000)
    precisions = [Precision.float32]
    if choose_precision(Precision.auto, torch.device("cpu")) is Precision.bfloat16:
        precisions.append(Precision.bfloat16)
    else:
        print(
            "bfloat16: not measured, since this machine does not multiply it faster (no AMX, no avx512_bf16 by AMD)",
            flush=True,
        )

    with recording("scorer", __doc__, options) as recorder:
        root = recorder.folder
        log = lifelong_log(root / "histories", histories, num_items=num_items)
        for dim, num_seeds in models:
            model = untrained(log, dim=dim, num_seeds=num_seeds)
            bench_history(recorder, ScorerWorkload.make(model, log, root / f"histories-{dim}"), histories)
        log = lifelong_log(root / "users", [*lengths, *[lengths[2]] * 28], num_items=num_items)
        for dim, num_seeds in models:
            sizes: dict[str, Any] = {"dim": dim, "num_seeds": num_seeds}
            folder = root / f"users-{dim}"
            ours, counted, with_category, featured = (
                ScorerWorkload.make(model, log, folder / name)
                for name, model in {
                    "ids": untrained(log, **sizes),
                    "counters": untrained(log, **sizes, counter_keys=["item"]),
                    "category": untrained_with_category(log, **sizes),
                    "features": untrained_with_features(log, **sizes),
                }.items()
            )
            bench_backends(recorder, ours, "ids")
            bench_backends(recorder, counted, "counters")
            bench_counters(recorder, ours, counted, with_category, NUM_CANDIDATES)
            bench_features(recorder, ours, featured)
        for precision in precisions:
            bench_roofline(recorder, ours, precision)
        keep_freed_memory()  # A service does not do this, but models that read histories are slow without it.
        model = untrained(log, **sizes, mixing=Mixing.bidirectional)
        bidirectional = ScorerWorkload.make(model, log, folder / "bidirectional")
        for precision in precisions:
            bench_recompute(recorder, bidirectional, len(lengths), precision)
    return 0


if __name__ == "__main__":
    sys.exit(main())
