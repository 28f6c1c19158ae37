"""The scorer: what ranking code calls. Its cost does not depend on the length of a user's history.

B users, C candidates, V items of the vocabulary, S seeds, L tail length, M' width of retrieval vectors.
"""

from __future__ import annotations

import bisect
import math
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int
from vista.config.checks import OnMissing, Precision, ScoringBackend, choice_of
from vista.errors import StoreError, VistaError
from vista.log.vocabulary import Ids
from vista.machine import reuse_freed_memory
from vista.model.serving_model import ServingModel
from vista.scorer.explanation import Explanation
from vista.scorer.ranking import ItemFilter, Ranking, ranked, retrieved
from vista.scorer.request import MAX_SCORES, NOW, Request, require_max_age, require_most
from vista.scorer.serving_snapshot import Call, CandidateSet, ServingSnapshot
from vista.scorer.serving_source import Follower, ServingSource, repair_after_fork
from vista.store.manifest import Manifest
from vista.store.reader import ShardedReader, StoreReader
from vista.store.record import Tail
from vista.threads import num_threads, set_num_threads

if TYPE_CHECKING:
    from vista.model.vista_model import VistaModel

BUCKETS_PER_OCTAVE = 4
LATENCY_BOUNDS_MS = tuple(0.0625 * 2 ** (step / BUCKETS_PER_OCTAVE) for step in range(20 * BUCKETS_PER_OCTAVE + 1))
"""Upper bounds of the histogram's buckets, 62.5 µs to 65 s, each 19 % above the one before; the last bucket is open."""


@dataclass(frozen=True, slots=True)
class AnswerSource:
    """What an answer for B users was computed from: the model, the store, and the times of the requests."""

    generation: int
    """Number of the store's generation; of a sharded store, the oldest one of its shards. An incremental refresh
    changes records without a new number."""
    model_checksum: str | None
    """`checksum` of the model's config.json, 16 hex digits; None for a model that was not read from a folder."""
    now: Int | None
    """[B] times of the requests in ms; None if unknown, or if the model reads no times."""
    known: NDArray[np.bool_]
    """[B] whether the store had a usable record of the user. The others were answered as users without history."""


@dataclass(frozen=True, slots=True)
class ScorerStats:
    """What a scorer has done in this process since it was opened (or since the process was forked)."""

    calls: int = 0
    failed_calls: int = 0
    """Calls that raised an error."""
    hits: int = 0
    """Users whose record was used; a user counts once per call."""
    misses: int = 0
    """Users without a record."""
    stale: int = 0
    """Users whose record was older than max_age_s and therefore not used."""
    damaged: int = 0
    """Users whose record is damaged. With on_missing="nan" they get NaN, otherwise the call fails."""
    bad_users: int = 0
    """With on_missing="nan": users who got NaN, because their record is damaged or their tail or time is impossible."""
    candidates: int = 0
    """Pairs of a user and a candidate."""
    unknown_candidates: int = 0
    """Pairs whose item the model does not know."""
    dropped: int = 0
    """Candidates that `rank` left out because they were unknown or their score was not finite."""
    reloads: int = 0
    """Calls of `reload` that moved to another generation or model."""
    failed_reloads: int = 0
    """Calls of `reload` that raised an error."""
    last_reload_error: str | None = None
    """Error of the last call of `reload`; None if that call succeeded."""
    followed_at: int = 0
    """When `reload` last succeeded, ms since 1970; 0 if never."""
    latency_counts: tuple[int, ...] = field(default=(0,) * (len(LATENCY_BOUNDS_MS) + 1))
    """Calls by duration, including failed ones; bucket i ends at LATENCY_BOUNDS_MS[i], the last one is open."""

    def latency_ms(self, quantile: float) -> float:
        """Quantile of the duration of calls, rounded up to its bucket's bound; NaN without calls.

        Args:
            quantile: in (0, 1]; 0.99 gives the p99.

        Raises:
            ValueError: the quantile is not in (0, 1].
        """
        if not 0 < quantile <= 1:
            raise ValueError(f"quantile: must lie in (0, 1], got {quantile}")
        total, seen = sum(self.latency_counts), 0
        for bound, count in zip((*LATENCY_BOUNDS_MS, math.inf), self.latency_counts, strict=True):
            seen += count
            if total and seen >= quantile * total:
                return bound
        return math.nan


