"""The lock of the one writer of a store on a server: a key that expires unless its holder renews it.

The key's value counts the holder's writes, and each write is atomic with a check of this value. So a writer that lost
the lock while it stood still cannot write, and neither can one whose last writes the server has lost.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time

from vista.errors import StoreError, StoreLockedError, StoreWriteError
from vista.store.remote.server_connection import Command, ServerConnection

LOCK_S = 15.0
"""The lock of a killed writer expires after this time. A live one renews it three times as often."""
_POLL_S = 0.1
_NEVER = -1
"""Reply to PTTL for a key that does not expire."""

logger = logging.getLogger(__name__)


class ServerLock:
    """Held from `acquire` to `release`; a daemon thread renews it."""

    def __init__(self, server: ServerConnection, name: bytes) -> None:
        self.name = name
        self._server = server
        self._token = f"{secrets.token_hex(8)} {socket.gethostname()} {os.getpid()}"
        self._num_writes = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="vista-lock", daemon=True)

    def acquire(self) -> None:
        """Take the lock, waiting for the lock of a killed writer to expire.

        Raises:
            StoreLockedError: another writer renews it, so it is alive; the message has its host and process.
            StoreError: the key does not expire.
        """
        found, expires_ms = None, 0
        while self._server.command("SET", self.name, self._value(), "NX", "PX", _lock_ms()) is None:
            holder, left_ms = self._server.pipeline([("GET", self.name), ("PTTL", self.name)])
            if holder == self._value():
                break  # The reply to the first attempt was lost, and the client had sent the command again.
            if holder is not None:
                if found is not None and (holder != found or left_ms > expires_ms):
                    raise StoreLockedError(f"{self._server.url} is being written by {_holder(holder)}; wait for it")
                if left_ms == _NEVER:
                    raise StoreError(
                        f"{self._server.url}: the lock {self.name.decode()} never expires, so no writer of vista made "
                        "it; remove this key if nothing writes to the store"
                    )
                found, expires_ms = holder, left_ms
                time.sleep(min(_POLL_S, max(left_ms, 1) / 1000))
        self._thread.start()

    def require(self, value: bytes | None) -> None:
        """Check that the lock's value, as just read, is what the last write left.

        Raises:
            StoreLockedError: another writer has taken the lock.
            StoreWriteError: it expired, or the server has lost writes.
        """
        if value == self._value():
            return
        if value is not None and not value.startswith(self._token.encode()):
            raise StoreLockedError(
                f"{self._server.url}: {_holder(value)} has taken over, because this process was suspended for more "
                f"than {LOCK_S:g} s; this process writes nothing more. Wait for the other one, then rerun "
                "the command"
            )
        raise StoreWriteError(
            f"{self._server.url}: the lock expired, or the server lost some of the last writes (a restart, a failover, "
            "or a broken connection); rerun the command to resume: the published generation is unchanged"
        )

    def next_write(self) -> Command:
        """The command that counts a write; run it atomically with the write, then call `wrote`."""
        return "SET", self.name, self._value(1), "PX", _lock_ms()

    def wrote(self) -> None:
        """Expect the value of `next_write` from now on."""
        self._num_writes += 1

    def release(self) -> None:
        """Let other writers in, unless one has taken over; releasing twice is allowed."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        if self._thread.ident is not None and self._thread.is_alive():
            self._thread.join()
        try:
            self._server.change([self.name], lambda: ([("DEL", self.name)] if self._is_ours() else [], None))
        except StoreError as error:
            logger.warning("%s; the lock expires within %g s", error, LOCK_S)

    def _is_ours(self) -> bool:
        value = self._server.command("GET", self.name)
        return value is not None and value.startswith(self._token.encode())

    def _value(self, ahead: int = 0) -> bytes:
        return f"{self._token} {self._num_writes + ahead}".encode()

    def _renew(self) -> None:
        while not self._stopped.wait(LOCK_S / 3):
            try:
                if not self._is_ours():
                    return
                self._server.command("PEXPIRE", self.name, _lock_ms())
            except StoreError as error:
                logger.warning("the writer's lock cannot be renewed: %s", error)


def _lock_ms() -> int:
    return int(1000 * LOCK_S)


def _holder(value: bytes) -> str:
    words = value.decode(errors="replace").split()
    return f"process {words[2]} on {words[1]}" if len(words) == 4 else "another process"
