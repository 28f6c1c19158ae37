"""Write side of a store: one writer fills a new generation in durable batches and publishes it; resumable."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from vista.errors import StoreError
from vista.store.format.authentication import key_id
from vista.store.format.keys import CURSOR_KEY
from vista.store.lmdb.flock import WAIT_S
from vista.store.lmdb.permissions import GROUP, PRIVATE
from vista.store.manifest import Manifest
from vista.store.remote.store_url import StoreUrl
from vista.store.writable_store import WritableGeneration, WritableStore, lock_for_writing


class StoreWriter:
    """The one writer of a store: fills a new generation in durable batches, resumes it after a kill, publishes it.

    Open it with `StoreWriter.open`. As a context manager it closes on exit, and an unpublished generation stays for the
    next run of the same refresh.
    """

    def __init__(self, store: WritableStore, generation: WritableGeneration, key: bytes | None) -> None:
        self.path = store.path
        self._store = store
        self._generation = generation
        self.manifest = generation.manifest
        self.spec = self.manifest.spec(key)
        """What each record must hold."""
        self.state_spec = self.manifest.state_spec()
        """What each state must hold; None if the generation keeps no states."""
        self._cursor = generation.read_cursor()

    @classmethod
    def open(
        cls,
        path: str | Path | StoreUrl,
        manifest: Manifest,
        *,
        key: bytes | None = None,
        shared_with_group: bool = False,
    ) -> StoreWriter:
        """Resume the unfinished generation with the same identity, or start a new one.

        Args:
            path: the store's folder, made if it does not exist, or its URL.
            manifest: what to write; its `generation` and `key_id` are assigned here. A resumed generation keeps its own
                `created_at`. Two manifests have the same identity if all their fields are equal except `NOT_IDENTITY`.
            key: 32 bytes, to give records codes that only holders of the key can make.
            shared_with_group: let the group of the store's folder read it (folders 2750, files 0640, lock.mdb 0660).

        Raises:
            StoreLockedError: another writer holds the store; the message has its process id if known.
            StoreError: the path cannot be written; the message has the remedy.
        """
        wanted = dataclasses.replace(manifest, key_id=None if key is None else key_id(key))
        store = lock_for_writing(path, GROUP if shared_with_group else PRIVATE)
        try:
            return cls(store, store.start(wanted), key)
        except BaseException:
            store.release()
            raise

    @property
    def generation(self) -> int:
        """Number of the generation being written."""
        return self.manifest.generation

    @property
    def cursor(self) -> int:
        """Users done, in the run's fixed order; 0 in a new generation."""
        return self._cursor

    def put_batch(
        self, keys: Sequence[bytes], records: Sequence[bytes], cursor: int, states: Sequence[bytes] = ()
    ) -> int:
        """Write a batch and the cursor durably: after this returns, a kill or power loss keeps both.

        Args:
            keys: from `vista.store.format.keys.user_keys`.
            records: from `vista.store.format.record.encode_records` with this writer's `spec`, one per key.
            cursor: users done after this batch, including those without a record.
            states: from `encode_states` with `state_spec`, one per key, if the generation keeps states.

        Returns:
            How many records were written: erased users are left out.

        Raises:
            StoreError: nothing was written (disk full, input/output error); the message has the remedy.
        """
        if len(keys) != len(records) or not self._cursor <= cursor <= self.manifest.total_users:
            raise ValueError(
                f"put_batch: got {len(keys)} keys, {len(records)} records and cursor {cursor}, after cursor "
                f"{self._cursor} of {self.manifest.total_users}"
            )
        written = self._generation.put(self._store.erased_users, keys, records, states, {CURSOR_KEY: b"%d" % cursor})
        self._cursor, self.manifest = cursor, self._generation.manifest
        return written

    def publish(self, *, wait_s: float = WAIT_S) -> Manifest:
        """Check every record, publish the generation, and remove all others except the one published before.

        Args:
            wait_s: seconds to wait for an erasure to end.

        Raises:
            StoreWriteError: the disk is full or fails; the generation stays, and the same run can resume.
            StoreLockedError, StoreBusyError: an erasure does not end, or erasures follow one another without a pause;
                the generation stays likewise.
            StoreError: the run is not finished (it can be resumed); or the count, a record or the file's structure is
                wrong (the generation is removed, and CURRENT does not change).
        """
        if self._cursor != self.manifest.total_users:
            raise StoreError(
                f"{self.path}: {self._cursor} of {self.manifest.total_users} users are done; run the refresh again to "
                "resume"
            )
        self.manifest = self._store.publish(self.spec, wait_s)
        return self.manifest

    def close(self) -> None:
        """Close the store; an unpublished generation stays for the next run of the same refresh."""
        self._store.release()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
