"""A whole generation, record by record in the order of the keys: for copies, exports and checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path
from typing import TypeVar

import lmdb

from vista.errors import StoreBusyError, StoreError
from vista.store.environment import ATTEMPTS, SharedEnvironment, last_transaction
from vista.store.keys import INT_PREFIX, STR_PREFIX, copied, walk
from vista.store.layout import Manifest, environment_path, environments_of, generation_path, list_generations
from vista.store.lmdb_store import read_manifest
from vista.store.record import RecordSpec, check_records, sum_of_checksums
from vista.store.state_record import decode_states

T = TypeVar("T")
Batch = tuple[list[bytes], list[bytes]]
"""Keys and records, of equal length."""


@dataclass(slots=True)
class Tally:
    """What a manifest says of all records, counted while they pass by."""

    count: int = 0
    digest: int = 0
    kinds: int = 0

    def add(self, keys: list[bytes], records: list[bytes]) -> None:
        """Count a batch."""
        self.count += len(keys)
        self.digest = (self.digest + sum_of_checksums(records)) % (1 << 64)
        self.kinds |= any(key.startswith(INT_PREFIX) for key in keys) | 2 * any(
            key.startswith(STR_PREFIX) for key in keys
        )

    @property
    def records_digest(self) -> str:
        """Sum mod 2^64 of the checksums, in hex."""
        return f"{self.digest:016x}"

    @property
    def user_kind(self) -> str | None:
        """int, str, mixed, or None without records."""
        return (None, "int", "str", "mixed")[self.kinds]


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
            check_records([memoryview(record) for record in records], keys, self.spec)
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
        tally = Tally()
        for keys, records in self.batches():
            tally.add(keys, records)
        return tally


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
