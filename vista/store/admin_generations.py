"""Reading whole generations, record by record in the order of the keys, for copies, exports and checks."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path
from typing import TypeVar

import lmdb
import numpy as np

from vista.errors import StoreBusyError, StoreError
from vista.files import remove_renamed, sync
from vista.progress_bar import progress_bar
from vista.store.keys import COMPLETE_KEY, CURSOR_KEY, MANIFEST_KEY
from vista.store.layout import (
    PARTIAL_PREFIX,
    Permissions,
    environment_path,
    environments_of,
    generation_path,
    list_generations,
    make_folder,
    record_complete,
)
from vista.store.lmdb_environment import (
    ATTEMPTS,
    SharedEnvironment,
    check_structure,
    complete_size,
    copied,
    last_transaction,
    open_environment,
    walk,
)
from vista.store.locked_folder import Tally, tally_of
from vista.store.manifest import Manifest, read_manifest
from vista.store.record import check_records, seal_record
from vista.store.record_spec import HEADER, HEADER_BYTES, RecordSpec
from vista.store.state_record import decode_states

T = TypeVar("T")
Batch = tuple[list[bytes], list[bytes]]
"""Keys and values, of equal length."""


@dataclass(frozen=True, slots=True)
class GenerationReader:
    """One complete generation, open for reading."""

    path: Path
    """Of the environment."""
    environment: SharedEnvironment
    manifest: Manifest
    spec: RecordSpec

    def value(self, key: bytes) -> bytes | None:
        """A user's unchecked record; None without one."""

        def copy(transaction: lmdb.Transaction[memoryview]) -> bytes | None:
            value = transaction.get(key)
            return None if value is None else bytes(value)

        return self.environment.read(copy)

    def raw_batches(self, after: bytes = b"u") -> Iterator[Batch]:
        """Keys beyond `after` and their unchecked values, ascending; each batch in a short transaction."""
        with progress_bar(total=self.manifest.count, desc="read records", unit="user", leave=False) as bar:
            for keys, records in walk(self.environment.read, copied, after):
                yield keys, records
                bar.update(len(keys))

    def batches(self, after: bytes = b"u") -> Iterator[Batch]:
        """As `raw_batches`, with every record checked.

        Raises:
            RecordError: a record is corrupt; the message names the first one's user.
        """
        for keys, records in self.raw_batches(after):
            check_records(records, keys, self.spec)
            yield keys, records

    def state_batches(self) -> Iterator[Batch]:
        """Keys and states, ascending, with every state checked; nothing if the generation keeps no states.

        Raises:
            RecordError: a state is corrupt; the message names the first one's user.
        """
        spec, folder = self.manifest.state_spec(), self.path.with_name("state")
        if spec is None or not folder.is_dir():
            return
        environment = SharedEnvironment.acquire(folder)
        try:
            with progress_bar(total=self.manifest.count, desc="read states", unit="user", leave=False) as bar:
                for keys, states in walk(environment.read, copied):
                    decode_states(states, keys, spec)
                    yield keys, states
                    bar.update(len(keys))
        finally:
            environment.release()

    def other_keys(self) -> list[bytes]:
        """The first keys that are not user keys, in the order of the file."""
        return self.environment.read(_other_keys)

    def tally(self) -> Tally:
        """Check and count all records; errors as of `batches`."""
        return tally_of(self.environment.read, self.spec, num_users=self.manifest.count)


@contextmanager
def open_generation(root: Path, generation: int, key: bytes | None = None) -> Iterator[GenerationReader]:
    """Open a complete generation of a store.

    Raises:
        StoreError: missing, unfinished, damaged, or of another key.
    """
    if not generation_path(root, generation).is_dir():
        existing = ", ".join(f"gen-{number}" for number in list_generations(root)) or "none"
        raise StoreError(f"{root} has no gen-{generation}; name an existing generation: {existing}")
    path = environment_path(root, generation)
    environment = SharedEnvironment.acquire(path)
    try:
        manifest = environment.read(lambda transaction: read_manifest(transaction, path))
        yield GenerationReader(path, environment, manifest, manifest.spec(key))
    finally:
        environment.release()


