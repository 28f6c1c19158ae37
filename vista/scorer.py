"""The scorer: what ranking code calls. Its cost does not depend on how long a user's history is.

    scorer = Scorer.open("runs/ml-1m/best", "stores/ml-1m")
    scores = scorer.score(users, candidates)

Letters: B users, C candidates, V items of the vocabulary, L tail length, M model dim.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vista.choices import OnMissing
from vista.config import ScoreConfig
from vista.data.vocabulary import Ids
from vista.device import cpu_settings, resolve_device
from vista.errors import ConfigError, StoreError, UnknownItemError, UnknownUserError
from vista.model import inference
from vista.model.ranking_model import NEXT_TASK, UNKNOWN_ITEM
from vista.model.recommender import Recommender
from vista.model.target_attention import Context
from vista.requests import check_times, ids_of, pad_ragged, request_times, split_ragged, typed_ids
from vista.store.authentication import read_key
from vista.store.batches import StoredBatch, Tail
from vista.store.lmdb_store import SummaryStore
from vista.store.parts import StoreParts, open_store
from vista.tails import checked_tail, merge_tails

logger = logging.getLogger(__name__)
Int = NDArray[np.int64]
PAIRS_PER_PASS = 65_536
"""Users times candidates of one forward pass: bounds memory, whatever is asked for."""

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
    """Candidates left out: unknown to the model, or of a score that is not finite."""


@dataclass(frozen=True, slots=True)
class _Request:
    """The context of B users and what their time is."""

    context: Context
    gap: Tensor | None
    tail: inference.PaddedTail
    missing: NDArray[np.bool_]


class Scorer:
    """Scores candidates for users from their stored summaries and tails. Open one a process with `Scorer.open`."""

    def __init__(
        self,
        model: Recommender,
        store: SummaryStore | StoreParts,
        on_missing: OnMissing,
        task: str | None,
        max_age_s: float | None = None,
    ) -> None:
        self.model = model
        self.store = store
        self.on_missing = on_missing
        self.max_age_s = max_age_s
        self.tasks = [*model.schema.tasks, *([NEXT_TASK] if model.has_retrieval else [])]
        """What `predict` gives; `next` is the retrieval head."""
        self.task = task or self.tasks[0]
        if self.task not in self.tasks:
            raise ValueError(f"task: {self.task!r} is none of this model's {self.tasks}")
        # Row by row as the model's item table; the unknown item is at right angles to every user.
        vectors = inference.item_vectors(model)
        self._vectors = torch.cat([torch.zeros_like(vectors[:1]), vectors])
        self._empty = inference.empty_summary(model)

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

        Raises:
            SummarizerMismatchError: the store is of another summarizer.
            StoreError, CheckpointError: missing or damaged; the message has the remedy.
            ValueError: on_missing or task is none of those that there are; max_age_s is not positive.
        """
        policies = {policy.value for policy in OnMissing}
        if not isinstance(on_missing, OnMissing) and on_missing not in policies:
            raise ValueError(f"on_missing: {on_missing!r} is none of {sorted(policies)}")
        if max_age_s is not None and not max_age_s > 0:
            raise ValueError(f"max_age_s: must be above 0 seconds, got {max_age_s}")
        model = model if isinstance(model, Recommender) else Recommender.from_pretrained(model, resolve_device(device))
        opened = open_store(store, summarizer_id=model.summarizer_id(), key=key)
        try:
            _require_tails(opened, model)
            return cls(model.eval(), opened, OnMissing(on_missing), task, max_age_s)
        except BaseException:
            opened.close()
            raise

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
        """Follow the store to a new generation, between two calls; whether there was one.

        Raises:
            StoreError: as `SummaryStore.reload`; or its tails are shorter than this model reads.
        """
        changed = self.store.reload()
        _require_tails(self.store, self.model)
        return changed

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
        """The best items of a user; those whose score is not finite, and unknown candidates, are left out and counted.

        Args:
            user: an id as in the log.
            top_k: items to return at most.
            candidates: item ids, or None for the whole catalogue.
            exclude: item ids that must not come.
            exclude_tail: leave out the items of the user's tail.
            tail, now: as in `predict`.
        """
        if top_k < 1:
            raise ValueError(f"top_k: must be at least 1, got {top_k}")
        request = self._request([user], tail, now)
        wanted, num_unknown = np.full(len(self.model.items) + 1, candidates is None), 0
        if candidates is not None:
            chosen = self.encode(candidates).rows
            num_unknown = int((chosen == UNKNOWN_ITEM).sum())
            wanted[chosen] = True
        wanted[UNKNOWN_ITEM] = False
        wanted[self.model.item_rows(ids_of(exclude, "exclude"))] = False
        if exclude_tail:
            wanted[request.tail.item[request.tail.valid]] = False
        rows = np.flatnonzero(wanted)
        scores = self._task_scores(request, torch.from_numpy(rows), [self.task])[self.task][0].numpy()
        finite = np.isfinite(scores)
        rows, scores = rows[finite], scores[finite]
        best = torch.from_numpy(scores).topk(min(top_k, len(scores))).indices.numpy()
        return Ranking(self.model.items.ids(rows[best] - 1), scores[best], num_unknown + int((~finite).sum()))

    def encode(self, candidates: Any) -> CandidateSet:
        """Look item ids up once, to score them many times: ids [C] or [B, C]."""
        if isinstance(candidates, CandidateSet):
            return candidates
        try:
            ids = np.asarray(candidates.cpu() if isinstance(candidates, Tensor) else candidates)
        except ValueError:
            raise ValueError("candidates: rows of different lengths; pass (values, offsets) instead") from None
        if ids.ndim not in (1, 2):
            raise ValueError(f"candidates: needs [C] or [B, C], got shape {ids.shape}")
        rows = self.model.item_rows(ids.ravel()).reshape(ids.shape)
        if self.on_missing is OnMissing.error and (rows == UNKNOWN_ITEM).any():
            unknown = ids[rows == UNKNOWN_ITEM][:5].tolist()
            raise UnknownItemError(
                f"candidates: items {unknown} are not in the model's vocabulary; train on a newer log"
            )
        return CandidateSet(rows)

    def user_vectors(self, users: Ids, *, tail: Tail | None = None, now: Any = None) -> NDArray[np.float32]:
        """Unit vectors of the retrieval head, float32 [B, M]; their products with `item_vectors` rank the catalogue.

        Raises:
            ValueError: the model was trained without a retrieval head; others as `predict`.
        """
        if not self.model.has_retrieval:
            raise ValueError("this model has no retrieval head; train it with optim.next_weight above 0")
        request = self._request(users, tail, now)
        vectors = inference.user_vectors(self.model, request.context, request.gap).float().cpu().numpy()
        if self.on_missing is OnMissing.nan:
            vectors[request.missing] = np.nan
        return vectors

    def item_vectors(self) -> tuple[NDArray[Any], NDArray[np.float32]]:
        """(ids [V], unit vectors float32 [V, M]) of the vocabulary, for a nearest-neighbour index."""
        vectors = self._vectors[1:].float().cpu().numpy().copy()
        return self.model.items.ids(np.arange(len(self.model.items))), vectors

    # Inside ----------------------------------------------------------------------------------------------------------

    def _predict(self, users: Ids, candidates: Any, tail: Tail | None, now: Any, tasks: list[str]) -> dict[str, Any]:
        request = self._request(users, tail, now)
        num_users = len(request.missing)
        values, offsets = split_ragged(candidates)
        rows = self.encode(values).rows
        filled = None
        if offsets is not None:
            rows, filled = pad_ragged(rows, offsets, num_users)
        if rows.ndim == 2 and len(rows) != num_users:
            raise ValueError(f"candidates: {rows.shape} do not fit {num_users} users; give [C], or one row a user")
        scores = self._task_scores(request, torch.from_numpy(rows), tasks)
        if filled is not None:
            scores = {task: cells[torch.from_numpy(filled)] for task, cells in scores.items()}
        if isinstance(values, Tensor):
            return {task: cells.to(values.device) for task, cells in scores.items()}
        return {task: cells.numpy() for task, cells in scores.items()}

    def _task_scores(self, request: _Request, rows: Tensor, tasks: list[str]) -> dict[str, Tensor]:
        """{task: float32 [B, C] on the CPU} of model rows int64 [C] (the same for every user) or [B, C]."""
        model, num_users = self.model, len(request.missing)
        labelled = [task for task in tasks if task != NEXT_TASK]
        users = None
        if NEXT_TASK in tasks:
            users = inference.user_vectors(model, request.context, request.gap) / model.config.temperature
        parts: dict[str, list[Tensor]] = {task: [] for task in tasks}
        for part in torch.split(rows, max(1, PAIRS_PER_PASS // max(num_users, 1)), dim=-1):
            on_device = part.to(model.device)
            if labelled:
                grid = on_device.expand(num_users, -1)
                logits = inference.candidate_logits(model, request.context, request.gap, grid)
                probability = logits.float().sigmoid().cpu()
                for task in labelled:
                    parts[task].append(probability[..., model.schema.tasks.index(task)])
            if users is not None:
                vectors = self._vectors[on_device]
                cosine = users @ vectors.t() if part.ndim == 1 else (vectors @ users.unsqueeze(-1)).squeeze(-1)
                parts[NEXT_TASK].append(cosine.float().cpu())
        scores = {task: torch.cat(cells, dim=1) for task, cells in parts.items()}
        if self.on_missing is OnMissing.nan:
            unknown = torch.from_numpy(request.missing)[:, None] | (rows == UNKNOWN_ITEM)
            scores = {task: cells.masked_fill(unknown, float("nan")) for task, cells in scores.items()}
        return scores

    def _request(self, users: Ids, tail: Tail | None, now: Any) -> _Request:
        ids = ids_of(users, "users")
        stored = self.store.get_many(ids)
        if self.max_age_s is not None:
            now_ms, max_age_ms = time.time_ns() // 1_000_000, int(1000 * self.max_age_s)
            stored = stored.without(stored.expired(now_ms, self.store.manifest.refreshed_at, max_age_ms))
        missing = ~stored.found
        if self.on_missing is OnMissing.error and missing.any():
            absent = np.asarray(ids)[missing][:5].tolist()
            raise UnknownUserError(
                f"users {absent} have no record in {self.store.path}; refresh it, or on_missing='empty'"
            )
        times = request_times(now, len(missing))
        if times is not None:
            self._check_times("now", times, stored)
        merged = stored.tail if tail is None else self._merge(stored, tail, len(missing))
        padded = inference.pad_tail(self.model, merged.items, merged.times, merged.actions, merged.offsets)
        summary = torch.from_numpy(stored.summary).to(self.model.device)
        if missing.any():
            summary[torch.from_numpy(missing).to(summary.device)] = self._empty
        context = inference.request_context(self.model, summary, padded)
        gap = inference.request_gap(self.model, times, padded)
        return _Request(context, gap, padded, missing)

    def _merge(self, stored: StoredBatch, tail: Tail, num_users: int) -> Tail:
        checked = checked_tail(tail, num_users, len(self.model.schema.actions))
        try:
            rows = self.model.item_rows(checked.items)
        except TypeError as error:
            raise TypeError(f"tail.items: {error}") from None
        self._check_times("tail.times", checked.times, stored)
        fresh = Tail(rows.astype(np.int32), checked.times, checked.actions, checked.offsets)
        return merge_tails(stored.tail, fresh, self.model.config.tail_len)

    def _check_times(self, name: str, times: NDArray[np.int64], stored: StoredBatch) -> None:
        if self.model.schema.has_time:
            check_times(name, times, int(stored.last_event_ts.max(initial=0)))


def _require_tails(store: SummaryStore | StoreParts, model: Recommender) -> None:
    if store.manifest.tail_len < model.config.tail_len:
        raise StoreError(
            f"{store.path} holds tails of {store.manifest.tail_len} events, the model reads {model.config.tail_len}; "
            "refresh it with this model"
        )


def score_from_config(config: ScoreConfig) -> str:
    """`vista score`: a table of users and items as text.

    Raises:
        ConfigError: no user is named, or an id is text where the store's or the model's are integers.
    """
    if not config.users:
        raise ConfigError("users: name at least one, such as users=[1,2]")
    with (
        cpu_settings(config.num_threads),
        Scorer.open(
            config.model,
            config.store,
            on_missing=config.on_missing,
            device=config.device,
            key=read_key(config.authentication_key_file),
        ) as scorer,
    ):
        users = typed_ids(config.users, "users", scorer.store.manifest.user_kind)
        candidates = typed_ids(config.candidates, "candidates", scorer.model.items.kind)
        lines = [f"task {scorer.task}, generation {scorer.store.generation}"]
        found = scorer.store.get_many(users).found.tolist()
        known = (scorer.model.item_rows(candidates) != UNKNOWN_ITEM).tolist() if candidates else []
        items = [str(item) if known[i] else f"{item} (unknown)" for i, item in enumerate(candidates)]
        for user, has_record in zip(users, found, strict=True):
            if candidates:
                pairs = zip(items, scorer.score([user], candidates)[0].tolist(), strict=True)
            else:
                ranking = scorer.rank(user, top_k=config.top_k)
                pairs = zip(ranking.items.tolist(), ranking.scores.tolist(), strict=True)
            name = f"user {user}" if has_record else f"user {user} (no record)"
            lines += [f"{name}: " + ", ".join(f"{item} {score:.4f}" for item, score in pairs)]
        return "\n".join(lines)
