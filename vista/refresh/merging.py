"""Merge: combine stores of the same users over disjoint events, made by one model on several machines, into one."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vista.config.checks import Precision, StateDtype
from vista.config.store_config import RefreshOptions
from vista.errors import ConfigError, StoreError
from vista.log.event_log import EventLog
from vista.log.histories import Histories, RowFeatures, concatenated
from vista.model.history_states import merge_histories
from vista.model.inference import LogUsers
from vista.model.summarizer import SummaryState
from vista.model.vista_model import VistaModel
from vista.refresh.full import (
    LogItems,
    RefreshReport,
    StageClock,
    UserRecords,
    check_log,
    count_histories,
    encode_users,
    from_arrays,
    has_states,
    new_manifest,
    read_summaries,
    to_arrays,
    user_summaries,
    write_generation,
)
from vista.store.keys import user_keys
from vista.store.layout import check_place
from vista.store.reader import StoreReader
from vista.store.state_record import UserSummaries
from vista.store.writer import StoreWriter

MERGED = "merged"
"""`until` of a merged store: it covers several logs, so no incremental refresh can update it."""


@dataclass(frozen=True, slots=True)
class _UserState:
    """State, history and history digest of one user."""

    state: SummaryState
    history: Histories
    """B = 1, with items as rows of the model."""
    digest: np.uint64
    features: RowFeatures
    """One row, with the model's codes."""


@dataclass(frozen=True, slots=True)
class _MergeSource:
    """A store to merge, and the log that it was refreshed from."""

    store: StoreReader
    log: EventLog
    items: LogItems
    features: LogUsers

    def check(self) -> None:
        """Raise StoreError unless the states cover the whole log."""
        manifest, last = self.store.manifest, self.log.last_segment
        if manifest.state_spec() is None:
            raise StoreError(f"{self.store.path}: has no states to merge; refresh it with state=float32")
        if (manifest.applied_segment, manifest.log_digest) != (last, self.log.sources_digest(last)):
            raise StoreError(
                f"{self.store.path}: covers segment {manifest.applied_segment}, but {self.log.path} ends at segment "
                f"{last}, or is another log; refresh that store first"
            )

    def read(self, model: VistaModel, users: Sequence[Any]) -> dict[Any, _UserState]:
        """States of those users who have a record in this store."""
        states = self.store.states(users)
        assert states is not None  # by `check`
        rows, arrays = states
        with_state = set(rows.tolist())
        without = [user for row, user in enumerate(users) if row not in with_state]
        for user, has_record in zip(without, self.store.get_many(without).found.tolist(), strict=True):
            if has_record:  # An incremental refresh could not store the user's summary.
                raise StoreError(f"{self.store.path}: has no state of user {user!r}; refresh that store in full")
        read = {}
        for place, row in enumerate(rows.tolist()):
            user, state = users[row], arrays[place : place + 1]
            history, digest = self.log[user], state.history_digest[0]
            if self.items.digests(history)[0] != digest:  # refreshed in place since it was opened
                raise StoreError(
                    f"{self.store.path}: the state of user {user!r} does not cover the events in {self.log.path}; "
                    "refresh that store first, and do not refresh it during the merge"
                )
            features = self.features.features(self.log.users.rows([user]))
            read[user] = _UserState(from_arrays(state, model.device), self.items.model_rows(history), digest, features)
        return read


