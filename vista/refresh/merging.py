"""Merge: stores over disjoint events of the same users, made on several machines by one model, become one store."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vista.config.choices import Codec, Precision, StateDtype
from vista.errors import ConfigError, StoreError
from vista.log.event_log import EventLog
from vista.log.histories import Histories
from vista.model.state_updates import merge_histories
from vista.model.summary_state import SummaryState
from vista.model.vista_model import VistaModel
from vista.refresh.encode import (
    Encoded,
    LogItems,
    check_log,
    encode_users,
    from_arrays,
    has_states,
    read_summaries,
    to_arrays,
)
from vista.refresh.refresh_report import RefreshProgress, RefreshReport
from vista.store.format.keys import user_keys
from vista.store.reader import StoreReader
from vista.store.shards import check_place
from vista.store.writer import StoreWriter

MERGED = "merged"
"""`until` of a merged store: no one log is what it has seen, so no incremental refresh goes on from it."""


_Found = tuple[SummaryState, Histories, np.uint64]
"""State, history (items as model rows) and digest of one user."""


@dataclass(frozen=True, slots=True)
class _Part:
    """A store that is merged, and the log that it was refreshed from."""

    store: StoreReader
    log: EventLog
    items: LogItems

    def check(self) -> None:
        """Raise StoreError unless the states are of all that the log holds."""
        manifest, last = self.store.manifest, self.log.last_segment
        if manifest.state_spec() is None:
            raise StoreError(f"{self.store.path}: keeps no states to merge; refresh it with state=float32")
        if (manifest.applied_segment, manifest.log_digest) != (last, self.log.sources_digest(last)):
            raise StoreError(
                f"{self.store.path}: has seen segment {manifest.applied_segment}, but {self.log.path} ends at {last}, "
                "or is another log; refresh that store first"
            )

    def find(self, model: VistaModel, users: Sequence[Any]) -> dict[Any, _Found]:
        """What is known of those of some users who have a record here."""
        states = self.store.states(users)
        assert states is not None  # by `check`
        rows, arrays = states
        with_state = set(rows.tolist())
        without = [user for row, user in enumerate(users) if row not in with_state]
        for user, has_record in zip(without, self.store.get_many(without).found.tolist(), strict=True):
            if has_record:  # an incremental refresh could not store the user's summary
                raise StoreError(f"{self.store.path}: has no state of user {user!r}; refresh that store in full")
        found = {}
        for place, row in enumerate(rows.tolist()):
            user, state = users[row], arrays[place : place + 1]
            history = self.log[user]
            if self.items.digests(history)[0] != state.history_digest[0]:  # refreshed meanwhile, in place
                raise StoreError(
                    f"{self.store.path}: the state of user {user!r} is not of the events that {self.log.path} has; "
                    "refresh that store first, and not while it is merged"
                )
            found[user] = from_arrays(state, model.device), self.items.model_rows(history), state.history_digest[0]
        return found


def merge(
    model: VistaModel,
    parts: Sequence[tuple[str | Path, EventLog]],
    store: str | Path,
    *,
    users_per_batch: int = 512,
    progress: bool = False,
    created_at: int | None = None,
    key: bytes | None = None,
    shared_with_group: bool = False,
) -> RefreshReport:
    """Write the summaries of whole histories from the states of their parts into a new generation of `store`.

    States are added; only the terms of events at the parts' seams are made anew, from the logs. Resumable, like a full
    refresh.

    Args:
        model: whose full or incremental refreshes made the parts.
        parts: (store, its log); a user's events in different logs are disjoint.
        store: folder of the merged store; none of the parts'.
        users_per_batch: users of one durable transaction.
        progress: show a progress bar.
        created_at: ms; by default now.
        key: 32 bytes, where the parts' records are authenticated; the merged ones are then too.
        shared_with_group: let the group of the store's folder read it.

    Raises:
        ConfigError: the model has no states, or decays by position; a log that it cannot read; `store` is divided.
        StoreError: a part is of another summarizer, keeps no states or is not up to date with its log.
    """
    if not has_states(model):
        raise ConfigError("model: has no states to merge (separable mixing without a history limit has)")
    check_place(store)
    model.eval()
    frozen = model.with_frozen("summarizer", Precision.float32)
    config = model.config
    with ExitStack() as stack:
        opened = []
        for path, log in parts:
            check_log(model, log)
            opened_store = stack.enter_context(StoreReader.open(path, summarizer_id=model.summarizer_id(), key=key))
            part = _Part(opened_store, log, LogItems.of(model, log))
            part.check()
            opened.append(part)
        ids: set[Any] = set().union(*(part.store.keys() for part in opened))
        users = sorted(ids, key=lambda user: user_keys([user]))
        first = opened[0].store.manifest
        digest = hashlib.sha256("".join(part.store.manifest.records_digest for part in opened).encode())
        writer = stack.enter_context(
            StoreWriter.open(
                store,
                summarizer_id=model.summarizer_id(),
                num_tokens=config.num_seeds,
                dim=config.dim,
                codec=Codec(first.codec),
                tail_len=config.tail_len,
                until=MERGED,
                state_dtype=StateDtype(first.state_dtype),
                state_shape=first.state_shape,
                total_users=len(users),
                run_digest=digest.hexdigest(),
                created_at=created_at,
                key=key,
                shared_with_group=shared_with_group,
            )
        )
        run = RefreshProgress(store, "merge", len(users), writer.cursor, progress=progress)
        remaining = iter(users[writer.cursor :])
        while batch := list(islice(remaining, users_per_batch)):
            keys = user_keys(batch)
            with run.stage("summarize"):
                found = [part.find(frozen, batch) for part in opened]
                whole = [_merged(frozen, found, user) for user in batch]
            with run.stage("encode"):
                encoded, num_events = _encoded(frozen, writer, keys, whole, run)
            run.check_failures()
            with run.stage("write"):
                cursor = writer.cursor + len(batch)
                written = writer.put_batch(encoded.keys, encoded.records, cursor, encoded.states)
            run.counts["written"] += written
            run.counts["erased"] += len(encoded.keys) - written
            run.batch(writer.generation, len(batch), num_events)
        with run.stage("publish"):
            writer.publish()
        return run.report(store, writer.generation)


def _merged(model: VistaModel, parts: Sequence[dict[Any, _Found]], user: Any) -> _Found:
    found = [part[user] for part in parts if user in part]
    if not found:
        raise StoreError(f"user {user!r} was erased from all parts while they were merged; merge them again")
    if len(found) == 1:
        return found[0]
    state, whole = merge_histories(model, [one[0] for one in found], [one[1] for one in found])
    return state, whole, np.add.reduce(np.array([one[2] for one in found], np.uint64))


def _encoded(
    model: VistaModel,
    writer: StoreWriter,
    keys: list[bytes],
    whole: Sequence[_Found],
    run: RefreshProgress,
) -> tuple[Encoded, int]:
    """A batch, and how many events it stands for."""
    names = ("z", "n", "removed", "clock", "num_events")
    state = SummaryState(*(torch.cat([getattr(one[0], name) for one in whole]) for name in names))
    digest = np.array([one[2] for one in whole], np.uint64)
    tail_len = model.config.tail_len
    newest = _end_to_end([one[1].slice(0, max(one[1].num_events - tail_len, 0)) for one in whole])
    encoded = encode_users(
        keys,
        read_summaries(model, state),
        newest,
        state.num_events.cpu().numpy(),
        digest,
        to_arrays(state, writer.manifest.applied_segment, digest),
        tail_len=tail_len,
        spec=writer.spec,
        state_spec=writer.state_spec,
        run=run,
    )
    return encoded, int(state.num_events.sum())


def _end_to_end(histories: Sequence[Histories]) -> Histories:
    def column(name: str) -> NDArray[Any]:
        return np.concatenate([np.asarray(getattr(history, name)) for history in histories])

    offsets = np.concatenate([[0], np.cumsum([history.num_events for history in histories])]).astype(np.int64)
    return Histories(column("item"), column("timestamp"), column("action"), None, offsets)
