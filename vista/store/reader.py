"""Read side of a summary store, for many processes and threads at once.

The writer never blocks a reader, and a call never mixes generations. B users of a request, K summary tokens, d model
width.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int, offsets_of
from vista.counters.counters import CounterCodes
from vista.errors import (
    RecordContentsError,
    StoreClosedError,
    StoreError,
    StoreUnavailableError,
    SummarizerMismatchError,
    UserKeyError,
)
from vista.log.histories import NO_TIMESTAMP, ranges
from vista.store.backend import open_backend
from vista.store.folder_generation import exclusive
from vista.store.item_values import ItemValues
from vista.store.keys import INT_PREFIX, STR_PREFIX, common_kind, user_id, user_keys
from vista.store.layout import StoreUrl, complete_shards, shards_in, shards_of, store_address, stores_in
from vista.store.manifest import Manifest
from vista.store.record import RecordSpec, Tail, TailColumn, UserColumn
from vista.store.record_reading import RawRecords, StoredRecord
from vista.store.state_record import StateArrays

if TYPE_CHECKING:
    from vista.store.backend import Generation


_OPEN_ATTEMPTS = 5
logger = logging.getLogger(__name__)


class StoreReader:
    """Reads a store: the generation that CURRENT named when it was opened, or at the last `reload`.

    Safe with threads, after fork, and to pickle.
    """

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
        self._backend = open_backend(path)
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
            key: 32 bytes (`vista.store.record_encoding.read_key`), to refuse records that were not written with it.
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

    def record(
        self, user_ids: Sequence[int] | Sequence[str] | NDArray[Any], wanted: Callable[[RecordSpec], bool]
    ) -> StoredRecord | None:
        """The record of one user, unchecked; None without one, or if records of its generation are not `wanted`.

        Raises:
            ValueError: there is not one id; and what `get_many` raises."""
        keys = user_keys(user_ids)
        if len(keys) != 1:
            raise ValueError(f"user_ids: needs one id, got {len(keys)}")
        while True:
            opened = self._current()
            _require_kind(keys, opened.manifest)
            if not wanted(opened.spec):
                return None
            try:
                value = opened.value(keys[0])
            except StoreClosedError:
                if self._opened is opened and not self.reload():
                    raise
                continue
            return None if value is None else StoredRecord(value, keys[0], opened.spec)

    def states(self, user_ids: Sequence[int] | Sequence[str]) -> tuple[NDArray[np.int64], StateArrays] | None:
        """Rows of the users who have a state, and these states; None if the generation keeps no states.

        The states are open only during the call, so that scorers never map them.

        Raises:
            RecordError: a state is damaged; the message names the user.
        """
        return self._current().states(user_keys(user_ids))

    def item_values(self) -> ItemValues | None:
        """What the generation knows of items; None if its refresh wrote nothing, because the model reads nothing.

        Raises:
            StoreError: it is damaged.
        """
        value = self._current().items()
        return None if value is None else ItemValues.from_bytes(value, self.path)

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
        fitting = next((number for number in others if number > current and self._is_wanted(number)), None)
        remedy = (
            "open it with the model that wrote it, or run `vista refresh` with this model"
            if fitting is None
            else f"gen-{fitting} is this model's, but not published yet: run `vista store rollback to={fitting}`"
        )
        raise SummarizerMismatchError(
            f"{self.path} was written by summarizer {current_id}, but the model's is {self._wanted.hex()}; {remedy}"
        )

    def _is_wanted(self, number: int) -> bool:
        try:
            return bytes.fromhex(self._backend.manifest(number).summarizer_id) == self._wanted
        except StoreUnavailableError:
            raise
        except StoreError:
            return False  # unfinished or damaged

    def _with_contents(self, opened: Generation) -> Generation:
        """The generation, if its records hold what the model reads."""
        held, stored = opened.spec, opened.manifest.tail_len
        lacking = [column.name for column in self._tail_columns if column not in held.tail_columns]
        unlike = [column.name for column in self._user_columns if column not in held.user_columns]
        if lacking:
            problem = (
                f": its tails do not hold the event features {', '.join(lacking)} as the model reads them; refresh the "
                "store with this model"
            )
        elif unlike:
            problem = (
                f": its records do not hold the user features {', '.join(unlike)} as the model reads them; run a full "
                "refresh with this model"
            )
        elif stored < self._tail_len:
            problem = (
                f" holds tails of {stored} events, but the model reads {self._tail_len}; refresh the store with this "
                "model"
            )
        else:
            return opened
        opened.release()
        raise RecordContentsError(f"{self.path}{problem}")


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


CLOCK_SKEW_MS = 300_000
"""A record dated further ahead was written by a wrong clock, so its age is unknown."""


@dataclass(frozen=True, slots=True)
class StoredBatch:
    """Records of B users, in the order of the request."""

    found: NDArray[np.bool_]
    """[B]; False for users without a record."""
    summary: NDArray[np.float32]
    """[B, K, d]; zeros if not found."""
    tail: Tail
    """Tails as of the refresh; empty if not found."""
    event_count: NDArray[np.int64]
    """[B] events that the record covers; 0 if not found."""
    last_event_ts: NDArray[np.int64]
    """[B] ms; NO_TIMESTAMP if not found or without events."""
    created_at: NDArray[np.int64]
    """[B] start of the refresh, ms; NO_TIMESTAMP if not found."""
    history_digest: NDArray[np.uint64]
    """[B]; 0 if not found."""
    generation: int
    """Number of the store's generation that was read; of a sharded store, the oldest one."""
    features: dict[str, NDArray[Any]] = dataclasses.field(default_factory=dict)
    """Of the users, [B] by name: the model's codes int32, or float32 numbers; -1 or NaN if missing, or not found."""
    counters: tuple[CounterCodes, ...] = ()
    """Counters as of the refresh, one per field of their spec; without keys if not found. Empty if the store keeps no
    counters."""

    def expired(self, now_ms: int, refreshed_at: int, max_age_ms: int) -> NDArray[np.bool_]:
        """Whether each user's record is older than `max_age_ms`, or dated in the future, [B].

        Args:
            now_ms: the current time.
            refreshed_at: of the manifest; a user without new events is as current as the last refresh.
            max_age_ms: the limit; a record of exactly this age is not expired.
        """
        age = now_ms - np.maximum(self.created_at, refreshed_at)
        return self.found & ((age > max_age_ms) | (age < -CLOCK_SKEW_MS))

    def take(self, rows: Int) -> StoredBatch:
        """The batch of the users at `rows` [N], in this order; a row of -1 stands for a user without a record."""
        present = np.flatnonzero(rows >= 0)
        chosen: Int | slice = rows[present]
        if len(present) == len(self.found) and (np.diff(rows[present]) == 1).all():
            chosen = slice(None)  # All users, in order: nothing is copied twice.

        def column(values: NDArray[Any], missing: float = 0) -> NDArray[Any]:
            taken = np.full((len(rows), *values.shape[1:]), missing, values.dtype)
            taken[present] = values[chosen]
            return taken

        def packed(offsets: Int) -> tuple[Int | slice, Int]:
            """Positions of what the users have of packed values, and its offsets."""
            lengths = column(np.diff(offsets))
            places = chosen if isinstance(chosen, slice) else ranges(column(offsets[:-1]), lengths)
            return places, offsets_of(lengths)

        counters = []
        for one in self.counters:
            index, offsets = packed(one.offsets)
            clock = column(one.clock, NO_TIMESTAMP)
            counters.append(CounterCodes(one.spec, one.key[index], one.codes[index], offsets, clock))
        return StoredBatch(
            found=column(self.found),
            summary=column(self.summary),
            tail=self.tail.select(*packed(self.tail.offsets)),
            event_count=column(self.event_count),
            last_event_ts=column(self.last_event_ts, NO_TIMESTAMP),
            created_at=column(self.created_at, NO_TIMESTAMP),
            history_digest=column(self.history_digest),
            generation=self.generation,
            features={name: column(values, _missing(values)) for name, values in self.features.items()},
            counters=tuple(counters),
        )

    def spread(self, rows: Int, num_users: int) -> StoredBatch:
        """A batch of `num_users` with these records at `rows`, and no records elsewhere."""
        places = np.full(num_users, -1, np.int64)
        places[rows] = np.arange(len(rows))
        return self.take(places)

    def without(self, users: NDArray[np.bool_]) -> StoredBatch:
        """The same batch, as if the marked users [B] had no record."""
        return self.take(np.where(users, -1, np.arange(len(users)))) if users.any() else self

    @staticmethod
    def concatenated(batches: Sequence[StoredBatch]) -> StoredBatch:
        """The users of all batches, end to end; at least one batch, all with the same features and counters."""

        def column(name: str) -> NDArray[Any]:
            return np.concatenate([getattr(batch, name) for batch in batches])

        return StoredBatch(
            found=column("found"),
            summary=column("summary"),
            tail=Tail.concatenated([batch.tail for batch in batches]),
            event_count=column("event_count"),
            last_event_ts=column("last_event_ts"),
            created_at=column("created_at"),
            history_digest=column("history_digest"),
            generation=min(batch.generation for batch in batches),
            features={name: _join([batch.features[name] for batch in batches]) for name in batches[0].features},
            counters=tuple(map(CounterCodes.concatenated, zip(*(batch.counters for batch in batches), strict=True))),
        )


