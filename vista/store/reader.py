"""Read side of a summary store, for many processes and threads at once.

The writer never blocks a reader, and a call never mixes generations. B users of a request, K summary tokens, d model
width.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vista.errors import (
    RecordContentsError,
    StoreClosedError,
    StoreError,
    StoreUnavailableError,
    SummarizerMismatchError,
    UserKeyError,
)
from vista.store.backend import open_backend
from vista.store.keys import INT_PREFIX, STR_PREFIX, user_id, user_keys
from vista.store.layout import StoreUrl, store_address
from vista.store.lmdb_environment import exclusive
from vista.store.manifest import Manifest
from vista.store.record import StoredBatch, assembled
from vista.store.record_spec import TailColumn, UserColumn
from vista.store.state_record import StateArrays

if TYPE_CHECKING:
    from vista.store.backend import Generation

_OPEN_ATTEMPTS = 5
logger = logging.getLogger(__name__)


class StoreReader:
    """One published generation of a store; `reload` follows CURRENT. Safe with threads, after fork, and to pickle."""

    def __init__(
        self,
        path: Path | StoreUrl,
        summarizer_id: bytes | None,
        key: bytes | None,
        tail_len: int,
        tail_columns: Sequence[TailColumn],
        user_columns: Sequence[UserColumn],
        generation: int | None = None,
    ) -> None:
        self.path = path
        self._number = generation
        self._backend = open_backend(path, cached=True)
        self._wanted = summarizer_id
        self._key = key
        self._tail_len, self._tail_columns, self._user_columns = tail_len, tail_columns, user_columns
        self._opened: Generation | None = self._open()

    @classmethod
    def open(
        cls,
        path: str | Path | StoreUrl,
        *,
        summarizer_id: bytes | None = None,
        key: bytes | None = None,
        tail_len: int = 0,
        tail_columns: Sequence[TailColumn] = (),
        user_columns: Sequence[UserColumn] = (),
        generation: int | None = None,
    ) -> StoreReader:
        """Open the generation that CURRENT names, or another one.

        Args:
            path: the store's folder, or its URL (redis://host:6379/name) if a Valkey or Redis server holds it.
            summarizer_id: 32 bytes, to refuse records of another summarizer. If CURRENT names a generation of another
                one, but an earlier generation matches (a two-step rollout), the matching one is opened.
            key: 32 bytes, to refuse records that were not written with this key (`vista.store.record_spec.read_key`).
            tail_len: events of a tail that the model reads, to refuse generations with shorter tails.
            tail_columns: features of these events that the model reads, to refuse generations without them.
            user_columns: the same for features of users.
            generation: number of the generation to open, to which `reload` keeps; None follows CURRENT.

        Raises:
            SummarizerMismatchError: no generation is of that summarizer; the message names both summarizers.
            RecordContentsError: the generation's records lack a part that the model reads.
            StoreError: missing, unpublished, truncated, not a store, or of another key; the message has the remedy.
        """
        return cls(store_address(path), summarizer_id, key, tail_len, tail_columns, user_columns, generation)

    @property
    def manifest(self) -> Manifest:
        """Manifest of the opened generation."""
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
            user_ids: B ids as in the log; duplicates and unknown ids are allowed.

        Raises:
            UserKeyError: an id cannot be a key, or is an integer although the store's ids are strings (or vice versa).
            RecordError: a record is corrupt; the message names the user.
            StoreError: the store is closed or cannot be read.
        """
        keys = user_keys(user_ids)
        while True:
            opened = self._current()
            _require_kind(keys, opened.manifest)
            try:
                parts = opened.read(keys)
            except StoreClosedError:
                if self._opened is opened and not self.reload():
                    raise
                continue  # It was removed, or another thread reloaded: read the whole batch from the new generation.
            return assembled(len(keys), parts, opened.spec)

    def states(self, user_ids: Sequence[int] | Sequence[str]) -> tuple[NDArray[np.int64], StateArrays] | None:
        """Rows of the users who have a state, and these states; None if the generation keeps no states.

        The states are open only during the call, so that scorers never map them.

        Raises:
            RecordError: a state is damaged; the message names the user.
        """
        return self._current().states(user_keys(user_ids))

    def keys(self) -> Iterator[int | str]:
        """User ids of all records of one generation, in the order of their keys, read in short transactions.

        Raises:
            RecordError, StoreError: a key, or the order of the keys, is damaged.
        """
        for keys in self._current().key_batches():
            yield from map(user_id, keys)

    def reload(self) -> bool:
        """Follow CURRENT to another generation; the old one is closed after its last transaction.

        Records that an incremental refresh writes are read even without a reload; the manifest is not.

        Returns:
            Whether the generation changed. If CURRENT names one of another summarizer than requested, it does not: the
            old generation stays in service, and a warning is logged.

        Raises:
            StoreError: CURRENT or its generation is damaged, or the store is closed; the old generation stays open.
        """
        before = self._current()
        if before.is_published():
            self._reread_manifest(before)
            return False
        opened = self._open()
        if opened.is_same(before):
            opened.release()
            return False
        self._replace(opened)
        return True

    def close(self) -> None:
        """Close the generation; closing twice is allowed."""
        self._replace(None)
        self._backend.close()

    def __enter__(self) -> StoreReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        reads = self._tail_len, self._tail_columns, self._user_columns
        return StoreReader, (self.path, self._wanted, self._key, *reads, self._number)

    def _current(self) -> Generation:
        opened = self._opened
        if opened is None:
            raise StoreError(f"{self.path} is closed; open the store again")
        try:
            opened.reopen()
        except StoreError:
            opened = self._open()  # It was removed after the parent opened it: follow CURRENT.
            self._replace(opened)
        return opened

    def _replace(self, opened: Generation | None) -> None:
        with exclusive():
            old, self._opened = self._opened, opened
        if old is not None:
            old.release()

    def _reread_manifest(self, opened: Generation) -> None:
        """Read what an incremental refresh has changed in place."""
        reread = opened.reread()
        with exclusive():
            if self._opened is opened:
                self._opened = reread

    def _open(self) -> Generation:
        if self._number is not None:
            numbers = self._backend.numbers()
            if self._number not in numbers:
                existing = ", ".join(f"gen-{number}" for number in numbers) or "none"
                raise StoreError(f"{self.path} has no gen-{self._number}; existing generations: {existing}")
            return self._matching(self._number)
        generation = self._backend.current()
        for _ in range(_OPEN_ATTEMPTS):
            try:
                return self._matching(generation)
            except StoreError:
                if self._backend.current() == generation:
                    raise
            generation = self._backend.current()  # CURRENT changed since it was read.
        raise StoreError(f"{self.path}: CURRENT changes faster than its generations can be opened; try again")

    def _matching(self, current: int) -> Generation:
        newest = self._backend.open(current, self._key)
        if self._wanted is None or newest.spec.summarizer_id == self._wanted:
            return self._with_contents(newest)
        current_id = newest.manifest.summarizer_id
        newest.release()
        others = self._backend.numbers() if self._number is None else []
        for generation in reversed([number for number in others if number < current]):
            try:
                older = self._backend.open(generation, self._key)
            except StoreUnavailableError:
                raise
            except StoreError:
                continue  # unfinished or damaged
            if older.spec.summarizer_id == self._wanted:
                logger.warning(
                    "%s: CURRENT is gen-%d of summarizer %s; opening gen-%d of the requested %s",
                    self.path, current, current_id, generation, self._wanted.hex(),
                )  # fmt: skip
                return self._with_contents(older)
            older.release()
        raise SummarizerMismatchError(
            f"{self.path} was written by summarizer {current_id}, but the model's is {self._wanted.hex()}; open it "
            "with the model that wrote it, or run `vista refresh` with this model"
        )

    def _with_contents(self, opened: Generation) -> Generation:
        """The generation, if its records hold what the model reads."""
        held, stored = opened.spec, opened.manifest.tail_len
        lacking = [column.name for column in self._tail_columns if column not in held.tail_columns]
        unlike = [column.name for column in self._user_columns if column not in held.user_columns]
        if stored >= self._tail_len and not lacking and not unlike:
            return opened
        opened.release()
        if lacking:
            raise RecordContentsError(
                f"{self.path}: its tails do not hold the event features {', '.join(lacking)} as the model reads them; "
                "refresh the store with this model"
            )
        if unlike:
            raise RecordContentsError(
                f"{self.path}: its records do not hold the user features {', '.join(unlike)} as the model reads them; "
                "run a full refresh with this model"
            )
        raise RecordContentsError(
            f"{self.path} holds tails of {stored} events, but the model reads {self._tail_len}; refresh the store with "
            "this model"
        )


def published_manifest(path: str | Path | StoreUrl) -> Manifest:
    """Manifest of the published generation; no key is needed.

    Raises:
        StoreError: nothing is published, or it is damaged.
    """
    backend = open_backend(path)
    try:
        return backend.manifest(backend.current())
    finally:
        backend.close()


def _require_kind(keys: list[bytes], manifest: Manifest) -> None:
    prefix = {"int": INT_PREFIX, "str": STR_PREFIX}.get(manifest.user_kind or "")
    if prefix is not None:
        for key in keys:
            if not key.startswith(prefix):
                raise UserKeyError(
                    f"user {user_id(key)!r}: the user ids of the store are of type {manifest.user_kind}; pass ids of "
                    "that type"
                )
