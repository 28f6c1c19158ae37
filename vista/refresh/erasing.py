"""Erasure and forgetting across log and store, so that neither brings back what the other has lost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vista.config import StoreEraseConfig
from vista.errors import ConfigError
from vista.log.deletions import erase_users, forget_events, rows_to_erase
from vista.log.event_log import EventLog
from vista.log.vocabulary import ids_of_words
from vista.model.vista_model import VistaModel
from vista.refresh.incremental import check_goes_on, refresh_incremental
from vista.refresh.refresh_report import RefreshReport
from vista.store.shards import divide, shard_to_write, user_kind
from vista.store.updates import erase, served_manifest


def forget(
    model: VistaModel, log: EventLog, store: str | Path, events: Any, *, key: bytes | None = None
) -> RefreshReport:
    """Forget events: deletion rows in the log, then their terms leave the states of their users, by subtraction.

    A state that lost too much weight is recomputed from what remains. No later refresh brings the events back.

    Args:
        model: whose refresh made the store.
        log: the events' log; it is reopened, since it grows by a segment.
        store: its folder.
        events: a frame, or a mapping of columns: user, item, timestamp (ms, or the ordinal), and action on wish.
        key: 32 bytes, where the store's records are authenticated.

    Raises:
        DataError: an event is not in the log; nothing is forgotten then.
        ConfigError: the store is divided, or was refreshed with `until`; nothing is forgotten then.
        StoreError: the log has the deletion rows, and the next incremental refresh obeys them.
    """
    root, _ = shard_to_write(store, None)
    check_goes_on(served_manifest(root), root)  # refused before the log is written
    forget_events(log.path, events)
    return refresh_incremental(model, EventLog.open(log.path), store, key=key)


def erase_from_config(config: StoreEraseConfig) -> str:
    """`vista store erase`: from the store, of a divided one each from its part, and from the log if one is named."""
    if not config.users:
        raise ConfigError("users: name at least one, such as users=[101]")
    users: Sequence[Any] = ids_of_words(config.users, "users", user_kind(config.store))
    if config.data is not None:
        rows_to_erase(EventLog.open(config.data), users)  # What the log would refuse must not be gone from the store.
    count = sum(erase(root, own) for root, own in divide(config.store, users))
    lines = [
        f"{config.store}: {count} of {len(users)} users had a record; readers miss them from now on. Their bytes are "
        f"in free pages until `vista store compact store={config.store}`"
    ]
    if count < len(users):
        lines.append(
            f"No refresh will write any of the {len(users)}: check the ids, of which {len(users) - count} had none"
        )
    if config.data is not None:
        lines.append(str(erase_users(config.data, users)))
    return "\n".join(lines)
