"""Incremental refresh: update the published generation in place, in time proportional to the new events.

    changed users -> batches -> updated states -> summaries -> records -> one durable transaction per batch

A user's state receives the terms of the events that arrived since the state's `applied_segment`. Terms of events that
came late or were deleted are exchanged. The summary is then read from the state again. Users whose state cannot be
updated are recomputed from the log.
"""

from __future__ import annotations

import time
from pathlib import Path

from vista.arrays import Int
from vista.config.store_config import INCREMENTAL_OPTIONS, SET_BY_FULL_REFRESH, RefreshOptions
from vista.errors import ConfigError, StoreError
from vista.log.event_log import EventLog
from vista.model.vista_model import VistaModel
from vista.refresh.batch_refresher import BatchRefresher
from vista.refresh.log_items import check_log
from vista.refresh.new_generation import user_columns
from vista.refresh.refresh_progress import RefreshProgress
from vista.refresh.refresh_report import RefreshReport
from vista.store.format.keys import user_id, user_keys
from vista.store.manifest import Manifest
from vista.store.remote.store_url import StoreUrl
from vista.store.shards import Shard, shard_to_write
from vista.store.update import StoreUpdate


def refresh_incremental(
    model: VistaModel,
    log: EventLog,
    store: str | Path | StoreUrl,
    *,
    options: RefreshOptions | None = None,
    shard: Shard | None = None,
    key: bytes | None = None,
    created_at: int | None = None,
) -> RefreshReport:
    """Update the published generation for users with new or deleted events.

    The result equals that of a full refresh, within float32 rounding where states are float32. Users without changes
    keep the bytes of their records. Call it again to resume an interrupted run: states and records say what they cover.

    Args:
        model: the one whose full refresh made the store; it is left in eval mode.
        log: the same log, with new segments.
        store: the store's folder or URL.
        options: tokens_per_batch, users_per_batch, verify_log, and progress; the full refresh set the others for good.
        shard: refresh only this shard, in the folder `<store>/part-i-of-n`.
        key: 32 bytes, if the store's records are authenticated.
        created_at: start of the run in ms, which records state; by default now.

    Raises:
        ConfigError: the model cannot read this log; the store was refreshed with `until`; the store is sharded and no
            shard is named; or `options` holds what only a full refresh sets.
        LogFormatError: a file of the log with new events, ids or deletions is damaged.
        StoreError: nothing is published there; the store is of another summarizer, holds other features of users, or
            covers a longer log; or it cannot be written.
    """
    options = options or RefreshOptions()
    options.require_only(INCREMENTAL_OPTIONS, SET_BY_FULL_REFRESH)
    check_log(model, log)
    model.eval()
    target, shard = shard_to_write(store, shard)
    now = time.time_ns() // 1_000_000 if created_at is None else created_at
    with StoreUpdate.open(
        target, summarizer_id=model.summarizer_id(), applied_segment=log.last_segment, created_at=now, key=key
    ) as update:
        check_updatable(update.manifest, target)
        if list(update.manifest.user_layout()) != user_columns(model):
            raise StoreError(
                f"{target}: its records do not hold the features of users that the model reads, or hold others; run a "
                "full refresh with this model"
            )
        _check_same_log(update.manifest, log, target)
        if options.verify_log:
            log.verify(newer_than=update.manifest.applied_segment)
        update.begin(log.sources_digest(log.last_segment))
        users, num_removed = _changed_users(update, log, shard)
        run = RefreshProgress(target, "incremental", len(users), 0, progress=options.progress)
        run.counts["removed"] += num_removed
        refresher = BatchRefresher(model, log, update, options.tokens_per_batch, run)
        for begin in range(0, len(users), options.users_per_batch):
            refresher.refresh(users[begin : begin + options.users_per_batch])
        with run.stage("publish"):
            update.finish()
        return run.report(update.manifest.generation)


def check_updatable(manifest: Manifest, store: Path | StoreUrl) -> None:
    """Raise ConfigError for a store that covers only a part of its log, because it was refreshed with `until`."""
    if manifest.until not in (None, "all"):
        raise ConfigError(
            f"{store}: was refreshed with until={manifest.until} and cannot be updated; run a full refresh instead"
        )


def _check_same_log(manifest: Manifest, log: EventLog, store: Path | StoreUrl) -> None:
    for segment, digest in (
        (manifest.applied_segment, manifest.log_digest),
        (manifest.going_to, manifest.going_to_digest),  # of a run that was interrupted
    ):
        if segment > log.last_segment:
            raise StoreError(
                f"{store}: covers segment {segment}, but {log.path} ends at segment {log.last_segment}; restore the "
                "log, or run a full refresh"
            )
        if digest and log.has_boundary(segment) and log.sources_digest(segment) != digest:
            raise StoreError(
                f"{store}: covers segment {segment}, but that segment of {log.path} was made from other sources; "
                "restore the log, or run a full refresh"
            )


def _changed_users(update: StoreUpdate, log: EventLog, shard: Shard | None) -> tuple[Int, int]:
    """Rows of the users to refresh, and how many users were removed because the log no longer has their ids."""
    changed = log.changed_users(update.manifest.applied_segment)
    has_id = log.users.has_ids(changed)  # A compaction blanks the ids of erased users.
    num_removed = 0 if has_id.all() else _remove_unknown_users(update, log)
    changed = changed[has_id]
    if shard is not None:
        changed = changed[shard.holds(user_keys(log.users.ids(changed)))]
    return changed, num_removed


def _remove_unknown_users(update: StoreUpdate, log: EventLog) -> int:
    count = 0
    for keys in update.key_batches():
        known = log.users.rows([user_id(key) for key in keys]) >= 0
        count += update.remove([key for key, is_known in zip(keys, known.tolist(), strict=True) if not is_known])
    return count
