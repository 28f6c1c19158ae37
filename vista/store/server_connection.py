"""The connection to a Valkey or Redis server, the lock, and the keys of a store there."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from vista.errors import StoreBusyError, StoreError, StoreLockedError, StoreUnavailableError, StoreWriteError, shown
from vista.installation import require_module
from vista.store.keys import COMPLETE_KEY, CURSOR_KEY, ITEMS_KEY, MANIFEST_KEY
from vista.store.layout import PASSWORD_VARIABLE, StoreUrl

T = TypeVar("T")
Command = tuple[Any, ...]
"""Name and arguments."""

_CHANGE_ATTEMPTS = 100
_READ_BYTES = 1 << 18
_DURABLE_S = 30.0

logger = logging.getLogger(__name__)

LOCK_S = 15.0
"""The lock of a killed writer expires after this time. A live one renews it three times as often."""
_POLL_S = 0.1
_NEVER = -1
"""Reply to PTTL for a key that does not expire."""

USERS_KEY = b"!users"
"""Sorted set of the keys of all users who have a record; no user's key begins with an exclamation mark."""
STATE_PREFIX = b"!state:"
"""Comes before a user's key in the name of the user's state."""


class ServerConnection:
    """A pool of connections to one server, with bounded waits, typed errors, and atomic changes.

    It may be shared by threads, and works in forked processes. A command whose connection breaks is retried once over a
    new connection. A command that times out is not retried.
    """

    def __init__(self, url: StoreUrl) -> None:
        self.url = url
        self.checked_at = 0.0
        """Time of the last successful check, by the monotonic clock."""
        redis = require_module("redis", "redis")
        self._errors: Any = redis.exceptions
        pool = redis.ConnectionPool(
            _bounded(redis.SSLConnection if url.tls else redis.Connection),
            host=url.host,
            port=url.port,
            db=url.database,
            username=url.user,
            password=url.password or os.environ.get(PASSWORD_VARIABLE) or None,
            socket_timeout=url.timeout_s,
            socket_connect_timeout=url.timeout_s,
            socket_keepalive=True,
            socket_read_size=_READ_BYTES,
            retry=redis.retry.Retry(redis.backoff.NoBackoff(), 1, (self._errors.ConnectionError,)),
            client_name="vista",
            protocol=2,
            command_packer=_CommandPacker(),
        )
        self._client: Any = redis.Redis.from_pool(pool)

    def check(self) -> None:
        """Check that the server answers, and that it never removes records to save memory. Raises StoreError if it
        would evict records, which readers would take for missing users; or as of `command`."""
        memory = self.command("INFO", "memory")
        policy = str(memory.get("maxmemory_policy", "")) if isinstance(memory, dict) else ""
        if memory and int(memory.get("maxmemory", 0)) and policy.startswith("allkeys"):
            raise StoreError(
                f"{self.url}: the server evicts records when its memory is full (maxmemory-policy {policy}), and "
                "readers could not tell them from missing users; set maxmemory-policy to noeviction"
            )
        self.checked_at = time.monotonic()

    def command(self, *command: Any) -> Any:
        """Run one command.

        Raises:
            StoreWriteError: the server has no memory left.
            StoreUnavailableError: anything else: the server cannot be reached, does not answer in time, refuses the
                password or the command, or is not a Valkey or Redis server. It says nothing about the store.
        """
        with self._typed_errors():
            return self._client.execute_command(*command)

    def pipeline(self, commands: Sequence[Command]) -> list[Any]:
        """Run commands in one round trip, not atomically; errors as of `command`."""
        with self._typed_errors(), self._client.pipeline(transaction=False) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            replies: list[Any] = pipeline.execute()
            return replies

    def change(self, watched: Sequence[bytes], plan: Callable[[], tuple[Sequence[Command], T]]) -> T:
        """Run commands atomically, based on what was read from keys that nobody changed meanwhile.

        Args:
            watched: keys; if one of them changes after `plan` began, nothing is run, and `plan` is called again.
            plan: reads what it needs with the other methods; returns the commands, and a result.

        Raises:
            StoreBusyError: others changed the keys at every attempt.
        """
        for _ in range(_CHANGE_ATTEMPTS):
            pipeline = self._client.pipeline(transaction=True)
            try:
                with self._typed_errors():
                    pipeline.watch(*watched)
                commands, result = plan()
                pipeline.multi()
                for command in commands:
                    pipeline.execute_command(*command)
                with self._typed_errors():
                    try:
                        pipeline.execute()
                    except self._errors.WatchError:
                        continue
                return result
            finally:
                with self._typed_errors():
                    pipeline.reset()  # It waits for a reply too.
        raise StoreBusyError(f"{self.url} is being changed by other processes all the time; try again")

    def make_durable(self, name: bytes) -> None:
        """Wait until all that was written so far is on the server's disk, if the server keeps an append-only file.

        Args:
            name: key to write, because the server waits only for earlier writes of the same connection.

        Raises:
            StoreUnavailableError: it is not on the disk after 30 seconds.
        """
        if not int(self.command("INFO", "persistence").get("aof_enabled", 0)):
            return
        deadline, wait_ms = time.monotonic() + _DURABLE_S, max(int(500 * self.url.timeout_s), 1)
        while time.monotonic() < deadline:
            _, (num_synced, _) = self.pipeline([("SET", name, 1), ("WAITAOF", 1, 0, wait_ms)])
            if num_synced:
                return
        raise StoreUnavailableError(
            f"{self.url}: the server has executed the command, but not synced its append-only file within "
            f"{_DURABLE_S:g} s; check its disk, then rerun the command"
        )

    def close(self) -> None:
        """Close all connections; the next command would open new ones."""
        self._client.close()

    @contextmanager
    def _typed_errors(self) -> Iterator[None]:
        try:
            yield
        except self._errors.WatchError:
            raise
        # ValueError: a number that is not one. RecursionError: a reply that is nested too deeply.
        except (self._errors.RedisError, OSError, ValueError, RecursionError) as error:
            raise self._typed(error) from error

    def _typed(self, error: Exception) -> StoreError:
        reply = str(error).rpartition(" caused error: ")[2]  # without the command, which holds records
        errors, url, reason = self._errors, self.url, shown(reply, 200)
        if isinstance(error, errors.AuthenticationError | errors.AuthorizationError):
            return StoreUnavailableError(
                f"{url}: the server refuses the user or the password; give them in the URL "
                f"(redis://user:password@host), or the password in the environment variable {PASSWORD_VARIABLE}"
            )
        if isinstance(error, errors.NoPermissionError):
            return StoreUnavailableError(
                f"{url}: the server does not permit a command ({reason}); grant it to the user"
            )
        if isinstance(error, errors.TimeoutError):
            return StoreUnavailableError(
                f"{url}: the server did not answer within {url.timeout_s:g} s; check its load, the network, and "
                "whether the port expects TLS (rediss://), or allow more time with ?timeout_s=… at the end of the URL"
            )
        if isinstance(error, errors.ConnectionError | OSError):
            return StoreUnavailableError(
                f"{url}: the server cannot be reached, or closed the connection ({reason}); check that it runs, the "
                "host, the port, and whether it needs TLS (rediss://)"
            )
        if isinstance(error, errors.OutOfMemoryError):
            return StoreWriteError(
                f"{url}: the server has no memory left (maxmemory), so nothing was written; raise maxmemory or remove "
                "other data, then rerun the command to resume: the published generation is unchanged"
            )
        if isinstance(error, errors.InvalidResponse | ValueError | RecursionError):
            return StoreUnavailableError(
                f"{url}: the service there is not a Valkey or Redis server ({reason}); check the host and the port"
            )
        return StoreUnavailableError(
            f"{url}: the server refuses a command ({reason}); check the server and the store's name"
        )


