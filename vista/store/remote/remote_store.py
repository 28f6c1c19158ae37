"""A store on a Valkey or Redis server: its generations, CURRENT, and tombstones."""

from __future__ import annotations

import xxhash

from vista.errors import StoreError, StoreUnavailableError, StoreWriteError, UnfinishedError, shown
from vista.files import checked_path
from vista.store.layout import parse_pointer
from vista.store.manifest import Manifest
from vista.store.remote.key_names import KeyNames
from vista.store.remote.record_cache import RecordCache
from vista.store.remote.remote_generation import RemoteGeneration
from vista.store.remote.remote_records import RemoteRecords
from vista.store.remote.remote_tombstones import RemoteTombstones
from vista.store.remote.server_connection import Command, ServerConnection, evicting
from vista.store.remote.store_url import StoreUrl


class RemoteStore:
    """One store on a server (`vista.store.open_generation.Generations`)."""

    def __init__(self, server: ServerConnection, cache: RecordCache | None = None) -> None:
        self.server = server
        self._cache = cache
        self.url = server.url
        self.names = KeyNames(server.url.name)
        self.tombstones = RemoteTombstones(server, self.names.tombstones)

    @classmethod
    def connect(cls, url: StoreUrl, *, cached: bool = False) -> RemoteStore:
        """Connect to the server; errors as of `ServerConnection.check` and `command`.

        Args:
            url: of the store.
            cached: read through the cache that the URL names, if it names one.
        """
        server = ServerConnection(url)
        server.check()
        if not cached or url.cache is None:
            return cls(server)
        folder = checked_path(url.cache, StoreError) / xxhash.xxh3_64_hexdigest(str(url).encode())
        return cls(server, RecordCache(folder.absolute(), int(1e6 * url.cache_mb)))

    def current(self) -> int:
        """Number of the published generation.

        Raises:
            StoreError: nothing is published, or CURRENT is damaged.
        """
        value = self.server.command("GET", self.names.current)
        if value is None:
            raise StoreError(
                f"{self.url} holds no published generation; check the store's name, or run `vista refresh "
                f"store={self.url}` or `vista store copy to={self.url}` first"
            )
        try:
            return parse_pointer(value)
        except ValueError as error:
            raise StoreError(
                f"{self.url}: CURRENT {error}; publish a generation with `vista store rollback store={self.url} to=N`, "
                "or refresh the store again"
            ) from None

    def published_or_none(self) -> int | None:
        """Like `current`, but None if nothing is published or CURRENT is damaged."""
        try:
            return self.current()
        except StoreUnavailableError:
            raise
        except StoreError:
            return None

    def last_complete(self) -> int:
        """The highest generation number that was ever complete; 0 if there was none.

        Raises:
            StoreWriteError: LAST is damaged.
        """
        value = self.server.command("GET", self.names.last)
        try:
            return 0 if value is None else parse_pointer(value)
        except ValueError as error:
            raise StoreWriteError(
                f"{self.url}: LAST {error}; remove the key {self.names.last.decode()} from the server, and numbering "
                f"continues after gen-{max(self.numbers(), default=0)}, the newest generation there"
            ) from None

    def numbers(self) -> list[int]:
        """Numbers of all generations, finished or not, ascending."""
        name = self.names.generations
        return sorted(self.whole_number(member, name) for member in self.server.command("SMEMBERS", name))

    def whole_number(self, value: bytes, name: bytes) -> int:
        """The number above 0 in a key of this name.

        Raises:
            StoreError: there is none.
        """
        if not 0 < len(value) < 19 or not value.isdigit() or not int(value):
            raise StoreError(
                f"{self.url}: the key {name.decode()} holds {shown(value, 40)}; check whether other programs write to "
                "the keys of this store, and mend it, or refresh into a store of another name"
            )
        return int(value)

    def next_number(self, least: int = 1) -> int:
        """A generation number above all existing ones, above all that were ever complete, and not below `least`."""
        return max(least, 1 + max([self.last_complete(), *self.numbers()]))

    def manifest(self, number: int) -> Manifest:
        """Manifest of a complete generation; no key is needed."""
        return self._complete(number)[0]

    def open(self, number: int, key: bytes | None) -> RemoteGeneration:
        """Open a complete generation.

        Raises:
            StoreError: missing, unfinished, damaged, or of another key.
        """
        manifest, stamp = self._complete(number)
        records = RemoteRecords(self.server, self.names.generation(number), manifest, stamp, self._cache)
        return RemoteGeneration(records, manifest, manifest.spec(key), self._current_and_stamp)

    def make_durable(self) -> None:
        """Wait until all that was written so far is on the server's disk, if it keeps an append-only file."""
        self.server.make_durable(self.names.synced)

    def close(self) -> None:
        """Close the connections and the cache."""
        self.server.close()
        if self._cache is not None:
            self._cache.close()

    def _current_and_stamp(self) -> tuple[int, Manifest, bytes]:
        number = self.current()
        return number, *self._complete(number)

    def _complete(self, number: int) -> tuple[Manifest, bytes]:
        """Manifest and stamp of a complete generation."""
        names = self.names.generation(number)
        commands: list[Command] = [("MGET", names.manifest, names.complete), ("PTTL", names.complete)]
        (manifest, stamp), left_ms = self.server.pipeline(commands)
        if manifest is None or stamp is None:
            numbers = self.numbers()
            existing = ", ".join(f"gen-{each}" for each in numbers) or "none"
            if number not in numbers:
                raise StoreError(
                    f"{self.url} has no gen-{number}; name an existing generation: {existing}. If it has expired "
                    "(ttl_days), run a full refresh"
                )
            reason = "was never finished" if manifest is not None else "has expired (ttl_days) or was removed"
            raise UnfinishedError(f"{self.url}: gen-{number} {reason}; refresh the store again")
        if left_ms >= 0:
            self.require_no_eviction()
        return self.parsed(manifest, number), stamp

    def require_no_eviction(self) -> None:
        """Raise StoreError if the server could evict the records of a generation that expires."""
        if self.server.evicts_expiring:
            raise evicting(self.url, "volatile-…")

    def parsed(self, value: bytes, number: int) -> Manifest:
        """A generation's manifest from its bytes.

        Raises:
            StoreError: it is damaged.
        """
        manifest = Manifest.from_bytes(value, self.url)
        if manifest.generation != number:
            raise StoreError(
                f"{self.url}: the manifest of gen-{number} is that of gen-{manifest.generation}; publish another "
                "generation (`vista store rollback`), or refresh the store again"
            )
        return manifest
