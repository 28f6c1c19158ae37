"""Erasure of users from a store, for good."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from vista.errors import StoreError
from vista.store.format.keys import user_keys
from vista.store.generation_files import GenerationFiles
from vista.store.layout import environment_path, list_generations, published_or_none, store_address
from vista.store.lmdb.flock import WAIT_S
from vista.store.locks import erasure_lock
from vista.store.remote.store_url import StoreUrl
from vista.store.tombstones import Tombstones

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
        from vista.store.remote.remote_erasure import erase_on_server

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
