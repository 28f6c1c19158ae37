"""What a scorer has in service: a model, its items, and a store, none of which change during a call.

B users, C candidates, C' the same in whole tiles of `ROW_TILE` rows, so that their scores do not depend on each other,
N requests or pairs, V items of the vocabulary, S seeds, L tail length, M model dim, M' width of retrieval vectors, J
pooled vectors of r numbers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vista.arrays import Int, id_array, offsets_of
from vista.config.checks import OnMissing, Precision, ScoringBackend
from vista.counters.counters import MAX_CODE
from vista.errors import ItemIndexError, RecordError, UnknownItemError, UnknownUserError, shown
from vista.examples.item_spaces import Pooled
from vista.log.histories import NUM_GAPS, RowFeatures
from vista.model import inference
from vista.model.inference import ROW_TILE, UserTransitions, pad_tail
from vista.model.item_feature_table import ItemsByValue
from vista.model.item_index import ItemIndex
from vista.model.item_projections import ItemProjections
from vista.model.ranking_model import NEXT_TASK, UNKNOWN_ITEM
from vista.model.target_attention import TargetContext
from vista.model.vista_model import VistaModel
from vista.scorer.native_scoring import NativeScoring, Pairs, native_scoring
from vista.scorer.request import (
    MAX_IDS,
    NOW,
    Request,
    RequestCounters,
    Tally,
    array_of,
    current_times,
    ids_of,
    impossible_times,
    item_rows,
    length_of,
    no_tally,
    not_a_time,
    request_pooled,
    request_times,
    require_most,
    with_fresh_events,
)
from vista.scorer.request_features import RequestProjections
from vista.store.item_values import ItemValues
from vista.store.reader import ShardedReader, StoredBatch, StoreReader
from vista.store.record import Tail

CONTEXT_TOKENS_PER_PASS = 1024
"""Tokens of summaries and tails whose keys and values fit a cache."""
logger = logging.getLogger(__name__)

Cells = tuple[slice, slice]
"""A range of users and a range of their candidates."""


@dataclass(frozen=True, slots=True)
class CandidateSet:
    """Candidates encoded by `Scorer.encode`, which any number of calls can use."""

    rows: NDArray[np.int64]
    """Model rows, [C] (the same for every user) or [B, C]."""
    vocabulary: tuple[int, str]
    """Number of items and digest of the vocabulary that the rows refer to."""


class ServingSnapshot:
    """A model and the store of its summaries.

    Args:
        model: in eval mode. If the store's generation has newer statistics of items, these are read instead.
        items: projections of the model's items.
        store: open; its summaries are of this model.
        precision: of matrix products.
        identity: of the model's export and of the index (`ServingSource`).
        checksum: of the model's config.json; None for a model that was not read from a folder.
        index: over the items, of this model; None without one.
        backend: what computes scores.
        pairs_per_pass: pairs of user and candidate per pass through stage 2, so that its intermediates fit a cache for
            any request.
        cosines_per_pass: the same for the retrieval head, which computes only one product per candidate.
    """

    def __init__(
        self,
        model: VistaModel,
        items: ItemProjections,
        store: StoreReader | ShardedReader,
        precision: Precision,
        identity: tuple[int, ...],
        checksum: str | None = None,
        index: ItemIndex | None = None,
        *,
        backend: ScoringBackend = ScoringBackend.auto,
        pairs_per_pass: int = 1024,
        cosines_per_pass: int = 65_536,
    ) -> None:
        sizes = partial(ServingSnapshot, pairs_per_pass=pairs_per_pass, cosines_per_pass=cosines_per_pass)
        self._again = partial(sizes, model, items, store, precision, identity, checksum, index, backend=backend)
        self.items_digest = store.manifest.items_digest
        """Of the values of items in service. Read before them, so that a reload finds values that are put meanwhile."""
        self.model, self.items = model, items = _as_of_generation(model, items, store.item_values())
        self.store = store
        self.identity = identity
        self.checksum = checksum
        self._index = index
        self.items_by_value = ItemsByValue(model.feature_table, model.schema.item_features)
        self._pairs_per_pass = pairs_per_pass
        self._cosines_per_pass = cosines_per_pass
        self._vocabulary = len(model.items), model.items.digest()
        self._digests = dict([self._vocabulary])
        """By number of items: digest of so many first items of the vocabulary."""
        self.tasks = [*model.schema.tasks, *([NEXT_TASK] if model.has_retrieval else [])]
        self.empty = inference.empty_summary(model)
        self.calls: set[object] = set()
        """A token per call that uses this snapshot (`Scorer`)."""
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
            added, spec = model.candidate_head, model.counter_spec
            self._code_vectors = None if added is None or spec is None else added.of_each_code()
            """[G * F * 64, 5M] what each code of each column adds to the rows of `ItemProjections.candidate`."""
        native = native_scoring(
            backend, precision, model, items, self._time_projections, self._of_features, self._code_vectors
        )
        self._native = native if isinstance(native, NativeScoring) else None
        self.backend = f"torch: {native}" if isinstance(native, str) else str(native)
        """What computes the scores; of torch, also why."""
        # Weights are laid out at their first use. Use them here, so that forked workers share the result.
        none = np.zeros(0, np.int64)
        tail = pad_tail(model, none, none, none, np.zeros(2, np.int64))
        width = model.config.space_dim
        pooled = torch.zeros(1, len(Pooled), width, device=model.device) if width else None
        request = Request(self.empty, tail, None, np.ones(1, bool), pooled=pooled)
        self.scores(request, torch.zeros(1, dtype=torch.int64), self.tasks)

    def with_new_item_values(self) -> ServingSnapshot | None:
        """The same with the values of items that the store has now; None if they are those in service."""
        if self.store.manifest.items_digest == self.items_digest:
            return None
        newer = self._again()
        newer.calls = self.calls  # Both use one store, which closes after the last call of either.
        return newer

    def candidates(self, given: Any, on_missing: OnMissing, name: str = "candidates") -> CandidateSet:
        """Look up item ids [C] or [B, C] in the vocabulary in service.

        A `CandidateSet` of it, or of its first items, is returned as it is: items that are added to a model come last.

        Args:
            given: ids, or a `CandidateSet`.
            on_missing: what to do about unknown items.
            name: of the argument, for errors.

        Raises:
            UnknownItemError: an id is unknown, and `on_missing` is "raise".
            ValueError, TypeError: the ids are not integers or strings as in the log, have the wrong shape, or are too
                many, or the set was encoded for another vocabulary.
        """
        if isinstance(given, CandidateSet):
            num_items, digest = given.vocabulary
            if num_items not in self._digests and num_items < len(self.model.items):
                self._digests[num_items] = self.model.items.part(0, num_items).digest()
            if self._digests.get(num_items) != digest:
                raise ValueError(f"{name}: were encoded for another model; call encode again after a reload")
            return given
        require_most(length_of(given), MAX_IDS, name)
        try:
            ids = array_of(given, name)
        except ValueError as error:
            raise ValueError(f"{error}; pass (values, offsets) instead") from None
        if ids.ndim not in (1, 2):
            raise ValueError(f"{name}: must be of shape [C] or [B, C], got {ids.shape}")
        require_most(ids.size, MAX_IDS, name)
        rows = item_rows(self.model, ids.ravel(), name).reshape(ids.shape)
        if on_missing is OnMissing.error and (rows == UNKNOWN_ITEM).any():
            unknown = ids[rows == UNKNOWN_ITEM][:5].tolist()
            raise UnknownItemError(
                f"{name}: items {unknown} are not in the model's vocabulary; train on a newer log, or pass "
                "on_missing='empty'"
            )
        return CandidateSet(rows, self._vocabulary)

    def read(
        self,
        users: Any,
        tail: Tail | None,
        now: Any,
        on_missing: OnMissing,
        max_age_s: float | None = None,
        tally: Tally = no_tally,
    ) -> Request:
        """Read the records of B users, and add what the caller passes.

        Args:
            users: as in `Scorer.predict`, like `tail`, `now`, and errors.
            on_missing: as in `Scorer.open`, like `max_age_s`.
            tally: counts the users by what was found.
        """
        ids, model = ids_of(users, "users"), self.model
        # Read before the records, so that a reload in between cannot make a record look younger than it is.
        refreshed_at = 0 if max_age_s is None else self.store.manifest.refreshed_at
        stored, damaged = self._stored(ids, on_missing, tally)
        bad = damaged
        times, is_open = request_times(now, len(bad)), np.zeros(len(bad), np.bool_)
        if times is not None and (is_open := times == NOW).any():
            times = np.where(is_open, current_times(np.zeros(len(bad), np.int64)), times)
        if times is not None and model.schema.has_time:
            wrong = impossible_times(times, stored.last_event_ts)
            if wrong.any() and on_missing is not OnMissing.nan:
                raise not_a_time("now", times[wrong][0])
            times, bad = np.where(wrong, np.maximum(stored.last_event_ts, 0), times), bad | wrong
        num_found = int(stored.found.sum())
        if max_age_s is not None:
            now_ms, max_age_ms = time.time_ns() // 1_000_000, int(1000 * max_age_s)
            stored = stored.without(stored.expired(now_ms, refreshed_at, max_age_ms))
        unknown = ~stored.found
        num_hits = int(stored.found.sum())
        num_missing = len(unknown) - num_found - int(damaged.sum())
        if on_missing is OnMissing.error and unknown.any():
            tally(hits=num_hits, stale=num_found - num_hits, misses=num_missing)
            absent = id_array(ids)[unknown][:5].tolist()
            raise UnknownUserError(
                f"users {absent} have no record in {self.store.path}; refresh the store (which leaves out erased "
                "users), or pass on_missing='empty'"
            )
        merged, is_fresh = stored.tail, np.zeros(len(stored.tail.items), np.bool_)
        if tail is not None:
            refuse = on_missing is not OnMissing.nan
            merged, is_fresh, wrong = with_fresh_events(model, stored, tail, refuse=refuse)
            bad = bad | wrong
        tally(hits=num_hits, stale=num_found - num_hits, misses=num_missing, bad_users=int(bad.sum()))
        padded = pad_tail(model, merged.items, merged.times, merged.actions, merged.offsets, merged.features)
        if times is not None and model.schema.has_time and is_open.any():
            newest = np.maximum(stored.last_event_ts, np.where(padded.valid.any(1), padded.last_time, 0))
            times = np.where(is_open, current_times(newest), times)
        summary = torch.from_numpy(stored.summary[:, : self.empty.shape[1]]).to(model.device)
        if unknown.any():
            summary[torch.from_numpy(unknown).to(summary.device)] = self.empty
        keys = model.item_keys
        counters = None if keys is None else RequestCounters.of(keys, stored, merged, is_fresh, times)
        pooled = request_pooled(model, stored, merged, is_fresh, padded)
        reader = model.user_features
        own = None if reader is None else reader.encode(RowFeatures(stored.features), len(unknown))
        return Request(summary, padded, times, unknown | bad, stored.generation, counters, pooled, users=own)

    def require_task(self, task: str) -> None:
        """Raise ValueError if the model lacks a task."""
        if task not in self.tasks:
            raise ValueError(f"task: {shown(task)} is not one of this model's tasks, {self.tasks}")

    def retrieval_vectors(self) -> Tensor:
        """Vectors of all items, [1 + V, M']; ValueError without the retrieval head."""
        if self.items.retrieval is None:
            raise ValueError("this model has no retrieval head; train it with optim.next_weight above 0")
        return self.items.retrieval

    def item_index(self) -> ItemIndex:
        """The index over the items; ItemIndexError without one."""
        if self._index is None:
            raise ItemIndexError(
                "this scorer has no index of items; run `vista index model=…`, then open the scorer, or start the "
                "service, with index=… and the folder that the command wrote"
            )
        return self._index

    def transitions(self, request: Request) -> UserTransitions | None:
        """Those that the scores of a request read; None for a model that reads none."""
        return UserTransitions.of(self.model, request.tail.item)

    def context(self, request: Request) -> tuple[TargetContext, Tensor | None]:
        """Keys and values of a request, and the gap buckets of its time, int64 [B, 1] or None."""
        context = inference.request_context(self._scoring, request.summary, request.tail, self._masks, request.users)
        return context, inference.request_bucket(self.model, request.now, request.tail)

    def user_vectors(self, request: Request) -> Tensor:
        """User vectors of the retrieval head, float32 [B, M']."""
        if self._native is not None:
            vectors = self._native.run(request, user_vectors=True).user_vectors
            assert vectors is not None
            return torch.from_numpy(vectors)
        parts = [self._user_vectors(*self.context(part), part.pooled) for _, part in self._portions(request)]
        return torch.cat(parts) if parts else torch.empty(0, self.model.retrieval_dim, device=self.model.device)

    def catalog_scores(self, request: Request) -> NDArray[np.float32]:
        """Scores of `next` of all items, float32 [B, V]; ValueError without the retrieval head."""
        items = self.retrieval_vectors()[UNKNOWN_ITEM + 1 :].cpu().numpy()
        vectors = self.user_vectors(request)
        scores: NDArray[np.float32] = (vectors / self.model.temperature).cpu().numpy() @ items.T
        rows, of_rows, offsets = self.counted_items(request)
        scores[np.repeat(np.arange(len(request)), np.diff(offsets)), rows - UNKNOWN_ITEM - 1] = of_rows
        return scores

    def counted_items(self, request: Request) -> tuple[Int, NDArray[np.float32], NDArray[np.int64]]:
        """Rows int64 [N] of the items in the users' counters and of the followers of the users' newest items, their
        scores of `next`, float32 [N], and offsets [B + 1].

        Args:
            request: of B users.

        Raises:
            ValueError: the model has no retrieval head.
        """
        self.retrieval_vectors()
        rows = inference.follower_rows(self.model, request.tail.item)
        if (counters := request.counters) is not None:
            bounds = pairwise(counters.codes.offsets.tolist())
            rows = [np.union1d(rows[user], counters.codes.key[slice(*own)]) for user, own in enumerate(bounds)]
        offsets = offsets_of(np.array([len(of_user) for of_user in rows], np.int64))
        together = np.concatenate([np.zeros(0, np.int64), *rows]).astype(np.int64)
        scores = self.ragged_scores(request, together, offsets, [NEXT_TASK])[NEXT_TASK]
        return together, scores.numpy(), offsets

    def scores(
        self, request: Request, rows: Tensor | None, tasks: list[str], lengths: Int | None = None
    ) -> dict[str, Tensor]:
        """Scores per task, float32 [B, C] on the CPU.

        The score of a pair does not depend on the other pairs of the call, bit for bit, if the machine computes rows of
        a matrix product independently (`ROW_TILE`).

        Args:
            request: of B users.
            rows: int64 model rows, [C] (the same for every user) or [B, C]; None for the rows 0 to V of all tables.
            tasks: some of `self.tasks`.
            lengths: [B] number of candidates per user, ascending; later columns are undefined.
        """
        count = len(self.model.items) + 1 if rows is None else rows.shape[-1]
        if self._native is not None:
            pairs = Pairs.of(None if rows is None else rows.numpy(), len(request), count)
            flat = self._native.task_scores(request, pairs, tasks)
            return {task: of_pairs.view(len(request), count) for task, of_pairs in flat.items()}
        scores = {task: torch.empty(len(request), count) for task in tasks}
        labeled = [task for task in tasks if task != NEXT_TASK]
        for users, part in self._portions(request):
            wanted = np.full(len(part), count) if lengths is None else lengths[users]
            own = rows if rows is None or rows.ndim == 1 else rows[users]
            context, bucket = self.context(part)
            if labeled:
                for cells, logits in self._logits(part, context, bucket, own, wanted):
                    # The last bit of a float32 sigmoid depends on the position in a vector; float64 rounds it away.
                    probability = logits.double().sigmoid().float().cpu()
                    for task in labeled:
                        scores[task][users][cells] = probability[..., self.model.schema.tasks.index(task)]
            if NEXT_TASK in tasks:
                vectors = self._user_vectors(context, bucket, part.pooled)
                for cells, cosine in self._next_scores(vectors, part, own, wanted):
                    scores[NEXT_TASK][users][cells] = cosine.cpu()
        return scores

    def logits(self, request: Request, rows: Tensor) -> Tensor:
        """Logits of the labeled tasks, float32 [B, C, num_tasks] on the CPU, whose sigmoid `scores` gives.

        Args:
            request: of B users.
            rows: int64 model rows [B, C].
        """
        if self._native is not None:
            made = self._native.run(request, Pairs.of(rows.numpy(), *rows.shape), logits=True).logits
            assert made is not None
            return torch.from_numpy(made).view(*rows.shape, -1)
        logits = torch.empty(*rows.shape, len(self.model.schema.tasks))
        for users, part in self._portions(request):
            wanted = np.full(len(part), rows.shape[1])
            for cells, of_cells in self._logits(part, *self.context(part), rows[users], wanted):
                logits[users][cells] = of_cells.cpu()
        return logits

    def ragged_scores(self, request: Request, rows: Int, offsets: Int, tasks: list[str]) -> dict[str, Tensor]:
        """Scores per task, float32 [N] on the CPU, of rows int64 [N], user b's from offsets[b] to offsets[b + 1].

        Users with similar numbers of candidates are scored together, so that the longest list does not determine time
        and memory.
        """
        if self._native is not None:
            return self._native.task_scores(request, Pairs(rows, offsets, False), tasks)
        lengths = np.diff(offsets)
        order = np.argsort(lengths, kind="stable")
        scores = {task: torch.empty(len(rows)) for task in tasks}
        for users, part in self._portions(request.select(order)):
            own = order[users]
            filled = np.arange(lengths[own].max()) < lengths[own][:, None]
            place = (offsets[own][:, None] + np.arange(filled.shape[1]))[filled]
            grid = np.full(filled.shape, UNKNOWN_ITEM, np.int64)
            grid[filled] = rows[place]
            part_scores = self.scores(part, torch.from_numpy(grid), tasks, lengths[own])
            for task, cells in part_scores.items():
                scores[task][torch.from_numpy(place)] = cells[torch.from_numpy(filled)]
        return scores

    def added_by(self, codes: NDArray[np.uint8]) -> Tensor:
        """Terms [n, 5M] that counters uint8 [n, G * F + 1] add to the rows of `ItemProjections.candidate`."""
        assert self._code_vectors is not None
        codes = codes[:, :-1]
        index = torch.from_numpy(codes + np.arange(codes.shape[1]) * (MAX_CODE + 1)).to(self.model.device)
        return F.embedding_bag(index, self._code_vectors, mode="sum")

    def _stored(self, ids: Any, on_missing: OnMissing, tally: Tally) -> tuple[StoredBatch, NDArray[np.bool_]]:
        """Records of B users, and which of them are damaged, which are counted.

        Raises:
            RecordError: one is damaged, and on_missing is not "nan".
        """
        try:
            stored = self.store.get_many(ids)
            return stored, np.zeros(len(stored.found), np.bool_)
        except RecordError as error:
            users = list(ids)
            damaged = np.array([self._is_damaged(user) for user in users])
            tally(damaged=int(damaged.sum()))
            if on_missing is not OnMissing.nan:
                raise
            logger.error("%s", error)
        valid = np.flatnonzero(~damaged)
        return self.store.get_many([users[row] for row in valid.tolist()]).spread(valid, len(users)), damaged

    def _is_damaged(self, user: Any) -> bool:
        try:
            self.store.get_many([user])
        except RecordError:
            return True
        return False

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

    def _user_vectors(self, context: TargetContext, bucket: Tensor | None, pooled: Tensor | None) -> Tensor:
        gap = self.model.encoder.gap_vectors(bucket)
        vectors: Tensor = inference.user_vectors(self._scoring, context, gap, pooled, self._biases)
        return vectors

    @torch.inference_mode()
    def _logits(
        self,
        request: Request,
        context: TargetContext,
        bucket: Tensor | None,
        rows: Tensor | None,
        lengths: Int,
    ) -> Iterator[tuple[Cells, Tensor]]:
        """Ranges of users and columns, and their logits, float32 [users, columns, num_tasks].

        A range passes stage 2 as a matrix of queries. Each is the sum of an item, of what the request adds, and of what
        the user's counters of the item add: of vectors [M], and of their projections in layer 1 [4M].

        Args:
            context: of the request, like `bucket` (`context`).
            rows: as in `scores`, like `lengths`.
        """
        model, dim = self._scoring, self.model.config.dim
        assert model.task_head is not None
        of_requests = self._of_requests(request, bucket)
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
                counted = request.counters.counted_pairs(users, rows, columns)
                self._add_counters(x, own, *counted)
            logits = model.task_head(model.target_attention.query(x, own, None, self._seen, some, self._biases))
            if request.pooled is not None:
                candidates = tiles(rows, users, columns).to(model.device)
                logits += self._of_head(request.pooled[users], candidates, counted)
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

    def _of_head(self, pooled: Tensor, rows: Tensor, counted: tuple[Int, Int, NDArray[np.uint8]] | None) -> Tensor:
        """What `candidate_head` adds to the logits of candidates, float32 [users, C', num_tasks].

        Args:
            pooled: [users, J, r].
            rows: int64 [C'] or [users, C'] model rows, in whole tiles.
            counted: as of `RequestCounters.counted_pairs`; None without counters.
        """
        model, head = self.model, self.model.candidate_head
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
        table, dim = self.items.candidate, self.model.config.dim
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
        table, counters, transitions = self.items.retrieval, request.counters, self.transitions(request)
        assert table is not None
        counted = None
        if counters is not None:
            items = table[UNKNOWN_ITEM + 1 :]
            counted = inference.counted_scores(self.model, vectors, items, counters, transitions, request.pooled)
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
                user, column, place = map(torch.from_numpy, counters.find(users, rows, columns))
                scores[user, column] = counted[place]
            yield (users, columns), scores[:, : columns.stop - columns.start]


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a scorer."""

    snapshot: ServingSnapshot
    """What is in service."""
    request: Request
    """What it reads."""
    on_missing: OnMissing
    """How the scorer treats what is missing."""
    tally: Tally
    """The scorer's counters."""

    def rows(self, given: Any, name: str = "candidates") -> Int:
        """Model rows int64 [C] of candidates, which must be the same for every user."""
        rows = self.snapshot.candidates(given, self.on_missing, name).rows
        if rows.ndim != 1:
            raise ValueError(f"{name}: must be of shape [C], got {rows.shape}")
        return rows

    def asked(self, features: Any, candidates: int | Int | None) -> Request:
        """The request with the features that the caller passes (`Request.with_features`)."""
        return self.request.with_features(self.snapshot.model, features, candidates)


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


def _as_of_generation(
    model: VistaModel, items: ItemProjections, values: ItemValues | None
) -> tuple[VistaModel, ItemProjections]:
    """A model with the values of items of a generation, as far as it reads them and they are of its vocabulary."""
    if values is None or not model.reads_item_values:
        return model, items
    if values.vocabulary != model.items.digest() or values.statistics.shape != model.item_statistics.shape:
        logger.info("the store's statistics of items are of another vocabulary, so those of the model are served")
        return model, items
    model = model.with_item_values(values.statistics, values.rates, values.tasks)
    return model, items.with_statistics_of(model)
