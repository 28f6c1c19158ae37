"""Requests through the C++ library (`vista_kernels.cpp_backend`), in place of torch: the same scores to rounding.

B users, N pairs of a user and a candidate, C candidates that all users share, V items of the vocabulary, M model dim,
M' width of retrieval vectors, L tail length, G fields of counters with F values per key, n counted pairs, J pooled
vectors.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from vista.arrays import Int
from vista.config.checks import Precision, ScoringBackend, TargetAttentionKind
from vista.config.model_config import CALENDAR, PREVIOUS, parts_of
from vista.counters.counters import EVENTS_RESOLUTION, MAX_CODE, MAX_EVENTS, code_scales, decode_values
from vista.counters.keys import ItemKeys
from vista.errors import CheckpointError, ConfigError
from vista.examples.item_spaces import NUM_POOLED, Pooled
from vista.examples.item_statistics import NUM_RECENT, RECENT_DECAY
from vista.log.histories import NUM_GAPS
from vista.model.features import EncodedRows
from vista.model.item_projections import NORM_EPS, ItemProjections
from vista.model.serving_model import (
    ADAPTED_BIASES,
    NEXT_TASK,
    PaddedTail,
    ServingModel,
    gap_buckets,
    input_scale,
    newest_first,
)
from vista.scorer.request import Request, UserRecord
from vista.scorer.request_features import PairFeatures
from vista.store.record import RecordSpec
from vista.store.record_reading import record_decoder
from vista.threads import num_threads
from vista_kernels.cpp_backend.answering import CounterScale, RecordScoring
from vista_kernels.cpp_backend.library import (
    CountedItems,
    CountedPairs,
    EventRows,
    Floats,
    ItemReads,
    LibraryError,
    Network,
    PairFeatureRows,
    RecentItems,
    ScoredPairs,
    ScoringModel,
    ScoringPlan,
    ScoringRequest,
)

MAX_SPECS = 1024
"""Generations, or shards of them, whose `record_scoring` is kept."""
PAIRS_LOOKED_UP = 1 << 18
"""Pairs that are looked up in the counters at once, which bounds the memory."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pairs:
    """N pairs of B users and their candidates."""

    rows: Int | None
    """int64 model rows: [N], or [C] if all users have the same; None for the rows 0, 1, … of all tables."""
    offsets: Int
    """int64 [B + 1]: the pairs of user b are offsets[b] to offsets[b + 1]."""
    shared: bool

    @classmethod
    def of(cls, rows: Int | None, num_users: int, count: int) -> Pairs:
        """All pairs of users and `count` candidates: rows [C], [B, C], or None."""
        is_shared = rows is None or rows.ndim == 1
        flat = None if rows is None else np.ascontiguousarray(rows).reshape(-1)
        return cls(flat, np.arange(num_users + 1) * count, is_shared)

    def blocks(self) -> Iterator[tuple[int, Int, Int]]:
        """All pairs, some at a time: the first one, and their users and model rows, int64 [n] each."""
        num_pairs = int(self.offsets[-1])
        for first in range(0, num_pairs, PAIRS_LOOKED_UP):
            pair = np.arange(first, min(first + PAIRS_LOOKED_UP, num_pairs))
            user = np.searchsorted(self.offsets, pair, side="right") - 1
            place = pair - self.offsets[user] if self.shared else pair
            yield first, user, place if self.rows is None else self.rows[place]


MAX_PREPARED_ROWS = 1 << 14
"""At M = 256, a table of so many rows takes 84 MB."""