class LatestSource(threading.local):
    """The source of each thread's latest answer."""

    source: AnswerSource | None = None


class Scorer:
    """Scores candidates for users from their stored summaries and tails. Open one per process with `Scorer.open`.

    It is thread-safe, and works after a fork. Each call uses one model and one state of the store throughout.

    Args:
        source: where the model and the store are, and how to open them.
        on_missing: as in `open`, like `task` and `max_age_s`.
    """

    def __init__(
        self,
        source: ServingSource,
        on_missing: OnMissing = OnMissing.empty,
        task: str | None = None,
        max_age_s: float | None = None,
    ) -> None:
        self.on_missing, self.max_age_s = on_missing, max_age_s
        self._source = source
        self._current = source.open()
        self._closed = self._inherited = False
        self._changing = threading.Lock()
        self._recorder = StatsRecorder()
        self._follower = Follower(self)
        self._latest = LatestSource()
        repair_after_fork(self)
        try:
            self.task = task or self.tasks[0]
            """The task that `score` and `rank` use."""
            self._current.require_task(self.task)
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(
        cls,
        model: str | Path | VistaModel,
        store: str | Path,
        *,
        on_missing: OnMissing | str = "empty",
        task: str | None = None,
        device: str = "cpu",
        key: bytes | None = None,
        max_age_s: float | None = None,
        precision: Precision | str = "float32",
        index: str | Path | None = None,
        project_per_request: bool = False,
        backend: ScoringBackend | str = "auto",
        adapter: str | Path | Mapping[str, str | Path] | None = None,
    ) -> Scorer:
        """Open a model and the store that its summarizer wrote.

        Args:
            model: folder of `save_pretrained`, or a model (which stays on its device).
            store: the store's folder.
            on_missing: how to score users without a record and items outside the vocabulary: "empty" (with the summary
                of an empty history, and as an unknown item), "nan", or "raise". With "nan", users whose record is
                damaged, or whose tail or time is impossible, also get NaN; otherwise, one of these fails the call.
            task: for `score` and `rank`; by default the first labeled task, or `next` if there are none.
            device: auto | cpu | cuda | cuda:N.
            key: 32 bytes, to refuse records that were not written with this key.
            max_age_s: treat records as missing if both they and the last refresh of the store are older than this
                (`reload` notices incremental refreshes); use None for no limit.
            precision: of matrix products: float32, bfloat16, or auto (bfloat16 if the device multiplies it natively).
                Without avx512_bf16, the C++ library computes in float32 instead of bfloat16.
            index: the folder that `vista index` wrote for this model, for `retrieve`.
            project_per_request: compute projections of candidates in each call: less memory, more time.
            backend: what computes scores: "native" (vista's C++ library, on CPUs), "torch", or "auto" (the library if
                it was built and can score the model, else torch; `Scorer.backend` tells).
            adapter: file of `vista adapt` for all calls; or, for calls to name one, files by name, or their folder.

        Raises:
            StoreError, CheckpointError, ItemIndexError, AdapterError: one of them is missing or damaged, or they do not
                match.
            ConfigError: backend is "native", and the library is missing or cannot score the model here.
            ValueError: on_missing, task, precision or backend is not one of the allowed values; max_age_s is not
                positive.
        """
        require_max_age(max_age_s)
        source = ServingSource(
            model,
            store,
            device,
            key,
            choice_of(Precision, precision, "precision"),
            index,
            project_per_request,
            backend=choice_of(ScoringBackend, backend, "backend"),
            adapter=adapter,
        )
        reuse_freed_memory()
        return cls(source, choice_of(OnMissing, on_missing, "on_missing"), task, max_age_s)

    def close(self) -> None:
        """Close the store and end `follow`; closing twice is allowed."""
        self._follower.stop()
        with self._changing:
            self._closed = True
            self._current.store.close()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def model(self) -> VistaModel:
        """The model in service, for torch. If the C++ library computes the scores, the first use loads torch."""
        return self._current.model

    @property
    def served(self) -> ServingModel:
        """What requests read of the model in service."""
        return self._current.served

    @property
    def store(self) -> StoreReader | ShardedReader:
        """The store in service; a `reload` that moves to another model closes it (`in_service` keeps it open)."""
        return self._current.store

    @property
    def backend(self) -> str:
        """What computes the scores: "native, …", or "torch: …" with the reason."""
        return self._current.backend

    @contextmanager
    def in_service(self) -> Iterator[ServingSnapshot]:
        """The `model` and its `store`, which stays open until the block ends; StoreError if the scorer is closed."""
        self._require_open()
        # This takes no lock, because a fork could copy it locked: `calls` is a set, and each operation on it is atomic.
        call, snapshot = object(), self._current
        snapshot.calls.add(call)
        while snapshot is not self._current:  # A reload happened between the two lines above.
            self._release(snapshot, call)
            snapshot = self._current
            snapshot.calls.add(call)
        try:
            yield snapshot
        finally:
            self._release(snapshot, call)

    @property
    def answered_from(self) -> AnswerSource | None:
        """What this thread's last call that read the store was computed from; None before the first one."""
        return self._latest.source

    @property
    def manifest(self) -> Manifest:
        """Manifest of the store's generation: its number, its users, when it was refreshed."""
        with self.in_service() as snapshot:
            return snapshot.store.manifest

    @property
    def tasks(self) -> list[str]:
        """The tasks that `predict` scores; `next` is the retrieval head."""
        return self._current.tasks

    def reload(self) -> bool:
        """Move to a new generation of the store or a new model in the model's folder; returns whether there was one.

        Calls that are running finish with what they started with. A new model goes into service once a generation of
        its summarizer is published and, for a scorer with an index, `vista index` has run; until then, the old one
        stays in service, and a warning is logged.

        Raises:
            StoreError, CheckpointError, ItemIndexError, AdapterError: what is new is damaged or does not match, its
                tails are shorter than the model reads, the new model lacks this scorer's task, or the scorer is closed.
                The old one stays in service.
        """
        try:
            with self._changing:
                moved = self._moved()
        except BaseException as error:
            self._recorder.failed_to_reload(error)
            raise
        self._recorder.reloaded(moved=moved)
        return moved

    def follow(self, every_s: float = 30.0) -> None:
        """Call `reload` every `every_s` seconds in a daemon thread, until `close`.

        An error is logged and counted (`stats`), and the next call tries again. Threads do not survive a fork: call
        `follow` in each worker. A second call replaces the first.

        Raises:
            StoreError: the scorer is closed.
            ValueError: every_s is not positive or too large.
        """
        with self.in_service():  # checks that the scorer is open
            self._follower.start(every_s)

    def stats(self) -> ScorerStats:
        """What this scorer has done in this process."""
        return self._recorder.snapshot()

    def score(
        self,
        users: Ids,
        candidates: Any,
        *,
        tail: Tail | None = None,
        now: Any = NOW,
        request: Mapping[str, Any] | None = None,
        adapter: str | None = None,
    ) -> Any:
        """Scores of the configured task: `predict(…)[task]` without the work for the other tasks.

        Raises:
            UnknownUserError, UnknownItemError, StoreError, ValueError, TypeError: as in `predict`.
        """
        with self._call(users, tail, now, adapter, by_record=True) as call:
            return call.predict(candidates, request, [self.task])[self.task]

    def predict(
        self,
        users: Ids,
        candidates: Any,
        *,
        tail: Tail | None = None,
        now: Any = NOW,
        request: Mapping[str, Any] | None = None,
        adapter: str | None = None,
    ) -> dict[str, Any]:
        """Scores of all tasks.

        Args:
            users: B ids as in the log.
            candidates: item ids [C] (the same for every user), [B, C], a `CandidateSet`, or ragged: (values [N],
                offsets int64 [B+1]).
            tail: events since the refresh, with ids as in the log (`Tail(items, times, actions, offsets)`), packed in
                the order of `users`. They may include events that the record covers. They are merged with the stored
                tail by time, item and action, and the newest tail_len events are kept. Actions are names as in the log,
                or codes, which can differ between models. `features` has columns by name; unknown values are missing.
            now: time of the request in ms, one or [B]. The default is the current time, but at most 30 days after the
                user's newest event. None if unknown.
            request: features of the request by name, such as {"device": "phone"}: one value, one per user [B], or one
                per candidate, such as its price: [B, C]; (values [N], offsets) or B lists for ragged candidates. Those
                that are not given, and values that the model does not know, are missing. Only labeled tasks read them.
                It may also name features of users, which replace those of the records: one value, or [B].
            adapter: name of one of the scorer's adapters; None scores without, or with the one that has no name.

        Returns:
            {task: float32 [B, C], or [N] for ragged candidates}; NumPy arrays, or tensors if `candidates` is a tensor.
            The score of a labeled task is its probability. That of `next` ranks items, but is not a probability: it is
            the cosine divided by the temperature, except with counters or popularity.

        Raises:
            UnknownUserError, UnknownItemError: with on_missing="raise".
            StoreError: the scorer is closed, or a record is damaged.
            ValueError, TypeError: an argument is invalid or too long; the message names it.
        """
        with self._call(users, tail, now, adapter, by_record=True) as call:
            return call.predict(candidates, request, call.snapshot.tasks)

    def rank(
        self,
        user: int | str,
        *,
        top_k: int = 10,
        candidates: Any = None,
        exclude: Ids = (),
        exclude_tail: bool = False,
        tail: Tail | None = None,
        now: int | None = NOW,
        request: Mapping[str, Any] | None = None,
        adapter: str | None = None,
        diversity: float = 0.0,
        timeout_s: float | None = None,
    ) -> Ranking:
        """The best items for a user; unknown candidates and those without a finite score are left out and counted.

        Args:
            user: an id as in the log.
            top_k: return at most this many items.
            candidates: item ids, or None for the whole catalog. Of an item that is listed twice, the first one counts.
            exclude: item ids to leave out.
            exclude_tail: leave out the items of the user's tail, also those that were only shown.
            tail: as in `predict`, like `now` and `adapter`.
            request: as in `predict`; features with one value per candidate, [1, C], need `candidates`.
            diversity: 0 orders by score. A value up to 1 also avoids items that resemble those above them: the list is
                chosen from the 10 * `top_k` best items by maximal marginal relevance over `item_vectors`.
            timeout_s: give up after so many seconds. It is checked before each tile of 65,536 items, which are ranked
                at once, and with diversity before each item of the list; None sets no limit.

        Raises:
            DeadlineError: the ranking takes longer than `timeout_s`.
            ValueError: `top_k` is below 1, `diversity` is not in [0, 1], or is above 0 for a model without a retrieval
                head. Others as in `predict`.
        """
        with self._call([user], tail, now, adapter) as call:
            wanted = ItemFilter(exclude, exclude_tail)
            return ranked(call, self.task, top_k, candidates, request, wanted, timeout_s, diversity)

    def retrieve(
        self,
        users: Ids,
        *,
        top_k: int = 10,
        num_candidates: int = 500,
        within: Any = None,
        where: Mapping[str, Any] | None = None,
        exclude: Ids = (),
        exclude_tail: bool = False,
        tail: Tail | None = None,
        now: Any = NOW,
        request: Mapping[str, Any] | None = None,
        adapter: str | None = None,
    ) -> list[Ranking]:
        """The best items of a large catalog for each user: what `rank` returns for the candidates that an index finds.

        Candidates are the items of the user's counters and tail, and the nearest others to the user vector.

        Args:
            users: B ids as in the log.
            top_k: return at most this many items per user.
            num_candidates: number of these others per user, or top_k if that is more.
            within: ids of the items that may be returned, such as those in stock, or a `CandidateSet` of them.
            where: by name of a category of items, the values that may be returned, such as {"brand": ["a", "b"]}. An
                item needs one of the values of each name.
            exclude: as in `rank`, like `exclude_tail`.
            tail: as in `predict`, like `now`, `adapter` and `request`, whose features are the same for all candidates.

        Raises:
            ItemIndexError: the scorer was opened without an index.
            ValueError: the model lacks a category or value of `where`. Others as in `rank`.
        """
        with self._call(users, tail, now, adapter) as call:
            wanted = ItemFilter(exclude, exclude_tail, within, where)
            return retrieved(call, self.task, top_k, num_candidates, request, wanted)

    def encode(self, candidates: Any) -> CandidateSet:
        """Look up item ids [C] or [B, C] once, to score them many times.

        The result belongs to the model in service: encode again after a `reload` that moves to another model.

        Raises:
            UnknownItemError, ValueError, TypeError: as in `predict`.
        """
        with self.in_service() as snapshot:
            return snapshot.candidates(candidates, self.on_missing)

    def user_vectors(
        self, users: Ids, *, tail: Tail | None = None, now: Any = NOW, adapter: str | None = None
    ) -> NDArray[np.float32]:
        """Vectors of the retrieval head, float32 [B, M'], which rank `item_vectors`, except for `counted_items`.

        Raises:
            ValueError: the model was trained without a retrieval head. Others as in `predict`.
        """
        with self._call(users, tail, now, adapter) as call:
            call.snapshot.retrieval_vectors()
            return nan_for(call.request.missing, call.snapshot.user_vectors(call.request), call.on_missing)

    def item_vectors(self) -> tuple[NDArray[Any], NDArray[np.float32]]:
        """(ids [V], vectors float32 [V, M']) of the vocabulary, for an index by inner product.

        Raises:
            ValueError: the model was trained without a retrieval head.
        """
        with self.in_service() as snapshot:
            vectors = snapshot.retrieval_vectors()[1:].copy()
            return snapshot.served.items.ids(np.arange(len(snapshot.served.items))), vectors

    def counted_items(
        self, users: Ids, *, tail: Tail | None = None, now: Any = NOW, adapter: str | None = None
    ) -> tuple[NDArray[Any], NDArray[np.float32], NDArray[np.int64]]:
        """The items that the users' counters hold, followers of the users' newest items (`model.transitions`), and the
        scores of `next` of both; other items have the scores `user_vectors @ item_vectors.T / temperature`.

        Returns:
            (ids [N], scores float32 [N], offsets int64 [B + 1]); none for a model without counters.

        Raises:
            ValueError: the model was trained without a retrieval head. Others as in `predict`.
        """
        with self._call(users, tail, now, adapter) as call:
            rows, scores, offsets = call.snapshot.counted_items(call.request)
            scores = nan_for(np.repeat(call.request.missing, np.diff(offsets)), scores, call.on_missing)
            return call.snapshot.served.items.ids(rows - 1), scores, offsets

    def catalog_scores(
        self, users: Ids, *, tail: Tail | None = None, now: Any = NOW, adapter: str | None = None
    ) -> NDArray[np.float32]:
        """Scores of `next` float32 [B, V] of the whole catalog for each user, in the order of `item_vectors`.

        They equal those of `predict` to rounding, which can depend on the other users. For a few items, use `predict`.

        Raises:
            ValueError: the model has no retrieval head, or there are too many scores. Others as in `predict`.
        """
        with self._call(users, tail, now, adapter) as call:
            snapshot, request = call.snapshot, call.request
            require_most(len(request) * len(snapshot.served.items), MAX_SCORES, "users", "pairs of a user and an item")
            scores = nan_for(request.missing, snapshot.catalog_scores(request), call.on_missing)
            call.tally(candidates=scores.size)
            return scores

    def explain(
        self,
        user: int | str,
        items: Any,
        *,
        candidates: Any = None,
        task: str | None = None,
        tail: Tail | None = None,
        now: int | None = NOW,
        request: Mapping[str, Any] | None = None,
        adapter: str | None = None,
    ) -> Explanation:
        """Why items have their scores: what raises each above the average candidate, in shares and in words.

        Always in float32, and much slower than `score`: about a thousand candidates are explained to know the average
        one. Users without a record have an empty history.

        Args:
            user: an id as in the log.
            items: ids [C], or a `CandidateSet` of them.
            candidates: as in `rank`, where the items were found: ids, or None for the whole catalog. Of more than
                `MOST_COMPARED`, evenly spaced ones give the average.
            task: one of `tasks`; by default the scorer's own.
            tail: as in `predict`, like `now` and `adapter`.
            request: as in `rank`.

        Raises:
            UnknownUserError: with on_missing="raise".
            UnknownItemError: the model does not know an item, whichever policy the scorer has.
            ValueError: an item is not one of the candidates. Others as in `predict`.
        """
        from vista.scorer.score_shares import explained  # Shares need torch, scores may not.

        with self._call([user], tail, now, adapter) as call:
            return explained(call, self.task if task is None else task, items, candidates, request)

    def _moved(self) -> bool:
        """Move to what is newer, as `reload` does, for one thread at a time."""
        self._require_open()
        try:
            newer = self._source.open_newer(self._current, self.task)
        except VistaError:
            self._follow_store()  # A model that cannot be served must not block new generations.
            raise
        if newer is None:
            return self._follow_store()
        old, self._current = self._current, newer
        self._close_unused(old)
        return True

    def _follow_store(self) -> bool:
        """Move to a new generation, and to new values of items; whether the generation changed."""
        moved = self._current.store.reload()
        self._current = self._current.with_new_item_values() or self._current
        return moved

    def _release(self, snapshot: ServingSnapshot, call: object) -> None:
        snapshot.calls.discard(call)
        if snapshot is not self._current:
            self._close_unused(snapshot)

    def _close_unused(self, snapshot: ServingSnapshot) -> None:
        if not snapshot.calls and snapshot.store is not self._current.store:
            snapshot.store.close()

    def _require_open(self) -> None:
        if self._closed:
            raise StoreError(f"the scorer of {self._current.store.path} is closed; open a new one")
        if self._inherited:  # OpenMP's threads are not forked, so a child that waits for them would hang.
            self._inherited = False
            set_num_threads(1)

    def _after_fork(self) -> None:
        self._inherited = "torch" in sys.modules and num_threads() > 1
        self._changing = threading.Lock()

    @contextmanager
    def _call(
        self, users: Ids, tail: Tail | None, now: Any, adapter: str | None = None, *, by_record: bool = False
    ) -> Iterator[Call]:
        """One call, which is counted and timed. With `by_record`, the request may be read when it is first used."""
        tally = self._recorder.add
        with self._recorder.timed(), self.in_service() as snapshot:
            has_time = snapshot.served.schema.has_time

            @cache
            def read() -> Request:
                request = snapshot.read(users, tail, now, self.on_missing, self.max_age_s, tally, adapter)
                times = request.now if has_time else None
                self._latest.source = AnswerSource(request.generation, snapshot.checksum, times, ~request.missing)
                return request

            record = None
            if by_record and tail is None and self.max_age_s is None:
                record = snapshot.record(users, now, adapter)
            if record is None:
                read()
            else:
                times = np.array([record.now]) if has_time and record.now is not None else None
                generation = record.stored.spec.generation
                self._latest.source = AnswerSource(generation, snapshot.checksum, times, np.ones(1, np.bool_))
            try:
                yield Call(snapshot, read, self.on_missing, tally, record)
            finally:
                if record is not None and not read.cache_info().misses:  # else `read` counted the user
                    tally(hits=1)


