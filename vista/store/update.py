"""Updates of the published generation in place: new records and states of some users."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from vista.errors import SummarizerMismatchError
from vista.store.format.record_spec import HEADER
from vista.store.manifest import Manifest
from vista.store.open_generation import FoundStates
from vista.store.remote.store_url import StoreUrl
from vista.store.writable_store import WritableGeneration, WritableStore, lock_for_writing


class StoreUpdate:
    """The one writer of a store: adds, replaces and removes records of the published generation in durable batches.

    Readers see each batch once it is committed. A kill loses no committed batch, and `applied_segments` tells which
    users of a run are done.
    """

    def __init__(
        self,
        store: WritableStore,
        generation: WritableGeneration,
        created_at: int,
        applied_segment: int,
        key: bytes | None,
    ) -> None:
        self.path = store.path
        self._store = store
        self._generation = generation
        self.created_at = created_at
        """Start of the run, ms."""
        self.applied_segment = applied_segment
        """Newest segment of the log that new records cover."""
        manifest = generation.manifest
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
        store = lock_for_writing(path)
        try:
            generation = store.published()
            if generation.manifest.summarizer_id != summarizer_id.hex():
                raise SummarizerMismatchError(
                    f"{store.path} was written by summarizer {generation.manifest.summarizer_id}, but the model's is "
                    f"{summarizer_id.hex()}; run a full `vista refresh` with this model"
                )
            return cls(store, generation, created_at, applied_segment, key)
        except BaseException:
            store.release()
            raise

    @property
    def manifest(self) -> Manifest:
        """Of the generation, as the last transaction left it."""
        return self._generation.manifest

    def erased(self, keys: Sequence[bytes]) -> NDArray[np.bool_]:
        """Whether each user is erased, [N]."""
        return np.array(self._store.erased_users.erased(keys), bool)

    def applied_segments(self, keys: Sequence[bytes]) -> NDArray[np.int64]:
        """Newest segment that each user's record covers, [N]; -1 without a record."""
        applied = np.full(len(keys), -1, np.int64)
        for row, header in enumerate(self._generation.headers(keys)):
            if header is not None:
                applied[row] = np.frombuffer(header, HEADER)[0]["applied_segment"]
        return applied

    def key_batches(self) -> Iterator[list[bytes]]:
        """Keys of all users in ascending order, a batch at a time."""
        return self._generation.key_batches()

    def states(self, keys: Sequence[bytes]) -> FoundStates | None:
        """Rows of the keys that have a state, and these states; None if the generation keeps no states.

        Raises:
            RecordError: a state is damaged; the message names the user.
        """
        return None if self.state_spec is None else self._generation.states(keys, self.state_spec)

    def put_batch(self, keys: Sequence[bytes], records: Sequence[bytes], states: Sequence[bytes] = ()) -> None:
        """Add or replace users durably, states first; erased users are left out.

        Raises:
            StoreError: the records are unchanged (disk full, input/output error); the message has the remedy.
        """
        self._generation.put(self._store.erased_users, keys, records, states, {})

    def remove(self, keys: Sequence[bytes]) -> int:
        """Remove users durably; returns how many had a record."""
        return self._generation.remove(keys)

    def remove_states(self, keys: Sequence[bytes]) -> None:
        """Remove the states of users, who are then recomputed from the log by their next refresh."""
        self._generation.remove_states(keys)

    def begin(self, log_digest: str) -> None:
        """Record that from now on some records may cover the log up to `applied_segment`."""
        self._generation.put_manifest(
            lambda manifest: dataclasses.replace(manifest, going_to=self.applied_segment, going_to_digest=log_digest)
        )

    def finish(self) -> Manifest:
        """Record that all users are done: as of this run's start, the generation covers `applied_segment`.

        On a server, a generation that expires does so `ttl_days` after the last call, at the latest.
        """
        self._generation.renew()
        self._generation.put_manifest(
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
