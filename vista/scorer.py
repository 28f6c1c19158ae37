"""The scorer: what ranking code calls. Its cost does not depend on how long a user's history is.

    scorer = Scorer.open("runs/ml-1m/best", "stores/ml-1m")
    scores = scorer.score(users, candidates)

Letters: B users, C candidates, V items of the vocabulary, L tail length, M model dim.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vista.config import OnMissing, ScoreConfig
from vista.data.histories import Histories
from vista.data.vocabulary import Ids
from vista.errors import StoreError, UnknownItemError, UnknownUserError
from vista.model import inference
from vista.model.recommender import UNKNOWN_ITEM, Recommender
from vista.model.target_attention import Context
from vista.store.lmdb_store import StoredBatch, SummaryStore
from vista.store.record import Tail
from vista.tails import check_tail, merge_tails

logger = logging.getLogger(__name__)
Int = NDArray[np.int64]
NEXT_TASK = "next"
CANDIDATES_PER_PASS = 4096

__all__ = ["NEXT_TASK", "CandidateSet", "Ranking", "Scorer", "Tail"]


@dataclass(frozen=True, slots=True)
class CandidateSet:
    """Encoded candidates, made by `Scorer.encode`, to use again: int64 model rows, [C] (for every user) or [B, C]."""

    rows: Int


@dataclass(frozen=True, slots=True)
class Ranking:
    """The best items of a user: ids as in the log, scores float32, best first."""

    items: NDArray[Any]
    scores: NDArray[np.float32]
    num_dropped: int
    """Items left out because their score was not finite."""


@dataclass(frozen=True, slots=True)
class _Request:
    """The context of B users and what their time is."""

    context: Context
    gap: Tensor | None
    tail: inference.PaddedTail
    missing: NDArray[np.bool_]


class Scorer:
    """Scores candidates for users from their stored summaries and tails. Open one a process with `Scorer.open`."""

    def __init__(self, model: Recommender, store: SummaryStore, on_missing: OnMissing, task: str | None) -> None:
        self.model = model
        self.store = store
        self.on_missing = on_missing
        self.tasks = [*model.schema.tasks, NEXT_TASK]
        """What `predict` gives; `next` is the retrieval head."""
        self.task = task or self.tasks[0]
        if self.task not in self.tasks:
            raise ValueError(f"task: {self.task!r} is none of this model's {self.tasks}")
        self._items = inference.item_vectors(model)
        self._empty = inference.summarize(model, _empty_history())

    @classmethod
    def open(
        cls,
        model: str | Path | Recommender,
        store: str | Path,
        *,
        on_missing: OnMissing | str = "empty",
        task: str | None = None,
        device: str = "cpu",
    ) -> Scorer:
        """Open a model and the store that its summarizer wrote.

        Args:
            model: folder of `save_pretrained`, or a model.
            store: the store's folder.
            on_missing: what users without a record and items outside the vocabulary get: "empty" (the empty history's
                summary; a neutral item), "nan", or "raise".
            task: what `score` and `rank` use; by default the first labelled task, or `next` where there is none.

        Raises:
            SummarizerMismatchError: the store is of another summarizer.
            StoreError, CheckpointError: missing or damaged; the message has the remedy.
        """
        policy = on_missing if isinstance(on_missing, OnMissing) else OnMissing(on_missing)
        model = model if isinstance(model, Recommender) else Recommender.from_pretrained(model, device)
        opened = SummaryStore.open(store, summarizer_id=model.summarizer_id())
        if opened.manifest.tail_len < model.config.tail_len:
            tails = opened.manifest.tail_len
            opened.close()
            raise StoreError(
                f"{store} holds tails of {tails} events, the model reads {model.config.tail_len}; refresh it with this model"
            )
        return cls(model.eval(), opened, policy, task)

    def close(self) -> None:
        """Let the store go."""
        self.store.close()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def reload(self) -> bool:
        """Follow the store to a new generation, between two calls; whether there was one."""
        return self.store.reload()

    # Scores ----------------------------------------------------------------------------------------------------------

    def score(self, users: Ids, candidates: Any, *, tail: Tail | None = None, now: Any = None) -> Any:
        """The configured task's score of candidates: `predict(…)[task]`, without the other tasks' work.

        Returns:
            float32, as `predict`.
        """
        return self._predict(users, candidates, tail, now, [self.task])[self.task]

    def predict(self, users: Ids, candidates: Any, *, tail: Tail | None = None, now: Any = None) -> dict[str, Any]:
        """Scores of all tasks.

        Args:
            users: B ids as in the log.
            candidates: item ids [C] (the same for every user), [B, C], a `CandidateSet`, or ragged: (values [N],
                offsets int64 [B+1]).
            tail: events since the refresh, ids as in the log (`Tail(items, times, actions, offsets)`), packed in the order
                of `users`; merged with the stored tail by time, item and action, the newest tail_len are kept.
            now: time of the request in ms, one or [B]; None leaves it unknown.

        Returns:
            {task: float32 [B, C], or [N] for ragged candidates}; NumPy, or torch if `candidates` are a tensor. A labelled
            task's score is its probability; that of `next` is the cosine over the temperature, which ranks but is no
            probability.

        Raises:
            UnknownUserError, UnknownItemError: by policy "raise".
            ValueError, TypeError: naming the argument.
        """
        return self._predict(users, candidates, tail, now, self.tasks)

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
        """The best items of a user.

        Args:
            user: an id as in the log.
            top_k: items to return at most.
            candidates: item ids, or None for the whole catalogue.
            exclude: item ids that must not come.
            exclude_tail: leave out the items of the user's tail.
        """
        request = self._request([user], tail, now)
        if candidates is None:
            rows = np.arange(1, len(self.model.items) + 1)
        else:
            rows = np.unique(self.encode(candidates).rows.ravel())
        unwanted = self.model.item_rows(exclude) if len(exclude) else np.zeros(0, np.int64)
        if exclude_tail:
            unwanted = np.concatenate([unwanted, request.tail.item[request.tail.valid]])
        rows = rows[~np.isin(rows, unwanted)]
        scores = self._task_scores(request, torch.from_numpy(rows[None]), [self.task])[self.task][0].numpy()
        finite = np.isfinite(scores)
        rows, scores = rows[finite], scores[finite]
        best = torch.from_numpy(scores).topk(min(top_k, len(scores))).indices.numpy()
        # The unknown item has no id to give back.
        best = best[rows[best] != UNKNOWN_ITEM]
        return Ranking(self.model.items.ids(rows[best] - 1), scores[best], int((~finite).sum()))

    def encode(self, candidates: Any) -> CandidateSet:
        """Look item ids up once, to score them many times: ids [C] or [B, C]."""
        if isinstance(candidates, CandidateSet):
            return candidates
        ids = np.asarray(candidates.cpu() if isinstance(candidates, Tensor) else candidates)
        if ids.ndim not in (1, 2):
            raise ValueError(f"candidates: needs [C] or [B, C], got shape {ids.shape}")
        rows = self.model.item_rows(ids.ravel()).reshape(ids.shape)
        if self.on_missing is OnMissing.error and (rows == UNKNOWN_ITEM).any():
            unknown = ids[rows == UNKNOWN_ITEM][:5].tolist()
            raise UnknownItemError(f"candidates: items {unknown} are not in the model's vocabulary; train on a newer log")
        return CandidateSet(rows)

    def user_vectors(self, users: Ids, *, tail: Tail | None = None, now: Any = None) -> NDArray[np.float32]:
        """Unit vectors of the retrieval head, float32 [B, M]; their products with `item_vectors` rank the catalogue."""
        request = self._request(users, tail, now)
        vectors = inference.user_vectors(self.model, request.context, request.gap).float().cpu()
        if self.on_missing is OnMissing.nan:
            vectors[torch.from_numpy(request.missing)] = float("nan")
        return vectors.numpy()

    def item_vectors(self) -> tuple[NDArray[Any], NDArray[np.float32]]:
        """(ids [V], unit vectors float32 [V, M]) of the vocabulary, for a nearest-neighbour index."""
        return self.model.items.ids(np.arange(len(self.model.items))), self._items.float().cpu().numpy()

    # Inside ----------------------------------------------------------------------------------------------------------

    def _predict(self, users: Ids, candidates: Any, tail: Tail | None, now: Any, tasks: list[str]) -> dict[str, Any]:
        request = self._request(users, tail, now)
        num_users = len(request.missing)
        ragged = None
        if isinstance(candidates, tuple):
            values, ragged = candidates
            rows, filled = _pad_ragged(self.encode(values).rows, np.asarray(ragged, np.int64), num_users)
        else:
            rows = self.encode(candidates).rows
        if rows.ndim == 2 and len(rows) != num_users:
            raise ValueError(f"candidates: {rows.shape} do not fit {num_users} users; give [C], or one row a user")
        grid = np.broadcast_to(rows, (num_users, rows.shape[-1]))
        scores = self._task_scores(request, torch.from_numpy(np.ascontiguousarray(grid)), tasks)
        out: dict[str, Any] = {}
        for task, values in scores.items():
            if self.on_missing is OnMissing.nan:
                values[torch.from_numpy(request.missing)] = float("nan")
                values[torch.from_numpy(grid == UNKNOWN_ITEM)] = float("nan")
            values = values[torch.from_numpy(filled)] if ragged is not None else values
            out[task] = values if isinstance(candidates, Tensor) else values.numpy()
        return out

    def _task_scores(self, request: _Request, rows: Tensor, tasks: list[str]) -> dict[str, Tensor]:
        """{task: float32 [B, C] on the CPU} of model rows int64 [B, C]."""
        model, out = self.model, {}
        rows = rows.to(model.device)
        if any(task != NEXT_TASK for task in tasks):
            parts = [
                inference.candidate_logits(model, request.context, request.gap, part)
                for part in rows.split(CANDIDATES_PER_PASS, dim=1)
            ]
            probabilities = torch.cat(parts, 1).float().sigmoid().cpu()
            out = {name: probabilities[..., i] for i, name in enumerate(model.schema.tasks) if name in tasks}
        if NEXT_TASK in tasks:
            users = inference.user_vectors(model, request.context, request.gap)
            vectors = torch.cat([torch.zeros_like(self._items[:1]), self._items])[rows]
            out[NEXT_TASK] = ((vectors @ users.unsqueeze(-1)).squeeze(-1) / model.config.temperature).float().cpu()
        return out

    def _request(self, users: Ids, tail: Tail | None, now: Any) -> _Request:
        stored = self.store.get_many(users)
        missing = ~stored.found
        if self.on_missing is OnMissing.error and missing.any():
            absent = np.asarray(users)[missing][:5].tolist()
            raise UnknownUserError(f"users {absent} have no record in {self.store.path}; refresh it, or on_missing='empty'")
        num_users = len(missing)
        times = None
        if now is not None:
            times = np.broadcast_to(np.asarray(now), (num_users,))
            if times.dtype.kind not in "iu":
                raise TypeError(f"now: needs integer milliseconds, got {times.dtype}")
        merged = stored.tail if tail is None else self._merge(stored, tail, num_users)
        padded = inference.pad_tail(self.model, merged.items, merged.times, merged.actions, merged.offsets)
        summary = torch.from_numpy(stored.summary).to(self.model.device)
        summary[torch.from_numpy(missing)] = self._empty
        context = inference.request_context(self.model, summary, padded)
        gap = inference.request_gap(self.model, times, padded)
        return _Request(context, gap, padded, missing)

    def _merge(self, stored: StoredBatch, tail: Tail, num_users: int) -> Tail:
        check_tail(tail, num_users, len(self.model.schema.actions))
        rows = self.model.item_rows(tail.items) if len(tail.items) else np.zeros(0, np.int64)
        fresh = Tail(rows.astype(np.int32), np.asarray(tail.times), np.asarray(tail.actions, np.uint8), tail.offsets)
        return merge_tails(stored.tail, fresh, self.model.config.tail_len)


def _pad_ragged(values: Int, offsets: Int, num_users: int) -> tuple[Int, NDArray[np.bool_]]:
    """Ragged rows as a grid [B, longest] and which of its cells are filled."""
    if values.ndim != 1 or offsets.shape != (num_users + 1,):
        raise ValueError(f"candidates: ragged values [N] need offsets [{num_users + 1}], got {values.shape}, {offsets.shape}")
    counts = np.diff(offsets)
    if offsets[0] != 0 or offsets[-1] != len(values) or (counts < 0).any():
        raise ValueError(f"candidates: offsets must rise from 0 to {len(values)}, got {offsets[0]} … {offsets[-1]}")
    filled = np.arange(counts.max(initial=0)) < counts[:, None]
    grid = np.full(filled.shape, UNKNOWN_ITEM, np.int64)
    grid[filled] = values
    return grid, filled


def _empty_history() -> Histories:
    none = np.zeros(0, np.int64)
    return Histories(none.astype(np.int32), none, none.astype(np.uint8), None, np.zeros(2, np.int64))


def score_from_config(config: ScoreConfig) -> str:
    """`vista score`: a table of users and items as text."""
    with Scorer.open(config.model, config.store, on_missing=config.on_missing) as scorer:
        users: list[Any] = [int(u) for u in config.users] if scorer.store.manifest.user_kind == "int" else list(config.users)
        as_item = int if scorer.model.items.kind == "int" else str
        candidates = [as_item(c) for c in config.candidates]
        lines = [f"task {scorer.task}, generation {scorer.store.generation}"]
        for user in users:
            if candidates:
                scores = scorer.score([user], candidates)[0]
                pairs = list(zip(candidates, scores.tolist(), strict=True))
            else:
                ranking = scorer.rank(user, top_k=config.top_k)
                pairs = list(zip(ranking.items.tolist(), ranking.scores.tolist(), strict=True))
            lines += [f"user {user}: " + ", ".join(f"{item} {score:.4f}" for item, score in pairs)]
        return "\n".join(lines)
