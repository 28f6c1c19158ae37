"""The scorer: what ranking code calls. Its cost does not depend on how long a user's history is.

    scorer = Scorer.open("runs/ml-1m/best", "stores/ml-1m")
    scores = scorer.score(users, candidates)

Letters: B users, C candidates, V items of the vocabulary, S seeds, L tail length, M model dim.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vista.config.choices import OnMissing, Precision, choice_of
from vista.device import reuse_freed_memory
from vista.errors import StoreError, UnknownItemError, VistaError
from vista.log.vocabulary import Ids
from vista.model.ranking_model import UNKNOWN_ITEM
from vista.model.vista_model import VistaModel
from vista.scorer.answers import CandidateSet, Explanation, Ranking
from vista.scorer.reading import read_request
from vista.scorer.requests import (
    ids_of,
    item_rows,
    ragged_offsets,
    split_ragged,
)
from vista.scorer.scorer_stats import ScorerStats, StatsRecorder
from vista.scorer.serving_snapshot import Request, ServingSnapshot
from vista.scorer.serving_source import ServingSource
from vista.store.layout import Manifest
from vista.store.reader import StoreReader
from vista.store.shards import StoreParts
from vista.store.stored_batch import Tail

logger = logging.getLogger(__name__)
Int = NDArray[np.int64]


class Scorer:
    """Scores candidates for users from their stored summaries and tails. Open one a process with `Scorer.open`.

    Safe with threads, and after fork. What a call sees of model and store does not change under it.
    """

    def __init__(self, source: ServingSource, on_missing: OnMissing, task: str | None, max_age_s: float | None) -> None:
        self.on_missing = on_missing
        self.max_age_s = max_age_s
        self._source = source
        self._served = source.open()
        self._closed = self._inherited = False
        self._changing = threading.Lock()
        self._recorder = StatsRecorder()
        _scorers.add(self)
        try:
            self.task = task or self.tasks[0]
            """What `score` and `rank` give."""
            _require_task(self.task, self._served)
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
    ) -> Scorer:
        """Open a model and the store that its summarizer wrote.

        Args:
            model: folder of `save_pretrained`, or a model (which stays on its device).
            store: the store's folder.
            on_missing: what users without a record and items outside the vocabulary get: "empty" (the empty history's
                summary; a neutral item), "nan", or "raise". Under "nan" a user whose record is damaged, or whose tail
                or time is impossible, gets NaN too; otherwise that is an error of the whole call.
            task: what `score` and `rank` use; by default the first labelled task, or `next` where there is none.
            device: auto | cpu | cuda | cuda:N.
            key: 32 bytes: refuse records that were not written with this key.
            max_age_s: users whose record, and the last refresh of the store, are older than this have none (`reload`
                learns of incremental refreshes); None serves records of any age.
            precision: of matrix products: float32, bfloat16, or auto (bfloat16 where the device multiplies it).

        Raises:
            SummarizerMismatchError: the store is of another summarizer.
            StoreError, CheckpointError: missing or damaged; the message has the remedy.
            ValueError: on_missing, task or precision is none of those that there are; max_age_s is not positive.
        """
        policy = choice_of(OnMissing, on_missing, "on_missing")
        if max_age_s is not None and not isinstance(max_age_s, (int, float)):
            raise TypeError(f"max_age_s: needs seconds, got {max_age_s!r}")
        if max_age_s is not None and not 0 < max_age_s < math.inf:
            raise ValueError(f"max_age_s: must be above 0 seconds and finite, got {max_age_s}; None knows no limit")
        source = ServingSource(model, store, device, key, choice_of(Precision, precision, "precision"))
        reuse_freed_memory()
        return cls(source, policy, task, max_age_s)

    def close(self) -> None:
        """Let the store go; closing twice is allowed."""
        with self._changing:
            self._closed = True
            self._served.store.close()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def model(self) -> VistaModel:
        """The model that is served."""
        return self._served.model

    @property
    def store(self) -> StoreReader | StoreParts:
        """The store that is read; a `reload` to another model closes it."""
        return self._served.store

    @property
    def manifest(self) -> Manifest:
        """What the store's generation is: its number, users, and when it was refreshed."""
        with self._use() as served:
            return served.store.manifest

    @property
    def tasks(self) -> list[str]:
        """What `predict` gives; `next` is the retrieval head."""
        return self._served.tasks

    def reload(self) -> bool:
        """Follow the store to a new generation, and the model's folder to a new model; whether there was one.

        Calls that run meanwhile end with what they began with. A new model is served once a generation of its
        summarizer is published: until then the old one stays, and a warning is logged.

        Raises:
            StoreError, CheckpointError: the new generation or model is damaged, its tails are shorter than the model
                reads, the new model lacks this scorer's task, or the scorer is closed. What was served is served on.
        """
        with self._changing:
            self._require_open()
            try:
                opened = self._source.open_newer(self._served, self.task)
            except VistaError:
                self.store.reload()  # A model that cannot be served must not keep new generations from being served.
                raise
            if opened is None:
                moved = self.store.reload()
            else:
                old, self._served = self._served, opened
                self._close_unused(old)
                moved = True
        self._recorder.add(reloads=moved)
        return moved

    def stats(self) -> ScorerStats:
        """What this scorer has done in this process."""
        return self._recorder.snapshot()

    # Scores ----------------------------------------------------------------------------------------------------------

    def score(self, users: Ids, candidates: Any, *, tail: Tail | None = None, now: Any = None) -> Any:
        """The configured task's score of candidates: `predict(…)[task]`, without the other tasks' work.

        Returns:
            float32, as `predict`.
        """
        with self._call() as served:
            return self._predict(served, users, candidates, tail, now, [self.task])[self.task]

    def predict(self, users: Ids, candidates: Any, *, tail: Tail | None = None, now: Any = None) -> dict[str, Any]:
        """Scores of all tasks.

        Args:
            users: B ids as in the log.
            candidates: item ids [C] (the same for every user), [B, C], a `CandidateSet`, or ragged: (values [N],
                offsets int64 [B+1]).
            tail: events since the refresh, ids as in the log (`Tail(items, times, actions, offsets)`), packed in the
                order of `users`; merged with the stored tail by time, item and action, the newest tail_len are kept.
            now: time of the request in ms, one or [B]; None leaves it unknown.

        Returns:
            {task: float32 [B, C], or [N] for ragged candidates}; NumPy, or torch if `candidates` are a tensor. A
            labelled task's score is its probability; that of `next` is the cosine over the temperature, which ranks but
            is no probability.

        Raises:
            UnknownUserError, UnknownItemError: by policy "raise".
            StoreError: the scorer is closed, or a record is damaged.
            ValueError, TypeError: naming the argument.
        """
        with self._call() as served:
            return self._predict(served, users, candidates, tail, now, served.tasks)

    def rank(
        self,
        user: int | str,
        *,
        top_k: int = 10,
        candidates: Any = None,
        exclude: Ids = (),
        exclude_tail: bool = False,
        tail: Tail | None = None,
        now: int | None = None,
    ) -> Ranking:
        """The best items of a user; those whose score is not finite, and unknown candidates, are left out and counted.

        Args:
            user: an id as in the log.
            top_k: items to return at most.
            candidates: item ids, or None for the whole catalogue.
            exclude: item ids that must not come.
            exclude_tail: leave out the items of the user's tail.
            tail: as in `predict`.
            now: as in `predict`.
        """
        if not isinstance(top_k, (int, np.integer)) or isinstance(top_k, bool):
            raise TypeError(f"top_k: needs an integer, got {top_k!r}")
        if top_k < 1:
            raise ValueError(f"top_k: must be at least 1, got {top_k}")
        with self._call() as served:
            items = served.model.items
            request = self._request(served, [user], tail, now)
            left_out = np.zeros(len(items) + 1, bool)
            left_out[UNKNOWN_ITEM] = True
            num_unknown, rows = 0, None
            if candidates is not None:
                chosen = self._encode(served, candidates).rows
                if chosen.ndim != 1:
                    raise ValueError(f"candidates: needs [C], got shape {chosen.shape}")
                num_unknown = int((chosen == UNKNOWN_ITEM).sum())
                rows = np.unique(chosen)
            left_out[item_rows(served.model, ids_of(exclude, "exclude"), "exclude")] = True
            if exclude_tail:
                left_out[request.tail.item[request.tail.valid]] = True
            given = None if rows is None else torch.from_numpy(rows)
            scores = served.scores(request, given, [self.task])[self.task][0].numpy()
            if self.on_missing is OnMissing.nan and request.missing[0]:
                scores[:] = np.nan
            kept = ~(left_out if rows is None else left_out[rows])
            rows = np.flatnonzero(kept) if rows is None else rows[kept]
            scores = scores[kept]
            finite = np.isfinite(scores)
            rows, scores = rows[finite], scores[finite]
            best = torch.from_numpy(scores).topk(min(top_k, len(scores))).indices.numpy()
            num_dropped = num_unknown + int((~finite).sum())
            self._recorder.add(
                candidates=len(finite) + num_unknown, unknown_candidates=num_unknown, dropped=num_dropped
            )
            return Ranking(items.ids(rows[best] - 1), scores[best], num_dropped)

    def encode(self, candidates: Any) -> CandidateSet:
        """Look item ids up once, to score them many times: ids [C] or [B, C].

        They are of the model that is served: encode anew after a `reload` that moved to another model.
        """
        with self._use() as served:
            return self._encode(served, candidates)

    def user_vectors(self, users: Ids, *, tail: Tail | None = None, now: Any = None) -> NDArray[np.float32]:
        """Unit vectors of the retrieval head, float32 [B, M]; their products with `item_vectors` rank the catalogue.

        Raises:
            ValueError: the model was trained without a retrieval head; others as `predict`.
        """
        with self._call() as served:
            _require_retrieval(served)
            request = self._request(served, users, tail, now)
            vectors: NDArray[np.float32] = served.user_vectors(request).cpu().numpy()
            if self.on_missing is OnMissing.nan:
                vectors[request.missing] = np.nan
            return vectors

    def item_vectors(self) -> tuple[NDArray[Any], NDArray[np.float32]]:
        """(ids [V], unit vectors float32 [V, M]) of the vocabulary, for a nearest-neighbour index.

        Raises:
            ValueError: the model was trained without a retrieval head.
        """
        with self._use() as served:
            vectors = _require_retrieval(served)[UNKNOWN_ITEM + 1 :].cpu().numpy().copy()
            return served.model.items.ids(np.arange(len(served.model.items))), vectors

    def explain(
        self,
        user: int | str,
        candidates: Any,
        *,
        task: str | None = None,
        tail: Tail | None = None,
        now: int | None = None,
    ) -> Explanation:
        """What a user's scores are made of: the summary's tokens, the tail's events, the candidate itself.

        Always in float32; a user without a record is an empty one, or an error under on_missing="raise". Takes several
        times as long as `score`: for people who look, not for each request.

        Args:
            user: an id as in the log.
            candidates: item ids [C], or a `CandidateSet` of them.
            task: one of `tasks`; None: the scorer's own.
            tail: as in `predict`.
            now: as in `predict`.
        """
        with self._call() as served:
            task = task or self.task
            _require_task(task, served)
            rows = self._encode(served, candidates).rows
            if rows.ndim != 1:
                raise ValueError(f"candidates: needs [C], got shape {rows.shape}")
            request = self._request(served, [user], tail, now)
            value, shares = served.shares(request, torch.from_numpy(rows), task)
            of_tail, own = shares.tail.clone(), shares.query[0]
            if len(shares.query) > 1:
                of_tail[:, -1] += shares.query[1]  # The query token of `next` starts from the newest event.
            self._recorder.add(candidates=len(rows), unknown_candidates=int((rows == UNKNOWN_ITEM).sum()))
            valid = request.tail.valid[0]
            items = request.tail.item[0][valid]
            names = served.model.items.ids(np.maximum(items - 1, 0)).tolist()
            remainder = value - (shares.summary.sum(1) + of_tail[:, valid].sum(1) + own)
            return Explanation(
                value.numpy(),
                shares.summary.numpy(),
                of_tail[:, valid].numpy(),
                [name if item != UNKNOWN_ITEM else None for name, item in zip(names, items.tolist(), strict=True)],
                own.numpy(),
                remainder.numpy(),
            )

    # Inside ----------------------------------------------------------------------------------------------------------

    @contextmanager
    def _use(self) -> Iterator[ServingSnapshot]:
        """What is served now; its store stays open until the block ends.

        Without a lock, which a fork could leave locked: `calls` is a set, and one operation on it is whole.
        """
        self._require_open()
        call = object()
        served = self._served
        served.calls.add(call)
        while served is not self._served:  # A reload came between the two lines above.
            self._release(served, call)
            served = self._served
            served.calls.add(call)
        try:
            yield served
        finally:
            self._release(served, call)

    def _release(self, served: ServingSnapshot, call: object) -> None:
        served.calls.discard(call)
        if served is not self._served:
            self._close_unused(served)

    def _close_unused(self, served: ServingSnapshot) -> None:
        if not served.calls:
            served.store.close()

    def _require_open(self) -> None:
        if self._closed:
            raise StoreError(f"the scorer of {self.store.path} is closed; open another one")
        if self._inherited:  # OpenMP's threads are not forked: a child that asks for them waits for ever.
            self._inherited = False
            torch.set_num_threads(1)

    def _after_fork(self) -> None:
        self._inherited = torch.get_num_threads() > 1
        self._changing = threading.Lock()
        self._recorder = StatsRecorder()

    @contextmanager
    def _call(self) -> Iterator[ServingSnapshot]:
        """`_use`, and the call is counted."""
        began, failed = time.perf_counter(), True
        try:
            with self._use() as served:
                yield served
            failed = False
        finally:
            self._recorder.called(time.perf_counter() - began, failed=failed)

    def _predict(
        self, served: ServingSnapshot, users: Ids, candidates: Any, tail: Tail | None, now: Any, tasks: list[str]
    ) -> dict[str, Any]:
        values, given = split_ragged(candidates)
        request = self._request(served, users, tail, now)
        rows, missing = self._encode(served, values).rows, request.missing
        if given is not None:
            offsets = ragged_offsets(rows, given, len(request))
            scores = served.ragged_scores(request, rows, offsets, tasks)
            missing = np.repeat(missing, np.diff(offsets))
        else:
            if rows.ndim == 2 and len(rows) != len(request):
                raise ValueError(
                    f"candidates: {rows.shape} do not fit {len(request)} users; give [C], or one row a user"
                )
            scores = served.scores(request, torch.from_numpy(rows), tasks)
            missing = missing[:, None]
        unknown = np.broadcast_to(rows == UNKNOWN_ITEM, scores[tasks[0]].shape)
        if self.on_missing is OnMissing.nan:
            nobody = torch.from_numpy(missing | unknown)
            scores = {task: cells.masked_fill(nobody, float("nan")) for task, cells in scores.items()}
        self._recorder.add(candidates=unknown.size, unknown_candidates=int(unknown.sum()))
        if isinstance(values, Tensor):
            return {task: cells.to(values.device) for task, cells in scores.items()}
        return {task: cells.numpy() for task, cells in scores.items()}

    def _encode(self, served: ServingSnapshot, candidates: Any) -> CandidateSet:
        if isinstance(candidates, CandidateSet):
            if candidates.vocabulary != served.vocabulary:
                raise ValueError("candidates: were encoded for another model's items; call encode again after a reload")
            return candidates
        try:
            ids = np.asarray(candidates.cpu() if isinstance(candidates, Tensor) else candidates)
        except ValueError:
            raise ValueError("candidates: rows of different lengths; pass (values, offsets) instead") from None
        if ids.ndim not in (1, 2):
            raise ValueError(f"candidates: needs [C] or [B, C], got shape {ids.shape}")
        rows = item_rows(served.model, ids.ravel(), "candidates").reshape(ids.shape)
        if self.on_missing is OnMissing.error and (rows == UNKNOWN_ITEM).any():
            unknown = ids[rows == UNKNOWN_ITEM][:5].tolist()
            raise UnknownItemError(
                f"candidates: items {unknown} are not in the model's vocabulary; train on a newer log"
            )
        return CandidateSet(rows, served.vocabulary)

    def _request(self, served: ServingSnapshot, users: Ids, tail: Tail | None, now: Any) -> Request:
        return read_request(served, users, tail, now, self.on_missing, self.max_age_s, self._recorder)


def _require_task(task: str, served: ServingSnapshot) -> None:
    if task not in served.tasks:
        raise ValueError(f"task: {task!r} is none of this model's {served.tasks}")


def _require_retrieval(served: ServingSnapshot) -> Tensor:
    """The unit vectors of its items."""
    if served.items.unit is None:
        raise ValueError("this model has no retrieval head; train it with optim.next_weight above 0")
    return served.items.unit


_scorers: weakref.WeakSet[Scorer] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for scorer in _scorers:
        scorer._after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