def nan_for(missing: NDArray[np.bool_], values: NDArray[np.float32], on_missing: OnMissing) -> NDArray[np.float32]:
    """Values [N] or [N, D], which become NaN where bool [N] is set, if the policy says so."""
    if on_missing is OnMissing.nan:
        values[missing] = np.nan
    return values


COUNTERS = tuple(ScorerStats.__dataclass_fields__)[:-3]  # without the error, the time, and the latencies


class StatsRecorder:
    """Counts for all threads of a process. A forked child starts at zero."""

    def __init__(self) -> None:
        self._after_fork()
        repair_after_fork(self)

    def _after_fork(self) -> None:
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(COUNTERS, 0)
        self._latencies = [0] * (len(LATENCY_BOUNDS_MS) + 1)
        self._reload_error: str | None = None
        self._followed_at = 0

    def add(self, **counts: int) -> None:
        """Add to counters by name."""
        with self._lock:
            for name, count in counts.items():
                self._counts[name] += count

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count and time the call that a block makes."""
        began, failed = time.perf_counter(), True
        try:
            yield
            failed = False
        finally:
            self.called(time.perf_counter() - began, failed=failed)

    def called(self, seconds: float, *, failed: bool) -> None:
        """Count a call."""
        bucket = bisect.bisect_left(LATENCY_BOUNDS_MS, 1e3 * seconds)
        with self._lock:
            self._counts["calls"] += 1
            self._counts["failed_calls"] += failed
            self._latencies[bucket] += 1

    def reloaded(self, *, moved: bool) -> None:
        """Count a call of `reload` that succeeded."""
        with self._lock:
            self._counts["reloads"] += moved
            self._reload_error, self._followed_at = None, time.time_ns() // 1_000_000

    def failed_to_reload(self, error: BaseException) -> None:
        """Count a call of `reload` that raised an error."""
        with self._lock:
            self._counts["failed_reloads"] += 1
            self._reload_error = f"{type(error).__name__}: {error}"

    def snapshot(self) -> ScorerStats:
        """All numbers at one point in time."""
        with self._lock:
            return ScorerStats(
                **self._counts,
                last_reload_error=self._reload_error,
                followed_at=self._followed_at,
                latency_counts=tuple(self._latencies),
            )