def merge(
    model: VistaModel,
    parts: Sequence[tuple[str | Path, EventLog]],
    store: str | Path,
    *,
    options: RefreshOptions | None = None,
    key: bytes | None = None,
    created_at: int | None = None,
) -> RefreshReport:
    """Combine the states of several stores into summaries of the whole histories, as a new generation of `store`.

    States are added. Only the terms of events at the seams between the parts are recomputed, from the logs. An
    interrupted merge resumes like a full refresh.

    Args:
        model: the one whose full or incremental refreshes made the parts.
        parts: (store, its log); a user's events in different logs are disjoint.
        store: folder of the merged store; it must not be one of the parts.
        options: users_per_batch, verify_log, and shared_with_group; the parts decide the others.
        key: 32 bytes, if the parts' records are authenticated; the merged ones then are too.
        created_at: start of the run in ms, which records state; by default now.

    Raises:
        ConfigError: the model has no states, decays by position or cannot read a log; `store` is sharded; or `options`
            holds what the parts decide.
        LogFormatError: a file of a log is damaged.
        StoreError: a part is of another summarizer, keeps no states or does not cover its whole log.
    """
    options = options or RefreshOptions()
    options.require_only(
        ("users_per_batch", "verify_log", "shared_with_group"),
        "is taken from the stores that are merged; leave it out",
    )
    if model.summarizer is None or not has_states(model):
        raise ConfigError("model: has no states to merge; train one with separable mixing and without a history limit")
    check_place(store)
    model.eval()
    with ExitStack() as stack:
        sources = [_open_source(stack, model, path, log, options.verify_log, key) for path, log in parts]
        ids: set[Any] = set().union(*(source.store.keys() for source in sources))
        users = sorted(ids, key=lambda user: user_keys([user]))
        first = sources[0].store.manifest
        manifest = new_manifest(
            model,
            StateDtype(first.state_dtype),
            created_at,
            codec=first.codec,
            until=MERGED,
            applied_segment=0,
            log_digest="",
            total_users=len(users),
            run_digest=_run_digest(sources),
        )
        encode_batches = partial(_encode_batches, model.with_frozen("summarizer", Precision.float32), sources, users)
        return write_generation(Path(store), manifest, "merge", encode_batches, options=options, key=key)


def _open_source(
    stack: ExitStack, model: VistaModel, path: str | Path, log: EventLog, verify_log: bool, key: bytes | None
) -> _MergeSource:
    check_log(model, log)
    if verify_log:
        log.verify()
    store = stack.enter_context(StoreReader.open(path, summarizer_id=model.summarizer_id(), key=key))
    source = _MergeSource(store, log, LogItems.of(model, log), LogUsers(model.user_features, log))
    source.check()
    return source


def _run_digest(sources: Sequence[_MergeSource]) -> str:
    """Digest of the records that are merged; a cursor is valid only for a run with the same digest."""
    return hashlib.sha256("".join(source.store.manifest.records_digest for source in sources).encode()).hexdigest()


def _encode_batches(
    model: VistaModel,
    sources: Sequence[_MergeSource],
    all_users: Sequence[Any],
    batches: Iterable[slice],
    writer: StoreWriter,
    clock: StageClock,
) -> Generator[UserRecords, None, None]:
    """The records of slices of the users."""
    for batch in batches:
        users = all_users[batch]
        with clock.stage("summarize"):
            read = [source.read(model, users) for source in sources]
            merged = [_merge_user(model, read, user) for user in users]
        with clock.stage("encode"):
            encoded = encode_users(_summarize(model, user_keys(users), merged), writer.spec, writer.state_spec)
        yield encoded


def _merge_user(model: VistaModel, parts: Sequence[dict[Any, _UserState]], user: Any) -> _UserState:
    held = [part[user] for part in parts if user in part]
    if not held:
        raise StoreError(f"user {user!r} was erased from all parts during the merge; run the merge again")
    if len(held) == 1:
        return held[0]
    state, history = merge_histories(model, [one.state for one in held], [one.history for one in held])
    digest = np.add.reduce(np.array([one.digest for one in held], np.uint64))
    return _UserState(state, history, digest, _newest_features([one.features for one in held]))


def _newest_features(logs: Sequence[RowFeatures]) -> RowFeatures:
    """A user's features from several logs: in each column, that of the last log with a value."""
    newest = dict(logs[0].columns)
    for features in logs[1:]:
        for name, column in features.columns.items():
            is_missing = np.isnan(column) if column.dtype.kind == "f" else column < 0
            newest[name] = np.where(is_missing, newest[name], column)
    return RowFeatures(newest)


def _summarize(model: VistaModel, keys: list[bytes], users: Sequence[_UserState]) -> UserSummaries:
    names = ("z", "n", "removed", "clock", "num_events")
    tables = count_histories(model.item_keys, concatenated([user.history for user in users]))
    state = SummaryState(*(torch.cat([getattr(user.state, name) for user in users]) for name in names))
    digest = np.array([user.digest for user in users], np.uint64)
    tail_len, names_of_features = model.config.tail_len, users[0].features.columns
    newest = concatenated([user.history.slice(0, max(user.history.num_events - tail_len, 0)) for user in users])
    return user_summaries(
        model,
        keys,
        newest,
        np.array([user.history.num_events for user in users], np.int64),
        read_summaries(model, state),
        to_arrays(state, 0, digest, tables),
        {name: np.concatenate([user.features.columns[name] for user in users]) for name in names_of_features},
    )