class NativeScoring:
    """Scores by the C++ library."""

    def __init__(self, model: ServingModel, items: ItemProjections, precision: Precision) -> None:
        """
        Args:
            model: on the CPU.
            items: projections of its items.
            precision: of matrix products; bfloat16 where the processor multiplies it, elsewhere float32.

        Raises:
            LibraryError: the library is missing, or lacks this kind of model; the message says why.
            KeyError, ValueError: a weight is missing, or has a wrong shape.
        """
        self._model, weights = model, model.weights
        is_plain = model.config.embedding_rows == 0 and not model.schema.item_features
        self._actions, self._gaps = event_tables(model)
        self._native = ScoringModel(
            scoring_plan(model, self._actions, self._gaps), bfloat16=precision is Precision.bfloat16
        )
        self._candidates, self._retrieval = items.candidate, items.retrieval
        self._vectors = self._candidates
        """[1 + V, at least M] whose first M columns are item vectors; None if requests compute those that they need."""
        if self._vectors is None and is_plain:
            self._vectors = weights["item_table"]
        self._reads = ItemReads(*(weights.get(name) for name in ("item_space", "item_statistics", "item_rates")))
        of_items = self._reads.space, self._reads.statistics, self._reads.rates, weights.get("transition_weights")
        self._native.keep(self._candidates, self._retrieval, self._vectors, *of_items)
        of_head = [weights[name] for name in ADAPTED_BIASES if name in weights]
        self._biases = np.concatenate([np.zeros(model.num_adapted - sum(map(len, of_head)), np.float32), *of_head])
        """[model.num_adapted] what the values of an adapter are added to: the library replaces biases of networks."""
        self._projection = weights["target_attention.request_projection.weight"].T.astype(np.float64)
        self._times = None if self._gaps is None else self._projected(self._gaps)
        """[NUM_GAPS, 5M] what the time of a request adds to candidates; None without times."""
        self._by_spec: dict[int, tuple[RecordSpec, RecordScoring | None]] = {}
        """By id of the spec of a generation, or of a shard."""
        self._prepared: Floats | None = None
        """[R, 5M] what each value of features of requests, then each dense input, adds to candidates; None without
        features, or if there are too many values."""
        if model.request_features is not None:
            rows = [weights[name] for name in ("request_encoder.values", "request_encoder.dense") if name in weights]
            if sum(map(len, rows)) <= MAX_PREPARED_ROWS:
                self._prepared = self._projected(np.concatenate(rows))

    def __str__(self) -> str:
        products = "bfloat16" if self._native.in_bfloat16 else "float32"
        return f"native, vectors of {self._native.lanes} floats, products in {products}"

    def task_scores(self, request: Request, pairs: Pairs, tasks: list[str]) -> dict[str, Floats]:
        """Scores per task, float32 [N].

        Args:
            tasks: of the model, as in `ServingSnapshot.tasks`.
        """
        labeled = tasks != [NEXT_TASK]
        made = self.run(request, pairs, logits=labeled, scores=NEXT_TASK in tasks, probabilities=True)
        return self._by_task(made, tasks)

    def scores_of_record(
        self, record: UserRecord, rows: Int, features: PairFeatures | None, tasks: list[str]
    ) -> dict[str, Floats] | None:
        """Scores per task, float32 [C], of model rows int64 [C]; None if the record is damaged.

        Args:
            record: of a generation with a `record_scoring`.
            features: of the request; None if all are missing.
        """
        scoring, labeled = self.record_scoring(record.stored.spec), tasks != [NEXT_TASK]
        assert scoring is not None
        reads_features = labeled and self._model.request_features is not None
        made = scoring.score(
            record.stored.value,
            *record.stored.digests(),
            record.now,
            np.ascontiguousarray(rows),
            self._features(features, 1) if reads_features else None,
            None if record.adapter is None else record.adapter + self._biases,
            logits=labeled,
            scores=NEXT_TASK in tasks,
            threads=num_threads(),
        )
        return None if made is None else self._by_task(made, tasks)

    def record_scoring(self, spec: RecordSpec) -> RecordScoring | None:
        """What scores from records of a generation; None if the model reads more than such a call prepares: features
        of events or users, or counters whose keys depend on the request."""
        known = self._by_spec.get(id(spec))
        if known is None or known[0] is not spec:
            if len(self._by_spec) >= MAX_SPECS:
                self._by_spec = {}  # of earlier generations
            known = self._by_spec[id(spec)] = spec, self._record_scoring(spec)
        return known[1]

    def _record_scoring(self, spec: RecordSpec) -> RecordScoring | None:
        model, weights = self._model, self._model.weights
        decoder, config, keys = record_decoder(spec), model.config, model.item_keys
        readers = model.tail_features, model.user_features
        shape = config.num_seeds + (config.space_dim > 0), config.dim
        if decoder is None or self._vectors is None or any(one is not None for one in readers):
            return None
        if (spec.num_tokens, spec.dim) != shape:
            return None
        if keys is not None and (self._scale is None or spec.counters is None or spec.counters.spec != keys.spec):
            return None
        followers = weights.get("transition_items")
        return RecordScoring(
            self._native,
            decoder,
            vectors=self._vectors,
            candidates=self._candidates if self._candidates is not None else self._vectors,
            retrieval=self._retrieval,
            reads=self._reads,
            followers=None if followers is None else (followers, weights["transition_weights"]),
            times=self._times if model.has_gap else None,
            weights=weights.get("item_space_weights"),
            num_gaps=NUM_GAPS if model.has_gap else 0,
            num_pooled=NUM_POOLED,
            counters=self._scale,
        )

    @cached_property
    def _scale(self) -> CounterScale | None:
        """How counters are decayed; None without them, or if their keys depend on requests. Its keys are as many as
        items, so generations share it."""
        keys = self._model.item_keys
        if keys is None or {part for field in keys.spec.fields for part in parts_of(field)} & {*CALENDAR, PREVIOUS}:
            return None
        return _counter_scale(keys)

    def _by_task(self, made: ScoredPairs, tasks: list[str]) -> dict[str, Floats]:
        scores = {}
        if made.scores is not None:
            scores[NEXT_TASK] = made.scores
        if made.logits is not None:
            columns, names = made.logits.T, self._model.schema.tasks
            scores |= {task: np.ascontiguousarray(columns[names.index(task)]) for task in tasks if task != NEXT_TASK}
        return {task: scores[task] for task in tasks}

    def run(
        self,
        request: Request,
        pairs: Pairs | None = None,
        *,
        logits: bool = False,
        scores: bool = False,
        user_vectors: bool = False,
        probabilities: bool = False,
    ) -> ScoredPairs:
        """Compute what is asked for.

        Args:
            request: of B users.
            pairs: for logits and scores.
            probabilities: give the sigmoid of logits instead.
        """
        pairs = Pairs.of(None, len(request), 0) if pairs is None else pairs
        if logits and self._vectors is None:
            # Rows of a table of this call, so the retrieval head, which reads another table, has a call of its own.
            others = self.run(request, pairs, scores=scores, user_vectors=user_vectors)
            count = len(self._model.items) + 1
            used, rows = (np.arange(count), None) if pairs.rows is None else np.unique(pairs.rows, return_inverse=True)
            vectors = self._item_vectors(used)
            places = replace(pairs, rows=rows)
            tables = self._reads.space, self._reads.statistics, self._reads.rates
            reads = ItemReads(*(None if table is None else table[used] for table in tables))
            own = self._call(request, pairs, places, vectors, reads, logits=True, probabilities=probabilities)
            return replace(others, logits=own.logits)
        wanted = {"logits": logits, "scores": scores, "user_vectors": user_vectors, "probabilities": probabilities}
        return self._call(request, pairs, pairs, self._vectors, self._reads, **wanted)

    def _call(
        self, request: Request, pairs: Pairs, places: Pairs, candidates: Floats | None, reads: ItemReads, **wanted: bool
    ) -> ScoredPairs:
        """Compute what is wanted, of pairs whose rows of `candidates` and `reads` are `places`."""
        logits, scores = wanted.get("logits", False), wanted.get("scores", False)
        features = None
        if logits and self._model.request_features is not None:
            features = self._features(request.features, len(request))
        counted, counted_next = self._counted(request, pairs, logits=logits, scores=scores)
        recent, followers = None, self._model.weights.get("transition_items")
        if scores and followers is not None:
            recent = RecentItems(newest_first(request.tail.item), followers, self._model.weights["transition_weights"])
        asked = ScoringRequest(
            summary=np.ascontiguousarray(request.summary),
            events=self._events(request.tail),
            offsets=pairs.offsets,
            rows=places.rows,
            shared=pairs.shared,
            candidates=candidates,
            retrieval=self._retrieval,
            added=self._of_users(request),
            pooled=request.pooled,
            reads=reads,
            recent=recent,
            features=features,
            counted=counted,
            counted_next=counted_next,
            adapter=None if request.adapter is None else request.adapter + self._biases,
        )
        return self._native.score(asked, **wanted, threads=num_threads())

    def _item_vectors(self, rows: Int) -> Floats:
        """float32 [..., M] of model rows that share rows of a table or have features, which torch computes."""
        model = self._model.vista_model  # built outside of inference mode, in which its weights would have no versions
        import torch

        with torch.inference_mode():
            vectors: Floats = model.item_vectors(torch.from_numpy(rows)).numpy()
            return vectors

    def _events(self, tail: PaddedTail) -> EventRows:
        added = None if tail.features is None else self._of_rows("encoder.features", tail.features)
        if self._vectors is not None:
            return EventRows(tail.valid, tail.item, tail.action, tail.gap, self._vectors, added)
        whole = self._item_vectors(tail.item)
        for table, values in ((self._actions, tail.action), (self._gaps, tail.gap)):
            whole = whole if table is None else whole + table[values]
        return EventRows(tail.valid, None, tail.action, tail.gap, None, whole if added is None else whole + added)

    def _of_rows(self, name: str, rows: EncodedRows) -> Floats:
        """float32 [..., M] vectors of features, as of `RowFeatureEncoder`."""
        weights = self._model.weights
        vectors: Floats = weights[f"{name}.values"][rows.entry].sum(-2)
        for place in range(rows.dense.shape[-1]):
            vectors += rows.dense[..., place : place + 1] * weights[f"{name}.dense"][place]
        return vectors

    def _projected(self, vectors: Floats) -> Floats:
        """[N, 5M] vectors [N, M], and their projections in the first layer of stage 2. In float64, so that the bits of
        a row do not depend on the others."""
        return np.concatenate([vectors, (vectors @ self._projection).astype(np.float32)], 1)

    def _of_users(self, request: Request) -> Floats | None:
        """[B, 5M] what the time of a request and features of the user add to query tokens."""
        bucket = gap_buckets(self._model, request.now, request.tail)
        times = None if bucket is None or self._times is None else self._times[bucket]
        if (reader := self._model.user_features) is None:
            return times
        users = reader.missing(len(request)) if request.users is None else request.users
        of_features = self._of_rows("user_encoder", users)
        return of_features if times is None else times + of_features

    def _features(self, features: PairFeatures | None, num_users: int) -> PairFeatureRows:
        reader = self._model.request_features
        assert reader is not None
        if features is None:
            features = PairFeatures(reader.missing(1), np.zeros(num_users, np.int64), False)
        rows, first = features.rows, np.ascontiguousarray(features.first, np.int64)
        if self._prepared is None:  # Each pair's own sum is its row of the table.
            table = self._projected(self._of_rows("request_encoder", rows))
            entries, dense = np.arange(len(rows))[:, None], np.zeros((len(rows), 0), np.float32)
        else:
            table, entries, dense = self._prepared, rows.entry, rows.dense
        return PairFeatureRows(
            table,
            not features.per_candidate,
            first,
            np.ascontiguousarray(entries, np.int64),
            np.ascontiguousarray(dense, np.float32),
        )

    def _counted(
        self, request: Request, pairs: Pairs, *, logits: bool, scores: bool
    ) -> tuple[CountedPairs | None, CountedItems | None]:
        """The pairs that the users' counters count, for logits and for the retrieval head."""
        counters, model = request.counters, self._model
        scores = scores and model.has_retrieval
        if counters is None or not (logits or scores):
            return None, None
        found, codes, items, places = [], [], [], []
        for first, user, row in pairs.blocks():
            if logits:
                at, of_pairs = counters.codes_of_pairs(user, row)
                found.append(first + at)
                codes.append(of_pairs)
            if scores:
                at, place = counters.places(user, row)
                items.append(first + at)
                places.append(place)
        counted = CountedPairs(_joined(found), np.concatenate(codes)) if found else None
        if not items:
            return counted, None
        place = _joined(places)
        return counted, CountedItems(
            _joined(items),
            np.ascontiguousarray(counters.of_counted_items()[place]),
            # By the same function as `RecordScoring`, which has the same bits.
            np.array([math.log1p(count) - 6 for count in counters.num_events.tolist()], np.float32),
        )


