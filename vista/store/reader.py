"""Read side of a summary store: many processes and threads, never blocked by the writer, never served a mixture.

B users asked for, K summary tokens, d model width.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import lmdb
import numpy as np
from numpy.typing import NDArray

from vista.errors import StoreError, SummarizerMismatchError, UnfinishedError, UserKeyError
from vista.store.format.keys import COMPLETE_KEY, INT_PREFIX, MANIFEST_KEY, STR_PREFIX, user_id, user_keys, walk
from vista.store.format.record import RawRecords, RecordSpec, check_keys, decode_rows, read_records
from vista.store.format.state_record import StateArrays, read_states
from vista.store.layout import (
    Manifest,
    environment_path,
    list_generations,
    missing_generation,
    read_current,
    state_path,
)
from vista.store.lmdb.data_file import MAX_READERS, REMEDY
from vista.store.lmdb.environment import ClosedError, SharedEnvironment, exclusive
from vista.store.stored_batch import NO_TIMESTAMP, StoredBatch, Tail

_READ_RECORDS = 1024
"""Records of one read transaction, so that it stays short whatever the batch."""
_OPEN_ATTEMPTS = 5
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Generation:
    environment: SharedEnvironment
    manifest: Manifest
    spec: RecordSpec

    def read(self, keys: list[bytes]) -> tuple[NDArray[np.int64], RawRecords]:
        """Positions of the keys that have a record, and their records."""

        def copy(transaction: lmdb.Transaction[memoryview]) -> tuple[NDArray[np.int64], RawRecords]:
            values = [transaction.get(key) for key in keys]
            found = [value for value in values if value is not None]
            if len(found) == len(keys):
                return np.arange(len(keys)), read_records(found, keys, self.spec)
            rows = [row for row, value in enumerate(values) if value is not None]
            return np.array(rows, dtype=np.int64), read_records(found, [keys[row] for row in rows], self.spec)

        return self.environment.read(copy)


class StoreReader:
    """One published generation of a store; `reload` follows CURRENT. Safe after fork, with threads, and to pickle."""

    def __init__(
        self, path: Path, summarizer_id: bytes | None, max_readers: int, key: bytes | None, tail_len: int
    ) -> None:
        self.path = path
        self._wanted = summarizer_id
        self._key = key
        self._max_readers = max_readers
        self._tail_len = tail_len
        self._opened: _Generation | None = self._open()

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        summarizer_id: bytes | None = None,
        max_readers: int = MAX_READERS,
        key: bytes | None = None,
        tail_len: int = 0,
    ) -> StoreReader:
        """Open the generation that CURRENT names.

        Args:
            path: the store's folder.
            summarizer_id: 32 bytes; refuse records of another summarizer. Where CURRENT has another one but a kept
                generation matches (a rollout in two steps), that one is opened.
            max_readers: slots of the reader table, if this is its first opener.
            key: 32 bytes: refuse records that were not written with this key (`authentication.read_key`).
            tail_len: events of a tail that the model reads: refuse generations of shorter tails.

        Raises:
            SummarizerMismatchError: no generation is of that summarizer; the message names both.
            StoreError: missing, unpublished, truncated, foreign, or of another key; the message has the remedy.
        """
        return cls(Path(path).absolute(), summarizer_id, max_readers, key, tail_len)

    @property
    def manifest(self) -> Manifest:
        """What the opened generation is."""
        return self._current().manifest

    @property
    def generation(self) -> int:
        """Number of the opened generation."""
        return self.manifest.generation

    @property
    def num_tokens(self) -> int:
        """K."""
        return self.manifest.num_tokens

    @property
    def dim(self) -> int:
        """d."""
        return self.manifest.dim

    @property
    def summarizer_id(self) -> bytes:
        """SHA-256 of the summarizer that wrote the generation, 32 bytes."""
        return self._current().spec.summarizer_id

    def __len__(self) -> int:
        """Users with a record."""
        return self.manifest.count

    def get_many(self, user_ids: Sequence[int] | Sequence[str] | NDArray[Any]) -> StoredBatch:
        """Records of a batch of users, all of one generation.

        Args:
            user_ids: B ids as in the log; duplicates and unknown ones are allowed.

        Raises:
            UserKeyError: an id cannot be a key, or is an integer where the store's are strings (or the reverse).
            RecordError: a record is corrupt; the message names the user.
            StoreError: the store is closed or cannot be read.
        """
        keys = user_keys(user_ids)
        while True:
            opened = self._current()
            _require_kind(keys, opened.manifest)
            try:
                firsts = range(0, max(len(keys), 1), _READ_RECORDS)
                parts = [opened.read(keys[first : first + _READ_RECORDS]) for first in firsts]
            except ClosedError:
                if self._opened is opened:
                    raise
                continue  # Another thread reloaded meanwhile: the whole batch comes from the new generation.
            return _assemble(len(keys), parts, opened.spec)

    def states(self, user_ids: Sequence[int] | Sequence[str]) -> tuple[NDArray[np.int64], StateArrays] | None:
        """Rows of the users that have a state, and these states; None where the generation keeps none.

        Opens the states for the call only: what scores never maps them.

        Raises:
            RecordError: a state is damaged; the message names the user.
        """
        manifest = self.manifest
        spec, keys = manifest.state_spec(), user_keys(user_ids)
        if spec is None:
            return None
        environment = SharedEnvironment.acquire(state_path(self.path, manifest.generation), self._max_readers)
        try:
            return read_states(environment, keys, spec)
        finally:
            environment.release()

    def keys(self) -> Iterator[int | str]:
        """User ids of all records of one generation in the order of their keys, read in short transactions.

        Raises:
            RecordError, StoreError: a key or their order is damaged.
        """
        environment = self._current().environment
        environment.retain()
        try:
            for keys, _ in walk(environment.read, check_keys):
                yield from map(user_id, keys)
        finally:
            environment.release()

    def reload(self) -> bool:
        """Follow CURRENT to another generation; the old one is closed after its last transaction.

        What an incremental refresh writes is read without it; the manifest is reread.

        Returns:
            Whether the generation changed. It does not where CURRENT has moved to another summarizer than the wanted
            one: the old generation is served on, and a warning logged.

        Raises:
            StoreError: CURRENT or its generation is damaged, or the store is closed; the old generation stays open.
        """
        before = self._current()
        current = read_current(self.path)
        if current == before.manifest.generation and before.environment.is_at(environment_path(self.path, current)):
            self._reread_manifest(before)
            return False
        opened = self._open()
        if opened.environment is before.environment:
            opened.environment.release()
            return False
        self._replace(opened)
        return True

    def close(self) -> None:
        """Let the generation go; closing twice is allowed."""
        self._replace(None)

    def __enter__(self) -> StoreReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_pickled, (self.path, self._wanted, self._max_readers, self._key, self._tail_len)

    def _current(self) -> _Generation:
        opened = self._opened
        if opened is None:
            raise StoreError(f"{self.path} is closed; open the store again")
        if opened.environment.inherited:
            try:
                opened.environment.reopen()
            except StoreError:
                opened = self._open()  # Removed since the parent opened it: this child follows CURRENT.
                self._replace(opened)
        return opened

    def _replace(self, opened: _Generation | None) -> None:
        with exclusive():
            old, self._opened = self._opened, opened
        if old is not None:
            old.environment.release()

    def _reread_manifest(self, opened: _Generation) -> None:
        """See what an incremental refresh has changed in place."""
        manifest = opened.environment.read(lambda transaction: read_manifest(transaction, self.path))
        with exclusive():
            if self._opened is opened:
                self._opened = dataclasses.replace(opened, manifest=manifest)

    def _open(self) -> _Generation:
        generation = read_current(self.path)
        for _ in range(_OPEN_ATTEMPTS):
            if environment_path(self.path, generation).is_dir():
                try:
                    return self._matching(generation)
                except StoreError:
                    if read_current(self.path) == generation:
                        raise
            elif read_current(self.path) == generation:
                raise missing_generation(self.path, generation)
            generation = read_current(self.path)  # A writer flipped twice between the two looks.
        raise StoreError(f"{self.path}: CURRENT changes faster than its generations can be opened; try again")

    def _matching(self, current: int) -> _Generation:
        newest = self._open_generation(current)
        if self._wanted is None or newest.spec.summarizer_id == self._wanted:
            return self._with_tails(newest)
        found = newest.manifest.summarizer_id
        newest.environment.release()
        for generation in reversed([number for number in list_generations(self.path) if number < current]):
            try:
                older = self._open_generation(generation)
            except StoreError:
                continue  # Unfinished or damaged: no candidate.
            if older.spec.summarizer_id == self._wanted:
                logger.warning(
                    "%s: CURRENT is gen-%d of summarizer %s; serving gen-%d of the wanted %s",
                    self.path, current, found, generation, self._wanted.hex(),
                )  # fmt: skip
                return self._with_tails(older)
            older.environment.release()
        raise SummarizerMismatchError(
            f"{self.path} was written by summarizer {found}, but the model's is {self._wanted.hex()}; open it "
            "with the model that wrote it, or run `vista refresh` with this model"
        )

    def _with_tails(self, opened: _Generation) -> _Generation:
        stored = opened.manifest.tail_len
        if stored >= self._tail_len:
            return opened
        opened.environment.release()
        raise StoreError(
            f"{self.path} holds tails of {stored} events, the model reads {self._tail_len}; refresh it with this model"
        )

    def _open_generation(self, generation: int) -> _Generation:
        path = environment_path(self.path, generation)
        environment = SharedEnvironment.acquire(path, self._max_readers)
        try:
            manifest = environment.read(lambda transaction: read_manifest(transaction, path))
            return _Generation(environment, manifest, manifest.spec(self._key))
        except BaseException:
            environment.release()
            raise


def _open_pickled(*arguments: Any) -> StoreReader:
    return StoreReader(*arguments)


def read_manifest(transaction: lmdb.Transaction[memoryview], path: Path) -> Manifest:
    """Manifest of a complete generation.

    Raises:
        StoreError: it is not complete, or the manifest is corrupt.
    """
    value = transaction.get(MANIFEST_KEY)
    if value is None or transaction.get(COMPLETE_KEY) is None:
        raise UnfinishedError(f"{path} was never finished; {REMEDY}")
    return Manifest.from_bytes(bytes(value), path)


def _require_kind(keys: list[bytes], manifest: Manifest) -> None:
    prefix = {"int": INT_PREFIX, "str": STR_PREFIX}.get(manifest.user_kind or "")
    if prefix is not None:
        for key in keys:
            if not key.startswith(prefix):
                raise UserKeyError(f"user {user_id(key)!r}: the store's user ids are of type {manifest.user_kind}")


def _assemble(num_users: int, parts: list[tuple[NDArray[np.int64], RawRecords]], spec: RecordSpec) -> StoredBatch:
    rows = _join([_READ_RECORDS * part + positions for part, (positions, _) in enumerate(parts)])
    headers = _join([raw.headers for _, raw in parts])
    if len(parts) == 1 and len(rows) == num_users:
        summary = decode_rows(parts[0][1], spec)
    else:
        summary = np.zeros((num_users, spec.num_tokens, spec.dim), dtype=np.float32)
        for part, (positions, raw) in enumerate(parts):
            summary[_READ_RECORDS * part + positions] = decode_rows(raw, spec)

    def column(name: str, missing: int, dtype: Any = np.int64) -> NDArray[Any]:
        values = np.full(num_users, missing, dtype=dtype)
        values[rows] = headers[name]
        return values

    offsets = np.zeros(num_users + 1, dtype=np.int64)
    np.cumsum(column("tail_length", 0), out=offsets[1:])
    found = np.zeros(num_users, dtype=np.bool_)
    found[rows] = True
    tails = [raw.tail for _, raw in parts]
    return StoredBatch(
        found=found,
        summary=summary,
        tail=Tail(
            _join([tail.items for tail in tails]),
            _join([tail.times for tail in tails]),
            _join([tail.actions for tail in tails]),
            offsets,
        ),
        event_count=column("event_count", 0),
        last_event_ts=column("last_event_ts", NO_TIMESTAMP),
        created_at=column("created_at", NO_TIMESTAMP),
        history_digest=column("history_digest", 0, np.uint64),
    )


def _join(arrays: list[NDArray[Any]]) -> NDArray[Any]:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
