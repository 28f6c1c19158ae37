"""Write side of a store: fill a new generation and publish it, update the published one, erase users."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vista.errors import StoreError, SummarizerMismatchError
from vista.store.backend import open_backend
from vista.store.folder_files import WAIT_S
from vista.store.item_values import ItemValues
from vista.store.keys import CURSOR_KEY, user_keys
from vista.store.layout import GROUP, PRIVATE, StoreUrl
from vista.store.manifest import Manifest
from vista.store.record import HEADER, HEADER_BYTES, user_of
from vista.store.record_encoding import key_id

if TYPE_CHECKING:
    from vista.store.backend import GenerationWriter, StoreBackend


logger = logging.getLogger(__name__)


class StoreWriter:
    """The one writer of a store: fills a new generation in durable batches, resumes it after a kill, publishes it.

    Open it with `StoreWriter.open`. As a context manager it closes on exit, and an unpublished generation stays for the
    next run of the same refresh.
    """

    def __init__(self, store: StoreBackend, generation: GenerationWriter, key: bytes | None) -> None:
        self.path = store.address
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
        store = open_backend(path)
        store.lock(GROUP if shared_with_group else PRIVATE)
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
            keys: from `vista.store.keys.user_keys`.
            records: from `vista.store.record_encoding.encode_records` with this writer's `spec`, one per key.
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
        written = self._generation.put(keys, records, states, {CURSOR_KEY: b"%d" % cursor})
        self._cursor, self.manifest = cursor, self._generation.manifest
        return written

    def put_items(self, value: bytes) -> None:
        """Put the values of items of the generation durably (`ItemValues.to_bytes`); errors as of `put_batch`."""
        self._generation.put_items(value)

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
        self.manifest = self._store.publish_written(self.spec, wait_s)
        return self.manifest

    def close(self) -> None:
        """Close the store; an unpublished generation stays for the next run of the same refresh."""
        self._store.release()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class StoreUpdate:
    """The one writer of a store: adds, replaces and removes records of the published generation in durable batches.

    Readers see each batch once it is committed. A kill loses no committed batch, and `applied_segments` tells which
    users of a run are done.
    """

    def __init__(
        self, store: StoreBackend, writer: GenerationWriter, created_at: int, applied_segment: int, key: bytes | None
    ) -> None:
        self.path = store.address
        self._store = store
        self.writer = writer
        """The published generation, which also reads and removes what is stored."""
        self.created_at = created_at
        """Start of the run, ms."""
        self.applied_segment = applied_segment
        """Newest segment of the log that new records cover."""
        manifest = writer.manifest
        self.spec = dataclasses.replace(manifest.spec(key), created_at=created_at, applied_segment=applied_segment)
        """What each new record must hold."""
        state_spec = manifest.state_spec()
        self.state_spec = None if state_spec is None else dataclasses.replace(state_spec, created_at=created_at)
        """What each new state must hold; None if the generation keeps no states."""

    @classmethod
    def open(
        cls,
        path: str | Path | StoreUrl,
        *,
        summarizer_id: bytes,
        applied_segment: int,
        created_at: int,
        key: bytes | None = None,
    ) -> StoreUpdate:
        """Open the published generation for writing.

        Args:
            path: the store's folder or URL.
            summarizer_id: of the model, 32 bytes.
            applied_segment: newest segment of the log that the new records will cover.
            created_at: start of the run, ms.
            key: 32 bytes, if the store's records are authenticated.

        Raises:
            StoreLockedError: another writer holds the store.
            SummarizerMismatchError: the generation is of another summarizer.
            StoreError: nothing is published there, its states are missing, or it cannot be written.
        """
        store = open_backend(path)
        store.current()  # raises before anything is locked if nothing is published
        store.lock()
        try:
            generation = store.published()
            if generation.manifest.summarizer_id != summarizer_id.hex():
                raise SummarizerMismatchError(
                    f"{store.address} was written by summarizer {generation.manifest.summarizer_id}, but the model's "
                    f"is {summarizer_id.hex()}; run a full `vista refresh` with this model"
                )
            return cls(store, generation, created_at, applied_segment, key)
        except BaseException:
            store.release()
            raise

    @property
    def manifest(self) -> Manifest:
        """Of the generation, as the last transaction left it."""
        return self.writer.manifest

    def erased(self, keys: Sequence[bytes]) -> NDArray[np.bool_]:
        """Whether each user is erased, [N]."""
        return np.array(self._store.erased_users.erased(keys), bool)

    def applied_segments(self, keys: Sequence[bytes]) -> NDArray[np.int64]:
        """Newest segment that each user's record covers, [N]; -1 without a record. Also -1 for a record that is shorter
        than a header, so that the user is summarized again; it is logged."""
        applied = np.full(len(keys), -1, np.int64)
        for row, header in enumerate(self.writer.headers(keys)):
            if header is None:
                continue
            if len(header) < HEADER_BYTES:
                logger.warning(
                    "%s: the record of %s is damaged: it holds %d bytes, fewer than a header; it is replaced",
                    self.path,
                    user_of(keys[row]),
                    len(header),
                )
                continue
            applied[row] = np.frombuffer(header, HEADER)[0]["applied_segment"]
        return applied

    def put_batch(self, keys: Sequence[bytes], records: Sequence[bytes], states: Sequence[bytes] = ()) -> None:
        """Add or replace users durably, states first; erased users are left out. Raises StoreError if the disk is
        full or fails, with the records unchanged; the message has the remedy."""
        self.writer.put(keys, records, states, {})

    def item_values(self) -> ItemValues | None:
        """The values of items as they are stored; None without any, or if they are damaged, which is logged."""
        value = self.writer.items()
        try:
            return None if value is None else ItemValues.from_bytes(value, self.path)
        except StoreError as error:
            logger.warning("%s; they are replaced", error)
            return None

    def begin(self, log_digest: str) -> None:
        """Record that from now on some records may cover the log up to `applied_segment`."""
        self.writer.put_manifest(
            lambda manifest: dataclasses.replace(manifest, going_to=self.applied_segment, going_to_digest=log_digest)
        )

    def finish(self) -> Manifest:
        """Record that all users are done: as of this run's start, the generation covers `applied_segment`."""
        self.writer.put_manifest(
            lambda manifest: dataclasses.replace(
                manifest,
                applied_segment=self.applied_segment,
                log_digest=manifest.going_to_digest,
                going_to=0,
                going_to_digest="",
                refreshed_at=self.created_at,
            )
        )
        return self.manifest

    def close(self) -> None:
        """Close the store."""
        self._store.release()

    def __enter__(self) -> StoreUpdate:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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
    return open_backend(path).erase(list(dict.fromkeys(user_keys(user_ids))), wait_s)
