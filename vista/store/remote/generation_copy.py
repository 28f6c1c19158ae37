"""A generation on a server that is filled with existing records (`NewGeneration` of `whole_generation.py`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from vista.errors import StoreError
from vista.store.format.keys import CURSOR_KEY
from vista.store.manifest import Manifest
from vista.store.remote.locked_server import LockedServer
from vista.store.tally import Tally


class GenerationCopy:
    """Filled in the order of the keys; `finish` does not publish it."""

    def __init__(self, locked: LockedServer, manifest: Manifest, key: bytes | None, *, resume: bool) -> None:
        self.manifest = manifest
        self.spec = manifest.spec(key)
        self.tally = Tally()
        self.last_key = b"u"
        self._locked = locked
        number = manifest.generation
        if number in locked.store.numbers() and not resume:
            locked.remove(number)
        if number in locked.store.numbers():
            self._generation = locked.open(number)
        else:
            empty = Tally()
            self._generation = locked.create(
                dataclasses.replace(
                    manifest, count=empty.count, user_kind=empty.user_kind, records_digest=empty.records_digest
                )
            )

    def put(self, keys: Sequence[bytes], records: Sequence[bytes]) -> None:
        """Append checked records of this generation.

        Raises:
            StoreError: a key is not larger than the last one.
        """
        if keys and not self.last_key < keys[0]:
            raise StoreError(f"{self._locked.path}: keys must ascend, but {keys[0]!r} follows {self.last_key!r}")
        self._generation.put(self._locked.erased_users, keys, records, [], {})
        self.tally.add(keys, records)
        self.last_key = keys[-1]

    def held_batches(self) -> Iterator[tuple[list[bytes], list[bytes]]]:
        """Keys and values that the server holds so far, ascending."""
        return self._generation.records.batches()

    def finish(self) -> Manifest:
        """Read all records back, and mark the generation as complete."""
        source = self.manifest
        cursor = {CURSOR_KEY: b"%d" % source.total_users}
        self._generation.put_manifest(lambda manifest: dataclasses.replace(manifest, refreshed_at=source.refreshed_at))
        self._generation.put(self._locked.erased_users, [], [], [], cursor)
        self.manifest = self._locked.finish(self._generation, self.spec, publish=False)
        return self.manifest

    def close(self) -> None:
        """Nothing to do: the connection is that of the writer."""

    def discard(self) -> None:
        """Remove what was copied."""
        self._locked.remove(self.manifest.generation)