def _counter_scale(keys: ItemKeys) -> CounterScale:
    """How counters are decayed whose keys do not depend on requests."""
    spec, rows = keys.spec, np.arange(keys.num_rows)
    levels = np.arange(MAX_CODE + 1, dtype=np.uint8)[:, None].repeat(spec.num_columns, 1)
    resolution, largest = code_scales(spec)
    return CounterScale(
        levels=decode_values(spec, levels),
        resolution=resolution,
        factor=MAX_CODE / np.log1p(largest / resolution),
        half_lives=spec.half_lives[: len(spec.days)],
        has_time=spec.has_time,
        of_events=(EVENTS_RESOLUTION, float(MAX_CODE / np.log1p(MAX_EVENTS / EVENTS_RESOLUTION))),
        keys=[one.astype(np.int32) for one in keys.of(rows, np.zeros_like(rows), np.zeros_like(rows))[1:]],
    )


def event_tables(model: ServingModel) -> tuple[Floats | None, Floats | None]:
    """Vectors of actions and of gaps that are added to events; None for a table that the model lacks."""
    weights = model.weights
    if model.config.embedding_rows == 0:
        return weights.get("encoder.action.weight"), weights.get("encoder.gap.weight")
    import torch  # Values share rows of a table by hashes, which torch computes.

    encoder = model.vista_model.encoder
    sizes = (encoder.action, len(model.schema.actions)), (encoder.gap, NUM_GAPS)
    actions, gaps = (None if table is None else table(torch.arange(size)).detach().numpy() for table, size in sizes)
    return actions, gaps


