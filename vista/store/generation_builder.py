"""A generation made of existing records: filled aside in the order of the keys, verified, then renamed and published.

store/.partial-gen-8/summary/    until it is whole; a copy goes on in it after a kill, all others begin anew
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import lmdb
import numpy as np

from vista.errors import StoreError
from vista.files import sync
from vista.store.environment import check_structure, complete_size, open_environment
from vista.store.generation_reader import Batch, Tally
from vista.store.keys import COMPLETE_KEY, CURSOR_KEY, MANIFEST_KEY, copied, walk
from vista.store.layout import (
    PARTIAL_PREFIX,
    Manifest,
    WriterLock,
    generation_path,
    last_complete,
    list_generations,
    note_complete,
)
from vista.store.permissions import Modes, make_folder
from vista.store.record import HEADER, HEADER_BYTES, RecordSpec, check_records, seal_record

T = TypeVar("T")


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Be the one writer of a store; faults of the file system become errors with a remedy.

    Raises:
        StoreLockedError: there is another one; the message names its process.
        StoreError: the folder is missing or cannot be written.
    """
    try:
        lock = WriterLock(root)
    except OSError as error:
        raise cannot_write(root, error) from error
    try:
        yield
    except (OSError, lmdb.Error) as error:
        raise cannot_write(root, error) from error
    finally:
        lock.release()


def cannot_write(root: Path, error: Exception) -> StoreError:
    """What to do about a fault of the file system."""
    return StoreError(
        f"{root} cannot be written: {error}; check the path, free space, permissions, and whether it is mounted "
        "read-only. What is served is as before"
    )


def next_number(root: Path) -> int:
    """A number for a generation that no complete one ever had, beyond all that are there."""
    return max([last_complete(root), *list_generations(root)], default=0) + 1


class GenerationBuilder:
    """Fills one generation; only under `locked`. `finish` publishes nothing yet: `flip` does."""

    def __init__(
        self, root: Path, manifest: Manifest, key: bytes | None, modes: Modes, *, resume: bool = False
    ) -> None:
        self.root = root
        self.manifest = manifest
        self.spec = manifest.spec(key)
        self.tally = Tally()
        self.last_key = b"u"
        """Of the last record; put only larger ones."""
        self.path = root / f"{PARTIAL_PREFIX}gen-{manifest.generation}"
        self.folder = self.path / "summary"
        if not resume:
            shutil.rmtree(self.path, ignore_errors=True)
        if not self.path.exists():
            make_folder(self.path, modes)
        if not self.folder.exists():
            make_folder(self.folder, modes)
        self._environment: lmdb.Environment | None = open_environment(self.folder, readonly=False)
        self._states: lmdb.Environment | None = None
        if manifest.state_spec() is not None:
            make_folder(self.path / "state", modes)
            self._states = open_environment(self.path / "state", readonly=False)

    @property
    def environment(self) -> lmdb.Environment:
        """Open until `finish` or `close`."""
        assert self._environment is not None
        return self._environment

    def put(self, keys: Sequence[bytes], records: Sequence[bytes]) -> None:
        """Append checked records of this generation in one durable transaction.

        Raises:
            StoreError: a key is not beyond the last one.
        """
        with self.environment.begin(write=True) as transaction:
            for key, record in zip(keys, records, strict=True):
                if key <= self.last_key:
                    raise StoreError(f"{self.root}: keys must ascend, {key!r} comes after {self.last_key!r}")
                transaction.put(key, record, append=True)
                self.last_key = key
        self.tally.add(list(keys), list(records))

    def put_states(self, keys: Sequence[bytes], states: Sequence[bytes]) -> None:
        """Append checked states of this generation, in the order of their keys, in one durable transaction."""
        assert self._states is not None
        with self._states.begin(write=True) as transaction:
            for key, state in zip(keys, states, strict=True):
                transaction.put(key, state, append=True)

    def finish(self) -> Manifest:
        """Read all records back, check the file's structure, and give the generation its name.

        Raises:
            StoreError: the file does not hold what was put; `discard` it.
        """
        self.manifest = dataclasses.replace(
            self.manifest,
            count=self.tally.count,
            user_kind=self.tally.user_kind,
            records_digest=self.tally.records_digest,
        )
        self._read_back()
        with self.environment.begin(write=True) as transaction:
            transaction.put(MANIFEST_KEY, self.manifest.to_bytes())
            transaction.put(CURSOR_KEY, b"%d" % self.manifest.total_users)
            transaction.put(COMPLETE_KEY, b"1")
        self.close()
        environments = [path for path in self.path.iterdir() if path.is_dir()]
        for path in environments:
            complete_size(path)
            check_structure(path)
        for path in (*environments, self.path):
            sync(path)
        os.rename(self.path, generation_path(self.root, self.manifest.generation))
        sync(self.root)
        note_complete(self.root, self.manifest.generation)
        return self.manifest

    def held_batches(self) -> Iterator[Batch]:
        """Keys and values that are in the file, ascending."""

        def read(function: Callable[[lmdb.Transaction[memoryview]], T]) -> T:
            with self.environment.begin(buffers=True) as transaction:
                return function(transaction)

        return walk(read, copied)

    def _read_back(self) -> None:
        found = Tally()
        for keys, records in self.held_batches():
            check_records([memoryview(record) for record in records], keys, self.spec)
            found.add(keys, records)
        if found != self.tally:
            raise StoreError(
                f"{self.folder} holds {found.count} records where {self.tally.count} were put; check the disk"
            )

    def close(self) -> None:
        """Let the file go; closing twice is allowed."""
        for environment in (self._environment, self._states):
            if environment is not None:
                environment.close()
        self._environment = self._states = None

    def discard(self) -> None:
        """Remove what was filled."""
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)


def restamp_records(keys: Sequence[bytes], records: Sequence[bytes], spec: RecordSpec) -> list[bytes]:
    """Checked records as those of another generation: all but its number, checksum and code stays, byte for byte."""
    headers = np.frombuffer(b"".join([record[:HEADER_BYTES] for record in records]), HEADER).copy()
    headers["generation"] = spec.generation
    headers["checksum"] = 0
    packed = headers.tobytes()
    sealed = []
    for index, (key, record) in enumerate(zip(keys, records, strict=True)):
        payload = memoryview(record)[HEADER_BYTES : len(record) - spec.code_bytes]
        header = packed[HEADER_BYTES * index : HEADER_BYTES * (index + 1)]
        sealed.append(seal_record(header, [payload], key, spec.key))
    return sealed
