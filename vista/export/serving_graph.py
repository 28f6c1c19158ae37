"""Stage 2 with its tables as one graph, from the arrays of records and requests to scores.

The inputs are plain arrays of what a record holds and what a request adds, so any program that decodes records can call
a graph.

Letters: B users, T events of the tails that are given, L tail length of the model, C candidates, S summary rows,
E counted keys, G fields of counters, F values per key (`CounterSpec`), H horizons, M model dim, M' width of retrieval
vectors, r width and J number of pooled vectors, V items of the vocabulary, A actions.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from vista.arrays import Int
from vista.counters.counters import (
    EVENTS_RESOLUTION,
    MAX_CODE,
    MAX_EVENTS,
    STEPS_PER_EVENT,
    CounterSpec,
    code_scales,
    decode_values,
)
from vista.counters.keys import keys_of
from vista.examples.item_spaces import NUM_POOLED
from vista.examples.item_statistics import NUM_RECENT
from vista.examples.transitions import transition_sums
from vista.log.histories import NO_TIMESTAMP, NUM_GAPS, UNKNOWN_GAP
from vista.model import inference
from vista.model.feature_encoders import RowFeatureEncoder
from vista.model.features import MAX_ABS_SCORE, FeatureSpec
from vista.model.item_projections import ItemProjections
from vista.model.target_attention import MASKED, SoftmaxLayer, TargetAttention
from vista.model.vista_model import VistaModel
from vista.store.reader import StoredBatch
from vista.store.record import Tail

Arrays = dict[str, NDArray[Any]]
ExportRunner: TypeAlias = Callable[[Arrays], Arrays]
"""Outputs by name from inputs by name, computed by the runtime that callers will use."""
_NO_AGE = 1e18
"""Age of a key without events, which no code depends on."""
USERS, EVENTS, KEYS, CANDIDATES = "users", "events", "keys", "candidates"
"""Names of the axes whose length a caller chooses."""
REQUEST, TAIL, USER = "request", "tail", "user"
"""Prefixes of inputs with features."""
COUNTER_KEYS, COUNTER_CODES = "counter_keys", "counter_codes"
"""Inputs with the counters of items, and prefixes of those with the counters of other fields."""


class ServingGraph(nn.Module):
    """Computes what the scorer computes, in operators that can be exported, for any number of users and candidates.

    Inputs are those of `graph_inputs`, in their order. Outputs are those of `outputs`, in their order: `logits` and
    `probabilities`, float32 [B, C, tasks], of the labeled tasks; and `next`, float32 [B, C], of the retrieval head.
    """

    def __init__(self, model: VistaModel, items: ItemProjections) -> None:
        """
        Args:
            model: in eval mode, on the CPU. The graph copies what it needs.
            items: of the model.
        """
        super().__init__()
        with torch.no_grad():
            self._build(model, items)
        # Parameters need no gradient, but gradients stay enabled during an export, because stage 2 then uses float32
        # where the scorer uses float64 so that bits do not depend on the batch.
        self.requires_grad_(False).eval()

    def _build(self, model: VistaModel, items: ItemProjections) -> None:
        config, schema, count = model.config, model.schema, len(model.items)
        self.names = [given.name for given in graph_inputs(model)]
        """Names of the inputs."""
        labeled = ["logits", "probabilities"] if schema.tasks else []
        self.outputs = [*labeled, *(["next"] if model.has_retrieval else [])]
        self.tail_len, self.temperature, self.dim = config.tail_len, config.softmax_temperature, config.dim
        self.num_trained, self.space_dim = model.num_trained_items, config.space_dim
        self.stage = copy.deepcopy(model.target_attention)
        use_plain_layers(self.stage)
        tables = (None if each is None else torch.from_numpy(each) for each in (items.candidate, items.retrieval))
        table, retrieval = tables
        if table is None:
            table = model.item_vectors(torch.arange(count + 1))
        self._tables(candidate=table, retrieval=retrieval, empty=model.empty_summary())
        self._tables(
            space=model.item_space if config.space_dim else None,
            weight=model.item_space_weights if config.space_dim else None,
        )
        self.heads = _heads(model, self.stage)
        encoder = model.encoder
        self._tables(
            action=None if encoder.action is None else encoder.action(torch.arange(len(schema.actions))),
            gap=encoder.gap_vectors(torch.arange(NUM_GAPS)),
        )
        # Bucket 1 + k begins at 2^k - 1 seconds (`gap_bucket`).
        self.register_buffer("gap_bounds", 1000 * (2 ** torch.arange(1, NUM_GAPS - 1) - 1))
        self.tail_features = GraphFeatures.of(schema.tail_features, encoder.features)
        self.user_features = GraphFeatures.of(schema.user_features, model.user_encoder)
        self.request_features = GraphFeatures.of(schema.request_features, model.request_encoder)
        self.counted = counted_names(model)
        self.counters = None if model.counter_spec is None else GraphCounters(model.counter_spec)
        self.categories, self.sizes, self.actions, table = list[str](), dict[str, int](), schema.actions, None
        if (keys := model.item_keys) is not None and keys.categories:
            self.categories, self.sizes = [*keys.categories], dict(keys.sizes)
            table = torch.from_numpy(np.stack([*keys.categories.values()]))
        self._tables(category=table)

    candidate_table: Tensor
    """[1 + V, 5M] or, without labeled tasks, [1 + V, M] (`ItemProjections.candidate`)."""
    retrieval_table: Tensor
    """[1 + V, M'] (`ItemProjections.retrieval`)."""
    empty_table: Tensor
    """[1, S, M] the summary of an empty history."""
    action_table: Tensor | None
    """[A, M]."""
    gap_table: Tensor | None
    """[NUM_GAPS, M]."""
    category_table: Tensor | None
    """int64 [categories, 1 + V] (`ItemKeys.categories`)."""
    space_table: Tensor | None
    """[1 + V, r] (`RankingModel.item_space`)."""
    weight_table: Tensor | None
    """[1 + V, A] (`RankingModel.item_space_weights`)."""
    gap_bounds: Tensor
    """int64 ms, ascending: where buckets begin."""

    def _tables(self, **tables: Tensor | None) -> None:
        for name, table in tables.items():
            self.register_buffer(f"{name}_table", None if table is None else table.detach())

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Outputs in the order of `outputs`, from inputs in the order of `names`."""
        given = dict(zip(self.names, inputs, strict=True))
        found, lengths = given["found"], given["tail_lengths"]
        candidates = given["candidates"].clamp(min=0)  # else runtimes count negative rows from the end of the table
        place = lengths[:, None] - self.tail_len + torch.arange(self.tail_len)
        valid = place >= 0
        place = place.clamp(min=0)

        def aligned(name: str) -> Tensor:
            """The newest L events of an input [B, T], right-aligned; 0 in the padding."""
            column = torch.cat([given[name], torch.zeros_like(lengths[:, None]).to(given[name].dtype)], 1)
            newest = column.gather(1, place)
            return newest & valid if newest.dtype is torch.bool else newest.masked_fill(~valid, 0)

        items = aligned("tail_items")
        # Items that were added later are candidates only.
        items = torch.where((items > self.num_trained) | (items < 0), 0, items)
        now = given.get("now", torch.full_like(lengths, NO_TIMESTAMP))
        times = aligned("tail_times") if "tail_times" in given else torch.zeros_like(items)
        events = F.embedding(items, self.candidate_table)[..., : self.dim]
        if self.action_table is not None:
            events = events + F.embedding(aligned("tail_actions"), self.action_table)
        request = None
        if self.gap_table is not None:
            gap = torch.where(valid[:, 1:] & valid[:, :-1], self._bucket(times[:, 1:] - times[:, :-1]), UNKNOWN_GAP)
            events = events + F.embedding(F.pad(gap, (1, 0), value=UNKNOWN_GAP), self.gap_table)
            is_known = (now != NO_TIMESTAMP) & valid[:, -1]
            bucket = torch.where(is_known, self._bucket(now - times[:, -1]), UNKNOWN_GAP)
            request = F.embedding(bucket, self.gap_table).unsqueeze(1)
        if self.tail_features is not None:
            events = events + self.tail_features([aligned(name) for name in self._columns(TAIL)])
        summary = self._summary(given, found)
        context = self.stage.encode_request(summary, events, valid)
        if self.user_features is not None:
            context = replace(context, user=self.user_features([given[name] for name in self._columns(USER)]))
        codes = num_events = of_tasks = None
        if self.counters is not None:
            is_new, clock = aligned("tail_is_new"), given["last_event_ts"]
            newest = torch.maximum(clock, torch.where(is_new, times, NO_TIMESTAMP).amax(1))
            as_of = torch.where(now == NO_TIMESTAMP, newest, now)
            asked = self._keys(candidates, as_of[:, None], items[:, -1:])
            actions = aligned("tail_actions") if "tail_actions" in given else None
            new = self._keys(items, times, F.pad(items[:, :-1], (1, 0)), actions)
            fields = []
            for name, wanted, key in zip(self.counted, asked, new, strict=True):
                own = given[f"{COUNTER_KEYS}{name}"], given[f"{COUNTER_CODES}{name}"]
                fields.append(self.counters(wanted, *own, clock, as_of, key, times, is_new))
            codes = torch.cat(fields, -1)
            num_events = given["event_count"] + is_new.long().sum(1)
            of_tasks = self.counters.with_event_counts(codes, num_events)
        pooled = None
        if self.space_table is not None:
            weight = None
            if self.weight_table is not None:
                of_actions = F.embedding(items, self.weight_table)
                weight = of_actions.gather(2, aligned("tail_actions").unsqueeze(2))
            pooled = self._pooled(given, found, items, weight, aligned("tail_is_new"))
        seen = torch.full((1,), self.tail_len)
        out = []
        if "logits" in self.outputs:
            rows = F.embedding(candidates, self.candidate_table)
            vectors, projections = rows[..., : self.dim], rows[..., self.dim :]
            shown = request
            if self.request_features is not None:
                added = self.request_features([given[name] for name in self._columns(REQUEST)])
                shown = added if request is None else request + added
            of_pairs = None
            if pooled is not None:
                of_pairs = self.heads.candidate_inputs(self._cosines(pooled, candidates), candidates)
            logits = self.heads.candidate_logits(
                vectors, shown, seen, context, projections, codes=of_tasks, inputs=of_pairs
            )
            out += [logits, logits.sigmoid()]
        if "next" in self.outputs:
            of_request = None if pooled is None else pooled.unsqueeze(1)
            outputs = self.heads.user_outputs(request, seen, context)
            users = self.heads.retrieval_users(outputs, of_request)[:, 0]
            score = (F.embedding(candidates, self.retrieval_table) * users.unsqueeze(1)).sum(-1) / self.temperature
            if codes is not None and self.heads.counted is not None:
                statistics = F.embedding(candidates, self.heads.item_statistics)
                if (transitions := self.heads.transitions) is not None:
                    recent = items.flip(1)[:, :NUM_RECENT]
                    sums = transition_sums(transitions, recent, range(len(transitions.item)))
                    sums = sums.gather(2, candidates.unsqueeze(1).expand(-1, sums.shape[1], -1))
                    score = score + inference.transition_scores(users, sums)
                    statistics = torch.cat([statistics, sums.transpose(1, 2)], -1)
                if pooled is not None:
                    statistics = torch.cat([statistics, self._cosines(pooled, candidates)], -1)
                counted = self.heads.counted(codes, score, statistics, num_events, users[:, : self.dim])
                score = torch.where(codes[..., 0] > 0, counted, score)
            out.append(score)
        return tuple(out)

    def _keys(self, item: Tensor, time: Tensor, previous: Tensor, action: Tensor | None = None) -> list[Tensor]:
        """The keys of events or candidates in each field of the counters, int64 [B, n] (`ItemKeys.of`)."""
        assert self.counters is not None
        tables = [] if self.category_table is None else self.category_table.unbind()
        categories = dict(zip(self.categories, tables, strict=True))
        return keys_of(self.counters.spec.fields, categories, self.sizes, item, time, previous, self.actions, action)

    def _pooled(
        self, given: dict[str, Tensor], found: Tensor, items: Tensor, weight: Tensor | None, is_new: Tensor
    ) -> Tensor:
        """Pooled vectors [B, J, r] (`request_pooled`) with the tail's items int64 [B, L], the weights [B, L, 1] of its
        events, and bool [B, L]: the new ones."""
        assert self.space_table is not None
        vectors = F.embedding(items, self.space_table).double()
        vectors = vectors if weight is None else vectors * weight
        of_record = given["summary"][:, -1, : self.space_dim].double() * given["event_count"].unsqueeze(1)
        new = (vectors * is_new.unsqueeze(-1)).sum(1)
        sums = torch.stack([of_record * found.unsqueeze(1) + new, vectors[:, -NUM_POOLED:].sum(1)], 1)
        length = sums.square().sum(-1, keepdim=True).sqrt()
        return (sums / length.masked_fill(length == 0, 1)).float()

    def _cosines(self, pooled: Tensor, candidates: Tensor) -> Tensor:
        """Cosines [B, C, J] of the pooled vectors [B, J, r] with candidates int64 [B, C]."""
        assert self.space_table is not None
        return F.embedding(candidates, self.space_table) @ pooled.transpose(1, 2)

    def _columns(self, prefix: str) -> list[str]:
        """Names of the inputs with features of one kind."""
        return [name for name in self.names if name.startswith(f"{prefix}.")]

    def _summary(self, given: dict[str, Tensor], found: Tensor) -> Tensor:
        """[B, S, M]: the records' rows without that of pooled vectors, or those of an empty history for users without a
        record."""
        if count := self.empty_table.shape[1]:
            return torch.where(found[:, None, None], given["summary"][:, :count], self.empty_table)
        return torch.zeros_like(found[:, None, None].float()).expand(-1, -1, self.dim)[:, :0]

    def _bucket(self, gap_ms: Tensor) -> Tensor:
        """Buckets of `gap_bucket` of ms int64 [...]."""
        return (gap_ms.unsqueeze(-1) >= self.gap_bounds).long().sum(-1) + 1


def _heads(model: VistaModel, stage: TargetAttention) -> VistaModel:
    """A copy of the model over `stage`, without its item table, stage 1, and encoders, so that no file holds these."""
    heads = copy.copy(model)
    kept = "task_head", "candidate_head", "counted", "statistics"
    heads._parameters = {
        name: None if own is None else nn.Parameter(own.detach().clone())
        for name, own in model._parameters.items()
        if name != "item_table"
    }
    read = "item_statistics", "item_rates", "transition_items", "transition_weights"
    heads._buffers = {name: own for name, own in model._buffers.items() if name in read}
    heads._modules = {name: copy.deepcopy(own) if name in kept else None for name, own in model._modules.items()}
    heads._modules["target_attention"] = stage
    return heads


@dataclass(frozen=True, slots=True)
class GraphInput:
    """One array that a graph reads."""

    name: str
    dtype: str
    """float32, int64, or bool."""
    shape: tuple[str | int, ...]
    """Length per axis; the name of the axis if a caller chooses it."""
    meaning: str
    """Description for readers of `export.json`."""


def graph_inputs(model: VistaModel) -> list[GraphInput]:
    """The inputs of a model's graph, in their order. What the model does not read is left out."""
    config, schema, counted = model.config, model.schema, model.counter_spec
    rows, reads_time = config.num_rows, model.encoder.gap is not None
    inputs = [
        GraphInput("candidates", "int64", (USERS, CANDIDATES), "item rows of the candidates; 0 or less if unknown"),
        GraphInput("found", "bool", (USERS,), "whether the user has a record; if not, the summary is ignored"),
    ]
    if rows:
        inputs.append(GraphInput("summary", "float32", (USERS, rows, config.dim), "the record's rows, decoded"))
    events = USERS, EVENTS
    inputs += [
        GraphInput("tail_lengths", "int64", (USERS,), "events in the tail; the entries after them are ignored"),
        GraphInput("tail_items", "int64", events, "item rows of the newest events, oldest first; 0 or less if unknown"),
    ]
    if model.encoder.action is not None:
        inputs.append(GraphInput("tail_actions", "int64", events, "codes of their actions"))
    if reads_time or (counted is not None and counted.has_time):
        inputs += [
            GraphInput("tail_times", "int64", events, "their times in ms"),
            GraphInput("now", "int64", (USERS,), "time of the request in ms; -2^63 if it is unknown"),
        ]
    inputs += _features(TAIL, schema.tail_features, events, "feature of the tail's events")
    inputs += _features(USER, schema.user_features, (USERS,), "feature of the user")
    if counted is not None or config.space_dim:
        inputs += [
            GraphInput("tail_is_new", "bool", events, "whether the record does not cover the event"),
            GraphInput("event_count", "int64", (USERS,), "events that the record covers"),
        ]
    if counted is not None:
        keys = USERS, KEYS
        inputs += [
            GraphInput("last_event_ts", "int64", (USERS,), "time of the newest of them in ms"),
            GraphInput(COUNTER_KEYS, "int64", keys, "item rows that the record counts; 0 is padding"),
            GraphInput(COUNTER_CODES, "int64", (*keys, counted.num_columns), "their codes, 0 to 63"),
        ]
        for name in counted_names(model)[1:]:
            meaning = f"keys of {name[1:]} that the record counts, from 1 on; 0 is padding"
            inputs += [
                GraphInput(f"{COUNTER_KEYS}{name}", "int64", keys, meaning),
                GraphInput(f"{COUNTER_CODES}{name}", "int64", (*keys, counted.num_columns), "their codes, 0 to 63"),
            ]
    if schema.tasks:
        inputs += _features(REQUEST, schema.request_features, (USERS, CANDIDATES), "feature of the request")
    return inputs


def counted_names(model: VistaModel) -> list[str]:
    """What the names of inputs with counters end with, per field: nothing for items, then a dot and the field."""
    spec = model.counter_spec
    return [] if spec is None else ["", *(f".{name}" for name in spec.fields[1:])]


def _features(
    prefix: str, columns: Sequence[FeatureSpec], shape: tuple[str | int, ...], meaning: str
) -> list[GraphInput]:
    values = {
        "category": ("int64", "code (a row of its file of values), -1 if missing"),
        "number": ("float32", "NaN if missing"),
    }
    return [
        GraphInput(f"{prefix}.{column.name}", values[column.kind][0], shape, f"{meaning}: {values[column.kind][1]}")
        for column in columns
    ]


def request_arrays(
    model: VistaModel,
    stored: StoredBatch,
    tail: Tail,
    is_new: NDArray[np.bool_],
    now: Int | None,
    candidates: Int,
    request: Mapping[str, NDArray[Any]],
) -> Arrays:
    """Arrays by name, as `graph_inputs` lists them, for users whose records vista has read.

    Args:
        stored: records of B users.
        tail: stored tails, with new events merged into them.
        is_new: bool [T] its events that the records do not cover.
        now: int64 [B] ms, or None if unknown.
        candidates: int64 [B, C] model rows.
        request: features of the request by name, [B, C] with the model's codes.
    """
    num_users = len(stored.found)
    given: Arrays = {
        "candidates": candidates,
        "found": stored.found,
        "summary": stored.summary,
        "tail_lengths": np.diff(tail.offsets),
        "tail_items": _padded(tail.items, tail.offsets),
        "tail_actions": _padded(tail.actions, tail.offsets),
        "tail_times": _padded(tail.times, tail.offsets),
        "tail_is_new": _padded(is_new, tail.offsets),
        "now": np.full(num_users, NO_TIMESTAMP) if now is None else now,
        "event_count": stored.event_count,
        "last_event_ts": stored.last_event_ts,
    }
    most = max((int(np.diff(counters.offsets).max(initial=0)) for counters in stored.counters), default=0)
    for counters, field in zip(stored.counters, counted_names(model), strict=True):
        keys, codes = counters.padded(most)
        given |= {f"{COUNTER_KEYS}{field}": np.maximum(keys, 0), f"{COUNTER_CODES}{field}": codes}
    for prefix, columns in (
        (TAIL, {name: _padded(values, tail.offsets) for name, values in tail.features.items()}),
        (USER, stored.features),
        (REQUEST, request),
    ):
        given |= {f"{prefix}.{name}": values for name, values in columns.items()}
    inputs = graph_inputs(model)
    return {one.name: np.ascontiguousarray(given[one.name].astype(one.dtype)) for one in inputs}


def _padded(values: NDArray[Any], offsets: Int) -> NDArray[Any]:
    """Packed values [N] of B users as [B, T], with zeros after each user's own; T is the longest length."""
    lengths = np.diff(offsets)
    filled = np.arange(lengths.max(initial=0)) < lengths[:, None]
    padded = np.zeros(filled.shape, values.dtype)
    padded[filled] = values
    return padded


class GraphCounters(nn.Module):
    """Advances stored counters to the request, adds new events, and looks up candidates (`CounterCodes.advanced`). In
    float64, as vista does."""

    def __init__(self, spec: CounterSpec) -> None:
        super().__init__()
        self.spec = spec
        every = torch.arange(MAX_CODE + 1, dtype=torch.uint8)[:, None].expand(-1, spec.num_columns)
        resolution, largest = (torch.from_numpy(scale) for scale in code_scales(spec))
        self.register_buffer("levels", torch.from_numpy(decode_values(spec, every.numpy())).view(-1, 1))
        self.register_buffer("resolution", resolution)
        self.register_buffer("factor", MAX_CODE / torch.log1p(largest / resolution))
        self.register_buffer("half_lives", torch.from_numpy(spec.half_lives).double())
        self.levels: Tensor
        self.resolution: Tensor
        self.factor: Tensor
        self.half_lives: Tensor

    def forward(
        self,
        candidates: Tensor,
        keys: Tensor,
        codes: Tensor,
        clock: Tensor,
        now: Tensor,
        items: Tensor,
        times: Tensor,
        is_new: Tensor,
    ) -> Tensor:
        """Codes int64 [B, C, F] of candidates in one field as of the request; 0 if they are not counted.

        Args:
            candidates: int64 [B, C] their keys, which are model rows in the field of items.
            keys: int64 [B, E] counted keys, 0 as padding.
            codes: int64 [B, E, F] as stored.
            clock: int64 [B] ms that they refer to.
            now: int64 [B] ms of the requests, or of the newest events.
            items: int64 [B, L] keys of the tail's events, right-aligned.
            times: int64 [B, L] ms.
            is_new: bool [B, L] events that the counters lack.
        """
        num_new = is_new.long().sum(1)
        later = num_new[:, None] - is_new.long().cumsum(1)
        column = torch.arange(self.spec.num_columns, device=codes.device)
        old = F.embedding(codes * self.spec.num_columns + column, self.levels).squeeze(-1)
        decay, age = self._passed((now - clock).clamp(min=0), num_new)
        old = torch.cat([old[..., :1], old[..., 1:-1] * decay[:, None], old[..., -1:] + age[:, None, None]], -1)
        decay, age = self._passed((now[:, None] - times).clamp(min=0), later)
        new = torch.cat([torch.ones_like(decay[..., :1]), decay, age.unsqueeze(-1)], -1)
        key, values = torch.cat([keys, torch.where(is_new, items, 0)], 1), torch.cat([old, new], 1)
        same = (candidates.unsqueeze(-1) == key[:, None]) & (key > 0)[:, None]
        sums = same.double() @ values[..., :-1]
        ages = torch.where(same, values[:, None, :, -1], _NO_AGE).amin(-1)
        found = torch.cat([sums, ages.unsqueeze(-1)], -1)
        level = _level(found, self.resolution, self.factor)
        return torch.where(same.any(-1).unsqueeze(-1), level, 0.0).long()

    def with_event_counts(self, codes: Tensor, num_events: Tensor) -> Tensor:
        """The codes of all fields, int64 [B, C, G * F], and those of the users' numbers of events int64 [B]
        (`UserCounters.of_pairs`): int64 [B, C, G * F + 1]."""
        factor = MAX_CODE / math.log1p(MAX_EVENTS / EVENTS_RESOLUTION)
        level = _level(num_events.double(), EVENTS_RESOLUTION, factor).long()
        is_counted = (codes[..., :: self.spec.num_columns] > 0).any(-1)
        of_items = torch.where(is_counted, level.unsqueeze(1), 0)
        return torch.cat([codes, of_items.unsqueeze(-1)], -1)

    def _passed(self, elapsed: Tensor, num_events: Tensor) -> tuple[Tensor, Tensor]:
        """Decay float64 [..., H] and age float64 [...] after ms and events int64 [...] (`CounterSpec`)."""
        spec = self.spec
        steps = [elapsed] * len(spec.days) + [num_events * STEPS_PER_EVENT] * len(spec.events)
        if not steps:
            return elapsed.double().unsqueeze(-1)[..., :0], self._age(elapsed, num_events)
        decay = torch.exp2(-torch.stack(steps, -1).double() / self.half_lives)
        return decay, self._age(elapsed, num_events)

    def _age(self, elapsed: Tensor, num_events: Tensor) -> Tensor:
        return elapsed.double() / 1_000 if self.spec.has_time else num_events.double()


def _level(values: Tensor, resolution: Tensor | float, factor: Tensor | float) -> Tensor:
    """Codes as of `vista.counters.counters`, in the dtype of the values."""
    return (torch.log(values / resolution + 1) * factor).round().clamp(max=MAX_CODE)


class GraphFeatures(nn.Module):
    """What `RowFeatureReader.encode` and `RowFeatureEncoder` compute, in operators that every runtime has."""

    def __init__(self, columns: Sequence[FeatureSpec], encoder: RowFeatureEncoder) -> None:
        """
        Args:
            columns: the encoder's, or the first of them.
        """
        super().__init__()
        self.columns = list(columns)
        self.register_buffer("values", encoder.values.detach())
        self.register_buffer("dense", None if encoder.dense is None else encoder.dense.detach())
        self.values: Tensor
        self.dense: Tensor | None
        for number, column in enumerate(columns):
            self.register_buffer(f"bounds{number}", torch.tensor(column.bounds, dtype=torch.float64))

    @classmethod
    def of(cls, columns: Sequence[FeatureSpec], encoder: RowFeatureEncoder | None) -> GraphFeatures | None:
        """None if there is nothing to read."""
        return cls(columns, encoder) if columns and encoder is not None else None

    def forward(self, given: Sequence[Tensor]) -> Tensor:
        """[..., M] vectors of codes int64 [...] or numbers float32 [...], one tensor per column."""
        entries: list[Tensor] = []
        out, first, dense = None, 0, 0
        for number, (column, values) in enumerate(zip(self.columns, given, strict=True)):
            if column.kind == "number":
                wide, missing = values.double(), values.isnan()
                bucket = (getattr(self, f"bounds{number}") < wide.unsqueeze(-1)).sum(-1)
                entries.append(torch.where(missing, first, bucket + first + 1))
                score = ((wide - column.mean) / column.scale).clamp(-MAX_ABS_SCORE, MAX_ABS_SCORE).float()
                assert self.dense is not None
                added = torch.where(missing, 0.0, score).unsqueeze(-1) * self.dense[dense]
                out, dense = added if out is None else out + added, dense + 1
            else:
                entries.append(values + (first + 1))
            first += column.num_rows
        embedded = F.embedding(torch.stack(entries, -1), self.values).sum(-2)
        return embedded if out is None else embedded + out


class PlainSoftmaxLayer(SoftmaxLayer):
    """A `SoftmaxLayer` without vista_kernels, whose operators can be exported: queries attend to the context and to
    themselves in one softmax over both."""

    def attend_query(
        self, x: Tensor, own: Sequence[Tensor], key: Tensor, value: Tensor, bias: Tensor, context_mask: Tensor
    ) -> Tensor:
        query, gate, own_key, own_value = own
        query, own_key, own_value = self.heads(query), self.heads(own_key), self.heads(own_value)
        scale = self.head_dim**-0.5
        scores = query @ key.transpose(-1, -2) * scale + bias + torch.where(context_mask, 0.0, MASKED)[:, None, None]
        own_score = (query * own_key).sum(-1, keepdim=True) * scale + self.bias[:, :1, None]
        share = torch.cat([scores, own_score], -1).softmax(-1)
        heads = share[..., :-1] @ value + share[..., -1:] * own_value
        return self.mix(x, heads, gate)


def use_plain_layers(stage: TargetAttention) -> None:
    """Let the softmax layers of a copied stage 2 compute in plain operators, with the same weights."""
    for layer in stage.layers:
        if type(layer) is SoftmaxLayer:
            layer.__class__ = PlainSoftmaxLayer
