"""Requests through the C++ library (`vista_kernels.cpp_backend`), in place of torch: the same scores to rounding.

B users, N pairs of a user and a candidate, C candidates that all users share, V items of the vocabulary, M model dim,
M' width of retrieval vectors, L tail length, G fields of counters with F values per key, n counted pairs, J pooled
vectors.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vista.arrays import Int
from vista.config.checks import Precision, ScoringBackend, TargetAttentionKind
from vista.errors import ConfigError
from vista.examples.item_spaces import Pooled
from vista.examples.transitions import NUM_RECENT, RECENT_DECAY, newest_first
from vista.log.histories import NUM_GAPS
from vista.model import inference
from vista.model.inference import PaddedTail
from vista.model.item_projections import ItemProjections
from vista.model.ranking_model import NEXT_TASK
from vista.model.target_attention import PointwiseLayer, SoftmaxLayer, TargetLayer
from vista.model.vista_model import VistaModel
from vista.scorer.request import Request
from vista.scorer.request_features import PairFeatures, RequestProjections
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
        for first in range(0, int(self.offsets[-1]), PAIRS_LOOKED_UP):
            pair = np.arange(first, min(first + PAIRS_LOOKED_UP, int(self.offsets[-1])))
            user = np.searchsorted(self.offsets, pair, side="right") - 1
            place = pair - self.offsets[user] if self.shared else pair
            yield first, user, place if self.rows is None else self.rows[place]


class NativeScoring:
    """Scores by the C++ library."""

    def __init__(
        self,
        model: VistaModel,
        items: ItemProjections,
        time_projections: Tensor | None,
        of_features: RequestProjections | None,
        code_vectors: Tensor | None,
    ) -> None:
        """
        Args:
            model: in eval mode, on the CPU.
            items: projections of its items.
            time_projections: [NUM_GAPS, 5M] what the time of a request adds to candidates; None without times.
            of_features: what features of requests add; None without them.
            code_vectors: [G * F * 64, 5M] what codes of counters add; None without them.

        Raises:
            LibraryError: the library is missing, or lacks this kind of model; the message says why.
        """
        self._model = model
        self._native = ScoringModel(scoring_plan(model, _array(code_vectors)))
        self._candidates, self._retrieval = _array(items.candidate), _array(items.retrieval)
        self._times, self._of_features = _array(time_projections), of_features
        is_plain = model.config.embedding_rows == 0 and model.features is None
        self._vectors = self._candidates
        """[1 + V, at least M] whose first M columns are item vectors; None if requests compute those that they need."""
        if self._vectors is None and is_plain:
            self._vectors = _array(model.item_table)
        self._reads = ItemReads(
            *(_array(getattr(model, name, None)) for name in ("item_space", "item_statistics", "item_rates"))
        )

    def __str__(self) -> str:
        return f"native, vectors of {self._native.lanes} floats"

    def task_scores(self, request: Request, pairs: Pairs, tasks: list[str]) -> dict[str, Tensor]:
        """Scores per task, float32 [N].

        Args:
            tasks: of the model, as in `ServingSnapshot.tasks`.
        """
        labeled = tasks != [NEXT_TASK]
        made = self.run(request, pairs, logits=labeled, scores=NEXT_TASK in tasks, probabilities=True)
        scores = {}
        if made.scores is not None:
            scores[NEXT_TASK] = torch.from_numpy(made.scores)
        if made.logits is not None:
            probability, names = torch.from_numpy(made.logits), self._model.schema.tasks
            scores |= {task: probability[:, names.index(task)].contiguous() for task in tasks if task != NEXT_TASK}
        return {task: scores[task] for task in tasks}

    @torch.inference_mode()
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
            vectors = self._model.item_vectors(torch.from_numpy(used)).numpy()
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
        if logits and self._of_features is not None:
            features = self._features(self._of_features, request.features, len(request))
        counted, counted_next = self._counted(request, pairs, logits=logits, scores=scores)
        recent, transitions = None, self._model.transitions
        if scores and transitions is not None:
            newest = newest_first(request.tail.item).numpy()
            recent = RecentItems(newest, transitions.item.numpy(), transitions.weight.numpy())
        asked = ScoringRequest(
            summary=np.ascontiguousarray(request.summary.numpy()),
            events=self._events(request.tail),
            offsets=pairs.offsets,
            rows=places.rows,
            shared=pairs.shared,
            candidates=candidates,
            retrieval=self._retrieval,
            added=self._of_users(request),
            pooled=_array(request.pooled),
            reads=reads,
            recent=recent,
            features=features,
            counted=counted,
            counted_next=counted_next,
        )
        return self._native.score(asked, **wanted, threads=torch.get_num_threads())

    def _events(self, tail: PaddedTail) -> EventRows:
        encoder, added = self._model.encoder, None
        if self._vectors is None:
            vectors = self._model.item_vectors(torch.from_numpy(tail.item))
            action, gap = torch.from_numpy(tail.action), torch.from_numpy(tail.gap)
            added = _array(encoder(vectors, action, gap, features=tail.features))
            return EventRows(tail.valid, None, tail.action, tail.gap, None, added)
        if encoder.features is not None and tail.features is not None:
            added = _array(encoder.features(tail.features))
        return EventRows(tail.valid, tail.item, tail.action, tail.gap, self._vectors, added)

    def _of_users(self, request: Request) -> Floats | None:
        """[B, 5M] what the time of a request and features of the user add to query tokens."""
        bucket = inference.request_bucket(self._model, request.now, request.tail)
        times = None if bucket is None or self._times is None else self._times[bucket.numpy()[:, 0]]
        return _sum(times, _array(inference.user_feature_vectors(self._model, request.users, len(request))))

    def _features(
        self, projections: RequestProjections, features: PairFeatures | None, num_users: int
    ) -> PairFeatureRows:
        reader = self._model.request_features
        assert reader is not None
        if features is None:
            features = PairFeatures(reader.missing(1), np.zeros(num_users, np.int64), False)
        rows, first = features.rows, np.ascontiguousarray(features.first, np.int64)
        if projections.table is None:  # Each pair's own sum is its row of the table.
            table, entries = _array(projections.of(rows, len(rows))), np.arange(len(rows))[:, None]
            dense = np.zeros((len(rows), 0), np.float32)
        else:
            table, entries, dense = _array(projections.table), rows.entry, rows.dense
        assert table is not None
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
        logits, scores = logits and model.candidate_head is not None, scores and model.counted is not None
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
            (np.log1p(counters.num_events) - 6).astype(np.float32),
        )


def scoring_plan(model: VistaModel, code_vectors: Floats | None) -> ScoringPlan:
    """The weights of a model for the library.

    Args:
        code_vectors: as in `NativeScoring`.
    """
    stage, config, counted = model.target_attention, model.config, model.counted
    actions, gaps = (
        None if table is None else _array(table(torch.arange(size, device=model.device)))
        for table, size in ((model.encoder.action, len(model.stage1.actions)), (model.encoder.gap, NUM_GAPS))
    )
    head, term, transitions, spec = model.task_head, model.statistics, model.transitions, model.counter_spec
    num_recent = 0 if transitions is None else min(NUM_RECENT, config.tail_len)
    pooled, scale = len(Pooled) if config.space_dim else 0, np.float32(math.sqrt(config.dim))
    wide_weight, wide_bias = np.zeros((pooled, config.dim), np.float32), np.zeros(pooled, np.float32)
    if term is not None:
        wide_weight, wide_bias = scale * _weight(term.weight.weight), _weight(term.weight.bias)
    candidate_head = None
    if (of_candidates := model.candidate_head) is not None:
        candidate_head = _network(of_candidates.network)
        num_scaled = len(of_candidates.input_scale)  # the last inputs, after the codes
        if num_scaled:
            candidate_head.first[:, -num_scaled:] *= of_candidates.input_scale.numpy()
    return ScoringPlan(
        softmax=config.target_attention is TargetAttentionKind.softmax,
        heads=config.num_heads,
        tail=config.tail_len,
        norm_eps=stage.final_norm.eps,
        input_scale=stage.scale,
        temperature=model.temperature,
        layers=[_layer_weights(layer) for layer in stage.layers],
        summary_norm=_weight(stage.summary_norm.weight),
        summary_kind=_weight(stage.summary_kind),
        final_norm=_weight(stage.final_norm.weight),
        task_weight=np.zeros((0, config.dim), np.float32) if head is None else _weight(head.weight),
        task_bias=np.zeros(0, np.float32) if head is None else _weight(head.bias),
        actions=actions,
        gaps=gaps,
        request=_weight(model.request),
        space=config.space_dim,
        pooled=pooled,
        statistics=model.item_statistics.shape[1] if hasattr(model, "item_statistics") else 0,
        gain=1.0 if term is None else float(term.gain.detach()),
        wide_weight=wide_weight,
        wide_bias=wide_bias,
        decay=RECENT_DECAY ** np.arange(num_recent, dtype=np.float32),
        followers=0 if transitions is None else transitions.item.shape[1],
        gate_weight=None if counted is None else scale * _weight(counted.gate.weight)[0],
        gate_bias=0.0 if counted is None else float(counted.gate.bias.detach()),
        columns=0 if spec is None else spec.num_fields * spec.num_columns,
        code_vectors=code_vectors,
        candidate_head=candidate_head,
        counted_head=None if counted is None else _network(counted.network),
    )


def _layer_weights(layer: TargetLayer) -> dict[str, Floats]:
    weights = {
        "norm": _weight(layer.norm.weight),
        "projections": _weight(layer.projections.weight),
        "bias": _weight(layer.bias),
    }
    if isinstance(layer, SoftmaxLayer):
        feed = layer.feed_forward
        return weights | {
            "head_norm": _weight(layer.output.head_norm.weight),
            "out": _weight(layer.output.out.weight),
            "feed_norm": _weight(feed.norm.weight),
            "up": _weight(feed.up.weight),
            "down": _weight(feed.down.weight),
        }
    assert isinstance(layer, PointwiseLayer)
    return weights | {"head_norm": _weight(layer.head_norm.weight), "out": _weight(layer.out.weight)}


def _network(network: nn.Sequential) -> Network:
    first, _, second, _, last = network
    return Network(
        first=_weight(first.weight),
        first_bias=_weight(first.bias),
        second=_weight(second.weight),
        second_bias=_weight(second.bias),
        last=_weight(last.weight),
    )


def _weight(weight: Any) -> Floats:
    return np.array(weight.detach().numpy(), np.float32)


def _array(tensor: Tensor | None) -> Floats | None:
    return None if tensor is None else tensor.detach().numpy()


def _sum(first: Floats | None, second: Floats | None) -> Floats | None:
    if first is None or second is None:
        return second if first is None else first
    return first + second


def _joined(parts: list[Int]) -> Int:
    return np.concatenate([np.zeros(0, np.int64), *parts])


def native_scoring(
    backend: ScoringBackend,
    precision: Precision,
    model: VistaModel,
    items: ItemProjections,
    time_projections: Tensor | None,
    of_features: RequestProjections | None,
    code_vectors: Tensor | None,
) -> NativeScoring | str:
    """The C++ library with a model's weights; or why torch computes the scores.

    Args:
        backend: what the caller asks for; others are those of `NativeScoring`.

    Raises:
        ConfigError: the caller asks for the library, which cannot score this model here.
    """
    if backend is ScoringBackend.torch:
        return "asked for"
    try:
        if model.device.type != "cpu":
            raise LibraryError(f"the C++ library runs on CPUs, and the model is on {model.device}")
        if precision is not Precision.float32:
            raise LibraryError(f"the C++ library multiplies float32, and precision={precision.value}")
        return NativeScoring(model, items, time_projections, of_features, code_vectors)
    except LibraryError as error:
        if backend is ScoringBackend.native:
            raise ConfigError(f"backend=native: {error}; or use backend=torch") from error
        # A device and a precision are choices of the caller; of a CPU and float32, more can be expected.
        is_chosen = model.device.type != "cpu" or precision is not Precision.float32
        level = logging.INFO if is_chosen else logging.WARNING
        logger.log(level, "scores are computed by torch, which takes about twice as long on a CPU: %s", error)
        return str(error)
