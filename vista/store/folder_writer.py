"""One generation of a store in a folder, open for writing, or built from existing records."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import lmdb
import numpy as np

from vista.errors import StoreError
from vista.files import remove_renamed, sync
from vista.store.folder_files import (
    REMEDY,
    WAIT_S,
    Tombstones,
    cannot_write,
    check_structure,
    complete_size,
    without_erased,
)
from vista.store.folder_generation import Batch, SharedEnvironment, copied, read_states, tally_of, walk
from vista.store.keys import COMPLETE_KEY, CURSOR_KEY, ITEMS_KEY, MANIFEST_KEY
from vista.store.layout import (
    PARTIAL_PREFIX,
    Permissions,
    Shard,
    environment_path,
    generation_path,
    make_folder,
    record_complete,
    shards_of,
    state_path,
)
from vista.store.manifest import Manifest, Tally, read_cursor
from vista.store.record import HEADER_BYTES, user_of
from vista.store.state_record import FoundStates


class FolderWriter:
    """One generation, open for writing; `manifest` is updated by every transaction.

    The states of a batch are committed before its records. So a record never covers more events than its state, and a
    resumed refresh sees from a state's `applied_segment` that the same events must not be added again.
    """

    def __init__(
        self, root: Path, summary: SharedEnvironment, state: SharedEnvironment | None, wait_s: float = WAIT_S
    ) -> None:
        self.path = root
        self._wait_s = wait_s
        self._closed = False
        self.summary = summary
        self.state = state
        self._tombstones = Tombstones(root)
        self._parsed: tuple[bytes, Manifest] | None = None
        self.manifest = self.read_manifest()
        self.complete: bool = summary.read(lambda transaction: transaction.get(COMPLETE_KEY) is not None)

    @classmethod
    def open(cls, root: Path, generation: int, *, wait_s: float = WAIT_S) -> FolderWriter:
        """Open an existing generation; its transactions wait up to `wait_s` seconds for one of another process. Raises
        StoreError if missing, truncated, or not of LMDB; the message has the remedy."""
        summary = SharedEnvironment.acquire(environment_path(root, generation), writable=True)
        state = None
        try:
            if state_path(root, generation).is_dir():
                state = SharedEnvironment.acquire(state_path(root, generation), writable=True)
            return cls(root, summary, state, wait_s)
        except BaseException:
            for environment in (summary, state):
                if environment is not None:
                    environment.release()
            raise

    @classmethod
    def create(cls, root: Path, manifest: Manifest, permissions: Permissions) -> FolderWriter:
        """Make an empty generation. All its folders are on the disk before its manifest says what they hold."""
        folder = generation_path(root, manifest.generation)
        make_folder(folder, permissions)
        has_states = manifest.state_spec() is not None
        paths = [environment_path(root, manifest.generation)] + ([state_path(root, manifest.generation)] * has_states)
        for path in paths:
            make_folder(path, permissions)
        opened = [SharedEnvironment.acquire(path, writable=True) for path in paths]
        for path in (*paths, folder, root):
            sync(path)

        def put_first(transaction: lmdb.Transaction[memoryview]) -> None:
            transaction.put(MANIFEST_KEY, manifest.to_bytes())
            transaction.put(CURSOR_KEY, b"0")

        opened[0].write(put_first)
        return cls(root, opened[0], opened[1] if has_states else None)

    def require_states(self) -> None:
        """Refuse a generation that lost its states; to erase users from it, it may stay open. Raises StoreError if its
        manifest names states, but there are none."""
        if self.state is None and self.manifest.state_spec() is not None:
            path = state_path(self.path, self.manifest.generation)
            raise StoreError(f"{path}: the states that its manifest names are missing; run a full refresh")

    def put(
        self, keys: Sequence[bytes], records: Sequence[bytes], states: Sequence[bytes], meta: Mapping[bytes, bytes]
    ) -> int:
        """Write a batch durably, without erased users: first the states, then records, manifest and `meta` together.

        Args:
            keys: N user keys.
            records: N records.
            states: N states, or none if the store keeps no states.
            meta: further keys and values to put.

        Returns:
            How many users were written.

        Raises:
            StoreError: a user belongs to another shard, or nothing can be written; the store is unchanged.
        """
        _check_shard(self.path, keys)
        if (self.state is not None) != bool(states) and keys:
            raise ValueError(f"states: got {len(states)} for {len(keys)} records of {self.path}")

        def put_states(transaction: lmdb.Transaction[memoryview]) -> None:
            erased = self._tombstones.erased(keys)
            remaining = [place for place, gone in enumerate(erased) if not gone]
            _put(transaction, [keys[place] for place in remaining], [states[place] for place in remaining])

        def put_records(transaction: lmdb.Transaction[memoryview]) -> tuple[Manifest, int]:
            # An erasure that began earlier is seen here; a later one deletes the user after this transaction.
            erased = self._tombstones.erased(keys)
            remaining = [place for place, gone in enumerate(erased) if not gone]
            put_keys, put_values = [keys[place] for place in remaining], [records[place] for place in remaining]
            old = _put(transaction, put_keys, put_values)
            others = partial(_other_headers, transaction, set(put_keys))
            manifest = self._manifest_in(transaction).with_records(old, put_keys, put_values, others)
            for key, value in meta.items():
                transaction.put(key, value)
            return self._put_manifest(transaction, manifest), len(remaining)

        if self.state is not None and keys:
            self._write(self.state, put_states)
        count: int
        self.manifest, count = self._write(self.summary, put_records)
        return count

    def remove(self, keys: Sequence[bytes]) -> int:
        """Remove users' records and states durably; returns how many had a record."""

        def remove_records(transaction: lmdb.Transaction[memoryview]) -> tuple[Manifest, int]:
            old = [bytes(value) for key in keys if (value := transaction.pop(key)) is not None]
            others = partial(_other_headers, transaction, set(keys))
            manifest = self._manifest_in(transaction).with_records(old, [], [], others)
            return self._put_manifest(transaction, manifest), len(old)

        if not keys:
            return 0
        # Records first, so that readers miss the users at once.
        count: int
        self.manifest, count = self._write(self.summary, remove_records)
        self.remove_states(keys)
        return count

    def remove_states(self, keys: Sequence[bytes]) -> None:
        """Remove users' states alone, durably."""

        def remove(transaction: lmdb.Transaction[memoryview]) -> None:
            for key in keys:
                transaction.delete(key)

        if self.state is not None and keys:
            self._write(self.state, remove)

    def remove_erased(self) -> None:
        """Remove erased users who still have a record or state."""
        for environment, remove in ((self.summary, self.remove), (self.state, self.remove_states)):
            if environment is not None and len(self._tombstones):
                for keys, erased in walk(environment, lambda keys, _: self._tombstones.erased(keys)):
                    remove([key for key, gone in zip(keys, erased, strict=True) if gone])

    def mark_complete(self, refreshed_at: int) -> None:
        """Mark durably that all records are written; readers may open the generation once CURRENT names it."""

        def put(transaction: lmdb.Transaction[memoryview]) -> Manifest:
            transaction.put(COMPLETE_KEY, b"1")
            manifest = dataclasses.replace(self._manifest_in(transaction), refreshed_at=refreshed_at)
            return self._put_manifest(transaction, manifest)

        self.manifest = self._write(self.summary, put)

    def put_manifest(self, change: Callable[[Manifest], Manifest]) -> None:
        """Change the manifest durably."""

        def put(transaction: lmdb.Transaction[memoryview]) -> Manifest:
            return self._put_manifest(transaction, change(self._manifest_in(transaction)))

        self.manifest = self._write(self.summary, put)

    def items(self) -> bytes | None:
        """The unchecked values of items; None without any."""

        def read(transaction: lmdb.Transaction[memoryview]) -> bytes | None:
            value = transaction.get(ITEMS_KEY)
            return None if value is None else bytes(value)

        return self.summary.read(read)

    def put_items(self, value: bytes) -> None:
        """Replace the values of items durably (`ItemValues.to_bytes`)."""

        def put(transaction: lmdb.Transaction[memoryview]) -> Manifest:
            transaction.put(ITEMS_KEY, value)
            return self._put_manifest(transaction, self._manifest_in(transaction).with_items(value))

        self.manifest = self._write(self.summary, put)

    def headers(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Header of each user's record; None without a record."""

        def read(transaction: lmdb.Transaction[memoryview]) -> list[bytes | None]:
            values = [transaction.get(key) for key in keys]
            return [None if value is None else bytes(value[:HEADER_BYTES]) for value in values]

        return self.summary.read(read)

    def key_batches(self) -> Iterator[list[bytes]]:
        """Keys of all users in ascending order, a batch at a time."""
        return (keys for keys, _ in walk(self.summary, lambda keys, _: None))

    def states(self, keys: Sequence[bytes]) -> FoundStates | None:
        """Rows of the keys that have a state, and these states; None if the generation keeps no states."""
        spec = self.manifest.state_spec()
        return None if self.state is None or spec is None else read_states(self.state, keys, spec)

    def read_manifest(self) -> Manifest:
        """The manifest as it is stored now."""
        return self.summary.read(self._manifest_in)

    def read_cursor(self) -> int:
        """Users done, in the run's fixed order. Raises StoreError if it is not a number up to the users of the run."""
        return self.summary.read(lambda transaction: read_cursor(transaction, self.manifest, self.path))

    def close(self) -> None:
        """Close the environments; closing twice is allowed."""
        if not self._closed:
            self._closed = True
            for environment in (self.summary, self.state):
                if environment is not None:
                    environment.release()

    def _manifest_in(self, transaction: lmdb.Transaction[memoryview]) -> Manifest:
        value = transaction.get(MANIFEST_KEY)
        if value is None:
            raise StoreError(f"{self.path}: a generation has no manifest; {REMEDY}")
        if self._parsed is None or value != self._parsed[0]:  # first read, or another process has erased users
            self._parsed = bytes(value), Manifest.from_bytes(bytes(value), self.path)
        return self._parsed[1]

    def _put_manifest(self, transaction: lmdb.Transaction[memoryview], manifest: Manifest) -> Manifest:
        value = manifest.to_bytes()
        transaction.put(MANIFEST_KEY, value)
        self._parsed = value, manifest
        return manifest

    def _write(self, environment: SharedEnvironment, function: Callable[[lmdb.Transaction[memoryview]], Any]) -> Any:
        if self._closed or environment.inherited:
            raise StoreError(f"{self.path}: the writer is closed, or was opened before a fork; open a new one")
        try:
            return environment.write(function, self._wait_s)
        except (OSError, lmdb.Error) as error:
            raise cannot_write(self.path, error) from error


class FolderBuilder:
    """A generation that is filled with existing records, in the order of their keys; only under the writer's lock.

    It is built in store/.partial-gen-8/ and renamed once it is complete and verified; publishing it is left to
    `Folder.publish`. After a kill, a copy resumes in that folder, and all other operations start over.
    """

    def __init__(
        self, root: Path, manifest: Manifest, key: bytes | None, permissions: Permissions, *, resume: bool = False
    ) -> None:
        self.root = root
        self.manifest = manifest
        self.spec = manifest.spec(key)
        self.tally = Tally()
        self.last_key = b"u"
        """Of the last record; only larger keys can be added."""
        self.path = root / f"{PARTIAL_PREFIX}gen-{manifest.generation}"
        if not resume or self.path.is_symlink():
            remove_renamed(self.path)
        if not self.path.exists():
            make_folder(self.path, permissions)
        names = ["summary", "state"] if manifest.state_spec() is not None else ["summary"]
        for name in names:
            if not (self.path / name).exists():
                make_folder(self.path / name, permissions)
        self._open = [SharedEnvironment.acquire(self.path / name, writable=True) for name in names]
        """Until `finish` or `close`: the environment of the records and, if the generation keeps states, theirs."""

    def put(self, keys: Sequence[bytes], records: Sequence[bytes]) -> None:
        """Append checked records of this generation in one durable transaction. Raises StoreError if a key is not
        larger than the last one, or a user belongs to another shard."""
        _check_shard(self.root, keys)
        for before, key in pairwise([self.last_key, *keys]):
            if key <= before:
                raise StoreError(f"{self.root}: keys must ascend, but {key!r} follows {before!r}")
        self._open[0].write(lambda transaction: _put(transaction, keys, records))
        self.tally.add(keys, records)
        self.last_key = keys[-1] if keys else self.last_key

    def put_states(self, keys: Sequence[bytes], states: Sequence[bytes]) -> None:
        """Append checked states of this generation, in the order of their keys, in one durable transaction."""
        self._open[1].write(lambda transaction: _put(transaction, keys, states))

    def put_items(self, value: bytes) -> None:
        """Put the values of items of the generation durably."""
        self._open[0].write(lambda transaction: transaction.put(ITEMS_KEY, value))
        self.manifest = self.manifest.with_items(value)

    def finish(self) -> Manifest:
        """Read all records back, check the files' structure, remove users erased meanwhile, and name the generation.
        Raises StoreError if the file does not hold what was put; call `discard`."""
        self.manifest = dataclasses.replace(
            self.manifest,
            count=self.tally.count,
            user_kind=self.tally.user_kind,
            records_digest=self.tally.records_digest,
        )
        held = tally_of(self._open[0], self.spec, num_users=self.tally.count)
        if held != self.tally:
            raise StoreError(f"{self.path} holds {held.count} records, but {self.tally.count} were put; check the disk")

        def put_meta(transaction: lmdb.Transaction[memoryview]) -> None:
            transaction.put(MANIFEST_KEY, self.manifest.to_bytes())
            transaction.put(CURSOR_KEY, b"%d" % self.manifest.total_users)
            transaction.put(COMPLETE_KEY, b"1")

        self._open[0].write(put_meta)
        environments = [path for path in self.path.iterdir() if path.is_dir()]
        for path in environments:
            complete_size(path)
            check_structure(path)
        for path in (*environments, self.path):
            sync(path)
        files = FolderWriter(self.root, self._open[0], self._open[1] if len(self._open) > 1 else None)

        def name() -> None:
            self.close()
            os.rename(self.path, generation_path(self.root, self.manifest.generation))
            sync(self.root)
            record_complete(self.root, self.manifest.generation)

        # An erasure that began before the rename did not see this generation; a later one does.
        without_erased(self.root, files.remove_erased, name)
        self.manifest = files.manifest
        return self.manifest

    def held_batches(self) -> Iterator[Batch]:
        """Keys and values that the file holds so far, ascending."""
        return walk(self._open[0], copied)

    def close(self) -> None:
        """Close the files; closing twice is allowed."""
        while self._open:
            self._open.pop().release()

    def discard(self) -> None:
        """Remove what was built."""
        self.close()
        remove_renamed(self.path)


def _check_shard(root: Path, keys: Sequence[bytes]) -> None:
    """Raise StoreError if a user does not belong to the shard that a folder is named after, where nobody finds them."""
    shard = Shard.named(root)
    if shard is not None and not (own := shard.holds(keys)).all():
        key = keys[int(np.argmin(own))]
        raise StoreError(
            f"{root}: {user_of(key)} belongs to shard {shards_of([key], shard.count)[0]} of {shard.count}, not to "
            f"shard {shard.index}, so readers would not find the user here; write to the folder of the user's shard"
        )


def _other_headers(transaction: lmdb.Transaction[memoryview], keys: Collection[bytes]) -> Iterator[bytes]:
    """Headers of the records of all users except `keys`."""
    cursor = transaction.cursor()
    for key, value in cursor if cursor.set_range(b"u") else ():
        if bytes(key[:1]) == b"u" and bytes(key) not in keys:
            yield bytes(value[:HEADER_BYTES])


def _put(
    transaction: lmdb.Transaction[memoryview], keys: Sequence[bytes], values: Sequence[bytes]
) -> list[bytes | memoryview]:
    """Put values and return those that they replace. Keys after the last one are appended. Otherwise LMDB would split
    the last page in half each time it is full, and ascending records of half a page would take a page each."""
    cursor = transaction.cursor()
    replaced: list[bytes | memoryview] = []
    last = bytes(cursor.key()) if cursor.last() else b""
    for key, value in zip(keys, values, strict=True):
        if key > last:
            transaction.put(key, value, append=True)
            last = key
        elif (old := transaction.replace(key, value)) is not None:
            replaced.append(old)
    return replaced
