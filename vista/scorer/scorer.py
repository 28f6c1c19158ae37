"""The scorer: what ranking code calls. Its cost does not depend on how long a user's history is.

    scorer = Scorer.open("runs/ml-1m/best", "stores/ml-1m")
    scores = scorer.score(users, candidates)

Letters: B users, C candidates, V items of the vocabulary, S seeds, L tail length, M model dim.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vista.choices import OnMissing, Precision, choice_of
from vista.data.vocabulary import Ids
from vista.device import one_thread_in_children, reuse_freed_memory
from vista.errors import UnknownItemError, UnknownUserError, VistaError
from vista.model import inference
from vista.model.ranking_model import UNKNOWN_ITEM
from vista.model.recommender import Recommender
from vista.scorer.answers import CandidateSet, Explanation, Ranking
from vista.scorer.requests import check_times, ids_of, item_rows, pad_ragged, request_times, split_ragged
from vista.scorer.served import Request, Served
from vista.scorer.source import Source
from vista.scorer.statistics import Recorder, ScorerStats
from vista.scorer.tails import with_fresh_events
from vista.store.batches import Tail
from vista.store.lmdb_store import SummaryStore
from vista.store.parts import StoreParts

logger = logging.getLogger(__name__)
Int = NDArray[np.int64]


class Scorer:
    """Scores candidates for users from their stored summaries and tails. Open one a process with `Scorer.open`.

    Safe with threads, and after fork. What a call sees of model and store does not change under it.
    """

    def __init__(self, source: Source, on_missing: OnMissing, task: str | None, max_age_s: float | None) -> None:
        self.on_missing = on_missing
        self.max_age_s = max_age_s
        self._source = source
        self._served = source.open()
        self._recorder = Recorder()
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
        model: str | Path | Recommender,
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
                summary; a neutral item), "nan", or "raise".
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
        if max_age_s is not None and not max_age_s > 0:
            raise ValueError(f"max_age_s: must be above 0 seconds, got {max_age_s}")
        source = Source(model, store, device, key, choice_of(Precision, precision, "precision"))
        reuse_freed_memory()
        one_thread_in_children()
        return cls(source, policy, task, max_age_s)

    def close(self) -> None:
        """Let the store go; closing twice is allowed."""
        self.store.close()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def model(self) -> Recommender:
        """The model that is served."""
        return self._served.model

    @property
    def store(self) -> SummaryStore | StoreParts:
        """The store that is read."""
        return self._served.store

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
                reads, or the scorer is closed; what was served is served on.
            ValueError: the new model lacks this scorer's task; the old one is served on.
        """
        try:
            opened = self._source.open_newer(self._served)
        except VistaError:
            self.store.reload()  # A damaged model must not keep new generations from being served.
            raise
        if opened is not None:
            try:
                _require_task(self.task, opened)
            except BaseException:
                opened.store.close()
                raise
            self._served = opened  # The old store closes with the last call that reads it (`Served.__del__`).
        elif not self.store.reload():
            return False
        self._served.require_tails()
        self._recorder.add(reloads=1)
        return True

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
            tail, now: as in `predict`.
        """
        if not isinstance(top_k, (int, np.integer)):
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
        return self._encode(self._served, candidates)

    def user_vectors(self, users: Ids, *, tail: Tail | None = None, now: Any = None) -> NDArray[np.float32]:
        """Unit vectors of the retrieval head, float32 [B, M]; their products with `item_vectors` rank the catalogue.

        Raises:
            ValueError: the model was trained without a retrieval head; others as `predict`.
        """
        with self._call() as served:
            if not served.model.has_retrieval:
                raise ValueError("this model has no retrieval head; train it with optim.next_weight above 0")
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
        served = self._served
        if served.items.unit is None:
            raise ValueError("this model has no retrieval head; train it with optim.next_weight above 0")
        vectors = served.items.unit[UNKNOWN_ITEM + 1 :].cpu().numpy().copy()
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

        Always in float32, and as under on_missing="empty". Takes several times as long as `score`: for people who look,
        not for each request.

        Args:
            user: an id as in the log.
            candidates: item ids [C], or a `CandidateSet` of them.
            task: one of `tasks`; None: the scorer's own.
            tail, now: as in `predict`.
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
    def _call(self) -> Iterator[Served]:
        """What is served during a call, which is counted."""
        began, failed = time.perf_counter(), True
        try:
            yield self._served
            failed = False
        finally:
            self._recorder.called(time.perf_counter() - began, failed=failed)

    def _predict(
        self, served: Served, users: Ids, candidates: Any, tail: Tail | None, now: Any, tasks: list[str]
    ) -> dict[str, Any]:
        request = self._request(served, users, tail, now)
        values, offsets = split_ragged(candidates)
        rows = self._encode(served, values).rows
        filled = None
        if offsets is not None:
            rows, filled = pad_ragged(rows, offsets, len(request))
        if rows.ndim == 2 and len(rows) != len(request):
            raise ValueError(f"candidates: {rows.shape} do not fit {len(request)} users; give [C], or one row a user")
        if filled is None:
            scores = served.scores(request, torch.from_numpy(rows), tasks)
        else:  # Users of like lengths together.
            lengths = filled.sum(1)
            order = np.argsort(lengths)
            sorted_scores = served.scores(request.select(order), torch.from_numpy(rows[order]), tasks, lengths[order])
            place = torch.from_numpy(np.argsort(order))
            scores = {task: cells[place] for task, cells in sorted_scores.items()}
        unknown = np.broadcast_to(rows == UNKNOWN_ITEM, (len(request), rows.shape[-1]))
        if self.on_missing is OnMissing.nan:
            nobody = torch.from_numpy(request.missing[:, None] | unknown)
            scores = {task: cells.masked_fill(nobody, float("nan")) for task, cells in scores.items()}
        if filled is not None:
            scores = {task: cells[torch.from_numpy(filled)] for task, cells in scores.items()}
            unknown = unknown[filled]
        self._recorder.add(candidates=unknown.size, unknown_candidates=int(unknown.sum()))
        if isinstance(values, Tensor):
            return {task: cells.to(values.device) for task, cells in scores.items()}
        return {task: cells.numpy() for task, cells in scores.items()}

    def _encode(self, served: Served, candidates: Any) -> CandidateSet:
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

    def _request(self, served: Served, users: Ids, tail: Tail | None, now: Any) -> Request:
        ids = ids_of(users, "users")
        stored = served.store.get_many(ids)
        num_found = int(stored.found.sum())
        if self.max_age_s is not None:
            now_ms, max_age_ms = time.time_ns() // 1_000_000, int(1000 * self.max_age_s)
            stored = stored.without(stored.expired(now_ms, served.store.manifest.refreshed_at, max_age_ms))
        missing = ~stored.found
        num_hits = len(missing) - int(missing.sum())
        self._recorder.add(hits=num_hits, stale=num_found - num_hits, misses=len(missing) - num_found)
        if self.on_missing is OnMissing.error and missing.any():
            absent = np.asarray(ids)[missing][:5].tolist()
            raise UnknownUserError(
                f"users {absent} have no record in {served.store.path}; refresh it, or on_missing='empty'"
            )
        times = request_times(now, len(missing))
        if times is not None:
            check_times(served.model, "now", times, stored)
        merged = stored.tail if tail is None else with_fresh_events(served.model, stored, tail)
        padded = inference.pad_tail(served.model, merged.items, merged.times, merged.actions, merged.offsets)
        summary = torch.from_numpy(stored.summary).to(served.model.device)
        if missing.any():
            summary[torch.from_numpy(missing).to(summary.device)] = served.empty
        return Request(summary, padded, times, missing)


def _require_task(task: str, served: Served) -> None:
    if task not in served.tasks:
        raise ValueError(f"task: {task!r} is none of this model's {served.tasks}")
