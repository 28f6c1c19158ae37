"""Erasure of users from a store, for good."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from vista.errors import StoreError, StoreWriteError
from vista.store.keys import user_keys
from vista.store.layout import environment_path, list_generations, published_or_none, store_address
from vista.store.lmdb_environment import WAIT_S
from vista.store.local_generation import GenerationFiles
from vista.store.remote_store import RemoteStore
from vista.store.server_writer import GenerationOnServer
from vista.store.store_url import StoreUrl
from vista.store.tombstones import Tombstones, erasure_lock

logger = logging.getLogger(__name__)


def erase(path: str | Path | StoreUrl, user_ids: Sequence[int] | Sequence[str], *, wait_s: float = WAIT_S) -> int:
    """Erase users: readers miss them at once, and no later refresh of this store brings them back.

    A tombstone is written first. Then their records and states are removed from every generation, including one that is
    being written: erasures wait for a writer only within a batch. Their bytes stay in free pages until the store is
    compacted.

    Args:
        path: the store's folder or URL.
        user_ids: ids as in the log; users without a record will not get one either.
        wait_s: seconds to wait for another erasure, a publication, or a writer's batch to end, in a folder.

    Returns:
        How many of them had a record in the published generation.

    Raises:
        StoreLockedError: another erasure, or a writer within a batch, does not end; call it again.
        StoreError: there is no store, or a generation cannot be opened or written. The tombstones are written; call it
            again, as after a kill. Until then, whatever publishes a generation, an incremental refresh that visits the
            user, or a compaction removes what is left.
    """
    keys = list(dict.fromkeys(user_keys(user_ids)))
    root = store_address(path)
    if isinstance(root, StoreUrl):
        return erase_on_server(root, keys)
    if not root.is_dir() or not list_generations(root):
        raise StoreError(f"{root} is not a store; check the path")
    count = 0
    with erasure_lock(root, wait_s):
        Tombstones(root).add(keys)
        published = published_or_none(root)
        # The published generation first, because that is the one readers see.
        for generation in sorted(list_generations(root), key=lambda number: number != published):
            try:
                files = GenerationFiles.open(root, generation, wait_s=wait_s)
            except StoreError:
                if generation == published:
                    raise
                # Unfinished and still without a manifest, or damaged: its writer sees the tombstone, or starts over.
                logger.warning("%s: gen-%d cannot be opened; its writer will apply the erasure", root, generation)
                continue
            try:
                removed = files.remove(keys)
            except StoreError:
                if generation == published or environment_path(root, generation).exists():
                    raise
                continue  # It was removed by a publication that this erasure waited for.
            finally:
                files.close()
            count = removed if generation == published else count
    return count


_REMOVED_AT_ONCE = 1000


def erase_on_server(url: StoreUrl, keys: Sequence[bytes]) -> int:
    """Erase users as `vista.store.erasure.erase` does; returns how many had a record in the published generation.

    The tombstones come first, so that no later write brings the users back. Writers are not stopped: if a
    writer and an erasure collide, the later one repeats its own atomic change.

    Raises:
        StoreError: there is no store, or the server cannot be used, or did not sync to disk in time. Call this again,
            as after a kill.
    """
    store = RemoteStore.connect(url)
    if not store.numbers():
        raise StoreError(f"{url} holds no store; check the store's name")
    if not keys:
        return 0
    store.tombstones.add(keys)
    # Generations that are created from now on leave the users out; those that were created before are listed now.
    numbers, published, count = store.numbers(), store.published_or_none(), 0
    for number in sorted(numbers, key=lambda number: number != published):  # the one that readers see comes first
        try:
            removed = GenerationOnServer(store, number, None).remove(keys)
        except StoreWriteError:
            if store.server.command("EXISTS", store.names.generation(number).manifest):
                raise
            _remove_remains(store, number, keys)  # of a generation that is being removed, or whose removal was killed
            continue
        count = removed if number == published else count
    store.make_durable()
    return count


def _remove_remains(store: RemoteStore, number: int, keys: Sequence[bytes]) -> None:
    """Remove users from a generation that has no manifest, so that nothing counts them."""
    names = store.names.generation(number)
    for first in range(0, len(keys), _REMOVED_AT_ONCE):
        part = keys[first : first + _REMOVED_AT_ONCE]
        store.server.pipeline([("UNLINK", *names.values(part)), ("ZREM", names.users, *part)])
