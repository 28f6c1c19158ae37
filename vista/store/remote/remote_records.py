"""The records of one generation on a server."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from vista.errors import RecordError, StoreClosedError
from vista.store.format.field_checks import user_of
from vista.store.format.record_spec import HEADER_BYTES
from vista.store.format.state_record import StateSpec, decode_states
from vista.store.manifest import CHECKSUM_DIGITS, Manifest
from vista.store.open_generation import FoundStates
from vista.store.remote.key_names import GenerationKeys
from vista.store.remote.record_cache import RecordCache
from vista.store.remote.server_connection import ServerConnection

BATCH_BYTES = 1 << 23
"""About how many bytes one command reads or writes."""
_BATCH_RECORDS = 1024
_EVENT_BYTES = 13
_PART_BYTES = 1 << 20
"""Fits the processor's cache, so that the copy of large records costs little after their arrival."""


class RemoteRecords:
    """Reads records in bounded batches, one round trip per batch.

    Args:
        cache: of this host, for readers; None always asks the server.
        stamp: what the generation's key `!complete` holds. A read fails if it has changed, because the records may then
            have been removed. None does not check.
    """

    def __init__(
        self,
        server: ServerConnection,
        names: GenerationKeys,
        manifest: Manifest,
        stamp: bytes | None,
        cache: RecordCache | None = None,
    ) -> None:
        self.stamp = stamp
        self._cache = cache
        self._version = b""
        """Of the records, as last seen: the stamp and the checksum of the manifest, which every write changes."""
        self._server = server
        self._names = names
        self._number = manifest.generation
        spec = dataclasses.replace(manifest, key_id=None).spec()
        size = HEADER_BYTES + spec.rows_bytes + spec.user_bytes + _EVENT_BYTES * manifest.tail_len
        self.batch_size = min(max(BATCH_BYTES // size, 1), _BATCH_RECORDS)
        """Most records per read."""
        self.part_size = max(_PART_BYTES // size, 1)
        """Records that are checked and copied at once."""

    def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Values of at most `batch_size` keys, unchecked; None for a user without a record.

        Raises:
            StoreClosedError: the generation was removed.
        """
        return self.get_from_server(keys) if self._cache is None else self._get_cached(self._cache, keys)

    def get_from_server(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """As `get`, without the cache."""
        return self._values([self._names.record(key) for key in keys])

    def states(self, keys: Sequence[bytes], spec: StateSpec) -> FoundStates:
        """Rows of the keys that have a state, and these states.

        Raises:
            RecordError: a state is damaged; the message names the user.
            StoreClosedError: the generation was removed.
        """
        rows: list[int] = []
        values: list[bytes] = []
        for first, part in self._state_parts(keys, spec):
            rows += [row for row, value in enumerate(part, first) if value is not None]
            values += [value for value in part if value is not None]
        return np.array(rows, np.int64), decode_states(values, [keys[row] for row in rows], spec)

    def state_batches(self, spec: StateSpec) -> Iterator[tuple[list[bytes], list[bytes]]]:
        """Keys and states of all users who have one, ascending; errors as of `states`."""
        for keys in self.key_batches():
            for first, part in self._state_parts(keys, spec):
                found = {keys[row]: value for row, value in enumerate(part, first) if value is not None}
                decode_states([*found.values()], [*found], spec)
                yield [*found], [*found.values()]

    def forget_cached(self, keys: Sequence[bytes]) -> bool:
        """Remove users from the cache, because a record is damaged; False if there is no cache."""
        if self._cache is None:
            return False
        self._cache.forget(self._version, keys)
        return True

    def key_batches(self, after: bytes = b"u") -> Iterator[list[bytes]]:
        """Keys beyond `after` of the users who have a record, ascending."""
        while True:
            listed = ("ZRANGEBYLEX", self._names.users, b"(" + after, "+", "LIMIT", 0, self.batch_size)
            keys, stamp = self._server.pipeline([listed, ("GET", self._names.complete)])
            self._require_stamp(stamp)
            if not keys:
                return
            after = keys[-1]
            yield keys

    def batches(self, after: bytes = b"u") -> Iterator[tuple[list[bytes], list[bytes]]]:
        """Keys beyond `after` and their unchecked values, ascending.

        Raises:
            RecordError: the server has lost a record.
        """
        for keys in self.key_batches(after):
            values = self.get(keys)
            missing = [key for key, value in zip(keys, values, strict=True) if value is None]
            if missing:  # Erased since they were listed, or lost.
                scores = self._server.command("ZMSCORE", self._names.users, *missing)
                lost = [key for key, score in zip(missing, scores, strict=True) if score is not None]
                if lost:
                    raise RecordError(
                        f"{self._server.url}: gen-{self._number} lists {user_of(lost[0])}, but the server has lost the "
                        "record; check that nothing else deletes its keys, then refresh the store again"
                    )
            present = [(key, value) for key, value in zip(keys, values, strict=True) if value is not None]
            if present:
                yield [key for key, _ in present], [value for _, value in present]

    def _state_parts(self, keys: Sequence[bytes], spec: StateSpec) -> Iterator[tuple[int, list[bytes | None]]]:
        """The unchecked states of some users in bounded parts, each with the position of its first user."""
        size = max(BATCH_BYTES // spec.least_bytes, 1)
        for first in range(0, len(keys), size):
            yield first, self._values([self._names.state(key) for key in keys[first : first + size]])

    def _values(self, names: Sequence[bytes]) -> list[bytes | None]:
        values: list[bytes | None] = self._server.command("MGET", *names, self._names.complete)
        self._require_stamp(values.pop())
        return values

    def _get_cached(self, cache: RecordCache, keys: Sequence[bytes]) -> list[bytes | None]:
        """One round trip, which also tells whether the cached records are still those of the server."""
        version = self._version
        held = cache.get(version, keys)
        while True:
            wanted = [key for key, value in zip(keys, held, strict=True) if value is None]
            # The version first: records that are read after it may be newer, but never older.
            checksum, values = self._server.pipeline(
                [
                    ("GETRANGE", self._names.manifest, 0, CHECKSUM_DIGITS - 1),
                    ("MGET", *map(self._names.record, wanted), self._names.complete),
                ]
            )
            stamp = values.pop()
            self._require_stamp(stamp)
            seen, version = version, stamp + checksum
            if seen == version or len(wanted) == len(keys):
                break
            held = [None] * len(keys)  # Records have changed since they were cached.
        fetched = dict(zip(wanted, values, strict=True))
        self._version = version  # Other threads may set a newer one, to which these records do not belong.
        cache.put(version, {key: value for key, value in fetched.items() if value is not None})
        return [fetched.get(key) if value is None else value for key, value in zip(keys, held, strict=True)]

    def _require_stamp(self, stamp: bytes | None) -> None:
        if self.stamp is not None and stamp != self.stamp:
            raise StoreClosedError(
                f"{self._server.url}: gen-{self._number} was removed from the server while it was in use; open the "
                "store again"
            )
