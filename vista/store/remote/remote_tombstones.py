"""Erased users of a store on a server: the set of the digests that the file `tombstones` of a folder would hold."""

from __future__ import annotations

from collections.abc import Sequence

from vista.store.remote.server_connection import Command, ServerConnection
from vista.store.tombstones import digests_of


class RemoteTombstones:
    """See `vista.store.erased_users.ErasedUsers`."""

    def __init__(self, server: ServerConnection, name: bytes) -> None:
        self.name = name
        self._server = server

    def erased(self, keys: Sequence[bytes]) -> list[bool]:
        """Whether each user is erased at the time of the call."""
        return [bool(reply) for reply in self._server.command(*self.question(keys))] if keys else []

    def question(self, keys: Sequence[bytes]) -> Command:
        """The command that replies with a 1 for each of these users, at least one, who is erased."""
        return "SMISMEMBER", self.name, *digests_of(keys).tolist()

    def add(self, keys: Sequence[bytes]) -> None:
        """Record erasures."""
        self._server.command("SADD", self.name, *digests_of(keys).tolist())

    def __len__(self) -> int:
        return int(self._server.command("SCARD", self.name))
