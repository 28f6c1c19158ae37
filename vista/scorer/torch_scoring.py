"""Scores computed by torch: on GPUs, in bfloat16, and where the C++ library is missing or lacks a model.

B users, C candidates, C' the same in whole tiles of `ROW_TILE` rows, so that their scores do not depend on each other,
N pairs, V items of the vocabulary, L tail length, M model dim, M' width of retrieval vectors, J pooled vectors of r
numbers, R rows of the encoder of requests.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vista.arrays import Float32s, Int
from vista.config.checks import Precision
from vista.counters.counters import MAX_CODE
from vista.log.histories import NUM_GAPS
from vista.model import inference
from vista.model.features import EncodedRows
from vista.model.inference import ROW_TILE, UserTransitions
from vista.model.item_projections import ItemProjections
from vista.model.serving_model import NEXT_TASK, UNKNOWN_ITEM, ServingModel
from vista.model.target_attention import TargetContext
from vista.model.vista_model import VistaModel
from vista.scorer.native_scoring import MAX_PREPARED_ROWS, code_vectors
from vista.scorer.request import Request

CONTEXT_TOKENS_PER_PASS = 1024
"""Tokens of summaries and tails whose keys and values fit a cache."""
Cells = tuple[slice, slice]
"""A range of users and a range of their candidates."""


class TorchScoring:
    """Scores by torch, on the model's device.

    Args:
        served: the model.
        items: projections of its items.
        precision: of matrix products.
        pairs_per_pass: pairs of user and candidate per pass through stage 2, so that its intermediates fit a cache for
            any request.
        cosines_per_pass: the same for the retrieval head, which computes only one product per candidate.
    """

    def __init__(
        self,
        served: ServingModel,
        items: ItemProjections,
        precision: Precision,
        pairs_per_pass: int = 1024,
        cosines_per_pass: int = 65_536,
    ) -> None:
        self.model = model = served.vista_model
        self._pairs_per_pass, self._cosines_per_pass = pairs_per_pass, cosines_per_pass
        self.retrieval, self._candidate = (
            None if table is None else torch.from_numpy(table).to(model.device)
            for table in (items.retrieval, items.candidate)
        )
        # What follows depends on the weights alone, so it is computed once.
        self._scoring = model.with_frozen("target_attention", precision)
        self._seen = torch.full((1,), model.config.tail_len, device=model.device)
        stage = model.target_attention
        with torch.inference_mode():
            self._masks, self._biases = stage.request_masks(), stage.query_biases(self._seen)
            gaps = model.encoder.gap_vectors(torch.arange(NUM_GAPS, device=model.device))
            self._time_projections = None if gaps is None else torch.cat([gaps, stage.request_projection(gaps)], -1)
            """[NUM_GAPS, 5M] projections of the request's time, like those of items in `ItemProjections.candidate`."""
            self._of_features = None if model.request_encoder is None else RequestProjections(model)
            head, self._code_vectors = model.candidate_head, None
            if head is not None and head.added is not None:
                vectors = code_vectors(head.added.weight.detach().cpu().numpy(), head.num_values)
                self._code_vectors = torch.from_numpy(vectors).to(model.device)
                """[G * F * 64, 5M] what each code of each column adds to the rows of `ItemProjections.candidate`."""

    def transitions(self, request: Request) -> UserTransitions | None:
        """Those that the scores of a request read; None for a model that reads none."""
        return UserTransitions.of(self.model, request.tail.item)

    def context(self, request: Request) -> tuple[TargetContext, Tensor | None]:
        """Keys and values of a request, and the gap buckets of its time, int64 [B, 1] or None."""
        summary, tail = request.summary, request.tail
        context = inference.request_context(self._scoring, summary, tail, self._masks, request.users)
        return context, inference.request_bucket(self.model, request.now, request.tail)

    def pooled(self, request: Request) -> Tensor | None:
        """[B, J, r] those of the request."""
        return None if request.pooled is None else torch.from_numpy(request.pooled).to(self.model.device)

    def user_vectors(self, request: Request) -> Float32s:
        """User vectors of the retrieval head, float32 [B, M']."""
        parts = [self._user_vectors(part, *self.context(part)) for _, part in self._portions(request)]
        vectors: Float32s = torch.cat(parts).cpu().numpy() if parts else np.empty((0, self.model.retrieval_dim), "f4")
        return vectors

    def scores(
        self, request: Request, rows: Int | None, tasks: list[str], lengths: Int | None = None
    ) -> dict[str, Float32s]:
        """Arguments and result are those of `ServingSnapshot.scores`.

        Args:
            lengths: [B] number of candidates per user, ascending; later columns are undefined.
        """
        count = len(self.model.items) + 1 if rows is None else rows.shape[-1]
        scores = {task: np.empty((len(request), count), np.float32) for task in tasks}
        labeled = [task for task in tasks if task != NEXT_TASK]
        wanted_rows = None if rows is None else torch.from_numpy(rows)
        for users, part in self._portions(request):
            wanted = np.full(len(part), count) if lengths is None else lengths[users]
            own = wanted_rows if wanted_rows is None or wanted_rows.ndim == 1 else wanted_rows[users]
            context, bucket = self.context(part)
            if labeled:
                for cells, logits in self._logits(part, context, bucket, own, wanted):
                    # The last bit of a float32 sigmoid depends on the position in a vector; float64 rounds it away.
                    probability = logits.double().sigmoid().float().cpu().numpy()
                    for task in labeled:
                        scores[task][users][cells] = probability[..., self.model.schema.tasks.index(task)]
            if NEXT_TASK in tasks:
                vectors = self._user_vectors(part, context, bucket)
                for cells, cosine in self._next_scores(vectors, part, own, wanted):
                    scores[NEXT_TASK][users][cells] = cosine.cpu().numpy()
        return scores

    def logits(self, request: Request, rows: Int) -> Float32s:
        """Arguments and result are those of `ServingSnapshot.logits`."""
        logits = np.empty((*rows.shape, len(self.model.schema.tasks)), np.float32)
        wanted_rows = torch.from_numpy(rows)
        for users, part in self._portions(request):
            wanted = np.full(len(part), rows.shape[1])
            for cells, of_cells in self._logits(part, *self.context(part), wanted_rows[users], wanted):
                logits[users][cells] = of_cells.cpu().numpy()
        return logits

    def ragged_scores(self, request: Request, rows: Int, offsets: Int, tasks: list[str]) -> dict[str, Float32s]:
        """Arguments and result are those of `ServingSnapshot.ragged_scores`.

        Users with similar numbers of candidates are scored together, so that the longest list does not determine time
        and memory.
        """
        lengths = np.diff(offsets)
        order = np.argsort(lengths, kind="stable")
        scores = {task: np.empty(len(rows), np.float32) for task in tasks}
        for users, part in self._portions(request.select(order)):
            own = order[users]
            filled = np.arange(lengths[own].max()) < lengths[own][:, None]
            place = (offsets[own][:, None] + np.arange(filled.shape[1]))[filled]
            grid = np.full(filled.shape, UNKNOWN_ITEM, np.int64)
            grid[filled] = rows[place]
            for task, cells in self.scores(part, grid, tasks, lengths[own]).items():
                scores[task][place] = cells[filled]
        return scores

    def added_by(self, codes: NDArray[np.uint8]) -> Tensor:
        """Terms [n, 5M] that counters uint8 [n, G * F + 1] add to the rows of `ItemProjections.candidate`."""
        assert self._code_vectors is not None
        codes = codes[:, :-1]
        index = torch.from_numpy(codes + np.arange(codes.shape[1]) * (MAX_CODE + 1)).to(self.model.device)
        return F.embedding_bag(index, self._code_vectors, mode="sum")

    def _portions(self, request: Request) -> Iterator[tuple[slice, Request]]:
        """The request, a few users at a time, so that their keys and values fit a cache."""
        tokens = self.model.config.num_seeds + self.model.config.tail_len
        step = max(1, CONTEXT_TOKENS_PER_PASS // tokens)
        if 0 < len(request) <= step:
            yield slice(0, len(request)), request
            return
        for first in range(0, len(request), step):
            users = slice(first, min(first + step, len(request)))
            yield users, request.select(users)

    def _user_vectors(self, request: Request, context: TargetContext, bucket: Tensor | None) -> Tensor:
        gap, model = self.model.encoder.gap_vectors(bucket), self._scoring.with_adapter(request.adapter)
        vectors: Tensor = inference.user_vectors(model, context, gap, self.pooled(request), self._biases)
        return vectors

    @torch.inference_mode()
    def _logits(
        self, request: Request, context: TargetContext, bucket: Tensor | None, rows: Tensor | None, lengths: Int
    ) -> Iterator[tuple[Cells, Tensor]]:
        """Ranges of users and columns, and their logits, float32 [users, columns, num_tasks].

        A range passes stage 2 as a matrix of queries. Each is the sum of an item, of what the request adds, and of what
        the user's counters of the item add: of vectors [M], and of their projections in layer 1 [4M].

        Args:
            context: of the request, like `bucket` (`context`).
            rows: as in `scores`, like `lengths`.
        """
        model, dim = self._scoring.with_adapter(request.adapter), self.model.config.dim
        assert model.task_head is not None
        of_requests, pooled = self._of_requests(request, bucket), self.pooled(request)
        for users, columns in rectangles(lengths, self._pairs_per_pass):
            some = context.select(users)
            vectors, projections = (
                part.expand(len(some.tail), -1, -1) for part in self._candidates(rows, users, columns)
            )
            count = vectors.shape[1]
            added = self._of_pairs(request, of_requests, users, columns.start, count)
            shape = len(some.tail), count
            x = torch.empty(*shape, dim, device=model.device)
            own = torch.empty(*shape, 4 * dim, dtype=some.keys[0].dtype, device=model.device)
            # Copy, convert, and add in one pass.
            torch.add(vectors, 0.0 if added is None else added[..., :dim], out=x)
            torch.add(projections, 0.0 if added is None else added[..., dim:], out=own)
            counted = None
            if request.counters is not None:
                counted = request.counters.counted_pairs(users, _array(rows), columns)
                self._add_counters(x, own, *counted)
            logits = model.task_head(model.target_attention.query(x, own, None, self._seen, some, self._biases))
            if pooled is not None:
                candidates = tiles(rows, users, columns).to(model.device)
                logits += self._of_head(model, pooled[users], candidates, counted)
            elif counted is not None and len(counted[2]):
                user, column, codes = counted
                index = torch.from_numpy(user * count + column).to(model.device)
                logits.view(-1, logits.shape[-1]).index_add_(0, index, inference.counter_logits(model, codes))
            yield (users, columns), logits[:, : columns.stop - columns.start]

    def _of_requests(self, request: Request, bucket: Tensor | None) -> Tensor | None:
        """[B, 1, 5M] what times and features of requests add to items; None if the model reads neither.

        Features that differ between candidates are left out (`_of_pairs` adds them).
        """
        times = None if bucket is None or self._time_projections is None else self._time_projections[bucket]
        given = request.features
        if self._of_features is None or (given is not None and given.per_candidate):
            return times
        of_features = self._of_features.of(None if given is None else given.of_users(), len(request))[:, None]
        return of_features if times is None else times + of_features

    def _of_pairs(
        self, request: Request, of_requests: Tensor | None, users: slice, start: int, count: int
    ) -> Tensor | None:
        """[users, 1 or count, 5M] what requests add to `count` candidates from `start` on; None if nothing."""
        added, features = None if of_requests is None else of_requests[users], request.features
        if features is None or not features.per_candidate:
            return added
        assert self._of_features is not None
        pairs = features.of_pairs(users, start, count)
        of_pairs = self._of_features.of(pairs, len(pairs)).view(-1, count, 5 * self.model.config.dim)
        return of_pairs if added is None else added + of_pairs

    def _add_counters(self, x: Tensor, own: Tensor, user: Int, column: Int, codes: NDArray[np.uint8]) -> None:
        """Add what counters say of n pairs of user and candidate to the queries x [users, Q, M] and own [users, Q,
        4M]."""
        if not len(codes):
            return
        dim, counted = x.shape[-1], self.added_by(codes)
        index = torch.from_numpy(user * x.shape[1] + column).to(x.device)
        x.view(-1, dim).index_add_(0, index, counted[:, :dim])
        own.view(-1, 4 * dim).index_add_(0, index, counted[:, dim:].to(own.dtype))

    def _of_head(
        self, model: VistaModel, pooled: Tensor, rows: Tensor, counted: tuple[Int, Int, NDArray[np.uint8]] | None
    ) -> Tensor:
        """What `candidate_head` adds to the logits of candidates, float32 [users, C', num_tasks].

        Args:
            pooled: [users, J, r].
            rows: int64 [C'] or [users, C'] model rows, in whole tiles.
            counted: as of `RequestCounters.counted_pairs`; None without counters.
        """
        head = model.candidate_head
        assert head is not None
        cosines = inference.pooled_cosines(pooled.unsqueeze(1), model.item_space[rows])
        inputs = model.candidate_inputs(cosines, rows.expand(cosines.shape[:2])).flatten(0, 1)
        codes: Tensor | None = None
        if (spec := model.counter_spec) is not None:
            own = np.zeros((len(inputs), spec.num_fields * spec.num_columns + 1), np.uint8)
            if counted is not None:
                user, column, of_pairs = counted
                own[user * cosines.shape[1] + column] = of_pairs
            codes = torch.from_numpy(own).to(model.device)
        logits: Tensor = head.logits(codes, inputs)
        return logits.view(*cosines.shape[:2], -1)

    def _candidates(self, rows: Tensor | None, users: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """Vectors [C', M] or [users, C', M] and projections [..., 4M] of the items of some columns, in whole tiles."""
        table, dim = self._candidate, self.model.config.dim
        if table is not None:
            items = take(table, rows, users, columns)
            return items[..., :dim], items[..., dim:]
        vectors = self.model.item_vectors(tiles(rows, users, columns).to(self.model.device))
        return vectors, self._scoring.target_attention.layers[0].project(vectors)

    @torch.inference_mode()
    def _next_scores(
        self, vectors: Tensor, request: Request, rows: Tensor | None, lengths: Int
    ) -> Iterator[tuple[Cells, Tensor]]:
        """Ranges of users and columns, and scores float32 [users, columns] of the users with vectors [B, M']."""
        table, counters, transitions = self.retrieval, request.counters, self.transitions(request)
        assert table is not None
        counted = None
        if counters is not None:
            items = table[UNKNOWN_ITEM + 1 :]
            counted = inference.counted_scores(self.model, vectors, items, counters, transitions, self.pooled(request))
        scaled = vectors / self.model.temperature
        for users, columns in rectangles(lengths, self._cosines_per_pass):
            items = take(table, rows, users, columns)
            # One product per user, because the bits of a joint product depend on the number of users.
            own = [torch.mv(items if items.ndim == 2 else items[row], user) for row, user in enumerate(scaled[users])]
            scores = torch.stack(own)
            if transitions is not None:
                wanted: Tensor | range = range(columns.start, columns.stop)
                if rows is not None:
                    wanted = rows[columns] if rows.ndim == 1 else rows[users, columns]
                added = inference.transition_scores(vectors[users], transitions.select(users).sums(wanted))
                scores[:, : added.shape[1]] += added
            if counters is not None and counted is not None:
                user, column, place = map(torch.from_numpy, counters.find(users, _array(rows), columns))
                scores[user, column] = counted[place]
            yield (users, columns), scores[:, : columns.stop - columns.start]


def rectangles(lengths: Int, pairs: int) -> Iterator[Cells]:
    """Rectangles of about `pairs` pairs, in whole tiles of columns, that cover the first lengths[b] columns of user b.

    The lengths ascend, so that the users who have a column are the last ones.
    """
    start, longest = 0, int(lengths.max(initial=0))
    while start < longest:
        first = int(np.searchsorted(lengths, start, side="right"))
        step = max(1, pairs // (len(lengths) - first) // ROW_TILE) * ROW_TILE
        yield slice(first, len(lengths)), slice(start, min(start + step, longest))
        start += step


def take(table: Tensor, rows: Tensor | None, users: slice, columns: slice) -> Tensor:
    """Rows of a table, padded with the unknown item's row to whole tiles: [C', width] or [users, C', width]."""
    if rows is None and (columns.stop - columns.start) % ROW_TILE == 0:
        return table[columns]
    part = tiles(rows, users, columns).to(table.device)
    return table.index_select(0, part.flatten()).view(*part.shape, table.shape[1])  # four times as fast as table[part]


def tiles(rows: Tensor | None, users: slice, columns: slice) -> Tensor:
    """Model rows int64 [C'] or [users, C'], padded with the unknown item to whole tiles."""
    if rows is None:
        part = torch.arange(columns.start, columns.stop)
    else:
        part = rows[columns] if rows.ndim == 1 else rows[users, columns]
    return F.pad(part, (0, -part.shape[-1] % ROW_TILE), value=UNKNOWN_ITEM)


def _array(rows: Tensor | None) -> Int | None:
    return None if rows is None else rows.numpy()


class RequestProjections:
    """Computes what features of requests add to the rows of `ItemProjections.candidate`.

    Encoder and projection are linear, so each value is projected once per model, and a request only adds up rows.
    """

    def __init__(self, model: VistaModel) -> None:
        """
        Args:
            model: reads features of requests; its weights no longer change.
        """
        assert model.request_encoder is not None
        self._model = model
        values, dense = model.request_encoder.values, model.request_encoder.dense
        rows = values if dense is None else torch.cat([values, dense])
        self._dense_rows = np.arange(len(values), len(rows))
        self.table = self._projected(rows) if len(rows) <= MAX_PREPARED_ROWS else None
        """[R, 5M] of each value, then of each dense input; None if the encoder has too many."""

    @torch.inference_mode()
    def of(self, features: EncodedRows | None, count: int) -> Tensor:
        """[N, 5M] float32. The bits of a row do not depend on the others.

        Args:
            features: None if all are missing.
            count: N.
        """
        if features is None:
            assert self._model.request_features is not None
            features = self._model.request_features.missing(count)
        if self.table is None:
            tiles = np.arange(-(-count // ROW_TILE) * ROW_TILE) % max(count, 1)  # repeated rows fill the last one
            assert self._model.request_encoder is not None
            return self._projected(self._model.request_encoder(features.select(tiles)))[:count]
        row = np.concatenate([features.entry, np.broadcast_to(self._dense_rows, features.dense.shape)], 1)
        weight = np.concatenate([np.ones(features.entry.shape, np.float32), features.dense], 1)
        row_, weight_ = torch.from_numpy(row).to(self.table.device), torch.from_numpy(weight).to(self.table.device)
        return F.embedding_bag(row_, self.table, mode="sum", per_sample_weights=weight_)

    def _projected(self, vectors: Tensor) -> Tensor:
        """[N, 5M] vectors [N, M], and their projections in the first layer of stage 2."""
        return torch.cat([vectors, self._model.target_attention.request_projection(vectors)], -1)
