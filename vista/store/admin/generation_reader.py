"""Reading whole generations, record by record in the order of the keys, for copies, exports and checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path
from typing import TypeVar

import lmdb

from vista.errors import StoreBusyError, StoreError
from vista.progress_bar import progress_bar
from vista.store.format.record import check_records
from vista.store.format.record_spec import RecordSpec
from vista.store.format.state_record import decode_states
from vista.store.layout import environment_path, environments_of, generation_path, list_generations
from vista.store.lmdb.data_file import ATTEMPTS, last_transaction
from vista.store.lmdb.environment import SharedEnvironment
from vista.store.lmdb.transactions import copied, walk
from vista.store.manifest import Manifest, read_manifest
from vista.store.tally import Tally, tally_of

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
