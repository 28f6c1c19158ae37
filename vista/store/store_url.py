"""URLs of remote stores: redis://[user[:password]@]host[:port]/[database/]name[?timeout_s=…&cache=…&cache_mb=…&ttl_days=…]."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, unquote, urlsplit

from vista.config.checks import MAX_DAYS
from vista.errors import ConfigError

PASSWORD_VARIABLE = "VISTA_REDIS_PASSWORD"
DEFAULT_PORT = 6379
DEFAULT_TIMEOUT_S = 5.0
DEFAULT_CACHE_MB = 1000.0
DAY_MS = 86_400_000
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
    cache: str | None = None
    """Folder in which readers keep the records that they have read; None keeps none."""
    cache_mb: float = DEFAULT_CACHE_MB
    """Size of the cache, 10^6 bytes."""
    ttl_days: float | None = None
    """Time from the last refresh until the server removes a generation that a full refresh or a copy writes to this
    URL; None keeps it."""

    @property
    def ttl_ms(self) -> int | None:
        """`ttl_days` in ms."""
        return None if self.ttl_days is None else max(round(DAY_MS * self.ttl_days), 1)

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
        timeout, cache = options.pop("timeout_s", str(DEFAULT_TIMEOUT_S)), options.pop("cache", None)
        cache_mb, ttl = options.pop("cache_mb", str(DEFAULT_CACHE_MB)), options.pop("ttl_days", None)
        if parts.scheme not in ("redis", "rediss"):
            problem = "it does not begin with redis:// or rediss://"
        elif not parts.hostname:
            problem = "it names no host"
        elif not _NAME.fullmatch(name) or (not database and name.isdigit()):
            problem = "its path must end in the store's name: letters, digits, dots, dashes, underscores"
        elif len(database) > 1 or not all(re.fullmatch("[0-9]{1,5}", word) for word in database):
            problem = "only the number of a database may come before the store's name"
        elif options or parts.fragment:
            problem = "its only options are timeout_s, cache, cache_mb, and ttl_days"
        elif not _is_number(timeout, 3600):
            problem = "timeout_s must be a positive number of seconds, at most 3600"
        elif not _is_number(cache_mb, 1e9):
            problem = "cache_mb must be a positive number of megabytes"
        elif ttl is not None and not _is_number(ttl, MAX_DAYS):
            problem = f"ttl_days must be a positive number of days, at most {MAX_DAYS}"
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
            cache=cache,
            cache_mb=float(cache_mb),
            ttl_days=None if ttl is None else float(ttl),
        )

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        database = f"{self.database}/" if self.database else ""
        return f"redis{'s' * self.tls}://{host}:{self.port}/{database}{self.name}"


def _is_number(text: str, most: float) -> bool:
    """Whether a text is a number above 0, up to `most`."""
    try:
        return 0 < float(text) <= most
    except ValueError:
        return False
