"""Whole generations, record by record in the order of the keys: read for copies, exports and checks, or made anew.

One that is made lies in store/.partial-gen-8/ until it is whole and verified, and is renamed then. A copy goes on in it
after a kill, all others begin anew.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path
from typing import TypeVar

import lmdb
import numpy as np

from vista.errors import StoreBusyError, StoreError
from vista.files import sync
from vista.store.format.keys import COMPLETE_KEY, CURSOR_KEY, MANIFEST_KEY, Read, common_kind, copied, kinds_of, walk
from vista.store.format.record import HEADER, HEADER_BYTES, RecordSpec, check_records, seal_record, sum_of_checksums
from vista.store.format.state_record import decode_states
from vista.store.layout import (
    PARTIAL_PREFIX,
    Manifest,
    environment_path,
    environments_of,
    generation_path,
    last_complete,
    list_generations,
    note_complete,
)
from vista.store.lmdb.data_file import ATTEMPTS, check_structure, complete_size, last_transaction, open_environment
from vista.store.lmdb.environment import SharedEnvironment
from vista.store.lmdb.permissions import Modes, make_folder
from vista.store.reader import read_manifest

T = TypeVar("T")
Batch = tuple[list[bytes], list[bytes]]
"""Keys and records, of equal length."""


@dataclass(slots=True)
class Tally:
    """What a manifest says of all records, counted while they pass by."""

    count: int = 0
    digest: int = 0
    user_kind: str | None = None
    """int, str, mixed, or None without records."""

    def add(self, keys: Sequence[bytes], records: Sequence[bytes | memoryview]) -> None:
        """Count a batch."""
        self.count += len(keys)
        self.digest = (self.digest + sum_of_checksums(records)) % (1 << 64)
        self.user_kind = common_kind([self.user_kind, *kinds_of(keys)])

    @property
    def records_digest(self) -> str:
        """Sum mod 2^64 of the checksums, in hex."""
        return f"{self.digest:016x}"


def tally_of(read: Read, spec: RecordSpec) -> Tally:
    """All records of an environment, checked and counted.

    Raises:
        RecordError: the first one that is corrupt; the message names the user.
    """
    tally = Tally()

    def add(keys: list[bytes], records: list[memoryview]) -> None:
        check_records(records, keys, spec)
        tally.add(keys, records)

    for _ in walk(read, add):
        pass
    return tally


@dataclass(frozen=True, slots=True)
class GenerationReader:
    """One complete generation, open."""

    path: Path
    """Of the environment."""
    environment: SharedEnvironment
    manifest: Manifest
    spec: RecordSpec

    def raw_batches(self, after: bytes = b"u") -> Iterator[Batch]:
        """Keys beyond `after` and their values, unchecked, ascending; each batch in a short transaction of its own."""
        return walk(self.environment.read, copied, after)

    def batches(self, after: bytes = b"u") -> Iterator[Batch]:
        """As `raw_batches`, every record checked.

        Raises:
            RecordError: the first one that is corrupt; the message names the user.
        """
        for keys, records in self.raw_batches(after):
            check_records(records, keys, self.spec)
            yield keys, records

    def state_batches(self) -> Iterator[Batch]:
        """Keys and states, every one checked, ascending; nothing where none are kept.

        Raises:
            RecordError: the first one that is corrupt; the message names the user.
        """
        spec, folder = self.manifest.state_spec(), self.path.with_name("state")
        if spec is None or not folder.is_dir():
            return
        environment = SharedEnvironment.acquire(folder)
        try:
            for keys, states in walk(environment.read, copied):
                decode_states(states, keys, spec)
                yield keys, states
        finally:
            environment.release()

    def other_keys(self) -> list[bytes]:
        """The first keys that no user has, in the order of the file."""
        return self.environment.read(_other_keys)

    def tally(self) -> Tally:
        """Check and count all records; errors as `batches`."""
        return tally_of(self.environment.read, self.spec)


@contextmanager
def open_generation(root: Path, generation: int, key: bytes | None = None) -> Iterator[GenerationReader]:
    """Open a complete generation of a store.

    Raises:
        StoreError: not there, unfinished, damaged, or of another key.
    """
    if not generation_path(root, generation).is_dir():
        there = ", ".join(f"gen-{number}" for number in list_generations(root)) or "none"
        raise StoreError(f"{root} has no gen-{generation}; generations there: {there}")
    path = environment_path(root, generation)
    environment = SharedEnvironment.acquire(path)
    try:
        manifest = environment.read(lambda transaction: read_manifest(transaction, path))
        yield GenerationReader(path, environment, manifest, manifest.spec(key))
    finally:
        environment.release()


def settled(root: Path, generation: int, look: Callable[[], T]) -> T:
    """What a function makes of a generation as a whole. If it fails while the generation is written, it looks again.

    Raises:
        StoreBusyError: it failed three times, and the generation was written each time.
        StoreError: of the function, and nobody wrote meanwhile.
    """
    for _ in range(ATTEMPTS):
        before = _transactions(root, generation)
        try:
            return look()
        except StoreError as error:
            if _transactions(root, generation) == before:
                raise
            last = error
    raise StoreBusyError(
        f"{root}: gen-{generation} is being written, by a refresh or an erasure; try again when that has ended"
    ) from last


def _transactions(root: Path, generation: int) -> list[int]:
    return [last_transaction(path) for path in environments_of(root, generation)]


def _other_keys(transaction: lmdb.Transaction[memoryview]) -> list[bytes]:
    cursor = transaction.cursor()
    before = list(takewhile(lambda key: key < b"u", map(bytes, islice(cursor.iternext(values=False), 1000))))
    beyond = cursor.set_range(b"v")
    return before + (list(map(bytes, islice(cursor.iternext(values=False), 1000))) if beyond else [])


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
        self.tally.add(keys, records)

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
        return walk(self._read, copied)

    def _read(self, function: Callable[[lmdb.Transaction[memoryview]], T]) -> T:
        with self.environment.begin(buffers=True) as transaction:
            return function(transaction)

    def _read_back(self) -> None:
        found = tally_of(self._read, self.spec)
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
