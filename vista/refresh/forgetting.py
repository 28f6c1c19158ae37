"""Forgetting of single events, from a log and from the summaries of their users."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vista.log.deletions import forget_events
from vista.log.event_log import EventLog
from vista.model.vista_model import VistaModel
from vista.refresh.incremental import check_updatable, refresh_incremental
from vista.refresh.refresh_report import RefreshReport
from vista.store.reader import published_manifest
from vista.store.shards import shard_to_write


def forget(
    model: VistaModel, log: EventLog, store: str | Path, events: Any, *, key: bytes | None = None
) -> RefreshReport:
    """Delete events from a log and subtract their terms from their users' states.

    A state that would lose too much weight is recomputed from the events that remain. No later refresh brings the
    events back.

    Args:
        model: the one whose refresh made the store.
        log: the events' log; it grows by a segment and is reopened.
        store: the store's folder.
        events: a frame, or a mapping of columns: user, item, timestamp (ms, or the ordinal), and optionally action.
        key: 32 bytes, if the store's records are authenticated.

    Raises:
        DataError: an event is not in the log; nothing is deleted.
        ConfigError: the store is sharded, or was refreshed with `until`; nothing is deleted.
        StoreError: the deletion is in the log, and the next incremental refresh applies it.
    """
    root, _ = shard_to_write(store, None)
    check_updatable(published_manifest(root), root)  # refused before the log is written
    forget_events(log.path, events)
    return refresh_incremental(model, EventLog.open(log.path), store, key=key)
