"""The records of one generation on a server."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from vista.errors import RecordError, StoreClosedError
from vista.store.format.field_checks import user_of
from vista.store.format.record_spec import HEADER_BYTES
from vista.store.manifest import Manifest
from vista.store.remote.key_names import GenerationKeys
from vista.store.remote.server_connection import ServerConnection

BATCH_BYTES = 1 << 23
"""About how many bytes one command reads or writes."""
_BATCH_RECORDS = 1024
_EVENT_BYTES = 13


class RemoteRecords:
    """Reads records in bounded batches, one round trip per batch.

    Args:
        stamp: what the generation's key `!complete` holds. A read fails if it has changed, because the records may then
            have been removed. None does not check.
    """

    def __init__(
        self, server: ServerConnection, names: GenerationKeys, manifest: Manifest, stamp: bytes | None
    ) -> None:
        self.stamp = stamp
        self._server = server
        self._names = names
        self._number = manifest.generation
        spec = dataclasses.replace(manifest, key_id=None).spec()
        size = HEADER_BYTES + spec.rows_bytes + spec.user_bytes + _EVENT_BYTES * manifest.tail_len
        self.batch_size = min(max(BATCH_BYTES // size, 1), _BATCH_RECORDS)
        """Most records per read."""

    def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Values of at most `batch_size` keys, unchecked; None for a user without a record.

        Raises:
            StoreClosedError: the generation was removed.
        """
        names = [self._names.record(key) for key in keys]
        values: list[bytes | None] = self._server.command("MGET", *names, self._names.complete)
        self._require_stamp(values.pop())
        return values

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

    def _require_stamp(self, stamp: bytes | None) -> None:
        if self.stamp is not None and stamp != self.stamp:
            raise StoreClosedError(
                f"{self._server.url}: gen-{self._number} was removed from the server while it was in use; open the "
                "store again"
            )