def _bounded(connection: Any) -> Any:
    """A class of connections whose replies must arrive within the time limit as a whole, however slowly bytes come."""

    class BoundedConnection(connection):  # type: ignore[misc]
        def _connect(self) -> _BoundedSocket:
            return _BoundedSocket(super()._connect(), self.socket_timeout)

    return BoundedConnection


class _BoundedSocket:
    """A socket that has received everything by a number of seconds after the last send, or raises a TimeoutError."""

    def __init__(self, connected: socket.socket, timeout_s: float) -> None:
        self._socket, self._timeout_s = connected, timeout_s
        self._deadline = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)

    def sendall(self, data: bytes) -> None:
        self._socket.settimeout(self._timeout_s)
        self._socket.sendall(data)
        self._deadline = time.monotonic() + self._timeout_s

    def recv(self, size: int, *flags: int) -> bytes:
        self._limit_wait()
        return self._socket.recv(size, *flags)

    def recv_into(self, buffer: Any, *sizes: int) -> int:
        self._limit_wait()
        return self._socket.recv_into(buffer, *sizes)

    def _limit_wait(self) -> None:
        if self._socket.gettimeout() != 0:  # otherwise the client only asks whether bytes are waiting
            left_s = self._deadline - time.monotonic()
            if left_s <= 0:
                raise TimeoutError
            self._socket.settimeout(left_s)


class _CommandPacker:
    """Packs each command into one piece, so that a request of many keys wakes the server once."""

    def pack(self, *words: Any) -> list[bytes]:
        """Bytes of a command in the protocol RESP; a name of several words, such as CLIENT SETINFO, is divided."""
        name = str(words[0]).encode().split()
        encoded = [*name, *(word if isinstance(word, bytes) else str(word).encode() for word in words[1:])]
        return [b"".join([b"*%d\r\n" % len(encoded), *(b"$%d\r\n%b\r\n" % (len(word), word) for word in encoded)])]


class ServerLock:
    """The lock of the one writer of a store: a key that expires unless its holder renews it, in a daemon thread.

    The key's value counts the holder's writes, and each write is atomic with a check of this value. So a writer that
    lost the lock while it stood still cannot write, and neither can one whose last writes the server has lost. The lock
    is held from `acquire` to `release`.
    """

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
        """Check that the lock's value, as just read, is what the last write left. Raises StoreLockedError if another
        writer has taken the lock, and StoreWriteError if it expired, or the server has lost writes."""
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


class GenerationKeys:
    """Names of the keys that hold a generation on a server: its prefix, followed by the key that LMDB would hold."""

    def __init__(self, prefix: bytes) -> None:
        self.prefix = prefix
        self.manifest, self.cursor = prefix + MANIFEST_KEY, prefix + CURSOR_KEY
        self.complete = prefix + COMPLETE_KEY
        """A random word that identifies these records, once all of them are written and checked."""
        self.items = prefix + ITEMS_KEY
        """Values of items, if there are any."""
        self.users = prefix + USERS_KEY
        """Keys of all users who have a record."""

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
    """Names of the keys of one store (docs/reference/file-formats.md, "Store on a server"). They have its name in
    braces, so that a cluster keeps them on one node."""

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
