"""Requests with counters, of items or also of a category, against requests without, for the scorer's benchmark."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from scripts.benchmarks.benchmark_recorder import BenchmarkRecorder
from scripts.benchmarks.scorer_workloads import ScorerWorkload
from scripts.benchmarks.timing import interleaved
from scripts.benchmarks.workloads import TASK, untrained
from vista.config import DataConfig
from vista.log.event_log import EventLog
from vista.log.features import CategoryColumn, ItemFeatures
from vista.log.vocabulary import Vocabulary
from vista.model.features import FeatureSpec
from vista.model.item_feature_table import ItemFeatureTable
from vista.model.ranking_model import NEXT_TASK
from vista.model.vista_model import VistaModel
from vista.scorer import Scorer

NUM_VALUES = 100
"""Of the category."""


def untrained_with_category(log: EventLog, *, dim: int, num_seeds: int) -> VistaModel:
    """`untrained` with counters of items and of a category, which every item has."""
    plain = untrained(log, dim=dim, num_seeds=num_seeds, counters=True)
    codes = np.random.default_rng(0).integers(0, NUM_VALUES, log.num_items).astype(np.int32)
    values = Vocabulary.from_ids([f"value {number}" for number in range(NUM_VALUES)])
    column = CategoryColumn(values, codes, np.arange(log.num_items + 1))
    columns = [FeatureSpec.of("category", column)]
    config = replace(plain.config, counter_categories=["category"])
    model = VistaModel(config, replace(plain.schema, item_features=columns), log.items, DataConfig()).eval()
    model.set_item_features(ItemFeatureTable.of(ItemFeatures({"category": column}), columns))
    return model


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
        assert len(codes.key) == counted.model.config.counter_keys
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
            recorder.add(
                f"{workload}, {num_candidates} candidates, {task}: with counters against without",
                timing["with"].median_s * 1e3,
                "ms",
                baseline=timing["without"].median_s * 1e3,
                bar="value <= 1.1 * baseline",
                spread=timing["with"].spread_s * 1e3,
            )
            recorder.add(
                f"{workload}, {num_candidates} candidates, {task}: with counters of a category too",
                timing["category"].median_s * 1e3,
                "ms",
                baseline=timing["with"].median_s * 1e3,
                spread=timing["category"].spread_s * 1e3,
            )
