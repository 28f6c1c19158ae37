"""What a scorer has in service: a model, its items, and a store, none of which change during a call.

B users, C candidates, N requests or pairs, V items of the vocabulary, M' width of retrieval vectors.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Float32s, Int, id_array, is_tensor, offsets_of
from vista.config.checks import OnMissing, Precision, ScoringBackend
from vista.errors import ItemIndexError, RecordError, UnknownItemError, UnknownUserError, shown
from vista.examples.item_spaces import Pooled
from vista.log.histories import RowFeatures
from vista.model.item_feature_table import ItemsByValue
from vista.model.item_projections import ItemProjections
from vista.model.serving_model import NEXT_TASK, UNKNOWN_ITEM, ServingModel, follower_rows, pad_tail
from vista.scorer.native_scoring import NativeScoring, Pairs, native_scoring
from vista.scorer.request import (
    MAX_IDS,
    MAX_SCORES,
    NOW,
    Request,
    RequestCounters,
    Tally,
    UserRecord,
    array_of,
    current_times,
    ids_of,
    impossible_times,
    item_rows,
    length_of,
    no_tally,
    not_a_time,
    ragged_offsets,
    request_pooled,
    request_times,
    require_most,
    split_ragged,
    with_fresh_events,
)
from vista.scorer.request_features import PairFeatures
from vista.store.item_values import ItemValues
from vista.store.reader import ShardedReader, StoredBatch, StoreReader
from vista.store.record import HEADER_BYTES, Tail

if TYPE_CHECKING:
    from vista.model.item_index import ItemIndex
    from vista.model.vista_model import VistaModel
    from vista.scorer.torch_scoring import TorchScoring

logger = logging.getLogger(__name__)
MOST_NAMED = 10
"""Adapters in an error."""


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
        served: the model. If the store's generation has newer statistics of items, these are read instead.
        items: projections of the model's items.
        store: open; its summaries are of this model.
        device: of the model, such as "cpu".
        precision: of matrix products.
        identity: of the model's export and of the index (`ServingSource`).
        checksum: of the model's config.json; None for a model that was not read from a folder.
        index: over the items, of this model; None without one.
        backend: what computes scores.
        adapters: values of the `Adapter`s of the model by name; that of None is used by requests that name none.
        passes: the last arguments of `TorchScoring`.
    """

    def __init__(
        self,
        served: ServingModel,
        items: ItemProjections,
        store: StoreReader | ShardedReader,
        device: str,
        precision: Precision,
        identity: tuple[int, ...],
        checksum: str | None = None,
        index: ItemIndex | None = None,
        *,
        backend: ScoringBackend = ScoringBackend.auto,
        adapters: Mapping[str | None, Float32s] | None = None,
        passes: tuple[int, ...] = (),
    ) -> None:
        again = partial(ServingSnapshot, served, items, store, device, precision, identity, checksum, index)
        self._again = partial(again, backend=backend, adapters=adapters, passes=passes)
        self.adapters = adapters or {}
        self.items_digest = store.manifest.items_digest
        """Of the values of items in service. Read before them, so that a reload finds values that are put meanwhile."""
        self.served, self.items = served, items = _as_of_generation(served, items, store.item_values())
        self.store = store
        self.identity = identity
        self.checksum = checksum
        self._index = index
        self.items_by_value = ItemsByValue(served.feature_table, served.schema.item_features)
        self._vocabulary = len(served.items), served.items.digest()
        self._digests = dict([self._vocabulary])
        """By number of items: digest of so many first items of the vocabulary."""
        self.tasks = [*served.schema.tasks, *([NEXT_TASK] if served.has_retrieval else [])]
        self.calls: set[object] = set()
        """A token per call that uses this snapshot (`Scorer`)."""
        self._precision, self._passes = precision, passes
        native = native_scoring(backend, device, precision, served, items)
        self._native = native if isinstance(native, NativeScoring) else None
        self.backend = f"torch: {native}" if isinstance(native, str) else str(native)
        """What computes the scores; of torch, also why."""
        # Weights are laid out at their first use. Use them here, so that forked workers share the result.
        none = np.zeros(0, np.int64)
        tail = pad_tail(served, none, none, none, np.zeros(2, np.int64))
        width = served.config.space_dim
        pooled = np.zeros((1, len(Pooled), width), np.float32) if width else None
        request = Request(served.empty, tail, None, np.ones(1, bool), pooled=pooled)
        self.scores(request, np.zeros(1, np.int64), self.tasks)

    @property
    def model(self) -> VistaModel:
        """The model for torch, with the item values in service; the first use may load torch."""
        return self.served.vista_model

    @cached_property
    def torch_scoring(self) -> TorchScoring:
        """Computes scores where the C++ library does not, and what explanations read."""
        from vista.scorer.torch_scoring import TorchScoring  # Torch is loaded where it computes something.

        return TorchScoring(self.served, self.items, self._precision, *self._passes)

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
            if num_items not in self._digests and num_items < len(self.served.items):
                self._digests[num_items] = self.served.items.part(0, num_items).digest()
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
        rows = item_rows(self.served, ids.ravel(), name).reshape(ids.shape)
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
        adapter: str | None = None,
    ) -> Request:
        """Read the records of B users, and add what the caller passes.

        Args:
            users: as in `Scorer.predict`, like `tail`, `now`, and errors.
            on_missing: as in `Scorer.open`, like `max_age_s`.
            tally: counts the users by what was found.
            adapter: as in `Scorer.predict`.
        """
        values = self.adapter(adapter)
        ids, model = ids_of(users, "users"), self.served
        # Read before the records, so that a reload in between cannot make a record look younger than it is.
        refreshed_at = 0 if max_age_s is None else self.store.manifest.refreshed_at
        stored, damaged = self._stored(ids, on_missing, tally)
        bad = damaged
        times, is_open = request_times(now, len(bad)), np.zeros(len(bad), np.bool_)
        if times is not None and np.count_nonzero(is_open := times == NOW):
            times = np.where(is_open, current_times(np.zeros(len(bad), np.int64)), times)
        if times is not None and model.schema.has_time:
            wrong = impossible_times(times, stored.last_event_ts)
            if np.count_nonzero(wrong):
                if on_missing is not OnMissing.nan:
                    raise not_a_time("now", times[wrong][0])
                times, bad = np.where(wrong, np.maximum(stored.last_event_ts, 0), times), bad | wrong
        num_found = np.count_nonzero(stored.found)
        if max_age_s is not None:
            now_ms, max_age_ms = time.time_ns() // 1_000_000, int(1000 * max_age_s)
            stored = stored.without(stored.expired(now_ms, refreshed_at, max_age_ms))
        unknown = ~stored.found
        num_hits = np.count_nonzero(stored.found)
        num_missing = len(unknown) - num_found - np.count_nonzero(damaged)
        if on_missing is OnMissing.error and num_hits < len(unknown):
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
        tally(hits=num_hits, stale=num_found - num_hits, misses=num_missing, bad_users=np.count_nonzero(bad))
        padded = pad_tail(model, merged.items, merged.times, merged.actions, merged.offsets, merged.features)
        if times is not None and model.schema.has_time and np.count_nonzero(is_open):
            newest = np.maximum(stored.last_event_ts, np.where(padded.valid.any(1), padded.last_time, 0))
            times = np.where(is_open, current_times(newest), times)
        summary = stored.summary[:, : model.config.num_seeds]
        if num_hits < len(unknown):
            summary = np.where(unknown[:, None, None], model.empty, summary)
        keys = model.item_keys
        counters = None if keys is None else RequestCounters.of(keys, stored, merged, is_fresh, times)
        pooled = request_pooled(model, stored, merged, is_fresh, padded)
        reader = model.user_features
        own = None if reader is None else reader.encode(RowFeatures(stored.features), len(unknown))
        missing = unknown | bad
        return Request(summary, padded, times, missing, stored.generation, counters, pooled, users=own, adapter=values)

    def record(self, users: Any, now: Any, adapter: str | None) -> UserRecord | None:
        """The record of one user, if the C++ library scores from it; None if `read` has to read the request, which also
        reports what is wrong. Arguments as of `read`."""
        values = self.adapter(adapter)
        if (native := self._native) is None or length_of(users) != 1 or not (now is None or type(now) is int):
            return None
        stored = self.store.record(ids_of(users, "users"), lambda spec: native.record_scoring(spec) is not None)
        if stored is None or len(stored.value) < HEADER_BYTES:
            return None
        newest = stored.last_event_ts
        if now == NOW:
            now = int(current_times(np.array([newest]))[0])
        if now is not None and self.served.schema.has_time and impossible_times(np.array([now]), np.array([newest]))[0]:
            return None
        return UserRecord(stored, now, values)

    def adapter(self, name: str | None) -> Float32s | None:
        """The values of an adapter; None without one. ValueError for an unknown name."""
        if name is not None and name not in self.adapters:
            known = ", ".join(sorted(filter(None, self.adapters))[:MOST_NAMED]) or "none are loaded"
            raise ValueError(f"adapter: {shown(name)} is not one of this scorer's adapters ({known})")
        return self.adapters.get(name)

    def require_task(self, task: str) -> None:
        """Raise ValueError if the model lacks a task."""
        if task not in self.tasks:
            raise ValueError(f"task: {shown(task)} is not one of this model's tasks, {self.tasks}")

    def retrieval_vectors(self) -> Float32s:
        """Vectors of all items, [1 + V, M']; ValueError without the retrieval head."""
        if self.items.retrieval is None:
            raise ValueError("this model has no retrieval head; train it with optim.next_weight above 0")
        return self.items.retrieval

    def searched_vectors(self) -> Any:
        """Those that an index is searched with: where torch computes, a tensor on its device."""
        vectors = self.retrieval_vectors()
        return vectors if self._native is not None else self.torch_scoring.retrieval

    def item_index(self) -> ItemIndex:
        """The index over the items; ItemIndexError without one."""
        if self._index is None:
            raise ItemIndexError(
                "this scorer has no index of items; run `vista index model=…`, then open the scorer, or start the "
                "service, with index=… and the folder that the command wrote"
            )
        return self._index

    def user_vectors(self, request: Request) -> Float32s:
        """User vectors of the retrieval head, float32 [B, M']."""
        if self._native is None:
            return self.torch_scoring.user_vectors(request)
        vectors = self._native.run(request, user_vectors=True).user_vectors
        assert vectors is not None
        return vectors

    def catalog_scores(self, request: Request) -> NDArray[np.float32]:
        """Scores of `next` of all items, float32 [B, V]; ValueError without the retrieval head."""
        items = self.retrieval_vectors()[UNKNOWN_ITEM + 1 :]
        scaled: Float32s = (self.user_vectors(request) / np.float32(self.served.temperature)).astype(np.float32)
        scores: Float32s = scaled @ items.T
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
        rows = follower_rows(self.served, request.tail.item)
        if (counters := request.counters) is not None:
            bounds = pairwise(counters.codes.offsets.tolist())
            rows = [np.union1d(rows[user], counters.codes.key[slice(*own)]) for user, own in enumerate(bounds)]
        offsets = offsets_of(np.array([len(of_user) for of_user in rows], np.int64))
        together = np.concatenate([np.zeros(0, np.int64), *rows]).astype(np.int64)
        scores = self.ragged_scores(request, together, offsets, [NEXT_TASK])[NEXT_TASK]
        return together, scores, offsets

    def scores(self, request: Request, rows: Int | None, tasks: list[str]) -> dict[str, Float32s]:
        """Scores per task, float32 [B, C].

        The score of a pair does not depend on the other pairs of the call, bit for bit, if the machine computes rows of
        a matrix product independently (`ROW_TILE`).

        Args:
            request: of B users.
            rows: int64 model rows, [C] (the same for every user) or [B, C]; None for the rows 0 to V of all tables.
            tasks: some of `self.tasks`.
        """
        if self._native is None:
            return self.torch_scoring.scores(request, rows, tasks)
        count = len(self.served.items) + 1 if rows is None else rows.shape[-1]
        flat = self._native.task_scores(request, Pairs.of(rows, len(request), count), tasks)
        return {task: of_pairs.reshape(len(request), count) for task, of_pairs in flat.items()}

    def scores_of_record(
        self, record: UserRecord, rows: Int, features: Any, tasks: list[str]
    ) -> dict[str, Float32s] | None:
        """`scores` of rows [C], float32 [1, C], from a record; None if it is damaged. `features`: as callers
        pass them."""
        given = PairFeatures.of(self.served.request_features, features, 1, len(rows))
        flat = None if self._native is None else self._native.scores_of_record(record, rows, given, tasks)
        return None if flat is None else {task: scores[None] for task, scores in flat.items()}

    def logits(self, request: Request, rows: Int) -> Float32s:
        """Logits of the labeled tasks, float32 [B, C, num_tasks], whose sigmoid `scores` gives.

        Args:
            request: of B users.
            rows: int64 model rows [B, C].
        """
        if self._native is None:
            return self.torch_scoring.logits(request, rows)
        made = self._native.run(request, Pairs.of(rows, *rows.shape), logits=True).logits
        assert made is not None
        return made.reshape(*rows.shape, -1)

    def ragged_scores(self, request: Request, rows: Int, offsets: Int, tasks: list[str]) -> dict[str, Float32s]:
        """Scores per task, float32 [N], of rows int64 [N], user b's from offsets[b] to offsets[b + 1]."""
        if self._native is None:
            return self.torch_scoring.ragged_scores(request, rows, offsets, tasks)
        return self._native.task_scores(request, Pairs(rows, offsets, False), tasks)

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


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a scorer."""

    snapshot: ServingSnapshot
    """What is in service."""
    read: Callable[[], Request]
    """Gives what the call reads, which is read once."""
    on_missing: OnMissing
    """How the scorer treats what is missing."""
    tally: Tally
    """The scorer's counters."""
    record: UserRecord | None = None
    """That of the only user, which nothing has checked; None if the request was read."""

    @property
    def request(self) -> Request:
        """What the call reads."""
        return self.read()

    def rows(self, given: Any, name: str = "candidates") -> Int:
        """Model rows int64 [C] of candidates, which must be the same for every user."""
        rows = self.snapshot.candidates(given, self.on_missing, name).rows
        if rows.ndim != 1:
            raise ValueError(f"{name}: must be of shape [C], got {rows.shape}")
        return rows

    def predict(self, candidates: Any, features: Any, tasks: list[str]) -> dict[str, Any]:
        """Scores of some tasks; arguments, result and errors are those of `Scorer.predict`."""
        values, given = split_ragged(candidates)
        rows = self.snapshot.candidates(values, self.on_missing).rows
        scores, missing = None, _NOT_MISSING
        if self.record is not None and given is None and (rows.ndim == 1 or len(rows) == 1):
            scores = self.snapshot.scores_of_record(self.record, rows.reshape(-1), features, tasks)
        if scores is None:
            scores, missing = self._scores(rows, given, features, tasks)
        unknown, num_pairs = rows == UNKNOWN_ITEM, scores[tasks[0]].size
        if self.on_missing is OnMissing.nan:
            scores = {task: np.where(missing | unknown, np.float32(np.nan), cells) for task, cells in scores.items()}
        num_unknown = np.count_nonzero(unknown) * (num_pairs // max(1, rows.size))  # Users may share the candidates.
        self.tally(candidates=num_pairs, unknown_candidates=num_unknown)
        if is_tensor(values):
            dtype = sys.modules["torch"].float32
            return {task: values.new_tensor(cells, dtype=dtype) for task, cells in scores.items()}
        return scores

    def _scores(
        self, rows: Int, given: Any, features: Any, tasks: list[str]
    ) -> tuple[dict[str, Float32s], NDArray[np.bool_]]:
        """Scores of the request, and where users are missing. `given`: offsets of ragged candidates, or None."""
        if given is not None:
            offsets = ragged_offsets(rows, given, len(self.request))
            scores = self.snapshot.ragged_scores(self.asked(features, offsets), rows, offsets, tasks)
            return scores, np.repeat(self.request.missing, np.diff(offsets))
        num_users = len(self.request)
        if rows.ndim == 2 and len(rows) != num_users:
            raise ValueError(
                f"candidates: shape {rows.shape} does not match {num_users} users; pass [C], or one row per user"
            )
        require_most(num_users * rows.shape[-1], MAX_SCORES, "candidates", "pairs of a user and a candidate")
        scores = self.snapshot.scores(self.asked(features, rows.shape[-1]), rows, tasks)
        return scores, self.request.missing[:, None]

    def asked(self, features: Any, candidates: int | Int | None) -> Request:
        """The request with the features that the caller passes (`Request.with_features`)."""
        return self.request.with_features(self.snapshot.served, features, candidates)


_NOT_MISSING: NDArray[np.bool_] = np.zeros((1, 1), np.bool_)


def _as_of_generation(
    model: ServingModel, items: ItemProjections, values: ItemValues | None
) -> tuple[ServingModel, ItemProjections]:
    """A model with the values of items of a generation, as far as it reads them and they are of its vocabulary."""
    if values is None or not model.reads_item_values:
        return model, items
    if values.vocabulary != model.items.digest() or values.statistics.shape != model.weights["item_statistics"].shape:
        logger.info("the store's statistics of items are of another vocabulary, so those of the model are served")
        return model, items
    model = model.with_item_values(values.statistics, values.rates, values.tasks)
    return model, items.with_statistics_of(model)