def scoring_plan(model: ServingModel, actions: Floats | None, gaps: Floats | None) -> ScoringPlan:
    """The weights of a model for the library.

    Args:
        actions, gaps: of `event_tables`.

    Raises:
        KeyError: a weight is missing.
        ValueError: the seeds have a wrong shape.
    """
    config, weights, spec = model.config, model.weights, model.counter_spec
    is_softmax = config.target_attention is TargetAttentionKind.softmax
    pooled = len(Pooled) if config.space_dim else 0
    columns, statistics = 0 if spec is None else spec.num_fields * spec.num_columns, weights.get("item_statistics")
    wide_weight, wide_bias, wide = np.zeros((pooled, config.dim), np.float32), np.zeros(pooled, np.float32), 1.0
    scale, stage = np.float32(math.sqrt(config.dim)), "target_attention."
    counts_next = spec is not None and model.has_retrieval
    if "statistics.gain" in weights:
        wide = float(weights["statistics.gain"])
        wide_weight, wide_bias = scale * weights["statistics.weight.weight"], _copied(weights["statistics.weight.bias"])
    followers = weights.get("transition_items")
    tasks, candidate_head = len(model.schema.tasks), None
    if tasks and (columns or pooled):
        candidate_head = _network(weights, "candidate_head.network.")
        if pooled:  # the last inputs, after the codes
            assert statistics is not None
            factors = np.asarray(input_scale(statistics.shape[1], tasks), np.float32)
            candidate_head.first[:, -len(factors) :] *= factors
    kind = _copied(weights[f"{stage}summary_kind"])
    if kind.shape != (config.num_seeds, config.dim):
        raise ValueError(f"{stage}summary_kind is of shape {list(kind.shape)}")
    return ScoringPlan(
        softmax=is_softmax,
        heads=config.num_heads,
        tail=config.tail_len,
        norm_eps=NORM_EPS,
        input_scale=1.0 if is_softmax else config.dim**0.5,
        temperature=model.temperature,
        layers=[
            _layer_weights(weights, f"{stage}layers.{index}.", is_softmax=is_softmax)
            for index in range(config.num_target_layers)
        ],
        summary_norm=_copied(weights[f"{stage}summary_norm.weight"]),
        summary_kind=kind,
        final_norm=_copied(weights[f"{stage}final_norm.weight"]),
        task_weight=_copied(weights["task_head.weight"]) if tasks else np.zeros((0, config.dim), np.float32),
        task_bias=_copied(weights["task_head.bias"]) if tasks else np.zeros(0, np.float32),
        actions=None if actions is None else _copied(actions),
        gaps=None if gaps is None else _copied(gaps),
        request=_copied(weights["request"]),
        space=config.space_dim,
        pooled=pooled,
        statistics=0 if statistics is None else statistics.shape[1],
        gain=wide,
        wide_weight=wide_weight,
        wide_bias=wide_bias,
        decay=RECENT_DECAY ** np.arange(0 if followers is None else min(NUM_RECENT, config.tail_len), dtype=np.float32),
        followers=0 if followers is None else followers.shape[1],
        gate_weight=scale * weights["counted.gate.weight"][0] if counts_next else None,
        gate_bias=float(weights["counted.gate.bias"][0]) if counts_next else 0.0,
        columns=columns,
        code_vectors=code_vectors(weights["candidate_head.added.weight"], columns) if tasks and columns else None,
        candidate_head=candidate_head,
        counted_head=_network(weights, "counted.network.") if counts_next else None,
    )


