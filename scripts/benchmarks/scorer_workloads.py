"""Inputs and baselines of the scorer's benchmark: the products of a call, and a server without a store.

Letters: B users, C candidates of each, K summary tokens, L tail length, H heads, D head dim, M model dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch

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
from scripts.benchmarks.workloads import untrained
from vista.arrays import Int
from vista.config import DataConfig, ModelConfig
from vista.config.checks import Precision, TargetAttentionKind
from vista.log.event_log import EventLog
from vista.log.features import Column
from vista.log.histories import RowFeatures
from vista.log.vocabulary import Vocabulary
from vista.model import inference
from vista.model.features import FeatureSpec, RowFeatureReader
from vista.model.item_feature_table import ItemFeatureTable
from vista.model.layers import FEED_FORWARD_RATIO
from vista.model.vista_model import VistaModel
from vista.refresh import refresh
from vista.refresh.batch_encoder import LogItems, last_times, stored_tail
from vista.store import NO_TIMESTAMP
from vista.store.record import StoredBatch

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

    def request(self, num_users: int, num_candidates: int) -> tuple[list[int], Int]:
        """Users 1, 2, … and their candidates: [B, C], or [C] for one user."""
        ids = self.candidates(num_users, num_candidates)
        return list(range(1, num_users + 1)), ids[0] if num_users == 1 else ids


def scorer_roofline(config: ModelConfig, num_users: int, num_candidates: int, precision: Precision) -> Roofline:
    """Roofline of scoring, with layer 1's projections of all items computed beforehand.

    Context: each layer's projections of summary and tail. All layers but the last, which needs only keys and values,
    also have attention, an output projection and, in softmax layers, a feed-forward network. Candidates: in each layer
    attention over K + L keys and the same products, and projections in all layers but the first. Bytes are the
    candidates' gathered vectors and projections. Candidates that read a state have, for each layer of stage 1, further
    projections, a product with the layer's matrices, and an output projection.
    """
    dtype = torch.float32 if precision is Precision.float32 else torch.bfloat16
    dtypes = product_dtypes(dtype)
    dim, heads, layers = config.dim, config.num_heads, config.num_target_layers
    head_dim, hidden = dim // heads, max(8, int(dim * FEED_FORWARD_RATIO))
    softmax = config.target_attention is TargetAttentionKind.softmax
    seeds, tail, keys = config.num_seeds, config.tail_len, config.num_seeds + config.tail_len

    def attention(rows: int, columns: int) -> list[RooflineWork]:
        several, batches = num_users * heads, (1, heads, num_users * heads)
        return [
            row_product(rows, columns, head_dim, dtypes, count=several, batches=batches),
            row_product(rows, head_dim, columns, dtypes, count=several, batches=batches),
        ]

    def mixing(rows: int) -> list[RooflineWork]:
        shapes = [(dim, dim), *([(2 * hidden, dim), (dim, hidden)] if softmax else [])]
        return [row_product(rows, n, k, dtypes, weights=True) for n, k in shapes]

    context, queries = num_users * keys, num_users * num_candidates
    last = [row_product(context, 2 * dim, dim, dtypes, weights=True)]
    inner = [row_product(context, 4 * dim, dim, dtypes, weights=True), *attention(seeds, seeds), *attention(tail, keys)]
    inner += [*mixing(context), row_product(queries, 4 * dim, dim, dtypes, weights=True)]
    each = [*attention(num_candidates, keys), *mixing(queries)]
    if config.num_state_rows:
        reading = [row_product(queries, n * dim, dim, dtypes, weights=True) for n in (4, 1)]
        several, batches = num_users * heads, (1, heads, num_users * heads)
        reading.append(row_product(num_candidates, head_dim, head_dim, dtypes, count=several, batches=batches))
        last += [work.scaled(config.num_layers) for work in reading]
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
    plain = untrained(log, dim=dim, num_seeds=num_seeds, counters=True)
    codes = np.random.default_rng(0).integers(0, NUM_VALUES, log.num_items).astype(np.int32)
    values = Vocabulary.from_ids([f"value {number}" for number in range(NUM_VALUES)])
    column = Column(codes, values, np.arange(log.num_items + 1))
    columns = [FeatureSpec.of("category", column)]
    config = replace(plain.config, counter_categories=["category"])
    model = VistaModel(config, replace(plain.schema, item_features=columns), log.items, DataConfig()).eval()
    model.set_item_features(ItemFeatureTable.of({"category": column}, columns))
    return model


def untrained_with_features(log: EventLog, *, dim: int, num_seeds: int) -> VistaModel:
    """`untrained` with eight features of items and four of requests, and random weights for them."""
    plain, rng = untrained(log, dim=dim, num_seeds=num_seeds), np.random.default_rng(0)
    count, values = log.num_items, Vocabulary.from_ids([f"value {number}" for number in range(100)])
    columns: dict[str, Column] = {
        f"category {number}": Column(rng.integers(0, len(values), count).astype(np.int32), values, np.arange(count + 1))
        for number in range(CATEGORIES_OF_ITEMS)
    }
    columns |= {
        f"number {number}": Column(rng.lognormal(size=count).astype(np.float32)) for number in range(NUMBERS_OF_ITEMS)
    }
    features = columns
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
