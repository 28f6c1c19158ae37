"""Stage 2 with its tables as one graph, from the arrays of records and requests to scores.

Letters: B users, T events of the tails that are given, L tail length of the model, C candidates, S summary rows,
G fields of counters, M model dim, M' width of retrieval vectors, V items of the vocabulary, A actions.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vista.export.graph_counters import GraphCounters
from vista.export.graph_features import GraphFeatures
from vista.export.graph_input import COUNTER_CODES, COUNTER_KEYS, REQUEST, TAIL, USER, counted_names, graph_inputs
from vista.export.plain_softmax_layer import use_plain_layers
from vista.log.gaps import NO_TIMESTAMP, NUM_GAPS, UNKNOWN_GAP
from vista.model import inference
from vista.model.item_projections import ItemProjections
from vista.model.target_attention import TargetAttention
from vista.model.vista_model import VistaModel


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
        self.num_rows, self.num_trained = config.num_seeds + config.num_state_rows, model.num_trained_items
        self.stage = copy.deepcopy(model.target_attention)
        use_plain_layers(self.stage)
        table = items.candidate
        if table is None:
            table = model.item_vectors(torch.arange(count + 1))
        self._tables(candidate=table, retrieval=items.retrieval, empty=inference.empty_summary(model))
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
        keys = model.item_keys
        category = None if keys is None or not len(keys.category) else keys.category.astype(np.int64)
        self._tables(category=None if category is None else torch.from_numpy(category))

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
    """int64 [G - 1, 1 + V] (`ItemKeys.category`)."""
    gap_bounds: Tensor
    """int64 ms, ascending: where buckets begin."""

    def _tables(self, **tables: Tensor | None) -> None:
        for name, table in tables.items():
            self.register_buffer(f"{name}_table", None if table is None else table.detach())

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Outputs in the order of `outputs`, from inputs in the order of `names`."""
        given = dict(zip(self.names, inputs, strict=True))
        candidates, found, lengths = given["candidates"], given["found"], given["tail_lengths"]
        place = lengths[:, None] - self.tail_len + torch.arange(self.tail_len)
        valid = place >= 0
        place = place.clamp(min=0)

        def aligned(name: str) -> Tensor:
            """The newest L events of an input [B, T], right-aligned; 0 in the padding."""
            column = torch.cat([given[name], torch.zeros_like(lengths[:, None]).to(given[name].dtype)], 1)
            newest = column.gather(1, place)
            return newest & valid if newest.dtype is torch.bool else newest.masked_fill(~valid, 0)

        items = aligned("tail_items")
        items = torch.where(items > self.num_trained, 0, items)  # items that were added later are candidates only
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
            is_new = aligned("tail_is_new")
            fields = []
            for field, name in enumerate(self.counted):
                own = f"{COUNTER_KEYS}{name}", f"{COUNTER_CODES}{name}", "last_event_ts"
                asked, new = self._keys(field, candidates), self._keys(field, items)
                fields.append(self.counters(asked, *(given[one] for one in own), now, new, times, is_new))
            codes = torch.cat(fields, -1)
            num_events = given["event_count"] + is_new.long().sum(1)
            of_tasks = self.counters.with_event_counts(codes, num_events)
        seen = torch.full((1,), self.tail_len)
        out = []
        if "logits" in self.outputs:
            rows = F.embedding(candidates, self.candidate_table)
            vectors, projections = rows[..., : self.dim], rows[..., self.dim :]
            shown = request
            if self.request_features is not None:
                added = self.request_features([given[name] for name in self._columns(REQUEST)])
                shown = added if request is None else request + added
            logits = self.heads.candidate_logits(vectors, shown, seen, context, projections, codes=of_tasks)
            out += [logits, logits.sigmoid()]
        if "next" in self.outputs:
            users = self.heads.user_vectors(request, seen, context)[:, 0]
            score = (F.embedding(candidates, self.retrieval_table) * users.unsqueeze(1)).sum(-1) / self.temperature
            if codes is not None and self.heads.counted is not None:
                popularity = F.embedding(candidates, self.heads.item_popularity.unsqueeze(1)).squeeze(-1)
                counted = self.heads.counted(codes, score, popularity, num_events, users)
                score = torch.where(codes[..., 0] > 0, counted, score)
            out.append(score)
        return tuple(out)

    def _keys(self, field: int, rows: Tensor) -> Tensor:
        """What items are counted as in one field of the counters: int64 [...] of item rows int64 [...]."""
        if field == 0:
            return rows
        assert self.category_table is not None
        return self.category_table[field - 1][rows]

    def _columns(self, prefix: str) -> list[str]:
        """Names of the inputs with features of one kind."""
        return [name for name in self.names if name.startswith(f"{prefix}.")]

    def _summary(self, given: dict[str, Tensor], found: Tensor) -> Tensor:
        """[B, S, M]: the records' rows, and those of an empty history for users without a record."""
        if self.num_rows:
            return torch.where(found[:, None, None], given["summary"], self.empty_table)
        return torch.zeros_like(found[:, None, None].float()).expand(-1, -1, self.dim)[:, :0]

    def _bucket(self, gap_ms: Tensor) -> Tensor:
        """Buckets of `gap_bucket` of ms int64 [...]."""
        return (gap_ms.unsqueeze(-1) >= self.gap_bounds).long().sum(-1) + 1


def _heads(model: VistaModel, stage: TargetAttention) -> VistaModel:
    """A copy of the model over `stage`, without its item table, stage 1, and encoders, so that no file holds these."""
    heads = copy.copy(model)
    kept = "task_head", "candidate_counters", "counted", "popularity"
    heads._parameters = {
        name: None if own is None else nn.Parameter(own.detach().clone())
        for name, own in model._parameters.items()
        if name != "item_table"
    }
    heads._buffers = {name: own for name, own in model._buffers.items() if name == "item_popularity"}
    heads._modules = {name: copy.deepcopy(own) if name in kept else None for name, own in model._modules.items()}
    heads._modules["target_attention"] = stage
    return heads
