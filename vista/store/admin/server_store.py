"""A store on a server, as operations on whole generations use it (`vista.store.admin.managed_store.ManagedStore`)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TypeVar

from vista.errors import StoreError, StoreUnavailableError
from vista.store.admin.generation_reader import settled
from vista.store.lmdb.permissions import Permissions
from vista.store.manifest import Manifest
from vista.store.remote.generation_copy import GenerationCopy
from vista.store.remote.generation_on_server import GenerationOnServer
from vista.store.remote.locked_server import LockedServer
from vista.store.remote.remote_generation import RemoteGeneration
from vista.store.remote.remote_store import RemoteStore
from vista.store.remote.remote_tombstones import RemoteTombstones
from vista.store.remote.store_url import StoreUrl

T = TypeVar("T")
_SAMPLE = 1000


class ServerStore:
    """Delegates to `RemoteStore` and `LockedServer`."""

    def __init__(self, store: RemoteStore) -> None:
        self.address = store.url
        self._store = store
        self._locked: LockedServer | None = None

    @classmethod
    def connect(cls, url: StoreUrl) -> ServerStore:
        """Connect to the server."""
        return cls(RemoteStore.connect(url))

    @property
    def erased_users(self) -> RemoteTombstones:
        """The store's tombstones."""
        return self._store.tombstones

    def current(self) -> int:
        """Number of the published generation."""
        return self._store.current()

    def published_or_none(self) -> int | None:
        """Like `current`, but None if nothing is published or CURRENT is damaged."""
        return self._store.published_or_none()

    def numbers(self) -> list[int]:
        """Numbers of all generations."""
        return self._store.numbers()

    @contextmanager
    def open(self, number: int, key: bytes | None) -> Iterator[RemoteGeneration]:
        """Open a complete generation."""
        yield self._store.open(number, key)

    def check_structure(self, number: int) -> None:
        """Nothing to do: there are no files."""

    def settled(self, number: int, read: Callable[[], T]) -> T:
        """Result of a function that reads a whole generation; called again if the generation was written meanwhile."""
        name = self._store.names.generation(number).manifest
        return settled(lambda: self._store.server.command("GET", name), read, f"{self.address}: gen-{number}")

    @contextmanager
    def locked(self, permissions: Permissions | None = None) -> Iterator[None]:
        """Context of the one writer."""
        if permissions is None and not self.numbers():
            self.current()  # raises, so that a mistyped name does not lock anything
        self._locked = LockedServer.lock(self.address)
        try:
            yield
        finally:
            self._locked.release()
            self._locked = None

    def number_for(self, manifest: Manifest) -> int:
        """The number of an unfinished generation with the manifest's identity; otherwise as in a folder."""
        return self._writer().number_for(manifest)

    def remove_leftovers(self, except_for: int) -> None:
        """Remove unfinished generations, except for a copy."""
        self._writer().remove_unfinished(except_for)

    def builder(self, manifest: Manifest, key: bytes | None, *, resume: bool) -> GenerationCopy:
        """Make a generation, or resume it."""
        return GenerationCopy(self._writer(), manifest, key, resume=resume)

    def publish(self, number: int, keep: Collection[int]) -> None:
        """Publish a complete generation without the users who were erased, and remove all others except `keep`."""
        self._writer().publish_existing(number)
        self._writer().remove_others((number, *keep))

    def progress(self, number: int) -> tuple[Manifest, bool, int]:
        """Manifest, whether the generation is complete, and the number of records or of users done."""
        generation = GenerationOnServer(self._store, number, None)
        manifest, complete = generation.manifest, generation.complete
        return manifest, complete, manifest.count if complete else generation.read_cursor()

    def expires_at(self, number: int) -> int | None:
        """When the generation expires by the server's clock, in ms; None if it does not."""
        time_ms = int(self._store.server.command("PEXPIRETIME", self._store.names.generation(number).manifest))
        return None if time_ms < 0 else time_ms

    def size_bytes(self, number: int) -> int:
        """Size of records and states, from the mean of the first 1,000 users."""
        server, names = self._store.server, self._store.names.generation(number)
        keys = server.command("ZRANGE", names.users, 0, _SAMPLE - 1)
        if not keys:
            return 0
        sizes = server.pipeline([("STRLEN", name) for name in names.values(keys)])
        return int(sum(sizes) / len(keys) * int(server.command("ZCARD", names.users)))

    def problems(self) -> list[str]:
        """What is wrong with LAST."""
        try:
            self._store.last_complete()
            return []
        except StoreUnavailableError:
            raise
        except StoreError as error:
            return [str(error)]

    def _writer(self) -> LockedServer:
        assert self._locked is not None, "only under `locked`"
        return self._locked