def code_vectors(added: Floats, columns: int) -> Floats:
    """[64 * columns, width]: row 64 f + c is what code c of column f adds to candidates. The rows of a candidate's
    codes add up to what `CandidateHead.forward` gives, because that is a sum over columns.

    Args:
        added: [width, 2 * columns + fields] weight of the head's linear map.
        columns: of codes of all fields.
    """
    level = np.arange(MAX_CODE + 1, dtype=np.float32)[:, None] / MAX_CODE
    linear, square, counted = np.split(added.T, [columns, 2 * columns])
    vectors = linear[:, None] * level + square[:, None] * level**2
    vectors[:: columns // len(counted), 1:] += counted[:, None]  # The first code of a field tells that it counts.
    rows: Floats = vectors.reshape(-1, len(added))
    return rows


def _layer_weights(weights: Mapping[str, Any], name: str, *, is_softmax: bool) -> dict[str, Floats]:
    names = {"norm": "norm.weight", "projections": "projections.weight", "bias": "bias"}
    if is_softmax:
        names |= {"head_norm": "output.head_norm.weight", "out": "output.out.weight"}
        names |= {"feed_norm": "feed_forward.norm.weight"}
        names |= {part: f"feed_forward.{part}.weight" for part in ("up", "down")}
    else:
        names |= {"head_norm": "head_norm.weight", "out": "out.weight"}
    return {part: _copied(weights[name + own]) for part, own in names.items()}


def _network(weights: Mapping[str, Any], name: str) -> Network:
    parts = ("0.weight", "0.bias", "2.weight", "2.bias", "4.weight")
    first, first_bias, second, second_bias, last = (_copied(weights[name + part]) for part in parts)
    return Network(first=first, first_bias=first_bias, second=second, second_bias=second_bias, last=last)


def _copied(weight: Any) -> Floats:
    return np.array(weight, np.float32)


def _joined(parts: list[Int]) -> Int:
    return np.concatenate([np.zeros(0, np.int64), *parts])


def native_scoring(
    backend: ScoringBackend, device: str, precision: Precision, model: ServingModel, items: ItemProjections
) -> NativeScoring | str:
    """The C++ library with a model's weights; or why torch computes the scores.

    Args:
        backend: what the caller asks for.
        device: of the model, such as "cpu".
        precision: of matrix products.

    Raises:
        ConfigError: the caller asks for the library, which cannot score this model here.
        CheckpointError: a weight is missing, or has a wrong shape.
    """
    if backend is ScoringBackend.torch:
        return "asked for"
    try:
        if device != "cpu":
            raise LibraryError(f"the C++ library runs on CPUs, and the model is on {device}")
        return NativeScoring(model, items, precision)
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"the weights of the model do not fit its config.json: {error}; copy the model again, or export it again"
        ) from error
    except LibraryError as error:
        if backend is ScoringBackend.native:
            raise ConfigError(f"backend=native: {error}; or use backend=torch") from error
        level = logging.INFO if device != "cpu" else logging.WARNING  # A device is a choice of the caller.
        logger.log(level, "scores are computed by torch, which takes 2 to 7 times as long on a CPU: %s", error)
        return str(error)
