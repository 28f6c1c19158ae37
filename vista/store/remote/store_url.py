"""URLs of remote stores: redis://[user[:password]@]host[:port]/[database/]name."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, unquote, urlsplit

from vista.errors import ConfigError

PASSWORD_VARIABLE = "VISTA_REDIS_PASSWORD"
DEFAULT_PORT = 6379
DEFAULT_TIMEOUT_S = 5.0
EXAMPLE = "redis://host:6379/mine, or rediss://host:6379/mine with TLS"

_SCHEME = re.compile(r"(rediss?):/+")  # pathlib makes one slash out of two
_NAME = re.compile(r"[A-Za-z0-9._-]{1,100}")


@dataclass(frozen=True, slots=True)
class StoreUrl:
    """A store on a Valkey or Redis server. Its text, unlike the URL that was parsed, never holds credentials."""

    host: str
    name: str
    """Of the store; all keys begin with {name}: ."""
    port: int = DEFAULT_PORT
    database: int = 0
    user: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    """None reads the environment variable VISTA_REDIS_PASSWORD when a connection is made."""
    tls: bool = False
    timeout_s: float = DEFAULT_TIMEOUT_S
    """Longest wait for a connection, and for each reply."""

    @staticmethod
    def matches(store: object) -> bool:
        """Whether a store is named by a URL, and not by a folder."""
        return isinstance(store, StoreUrl) or _SCHEME.match(str(store)) is not None

    @classmethod
    def parse(cls, text: str | os.PathLike[str] | StoreUrl) -> StoreUrl:
        """Parse a URL.

        Raises:
            ConfigError: it has another form. The message does not repeat it, because it may hold a password.
        """
        if isinstance(text, StoreUrl):
            return text
        problem = None
        try:
            parts = urlsplit(_SCHEME.sub(r"\1://", os.fspath(text), count=1))
            port, options = parts.port or DEFAULT_PORT, dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
        except ValueError as error:
            raise ConfigError(f"store: the URL cannot be read ({type(error).__name__}); write {EXAMPLE}") from None
        *database, name = [unquote(word) for word in parts.path.strip("/").split("/")]
        timeout = options.pop("timeout_s", str(DEFAULT_TIMEOUT_S))
        if parts.scheme not in ("redis", "rediss"):
            problem = "it does not begin with redis:// or rediss://"
        elif not parts.hostname:
            problem = "it names no host"
        elif not _NAME.fullmatch(name) or (not database and name.isdigit()):
            problem = "its path must end in the store's name: letters, digits, dots, dashes, underscores"
        elif len(database) > 1 or not all(re.fullmatch("[0-9]{1,5}", word) for word in database):
            problem = "only the number of a database may come before the store's name"
        elif options or parts.fragment:
            problem = "timeout_s is its only option"
        elif not _is_timeout(timeout):
            problem = "timeout_s must be a positive number of seconds, at most 3600"
        if problem:
            raise ConfigError(f"store: the URL cannot be used: {problem}; write {EXAMPLE}")
        return cls(
            host=str(parts.hostname),
            name=name,
            port=port,
            database=int(database[0]) if database else 0,
            user=unquote(parts.username) if parts.username else None,
            password=unquote(parts.password) if parts.password else None,
            tls=parts.scheme == "rediss",
            timeout_s=float(timeout),
        )

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        database = f"{self.database}/" if self.database else ""
        return f"redis{'s' * self.tls}://{host}:{self.port}/{database}{self.name}"


def _is_timeout(text: str) -> bool:
    try:
        seconds = float(text)
    except ValueError:
        return False
    return math.isfinite(seconds) and 0 < seconds <= 3600