def _missing(values: NDArray[Any]) -> float:
    """How a column of features says that a value is missing."""
    return np.nan if values.dtype.kind == "f" else -1


def assembled(num_users: int, parts: Sequence[tuple[Int, RawRecords]], spec: RecordSpec) -> StoredBatch:
    """The batch of B = `num_users` users.

    Args:
        num_users: B.
        parts: positions in the batch, ascending, and the records of the users there; at least one part.
        spec: what the records share.
    """
    rows, headers = _join([positions for positions, _ in parts]), _join([raw.headers for _, raw in parts])
    is_complete = len(rows) == num_users
    if is_complete and len(parts) == 1:
        summary = parts[0][1].summary
    else:
        summary = np.zeros((num_users, spec.num_tokens, spec.dim), np.float32)
        for positions, raw in parts:
            summary[positions] = raw.summary
    event_count, last_event_ts, created_at = (
        headers[name].astype(np.int64) for name in ("event_count", "last_event_ts", "created_at")
    )
    found = StoredBatch(
        found=np.ones(len(rows), np.bool_),
        # Of several parts, it is already in its place.
        summary=summary if is_complete else np.empty((len(rows), 0, spec.dim), np.float32),
        tail=Tail.concatenated([raw.tail for _, raw in parts]),
        event_count=event_count,
        last_event_ts=last_event_ts,
        created_at=created_at,
        history_digest=headers["history_digest"].astype(np.uint64),
        generation=spec.generation,
        features={name: _join([raw.features[name] for _, raw in parts]) for name in parts[0][1].features},
        counters=tuple(map(CounterCodes.concatenated, zip(*(raw.counters for _, raw in parts), strict=True))),
    )
    return found if is_complete else replace(found.spread(rows, num_users), summary=summary)


