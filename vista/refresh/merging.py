"""Merge stores that one model made on several machines, from different events or users, into one store."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vista.arrays import Int
from vista.config.checks import Precision, StateDtype
from vista.config.store_config import RefreshOptions
from vista.errors import ConfigError, StoreError
from vista.log.event_log import EventLog
from vista.log.histories import Histories, RowFeatures, concatenated
from vista.log.splits import Until
from vista.model.history_states import merge_histories
from vista.model.inference import LogUsers
from vista.model.summarizer import SummaryState
from vista.model.vista_model import VistaModel
from vista.refresh.full import (
    RefreshReport,
    StageClock,
    UserRecords,
    encode_users,
    from_arrays,
    has_states,
    new_manifest,
    read_summaries,
    sums_of_histories,
    to_arrays,
    user_summaries,
    write_generation,
)
from vista.refresh.incremental import digests_of_events
from vista.refresh.log_reading import LogItems, check_log, item_values
from vista.store.backend import Folder, open_backend
from vista.store.keys import user_keys
from vista.store.layout import Shard, check_place, complete_shards, shards_of, store_path
from vista.store.manifest import OF_SEVERAL_LOGS
from vista.store.reader import StoreReader
from vista.store.state_record import UserSummaries
from vista.store.writer import StoreWriter


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
    """A log, and the stores that were refreshed from it: one, or several of different users, such as all shards."""

    log: EventLog
    items: LogItems
    features: LogUsers
    stores: list[StoreReader]

    def check(self, store: StoreReader) -> None:
        """Raise StoreError unless the states of a store cover the whole log."""
        manifest, last = store.manifest, self.log.last_segment
        if manifest.state_spec() is None:
            raise StoreError(f"{store.path}: has no states to merge; refresh it with state=float32")
        if (manifest.applied_segment, manifest.log_digest) != (last, self.log.sources_digest(last)):
            raise StoreError(
                f"{store.path}: covers segment {manifest.applied_segment}, but {self.log.path} ends at segment "
                f"{last}, or is another log; refresh that store first"
            )

    def check_shards(self) -> None:
        """Raise StoreError if one of several shards is missing, although the folder above them is not named."""
        shards = [shard for store in self.stores if (shard := Shard.named(store.path)) is not None]
        for count in {shard.count for shard in shards}:
            if missing := sorted(set(range(count)) - {shard.index for shard in shards if shard.count == count}):
                raise StoreError(
                    f"parts of {self.log.path}: shards {missing} of {count} are missing; name all shards, or the "
                    "folder above them"
                )

    def users(self) -> list[Any]:
        """Ids of all users with events in the log."""
        ids: list[Any] = self.log.users.ids(np.flatnonzero(self.log.lengths)).tolist()
        return ids

    def read(self, model: VistaModel, users: Sequence[Any]) -> dict[Any, _UserState | None]:
        """States of those users who have events in the log; None if none of its stores has the state."""
        kind = str if self.log.users.kind == "str" else int
        own = [user for user in users if isinstance(user, kind)]
        rows = {user: row for user, row in zip(own, self.log.users.rows(own).tolist(), strict=True) if row >= 0}
        read: dict[Any, _UserState | None] = {user: None for user, row in rows.items() if self.log.lengths[row]}
        store_of_user: dict[Any, StoreReader] = {}
        keys, owners = user_keys(users), dict[int, Int]()
        for store in self.stores:
            asked: Sequence[Any] = users
            if (shard := Shard.named(store.path)) is not None:
                if shard.count not in owners:
                    owners[shard.count] = shards_of(keys, shard.count)
                asked = [users[place] for place in np.flatnonzero(owners[shard.count] == shard.index).tolist()]
            found = store.states(asked)
            assert found is not None  # by `check`
            for place, position in enumerate(found[0].tolist()):
                user, state = asked[position], found[1][place : place + 1]
                other = store_of_user.setdefault(user, store)
                if other is not store:
                    raise StoreError(
                        f"user {user!r} is in both {other.path} and {store.path}, which were refreshed from the same "
                        "log, so events would count twice; leave one of the two stores out"
                    )
                history = self.log.slice(rows[user]) if user in read else None
                if history is None or self.items.digests(history)[0] != state.history_digest[0]:
                    raise StoreError(  # because it was refreshed in place since it was opened
                        f"{store.path}: the state of user {user!r} does not cover the events in {self.log.path}; "
                        "refresh that store first, and do not refresh it during the merge"
                    )
                read[user] = _UserState(
                    from_arrays(state, model.device),
                    self.items.model_rows(history),
                    state.history_digest[0],
                    self.features.features(np.array([rows[user]])),
                )
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
    """Combine the states of several stores into one store, as a new generation of `store`.

    If a user is in several stores, the states are added. Only the terms of events at the seams between the parts are
    recomputed, from the logs. An interrupted merge resumes like a full refresh.

    If all parts were refreshed from one log, such as the shards of a store, the result can be refreshed incrementally
    from that log. Otherwise, see `refresh_incremental`.

    Args:
        model: the one whose full or incremental refreshes made the parts.
        parts: pairs of a store and its log. Different logs must hold different events, and stores of one log must
            hold different users. To merge all shards of a store, name the folder above them.
        store: folder of the merged store; it must not be one of the parts.
        options: users_per_batch, verify_log, and shared_with_group; the parts decide the others.
        key: 32 bytes, if the parts' records are authenticated; the merged ones then are too.
        created_at: start of the run in ms, which records state; by default now.

    Returns:
        The report. A user with events in a log but no state in its stores, for example because the summary could not
        be stored, is listed under failures and gets no record.

    Raises:
        ConfigError: there are no parts, or `store` is one of them or sharded; the model has no states, cannot read a
            log, or decays by position although a user is in several parts; or `options` holds what the parts decide.
        LogFormatError: a file of a log is damaged.
        StoreError: a part is not published, lacks a shard, is of another summarizer, keeps no states, or does not cover
            its whole log; two logs share a source or a partition of a topic; or two stores of one log hold the same
            user.
        RecordError: too many users have no state, because a part is missing.
    """
    options = options or RefreshOptions()
    options.require_only(
        ("users_per_batch", "verify_log", "shared_with_group"), "is taken from the stores that are merged; leave it out"
    )
    if not parts:
        raise ConfigError("parts: name the stores to merge, at least one")
    if model.summarizer is None or not has_states(model):
        raise ConfigError("model: has no states to merge; train one with separable mixing and without a history limit")
    check_place(store)
    model.eval()
    with ExitStack() as stack:
        sources = _open_sources(stack, model, parts, options.verify_log, key)
        target = store_path(store).resolve()
        if any(isinstance(part.path, Path) and part.path.resolve() == target for one in sources for part in one.stores):
            raise ConfigError(f"store={store}: is one of the parts, which it would replace; name another folder")
        users = sorted(set().union(*(source.users() for source in sources)), key=lambda user: user_keys([user]))
        first, log = sources[0].stores[0].manifest, sources[0].log
        *_, (_, events_digest) = digests_of_events([source.log for source in sources])
        manifest = new_manifest(
            model,
            StateDtype(first.state_dtype),
            created_at,
            codec=first.codec,
            until=first.until,
            applied_segment=log.last_segment if len(sources) == 1 else OF_SEVERAL_LOGS,
            log_digest=log.sources_digest(log.last_segment) if len(sources) == 1 else events_digest,
            total_users=len(users),
            run_digest=_run_digest(sources),
        )
        encode_batches = partial(_encode_batches, model.with_frozen("summarizer", Precision.float32), sources, users)
        # Several logs number their items differently, so the next refresh from one log says how popular they are.
        rows = sources[0].items.all_rows
        values = partial(item_values, model, log, rows, log.lengths, Until()) if len(sources) == 1 else None
        return write_generation(Path(store), manifest, "merge", encode_batches, values, options=options, key=key)


def _open_sources(
    stack: ExitStack,
    model: VistaModel,
    parts: Sequence[tuple[str | Path, EventLog]],
    verify_log: bool,
    key: bytes | None,
) -> list[_MergeSource]:
    """The stores by log, in the order of the parts."""
    by_log: dict[tuple[int, str], _MergeSource] = {}
    log_of_source: dict[str, EventLog] = {}
    for path, log in parts:
        identity = log.last_segment, log.sources_digest(log.last_segment)
        if identity not in by_log:
            check_log(model, log)
            if verify_log:
                log.verify()
            for events in log.event_sources():
                other = log_of_source.setdefault(events, log)
                if other is not log:
                    raise StoreError(
                        f"{other.path} and {log.path} both contain events of {events}, which would count twice; merge "
                        "only stores whose logs share no source and no partition of a topic"
                    )
            by_log[identity] = _MergeSource(log, LogItems.of(model, log), LogUsers(model.user_features, log), [])
        source = by_log[identity]
        roots: list[str | Path] = [shard.path(path) for shard in complete_shards(path)]
        for root in roots or [path]:
            opened = StoreReader.open(root, summarizer_id=model.summarizer_id(), key=key)
            source.stores.append(stack.enter_context(opened))
            source.check(opened)
    for source in by_log.values():
        source.check_shards()
    return list(by_log.values())


def _run_digest(sources: Sequence[_MergeSource]) -> str:
    """Digest of the records that are merged; a cursor is valid only for a run with the same digest."""
    stores = (store for source in sources for store in source.stores)
    return hashlib.sha256("".join(store.manifest.records_digest for store in stores).encode()).hexdigest()


def _encode_batches(
    model: VistaModel,
    sources: Sequence[_MergeSource],
    all_users: Sequence[Any],
    batches: Iterable[slice],
    writer: StoreWriter,
    clock: StageClock,
) -> Generator[UserRecords, None, None]:
    """The records of slices of the users."""
    target = Folder(store_path(writer.path))
    num_erased = _carry_erasures(sources, target)
    for batch in batches:
        users = all_users[batch]
        with clock.stage("summarize"):
            read = [source.read(model, users) for source in sources]
            is_erased = target.erased_users.erased(user_keys(users))
            remaining = [user for user, gone in zip(users, is_erased, strict=True) if not gone]
            failures = _without_state(sources, read, remaining)
            remaining = [user for user in remaining if user not in failures]
            merged = [_merge_user(model, read, user) for user in remaining]
        with clock.stage("encode"):
            encoded = UserRecords(failures={str(user): reason for user, reason in failures.items()})
            if merged:
                summaries = _summarize(model, user_keys(remaining), merged, writer.manifest.applied_segment)
                encoded.extend(encode_users(summaries, writer.spec, writer.state_spec))
        yield encoded
    _carry_erasures(sources, target, num_erased)  # of users who were erased from a part meanwhile


def _carry_erasures(sources: Sequence[_MergeSource], target: Folder, num_carried: int = 0) -> int:
    """Erase users who were erased from a part, unless these are `num_carried`, like before; returns how many they are.
    They are erased from all generations of the merged store, so that it stops serving them before the merge ends."""
    digests = []
    for store in (store for source in sources for store in source.stores):
        with closing(open_backend(store.path)) as part:
            digests.append(part.erased_users.digests())
    erased = np.unique(np.concatenate(digests))
    if len(erased) > num_carried:
        target.erase_digests(erased)
    return len(erased)


def _without_state(
    sources: Sequence[_MergeSource], read: Sequence[dict[Any, _UserState | None]], users: Sequence[Any]
) -> dict[Any, str]:
    """Which of the users cannot be merged, with the reason."""
    failures = {}
    for source, states in zip(sources, read, strict=True):
        paths = ", ".join(str(store.path) for store in source.stores)
        for user in users:
            if user in states and states[user] is None:
                failures[user] = (
                    f"it has events in {source.log.path}, but no state in {paths}; add the missing stores of that log, "
                    "or refresh its stores in full"
                )
    return failures


def _merge_user(model: VistaModel, parts: Sequence[dict[Any, _UserState | None]], user: Any) -> _UserState:
    held = [found for part in parts if (found := part.get(user)) is not None]
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


def _summarize(
    model: VistaModel, keys: list[bytes], users: Sequence[_UserState], applied_segment: int
) -> UserSummaries:
    names = ("z", "n", "removed", "clock", "num_events")
    sums = sums_of_histories(model, concatenated([user.history for user in users]))
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
        to_arrays(state, applied_segment, digest, sums),
        {name: np.concatenate([user.features.columns[name] for user in users]) for name in names_of_features},
    )