def read_settled(root: Path, generation: int, read: Callable[[], T]) -> T:
    """Result of a function that reads a whole generation; called again if it failed while the generation was written.

    Raises:
        StoreBusyError: it failed three times, and the generation was written each time.
        StoreError: it failed, and nobody wrote the generation meanwhile.
    """
    return settled(lambda: _last_transactions(root, generation), read, f"{root}: gen-{generation}")


def settled(version: Callable[[], object], read: Callable[[], T], name: str) -> T:
    """As `read_settled`, of a generation whose every write changes `version()`; `name` names it in the error."""
    for _ in range(ATTEMPTS):
        before = version()
        try:
            return read()
        except StoreError as error:
            if version() == before:
                raise
            last = error
    raise StoreBusyError(f"{name} is being written by a refresh or an erasure; try again when that has ended") from last


def _last_transactions(root: Path, generation: int) -> list[int]:
    return [last_transaction(path) for path in environments_of(root, generation)]


def _other_keys(transaction: lmdb.Transaction[memoryview]) -> list[bytes]:
    cursor = transaction.cursor()
    before = list(takewhile(lambda key: key < b"u", map(bytes, islice(cursor.iternext(values=False), 1000))))
    beyond = cursor.set_range(b"v")
    return before + (list(map(bytes, islice(cursor.iternext(values=False), 1000))) if beyond else [])


# Building a generation from existing records.
#
# It is built in store/.partial-gen-8/ and renamed once it is complete and verified. After a kill, a copy resumes in
# that
# folder; all other operations start over.


class GenerationBuilder:
    """Fills one generation; only under `locked`. `finish` does not publish it: `publish_generation` does."""

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
        self.folder = self.path / "summary"
        if not resume or self.path.is_symlink():
            remove_renamed(self.path)
        if not self.path.exists():
            make_folder(self.path, permissions)
        if not self.folder.exists():
            make_folder(self.folder, permissions)
        self._environment: lmdb.Environment | None = open_environment(self.folder, readonly=False)
        self._states: lmdb.Environment | None = None
        if manifest.state_spec() is not None:
            make_folder(self.path / "state", permissions)
            self._states = open_environment(self.path / "state", readonly=False)

    @property
    def environment(self) -> lmdb.Environment:
        """Open until `finish` or `close`."""
        assert self._environment is not None
        return self._environment

    def put(self, keys: Sequence[bytes], records: Sequence[bytes]) -> None:
        """Append checked records of this generation in one durable transaction.

        Raises:
            StoreError: a key is not larger than the last one.
        """
        with self.environment.begin(write=True) as transaction:
            for key, record in zip(keys, records, strict=True):
                if key <= self.last_key:
                    raise StoreError(f"{self.root}: keys must ascend, but {key!r} follows {self.last_key!r}")
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
        """Read all records back, check the structure of the files, and give the generation its final name.

        Raises:
            StoreError: the file does not hold what was put; call `discard`.
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
        record_complete(self.root, self.manifest.generation)
        return self.manifest

    def held_batches(self) -> Iterator[Batch]:
        """Keys and values that the file holds so far, ascending."""
        return walk(self._read, copied)

    def _read(self, function: Callable[[lmdb.Transaction[memoryview]], T]) -> T:
        with self.environment.begin(buffers=True) as transaction:
            return function(transaction)

    def _read_back(self) -> None:
        tally = tally_of(self._read, self.spec, num_users=self.tally.count)
        if tally != self.tally:
            raise StoreError(
                f"{self.folder} holds {tally.count} records, but {self.tally.count} were put; check the disk"
            )

    def close(self) -> None:
        """Close the files; closing twice is allowed."""
        for environment in (self._environment, self._states):
            if environment is not None:
                environment.close()
        self._environment = self._states = None

    def discard(self) -> None:
        """Remove what was built."""
        self.close()
        remove_renamed(self.path)


def restamp_records(keys: Sequence[bytes], records: Sequence[bytes], spec: RecordSpec) -> list[bytes]:
    """Move checked records to another generation: only its number, the checksum and the code change."""
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