def _join(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


_SHARED_FIELDS = ("summarizer_id", "num_tokens", "dim", "until", "counters", "user_columns", "tail_columns")
"""Fields of manifests that all shards have in common."""


def user_kind(store: str | Path) -> str | None:
    """Type of the user ids of a store, sharded or not: int, str or mixed; None without users."""
    return common_kind(published_manifest(root).user_kind for root in stores_in(store))


def open_store(
    path: str | Path | StoreUrl,
    *,
    summarizer_id: bytes | None = None,
    key: bytes | None = None,
    tail_len: int = 0,
    tail_columns: Sequence[TailColumn] = (),
    user_columns: Sequence[UserColumn] = (),
    generation: int | None = None,
) -> StoreReader | ShardedReader:
    """Open a store, sharded or not, or on a server; arguments and errors as of `StoreReader.open`.

    Raises:
        StoreError: a generation of a sharded store is asked for, whose shards count theirs separately.
    """
    address = store_address(path)
    wanted: dict[str, Any] = {"summarizer_id": summarizer_id, "key": key, "tail_len": tail_len}
    wanted |= {"tail_columns": tail_columns, "user_columns": user_columns}
    if isinstance(address, StoreUrl) or not shards_in(address):
        return StoreReader.open(address, generation=generation, **wanted)
    if generation is not None:
        raise StoreError(f"{address} is sharded, and each shard counts its own generations; open one shard's folder")
    return ShardedReader(address, **wanted)


class ShardedReader:
    """All shards of a store, read as one; it has the methods of `StoreReader` except `states`.

    Args:
        path: the store's folder.
        wanted: as of `StoreReader.open`.

    Raises:
        StoreError: a shard is missing, or the shards are of different counts or hold different things; and as
            `StoreReader.open`.
    """

    def __init__(self, path: Path, **wanted: Any) -> None:
        self.path = path
        shards = complete_shards(path)
        if not shards:
            raise StoreError(f"{path} holds no shards; check the path")
        self._readers: list[StoreReader] = []
        try:
            for shard in shards:
                self._readers.append(StoreReader.open(shard.path(path), **wanted))
            first = self._readers[0].manifest
            for reader in self._readers[1:]:
                for field in _SHARED_FIELDS:
                    if getattr(reader.manifest, field) != getattr(first, field):
                        raise StoreError(
                            f"{reader.path}: {field} differs from that of shard 0; refresh all shards alike"
                        )
        except BaseException:
            self.close()
            raise

    @property
    def manifest(self) -> Manifest:
        """Manifest for all shards together: the oldest generation and refresh, the shortest tail, the sum of counts."""
        manifests = [reader.manifest for reader in self._readers]
        return dataclasses.replace(
            manifests[0],
            generation=min(manifest.generation for manifest in manifests),
            created_at=min(manifest.created_at for manifest in manifests),
            refreshed_at=min(manifest.refreshed_at for manifest in manifests),
            applied_segment=min(manifest.applied_segment for manifest in manifests),
            tail_len=min(manifest.tail_len for manifest in manifests),
            total_users=sum(manifest.total_users for manifest in manifests),
            count=sum(manifest.count for manifest in manifests),
            user_kind=common_kind(manifest.user_kind for manifest in manifests),
        )

    @property
    def generation(self) -> int:
        """The oldest of the shards' generations."""
        return self.manifest.generation

    @property
    def summarizer_id(self) -> bytes:
        """SHA-256 of the summarizer that wrote all shards, 32 bytes."""
        return self._readers[0].summarizer_id

    def __len__(self) -> int:
        return sum(map(len, self._readers))

    def get_many(self, user_ids: Sequence[int] | Sequence[str] | NDArray[Any]) -> StoredBatch:
        """Records of a batch of users; as `StoreReader.get_many`."""
        ids = user_ids if isinstance(user_ids, np.ndarray) else np.array(list(user_ids), dtype=object)
        count = len(self._readers)
        owner = shards_of(user_keys(user_ids), count)
        order = np.argsort(owner, kind="stable")
        bounds = np.searchsorted(owner[order], np.arange(count + 1))
        users_of = [ids[order[bounds[index] : bounds[index + 1]]].tolist() for index in range(count)]
        # Shards without a user of the batch are read too, for the shapes and errors of an empty batch.
        batches = [reader.get_many(users) for reader, users in zip(self._readers, users_of, strict=True)]
        return StoredBatch.concatenated(batches).take(np.argsort(order, kind="stable"))

    def record(
        self, user_ids: Sequence[int] | Sequence[str] | NDArray[Any], wanted: Callable[[RecordSpec], bool]
    ) -> StoredRecord | None:
        """As `StoreReader.record`."""
        owner = shards_of(user_keys(user_ids), len(self._readers))
        return self._readers[int(owner[0])].record(user_ids, wanted)

    def item_values(self) -> ItemValues | None:
        """Those of the first shard, as all shards are of one log; see `StoreReader.item_values`."""
        return self._readers[0].item_values()

    def keys(self) -> Iterator[int | str]:
        """User ids of all records, shard by shard."""
        return chain.from_iterable(reader.keys() for reader in self._readers)

    def reload(self) -> bool:
        """Follow every shard to its newest generation; whether at least one changed."""
        changed = [reader.reload() for reader in self._readers]  # all of them, whether or not the first changes
        return any(changed)

    def close(self) -> None:
        """Close all shards."""
        for reader in self._readers:
            reader.close()

    def __enter__(self) -> ShardedReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
