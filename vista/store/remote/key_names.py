"""Names of a store's keys on a server (docs/reference/file-formats.md, "Store on a server").

All of a store's keys have its name in braces, so that a cluster keeps them on one node.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vista.store.format.keys import COMPLETE_KEY, CURSOR_KEY, MANIFEST_KEY

USERS_KEY = b"!users"
"""Sorted set of the keys of all users who have a record; no user's key begins with an exclamation mark."""
TTL_KEY = b"!ttl"
STATE_PREFIX = b"!state:"
"""Comes before a user's key in the name of the user's state."""


@dataclass(frozen=True, slots=True)
class GenerationKeys:
    """Names of the keys of one generation: its prefix, followed by the key that LMDB would hold."""

    prefix: bytes

    @property
    def manifest(self) -> bytes:
        """Manifest, as in LMDB."""
        return self.prefix + MANIFEST_KEY

    @property
    def cursor(self) -> bytes:
        """Users done, as in LMDB."""
        return self.prefix + CURSOR_KEY

    @property
    def complete(self) -> bytes:
        """A random word that identifies these records, once all of them are written and checked."""
        return self.prefix + COMPLETE_KEY

    @property
    def users(self) -> bytes:
        """Keys of all users who have a record."""
        return self.prefix + USERS_KEY

    @property
    def ttl(self) -> bytes:
        """Time to live in ms, if the generation expires."""
        return self.prefix + TTL_KEY

    @property
    def own(self) -> list[bytes]:
        """All names but those of users."""
        return [self.manifest, self.complete, self.cursor, self.users, self.ttl]

    def record(self, key: bytes) -> bytes:
        """The record of a user."""
        return self.prefix + key

    def state(self, key: bytes) -> bytes:
        """The state of a user, if the generation keeps states."""
        return self.prefix + STATE_PREFIX + key

    def values(self, keys: Iterable[bytes]) -> list[bytes]:
        """The records and the states of users, whether they exist or not."""
        return [name(key) for key in keys for name in (self.record, self.state)]


class KeyNames:
    """Names of the keys of one store."""

    def __init__(self, name: str) -> None:
        self._prefix = b"{%s}:" % name.encode()
        self.current = self._prefix + b"CURRENT"
        self.last = self._prefix + b"LAST"
        self.generations = self._prefix + b"generations"
        """Set of the numbers of all generations, finished or not."""
        self.tombstones = self._prefix + b"tombstones"
        self.writer = self._prefix + b"writer"
        self.synced = self._prefix + b"synced"
        """Written to wait for the server's disk; its value has no meaning."""

    def generation(self, number: int) -> GenerationKeys:
        """Names of the keys of a generation."""
        return GenerationKeys(self._prefix + b"gen-%d:" % number)
