"""Small models, histories and batches, the same in every run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.conftest import draw_space, draw_transitions, model_config
from tests.counters.counter_histories import category
from vista.arrays import Int
from vista.config import DataConfig, ModelConfig
from vista.config.checks import Decay
from vista.counters.keys import ItemKeys
from vista.examples.batch import Batch, ChunkHistories, ChunkImpressions, Chunks, ChunkTimeline, decay_clock
from vista.examples.cuts import AnchorPlan, CutPlan, cut_batch
from vista.examples.item_spaces import PooledHistories
from vista.examples.item_statistics import HistoryCounters
from vista.log.histories import Histories, RowFeatures, gap_bucket, history_gaps, ranges
from vista.log.vocabulary import Vocabulary
from vista.model.features import EncodedRows, RowFeatureReader, Schema
from vista.model.ranking_model import RankingModel
from vista.model.registry import ARCHITECTURES
from vista.model.serving_model import PaddedTail, pad_tail
from vista.model.vista_model import VistaModel

ACTIONS, TASKS, NUM_ITEMS = ["view", "click", "buy"], ["click", "like"], 40
HOUR = 3_600_000


def model(
    *,
    seed: int = 0,
    tasks: list[str] = TASKS,
    num_items: int = NUM_ITEMS,
    actions: list[str] | None = None,
    has_time: bool = True,
    rating_range: tuple[float, float] | None = (1.0, 5.0),
    request_features: bool = False,
    num_tail_features: int | None = None,
    user_features: bool = False,
    has_decoder: bool = False,
    **config: Any,
) -> VistaModel:
    """A model in eval mode in which every parameter matters: noise keeps biases and the like from being 0.

    With `num_tail_features`, it reads features of events, and so many of them in stage 2. If it counts categories, its
    items have the feature `brand`: 3 values, and none for every fourth item.
    """
    torch.manual_seed(seed)
    options = {"dim": 16, "num_heads": 2, "num_seeds": 3, "tail_len": 5, "conv_width": 3, "dropout": 0.0}
    options |= {"pooled_dim": 0} | config
    brands, table = (
        category("brand", np.arange(num_items) % 4 - 1) if "brand" in str(config.get("counter_keys")) else ([], None)
    )
    schema = Schema(
        ACTIONS if actions is None else actions,
        has_time,
        rating_range,
        tasks,
        item_features=brands,
        event_features=[] if num_tail_features is None else READER.columns,
        num_tail_features=num_tail_features or 0,
        request_features=READER.columns if request_features else [],
        user_features=READER.columns if user_features else [],
        has_decoder=has_decoder,
    )
    built = VistaModel(ModelConfig(**options), schema, Vocabulary.from_ids(np.arange(num_items) + 100), DataConfig())
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        draw_statistics(built)
    built.event_features = None if num_tail_features is None else READER
    built.request_features = READER if request_features else None
    built.user_features = READER if user_features else None
    built.set_item_features(table)
    return built.eval()


def of_architecture(
    name: str,
    *,
    dtype: torch.dtype = torch.float64,
    tasks: tuple[str, ...] = ("click", "like"),
    has_time: bool = True,
    has_retrieval: bool = True,
    features: bool = False,
    **config: Any,
) -> RankingModel:
    """A model of any architecture as `model` makes them, with features of all kinds of rows if `features`."""
    torch.manual_seed(1)
    options = {"dim": 16, "num_heads": 2, "tail_len": 5, "dropout": 0.0} | config
    kinds = {f"{kind}_features": READER.columns if features else [] for kind in ("event", "request", "user")}
    schema = Schema(ACTIONS, has_time, (1.0, 5.0), list(tasks), has_retrieval, **kinds)
    items = Vocabulary.from_ids(np.arange(NUM_ITEMS) + 100)
    settings = model_config(name, **options)
    if isinstance(settings, ModelConfig) and "pooled_dim" not in config:
        settings = replace(settings, pooled_dim=0)
    built = ARCHITECTURES[settings.architecture](settings, schema, items, DataConfig()).to(dtype).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        draw_statistics(built)
    built.event_features = built.request_features = built.user_features = READER if features else None
    return built


def draw_statistics(built: RankingModel) -> None:
    """Draw the statistics, vectors, and transitions of items, in models that read them."""
    for name in {"item_statistics", "item_rates"} & dict(built.named_buffers()).keys():
        getattr(built, name)[1:].normal_()
    if built.config.space_dim:
        draw_space(built)
    if built.transitions is not None:
        draw_transitions(built.transitions)


def drawn_features(count: int, seed: int = 0) -> RowFeatures:
    """Features of requests, events, or users, a quarter of them missing."""
    rng = np.random.default_rng([seed, 2])
    hour = np.where(rng.random(count) < 0.25, np.nan, rng.integers(0, 24, count))
    return RowFeatures({"device": rng.integers(-1, 3, count).astype(np.int32), "hour": hour.astype(np.float32)})


READER = RowFeatureReader.of(
    drawn_features(100), {"device": Vocabulary.from_ids(["desktop", "phone", "tv"]), "hour": None}
)
"""How the models of this module read features of events, of requests, and of users."""


def histories(lengths: list[int], seed: int = 0, *, num_items: int = NUM_ITEMS, days: float = 30.0) -> Histories:
    """Packed histories of model rows. Times ascend, and a fifth of them repeat."""
    rng = np.random.default_rng(seed)
    total = sum(lengths)
    mean_gap = days * 24 * HOUR / max(max(lengths, default=1), 1)
    gaps = np.where(rng.random(total) < 0.2, 0, rng.exponential(mean_gap, total)).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    times = [1_700_000_000_000 + np.cumsum(gaps[a:b]) for a, b in pairwise(offsets)]
    return Histories(
        rng.integers(1, num_items + 1, total).astype(np.int32),
        np.concatenate([np.zeros(0, np.int64), *times]),
        rng.integers(0, len(ACTIONS), total).astype(np.uint8),
        rng.integers(1, 6, total).astype(np.float32),
        offsets,
        drawn_features(total, seed),
    )


def users(packed: Histories) -> EncodedRows:
    """Features of the users of histories. Users with as many events have the same, also if they are alone."""
    features = drawn_features(32, 9).select(packed.lengths % 32)
    return READER.encode(features, packed.num_users)


def chunks(
    packed: Histories,
    seed: int = 0,
    *,
    impressions: int = 0,
    num_items: int = NUM_ITEMS,
    decay: Decay = Decay.none,
    chunk_len: int = 10**6,
    keys: ItemKeys | None = None,
    space: Tensor | None = None,
    requests: bool = False,
) -> tuple[Chunks, Int]:
    """Histories in chunks, with impressions at random positions; and the times of the impressions in ms.

    Anchors may ask about the rest of a chunk's history. With keys, chunks have the counters of their users; with a
    space, pooled vectors in it, as serving has them; with requests, impressions have features.
    """
    rng = np.random.default_rng([seed, 1])
    pieces = np.maximum(1, -(-packed.lengths // chunk_len))
    user = np.repeat(np.arange(packed.num_users), pieces)
    offsets = np.append(packed.offsets[:-1][user] + ranges(0, pieces) * chunk_len, packed.num_events)
    owner = np.sort(rng.integers(0, max(len(user), 1), impressions if len(user) else 0))
    position = (rng.random(len(owner)) * (np.diff(offsets)[owner] + 1)).astype(np.int64)
    order = np.lexsort((position, owner))
    owner, position = owner[order], position[order]
    before = offsets[:-1][owner] + position - 1
    last = packed.timestamp[np.maximum(before, 0)] if packed.num_events else np.zeros(len(owner), np.int64)
    time = last + rng.integers(0, 48 * HOUR, len(owner))
    features = READER.encode(drawn_features(len(owner), seed), len(owner)).joined(READER.missing(1))
    of_events, of_users = READER.encode(packed.features, packed.num_events), users(packed).select(user)
    rest = packed.offsets[1:][user] - offsets[:-1]
    index = ranges(offsets[:-1], rest)
    item = packed.item.astype(np.int64)
    start, counters, pooled = offsets[:-1] - packed.offsets[:-1][user], None, None
    if keys is not None:
        counters = HistoryCounters(keys, item, packed.action, packed.timestamp, packed.offsets)
    if space is not None:
        fold = np.zeros(packed.num_users, np.int64)
        pooled = PooledHistories(space.numpy()[None], fold, item, packed.offsets)
    whole = ChunkHistories(counters, pooled, user, start, None)
    made = Chunks(
        user=user,
        item=item,
        action=packed.action.astype(np.int64),
        rating=None if packed.rating is None else np.asarray(packed.rating),
        gap=history_gaps(packed.timestamp, offsets),
        clock=decay_clock(decay, packed.timestamp),
        offsets=offsets,
        timeline=ChunkTimeline(item[index], packed.timestamp[index], np.concatenate([[0], np.cumsum(rest)])),
        impressions=ChunkImpressions(
            chunk=owner,
            position=position,
            item=rng.integers(1, num_items + 1, len(owner)),
            gap=np.where(position > 0, gap_bucket(time - last), 0),
            label=rng.integers(0, 2, (len(owner), len(TASKS))).astype(np.float32),
            mask=rng.random((len(owner), len(TASKS))) < 0.8,
            time=time,
            features=features if requests else None,
        ),
        histories=None if keys is None and space is None else whole,
        features=of_events,
        user_features=of_users.joined(READER.missing(1)),
    )
    return made, time


def plan(model: VistaModel, **changes: Any) -> CutPlan:
    """How chunks are cut for a model: all windows, and no staleness unless `changes` has some."""
    options = {
        "mixing": model.config.mixing,
        "tail_len": model.config.tail_len,
        "label_spacing": 4,
        "windows_per_chunk": 0,
        "num_cuts": 2,
        "staleness_events": 8.0,
        "staleness_share": 0.0,
        "unknown_share": 0.0,
        "featureless_share": 0.0,
        "reconstruction_len": 6,
        "pools_labels": model.config.space_dim > 0 and not model.config.counter_keys,
    }
    return CutPlan(**{**options, **changes})


def anchor_plan(**changes: Any) -> AnchorPlan:
    """One anchor per four events of a chunk at random positions, about the next six events."""
    options = {
        "spacing": 4,
        "horizon_events": 6,
        "horizon_days": 0.0,
        "by_time": False,
        "use_time": True,
        "timeless_share": 0.0,
        "keeps_other_windows": True,
    }
    return AnchorPlan(**{**options, **changes})


def batch(made: Chunks, cut_plan: CutPlan, seed: int = 0, *, num_items: int = NUM_ITEMS) -> Batch:
    """A batch with all items as negatives."""
    negatives = np.arange(1, num_items + 1)
    return cut_batch(made, cut_plan, np.random.default_rng(seed), negatives, np.zeros(num_items, np.float32))


@dataclass(frozen=True)
class Predictions:
    """Where the predictions of a batch belong: [NW, W] next items, [NW, I] impressions, or [NA] anchors."""

    chunk: Int
    position: Int
    """Events of the chunk that come before; -1 in the padding."""
    number: Int
    """Packed index of the label (of the first one of an anchor), or index of the impression."""


def predictions(made: Chunks, cut_plan: CutPlan, seed: int = 0) -> tuple[Predictions, Predictions]:
    """What a batch predicts: next items and impressions.

    The draws of `cut_batch` do not depend on items. So a batch whose items are numbers, 1000 + i for event i and
    2000 + j for impression j, is cut like the batch of the real items, and shows what lies where.
    """
    numbers = np.arange(len(made.impressions.item))
    coded = replace(
        made,
        item=1000 + np.arange(len(made.item)),
        impressions=replace(made.impressions, item=2000 + numbers),
        histories=None,
    )
    cut = batch(coded, cut_plan, seed)
    rows = cut.rows.numpy()
    event = np.where(cut.labels.item.numpy() >= 0, rows[cut.labels.item.numpy()] - 1000, -1)
    chunk = np.searchsorted(made.offsets, event, side="right") - 1
    next_items = Predictions(chunk, np.where(event >= 0, event - made.offsets[chunk], -1), event)
    number = np.maximum(rows[cut.impressions.item.numpy()] - 2000, -1)
    if number.size == 0:
        return next_items, Predictions(number, number, number)
    position = np.where(number >= 0, made.impressions.position[number], -1)
    return next_items, Predictions(made.impressions.chunk[number], position, number)


def anchor_predictions(made: Chunks, cut_plan: CutPlan, seed: int = 0) -> Predictions:
    """Where the anchors of a batch belong, read back like `predictions`."""
    assert made.timeline is not None
    numbers = np.arange(len(made.item))
    rest = ranges(made.offsets[:-1], np.diff(made.timeline.offsets))
    coded = replace(made, item=1000 + numbers, timeline=replace(made.timeline, item=1000 + rest))
    cut = batch(coded, cut_plan, seed)
    assert cut.anchors is not None
    label = cut.anchors.item.numpy()
    event = np.where(label >= 0, cut.rows.numpy()[label] - 1000, len(numbers)).min(1)
    chunk = np.searchsorted(made.offsets, event, side="right") - 1
    return Predictions(chunk, event - made.offsets[chunk], event)


def outputs(model: VistaModel, cut: Batch) -> tuple[Tensor, Tensor]:
    """(user vectors [NW, W, M], task logits [NW, I, tasks]) as training computes them."""
    with torch.no_grad():
        vectors = model.item_vectors(cut.rows)
        events = cut.events
        shown = model.shown_vectors(events, vectors)
        encoded = model.encoder(shown, events.action, events.gap, events.rating, events.features)
        context = model.window_context(cut, shown, model.cut_summaries(cut, encoded))
        return model.window_users(cut, context), model.window_logits(cut, vectors, context)[0]


def anchor_users(model: VistaModel, cut: Batch) -> Tensor:
    """User vectors [NA, M] as training computes them."""
    with torch.no_grad():
        return model.anchor_users(cut, model.item_vectors(cut.rows))


def tail(model: VistaModel, packed: Histories, lengths: Int | int | None = None) -> PaddedTail:
    """Padded tails of the newest `lengths` (model.tail_len) events of each history."""
    keep = np.minimum(packed.lengths, model.config.tail_len if lengths is None else lengths)
    last = packed.select(packed.lengths - keep, packed.lengths)
    return pad_tail(model, last.item, last.timestamp, last.action, last.offsets, last.features.columns)


@pytest.fixture(scope="session")
def make() -> SimpleNamespace:
    """The functions above."""
    return SimpleNamespace(
        model=model,
        architecture=of_architecture,
        histories=histories,
        chunks=chunks,
        plan=plan,
        anchor_plan=anchor_plan,
        batch=batch,
        predictions=predictions,
        anchor_predictions=anchor_predictions,
        outputs=outputs,
        anchor_users=anchor_users,
        tail=tail,
        requests=lambda count: READER.encode(drawn_features(count), count),
        request_reader=READER,
        users=users,
        space=lambda model: model.item_space if model.config.space_dim else None,
        num_items=NUM_ITEMS,
    )
