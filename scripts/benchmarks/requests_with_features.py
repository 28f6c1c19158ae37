"""Requests with features of items and of requests against requests with ids alone, for the scorer's benchmark."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from scripts.benchmarks.benchmark_recorder import BenchmarkRecorder
from scripts.benchmarks.scorer_workloads import ScorerWorkload
from scripts.benchmarks.timing import interleaved
from scripts.benchmarks.workloads import TASK, untrained
from vista.config import DataConfig
from vista.log.event_log import EventLog
from vista.log.features import CategoryColumn, FeatureColumn, ItemFeatures, NumberColumn
from vista.log.histories import RowFeatures
from vista.log.vocabulary import Vocabulary
from vista.model.features import FeatureSpec, RowFeatureReader
from vista.model.item_feature_table import ItemFeatureTable
from vista.model.vista_model import VistaModel
from vista.scorer import Scorer

CATEGORIES_OF_ITEMS, NUMBERS_OF_ITEMS = 5, 3
REQUEST = {"device": "value 3", "surface": "value 7", "hour": 14.0, "position": 2.0}
"""The features of every request."""
CALLS = {"500 candidates": (1, 500), "32 users x 100 candidates": (32, 100)}
"""(B, C)."""


def untrained_with_features(log: EventLog, *, dim: int, num_seeds: int) -> VistaModel:
    """`untrained` with eight features of items and four of requests, and random weights for them."""
    plain, rng = untrained(log, dim=dim, num_seeds=num_seeds), np.random.default_rng(0)
    count, values = log.num_items, Vocabulary.from_ids([f"value {number}" for number in range(100)])
    columns: dict[str, FeatureColumn] = {
        f"category {number}": CategoryColumn(
            values, rng.integers(0, len(values), count).astype(np.int32), np.arange(count + 1)
        )
        for number in range(CATEGORIES_OF_ITEMS)
    }
    columns |= {
        f"number {number}": NumberColumn(rng.lognormal(size=count).astype(np.float32))
        for number in range(NUMBERS_OF_ITEMS)
    }
    features = ItemFeatures(columns)
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
    model.set_item_features(ItemFeatureTable.of(features, of_items))
    model.request_features = reader
    for encoder in (model.features, model.request_encoder):
        assert encoder is not None
        for weight in encoder.parameters():
            torch.nn.init.normal_(weight, std=0.02)
    return model


def bench_features(recorder: BenchmarkRecorder, workload: ScorerWorkload, featured: ScorerWorkload) -> None:
    """Compare requests of models with and without features; both workloads have the same log and sizes."""
    with (
        Scorer.open(workload.model_dir, workload.store, task=TASK) as plain,
        Scorer.open(featured.model_dir, featured.store, task=TASK) as ours,
    ):
        newest = max(int(workload.log[user].timestamp[-1]) for user in range(1, workload.log.num_users + 1))
        for case, (num_users, num_candidates) in CALLS.items():
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
            recorder.add(
                f"{workload}, {case}: with {num_of_items} features of items and {len(REQUEST)} of requests against ids "
                "alone",
                timing["features"].median_s * 1e3,
                "ms",
                baseline=timing["ids"].median_s * 1e3,
                bar="value <= 1.15 * baseline",
                spread=timing["features"].spread_s * 1e3,
            )
