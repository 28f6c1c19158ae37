"""Compaction of a store: rewrite the published generation without the bytes of records that were removed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from vista.store.admin.folder_store import FolderStore
from vista.store.admin.generation_builder import GenerationBuilder, restamp_records
from vista.store.admin.generation_reader import GenerationReader, open_generation
from vista.store.admin.publish_report import PublishReport
from vista.store.format.state_record import restamp_states
from vista.store.layout import (
    environments_of,
    generation_path,
    next_number,
    read_current,
    remove_store_leftovers,
    store_path,
)
from vista.store.lmdb.data_file import check_structure
from vista.store.lmdb.permissions import permissions_of
from vista.store.locks import locked
from vista.store.manifest import Manifest
from vista.store.publication import publish_generation
from vista.store.remote.store_url import StoreUrl
from vista.store.tombstones import Tombstones


def compact_store(root: str | Path | StoreUrl, *, key: bytes | None = None) -> PublishReport:
    """Rewrite the published generation under the next number without free pages, publish it, and remove all others.

    Afterwards no file holds bytes of records that were removed before, because pages in use are the only ones copied.
    Bytes of users who are erased during the compaction may remain until the next one. What the file system or the disk
    keeps of deleted files is beyond this function, and readers that have not reloaded still hold the old files.

    Args:
        root: the store's folder.
        key: 32 bytes, if the store's records are authenticated.

    Raises:
        StoreLockedError: another process writes the store.
        StoreError: nothing is published, it is damaged, or the folder cannot be written. The published generation is
            unchanged.
    """
    root = store_path(root)
    read_current(root)  # first, so that no lock file is made in a folder that is not a store
    with locked(root):
        current = read_current(root)
        remove_store_leftovers(root)
        for environment in environments_of(root, current):
            check_structure(environment)
        with open_generation(root, current, key) as source:
            manifest = _compacted(root, source, key)
        publish_generation(root, manifest.generation, ())
    return PublishReport(root, manifest.generation, manifest.count, FolderStore(root).size_bytes(manifest.generation))


def _compacted(root: Path, source: GenerationReader, key: bytes | None) -> Manifest:
    """Build a complete generation with the next number from the records and states of the source."""
    wanted = dataclasses.replace(source.manifest, generation=next_number(root))
    permissions = permissions_of(generation_path(root, source.manifest.generation))
    builder = GenerationBuilder(root, wanted, key, permissions)
    try:
        tombstones = Tombstones(root)  # An interrupted erasure may have left some of its users.
        for keys, records in source.batches():
            keys, records = _without_erased(tombstones, keys, records)
            builder.put(keys, restamp_records(keys, records, builder.spec))
        for keys, states in source.state_batches():
            keys, states = _without_erased(tombstones, keys, states)
            builder.put_states(keys, restamp_states(states, wanted.generation))
        return builder.finish()
    except BaseException:
        builder.discard()
        raise


def _without_erased(tombstones: Tombstones, keys: list[bytes], values: list[bytes]) -> tuple[list[bytes], list[bytes]]:
    remaining = [place for place, erased in enumerate(tombstones.erased(keys)) if not erased]
    return [keys[place] for place in remaining], [values[place] for place in remaining]
