"""Where a store is: the URL of a server, or a folder with generations and CURRENT, which names the published one.

store/CURRENT            "gen-7" and its checksum: the generation that readers open
store/LAST               the same for "gen-8": numbers up to 8 are never reused, even after their folders are removed
store/writer.lock        locked (flock) by the one writer; holds its process id
store/erase.lock         locked (flock) by an erasure or a publication, briefly
store/tombstones         digests of erased users, if there are any
store/gen-7/summary/     LMDB environment: data.mdb, lock.mdb
store/gen-7/state/       LMDB environment of the states, if the store keeps any; only refreshes open it
store/gen-8/summary/     an unfinished run: it has no `!complete`, and `!cursor` says where to resume
store/part-0-of-4/       a shard, which is a store itself; then nothing of the above lies in store/
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import numpy as np
import xxhash
from numpy.typing import NDArray

from vista.errors import ConfigError, StoreError, StoreWriteError, shortened, shown
from vista.files import (
    checked_path,
    make_folders,
    open_file,
    read_limited,
    remove_folder,
    remove_leftovers,
    remove_renamed,
    replace_file,
)
from vista.store.keys import user_keys

CURRENT = "CURRENT"
LAST = "LAST"
WRITER_LOCK = "writer.lock"
ERASURE_LOCK = "erase.lock"
TOMBSTONES = "tombstones"

REMOVED_PREFIX = ".removed-"
PARTIAL_PREFIX = ".partial-"
"""Prefix of a generation that is built from existing records, until it is complete and verified."""

MAX_GENERATION = 10**18 - 1

_PREFIX = "gen-"
_NAME = re.compile(rf"{_PREFIX}([1-9][0-9]{{0,17}})")
_POINTER_BYTES = 64
"""CURRENT and LAST are shorter."""

PASSWORD_VARIABLE = "VISTA_REDIS_PASSWORD"
DEFAULT_PORT = 6379
DEFAULT_TIMEOUT_S = 5.0
EXAMPLE = "redis://host:6379/mine, or rediss://host:6379/mine with TLS"
_ENCODE = f"; percent-encode / # ? [ ] @ in a password, or pass it in the variable {PASSWORD_VARIABLE}"

_SCHEME = re.compile(r"(rediss?):/+")  # pathlib makes one slash out of two
_OTHER_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/+")
_STORE_NAME = re.compile(r"[A-Za-z0-9._-]{1,100}")


@dataclass(frozen=True, slots=True)
class StoreUrl:
    """The URL of a store on a Valkey or Redis server. Its text, unlike what was parsed, never holds credentials.
    redis://[user[:password]@]host[:port]/[database/]name[?timeout_s=…]"""

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
        # Also without slashes: an error that calls it a folder would show the password.
        return isinstance(store, StoreUrl) or str(store).startswith(("redis:", "rediss:"))

    @classmethod
    def parse(cls, text: str | os.PathLike[str] | StoreUrl) -> StoreUrl:
        """Parse a URL.

        Raises:
            ConfigError: it has another form. The message does not repeat it, because it may hold a password.
        """
        if isinstance(text, StoreUrl):
            return text
        problem, remedy = None, f"write {EXAMPLE}{_ENCODE if '@' in os.fspath(text) else ''}"
        try:
            parts = urlsplit(_SCHEME.sub(r"\1://", os.fspath(text), count=1))
            port, options = parts.port or DEFAULT_PORT, dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
        except ValueError as error:
            raise ConfigError(f"store: the URL cannot be read ({type(error).__name__}); {remedy}") from None
        *database, name = [unquote(word) for word in parts.path.strip("/").split("/")]
        timeout = options.pop("timeout_s", str(DEFAULT_TIMEOUT_S))
        if parts.scheme not in ("redis", "rediss"):
            problem = "it does not begin with redis:// or rediss://"
        elif not parts.hostname:
            problem = "it names no host"
        elif not _STORE_NAME.fullmatch(name) or (not database and name.isdigit()):
            problem = "its path must end in the store's name: letters, digits, dots, dashes, underscores"
        elif len(database) > 1 or not all(re.fullmatch("[0-9]{1,5}", word) for word in database):
            problem = "only the number of a database may come before the store's name"
        elif options or parts.fragment:
            problem = "its only option is timeout_s"
        elif not _is_timeout(timeout):
            problem = "timeout_s must be a positive number of seconds, at most 3600"
        if problem:
            raise ConfigError(f"store: the URL cannot be used: {problem}; {remedy}")
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


def store_path(path: str | os.PathLike[str] | StoreUrl) -> Path:
    """Absolute path of a store, whether it exists or not. Raises StoreError if the system accepts no such path, or it
    is the URL of a remote store."""
    if isinstance(path, StoreUrl) or StoreUrl.matches(path):
        raise StoreError(
            f"{StoreUrl.parse(path)} is a remote store, but this works on a folder; copy the store to one with "
            "`vista store copy` first"
        )
    if (scheme := _OTHER_SCHEME.match(os.fspath(path))) is not None:  # a folder of that name might show a password
        raise StoreError(f"{scheme[0]}… is neither a folder nor the URL of a store; write {EXAMPLE}, or a path")
    return checked_path(path, StoreError).absolute()


def store_address(store: str | os.PathLike[str] | StoreUrl) -> Path | StoreUrl:
    """A store's URL, parsed, or the absolute path of its folder. Raises ConfigError if the URL has another form than
    those of stores, and StoreError if the system accepts no such path."""
    if isinstance(store, StoreUrl) or StoreUrl.matches(store):
        return StoreUrl.parse(store)
    return store_path(store)


def _is_timeout(text: str) -> bool:
    """Whether a text is a number of seconds above 0, up to an hour."""
    try:
        return 0 < float(text) <= 3600
    except ValueError:
        return False


def generation_path(root: Path, generation: int) -> Path:
    """Folder of a generation."""
    return root / f"{_PREFIX}{generation}"


def environment_path(root: Path, generation: int) -> Path:
    """Folder of the LMDB environment with a generation's summaries."""
    return generation_path(root, generation) / "summary"


def state_path(root: Path, generation: int) -> Path:
    """Folder of the LMDB environment with a generation's states."""
    return generation_path(root, generation) / "state"


def environments_of(root: Path, generation: int) -> list[Path]:
    """Folders of all LMDB environments of a generation."""
    paths = (environment_path(root, generation), state_path(root, generation))
    return [path for path in paths if path.is_dir()]


def list_generations(root: Path) -> list[int]:
    """Numbers of all generation folders, finished or not, ascending."""
    return sorted(number for entry in root.iterdir() if (number := _number_of(entry)) is not None)


def entries_like_generations(root: Path) -> list[str]:
    """Names of entries that look like generations but are ignored, such as a folder `gen-007` or a file `gen-9`."""
    return sorted(
        entry.name for entry in root.iterdir() if entry.name.startswith(_PREFIX) and _number_of(entry) is None
    )


def next_number(root: Path, least: int = 1) -> int:
    """A generation number above all existing ones, above all that were ever complete, and not below `least`. Raises
    StoreError if a folder already has the highest number."""
    number = max(least, *(number + 1 for number in (last_complete(root), *list_generations(root))))
    while os.path.lexists(generation_path(root, number)):  # by something that is not a generation
        number += 1
    if number > MAX_GENERATION:
        raise StoreError(f"{root}: there is no number above gen-{number - 1}; create a new store in another folder")
    return number


def _number_of(entry: Path) -> int | None:
    match = _NAME.fullmatch(entry.name)
    return int(match[1]) if match is not None and entry.is_dir() and not entry.is_symlink() else None


def read_current(root: Path) -> int:
    """Number of the published generation. Raises StoreError if nothing is published there, or CURRENT is damaged."""
    try:
        return _read_pointer(root / CURRENT)
    except FileNotFoundError as error:
        raise StoreError(f"{root} {_why_not_published(root)}") from error
    except (PermissionError, NotADirectoryError) as error:
        raise StoreError(f"{root / CURRENT}: {error.strerror}; check the path and its permissions") from error
    except OSError as error:
        raise StoreError(f"{root / CURRENT}: {error.strerror}; {_remedy_for_current(root)}") from error
    except ValueError as error:
        raise StoreError(f"{root / CURRENT} {error}; {_remedy_for_current(root)}") from None


def published_or_none(root: Path) -> int | None:
    """Like `read_current`, but None if nothing is published or CURRENT is damaged."""
    try:
        return read_current(root)
    except StoreError:
        return None


def missing_generation(root: Path, generation: int) -> StoreError:
    """The error for a CURRENT that names a generation that does not exist."""
    name = f"{_PREFIX}{generation}"
    return StoreError(f"{root / CURRENT} names {name}, which does not exist; {_remedy_for_current(root)}")


def write_current(root: Path, generation: int) -> None:
    """Publish a generation atomically and durably: readers that open or reload from now on get it."""
    record_complete(root, generation)
    _write_pointer(root / CURRENT, generation)


def last_complete(root: Path) -> int:
    """The highest generation number that was ever complete; 0 if there was none. Raises StoreWriteError if LAST cannot
    be read, or is damaged."""
    try:
        return _read_pointer(root / LAST)
    except FileNotFoundError:
        return 0
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
    except ValueError as error:
        reason = str(error)
    newest = max(list_generations(root), default=0)
    raise StoreWriteError(
        f"{root / LAST} {reason}; remove it, and numbering continues after gen-{newest}, the newest generation there"
    )


def record_complete(root: Path, generation: int) -> None:
    """Include a generation in `last_complete`, durably; call it before publishing or removing the generation."""
    if generation > last_complete(root):
        _write_pointer(root / LAST, generation)


def remove_store_leftovers(root: Path, except_for: str = "") -> None:
    """Remove the folders that killed processes left of generations being removed or copied; only under the lock.
    `except_for`: a name to keep."""
    for prefix in (REMOVED_PREFIX, PARTIAL_PREFIX):
        for entry in root.glob(f"{prefix}*"):
            if entry.name != except_for:
                remove_renamed(entry)


def pointer_to(generation: int) -> bytes:
    """What CURRENT or LAST holds: the name of a generation, its XXH3-64 in hex, and a newline."""
    name = f"{_PREFIX}{generation}"
    return f"{name} {xxhash.xxh3_64_hexdigest(name.encode())}\n".encode()


def _write_pointer(path: Path, generation: int) -> None:
    remove_leftovers(path.parent, path.name)  # of killed processes; only the holder of the writer's lock comes here
    mode = permissions_of(generation_path(path.parent, generation)).file
    replace_file(path, pointer_to(generation), mode)


def _read_pointer(path: Path) -> int:
    return parse_pointer(read_limited(path, _POINTER_BYTES, follow=False))


def parse_pointer(content: bytes) -> int:
    """The generation that the bytes of `pointer_to` name. Raises ValueError if they are damaged; the message says what
    they hold."""
    match = _NAME.fullmatch(content.partition(b" ")[0].decode("ascii", errors="replace"))
    if match is None or content != pointer_to(int(match[1])):
        text = shown(content.decode("ascii", errors="replace").strip(), 40)
        raise ValueError(f"holds {text} instead of the name of a generation and its checksum")
    return int(match[1])


def _why_not_published(root: Path) -> str:
    """Why a folder has no CURRENT, and what to do about it."""
    if is_generation(root):
        return f"is a generation of the store {root.parent}; pass that folder instead"
    if is_other_folder(root):
        return "is not a store, but a log, a model or a run; pass the store's folder"
    if not root.exists():
        return "does not exist, so it holds no published generation; check the path, or run `vista refresh` first"
    return f"holds no published generation; run `vista refresh store={root}` first"


def is_generation(root: Path) -> bool:
    """Whether this is the folder of a generation inside of a store."""
    return root.name.startswith(_PREFIX) and (root.parent / WRITER_LOCK).exists()


def is_other_folder(root: Path) -> bool:
    """Whether this is the folder of an event log, a model or a run, and not of a store."""
    if (root / WRITER_LOCK).exists() or not root.is_dir():
        return False
    return any((root / name).exists() for name in ("config.json", "config.yaml")) or any(root.glob("segment-*"))


def prepare_root(root: Path, permissions: Permissions) -> None:
    """Make the store's folder if it does not exist. A folder with other contents keeps its mode.

    Raises:
        StoreError: it is a generation of another store, is inside another store, or is the folder of a log, a model or
            a run.
        OSError: it cannot be made, or belongs to another account.
    """
    if is_generation(root) or is_other_folder(root):
        raise StoreError(f"{root} {_why_not_published(root)}")
    for parent in root.resolve().parents:
        if _is_store(parent):
            raise StoreError(
                f"{root} is inside the store {parent}, which would remove it; choose a folder outside of it"
            )
    if not root.exists():
        make_folders(root.parent)
        with suppress(FileExistsError):  # Another writer may be starting at the same time.
            make_folder(root, permissions)
    make_folders(root)  # A killed process may have made it, or a parent, without a sync.
    if is_owner(root) and ((root / WRITER_LOCK).exists() or not any(root.iterdir())):
        set_mode(root, permissions.folder)


def _is_store(folder: Path) -> bool:
    if (folder / WRITER_LOCK).exists() and list_generations(folder):
        return True
    try:
        return bool(_read_pointer(folder / CURRENT))
    except (OSError, ValueError):
        return False


def set_store_permissions(root: Path, permissions: Permissions) -> None:
    """Give all files of a store their modes; only under the lock. Raises OSError if a file belongs to another
    account."""
    for path in (root / CURRENT, root / LAST):
        if path.exists() and not path.is_symlink():
            set_mode(path, permissions.file)
    for generation in list_generations(root):
        set_tree_permissions(generation_path(root, generation), permissions)


def remove_generation(root: Path, generation: int) -> None:
    """Remove a generation's folder. A crash leaves all of it, or a name that does not look like a generation. Readers
    that have it open keep their files until they close them."""
    remove_folder(generation_path(root, generation), root / f"{REMOVED_PREFIX}{generation}")


def _remedy_for_current(root: Path) -> str:
    names = ", ".join(f"{_PREFIX}{number}" for number in list_generations(root)) or "none"
    remedy = f"publish one of them with `vista store rollback store={root} to=N`, or refresh the store again"
    return f"existing generations: {names}; {remedy}"


_SETGID = 0o2000


@dataclass(frozen=True, slots=True)
class Permissions:
    """Modes of folders and files, whatever the umask: for the owner alone, or for a group too. A folder's own mode
    decides, so that a file created in it later, by any command, gets the matching mode."""

    folder: int
    file: int
    lock: int
    """Of lock.mdb, which readers write to when they register."""


PRIVATE = Permissions(folder=0o700, file=0o600, lock=0o600)
GROUP = Permissions(folder=0o2750, file=0o640, lock=0o660)
"""New files inherit the folder's group: run `chgrp` once on the store's folder."""


def permissions_of(folder: Path) -> Permissions:
    """What the files in a folder of a store should have."""
    try:
        mode = stat.S_IMODE(folder.stat().st_mode)
    except OSError:
        return PRIVATE
    return GROUP if mode | _SETGID == GROUP.folder else PRIVATE


def set_mode(path: Path, mode: int) -> None:
    """Give a file or folder a mode unless it has it already. Raises OSError if it has another mode and belongs to
    another account."""
    if stat.S_IMODE(path.stat().st_mode) != mode:
        path.chmod(mode)


def open_private(path: Path, flags: int) -> int:
    """Open a file of a store that is its owner's alone, whatever the umask, and make it if it does not exist.

    Args:
        flags: of `os.open`, without O_CREAT.

    Raises:
        OSError: it cannot be opened, is a symbolic link or not a regular file, or belongs to another account.
    """
    descriptor = open_file(path, flags | os.O_CREAT, PRIVATE.file, follow=False)
    try:
        if stat.S_IMODE(os.fstat(descriptor).st_mode) != PRIVATE.file:
            os.fchmod(descriptor, PRIVATE.file)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def make_folder(path: Path, permissions: Permissions) -> None:
    """Make one folder; its mode is never wider than the final one. Raises OSError if it exists already, or cannot be
    made."""
    path.mkdir(mode=PRIVATE.folder)
    set_mode(path, permissions.folder)


def set_tree_permissions(folder: Path, permissions: Permissions) -> None:
    """Give a generation's folder and everything in it their modes."""
    set_mode(folder, permissions.folder)
    for entry in folder.iterdir():
        if entry.is_symlink():
            continue  # Its target is not a part of the store.
        if entry.is_dir():
            set_tree_permissions(entry, permissions)
        else:
            set_mode(entry, permissions.lock if entry.name == "lock.mdb" else permissions.file)


def is_owner(path: Path) -> bool:
    """Whether this process may change a path's mode."""
    return path.stat().st_uid == os.geteuid() or os.geteuid() == 0


MAX_SHARDS = 65_536
_NUMBER = "(0|[1-9][0-9]{0,4})"


@dataclass(frozen=True, slots=True)
class Shard:
    """Shard `index` of `count`: a store that one machine refreshes; a reader opens all shards as one.

    A user's shard depends only on the user's key (XXH3-64 modulo `count`), so every refresh with the same number of
    shards assigns users alike. Shards are published one by one, but one user's data come from one generation.
    """

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Parse "2/8", the third of eight shards. Raises ConfigError if the text has another form."""
        shard = cls._matching(f"{_NUMBER}/{_NUMBER}", text.strip())
        if shard is None:
            raise ConfigError(
                f"shard={shortened(text, 80)}: write i/n with i from 0 to n-1 and n at most {MAX_SHARDS}, such as 0/4"
            )
        return shard

    @classmethod
    def named(cls, path: Path | StoreUrl) -> Shard | None:
        """The shard that a folder is named after; None for other names, and for a server."""
        return None if isinstance(path, StoreUrl) else cls._matching(f"part-{_NUMBER}-of-{_NUMBER}", path.name)

    @classmethod
    def _matching(cls, pattern: str, text: str) -> Shard | None:
        match = re.fullmatch(pattern, text)
        if match is None or not int(match[1]) < int(match[2]) <= MAX_SHARDS:
            return None
        return cls(int(match[1]), int(match[2]))

    def path(self, store: str | Path) -> Path:
        """Folder of this shard of a store."""
        return Path(store) / f"part-{self.index}-of-{self.count}"

    def holds(self, keys: Sequence[bytes]) -> NDArray[np.bool_]:
        """Whether each user belongs to this shard, [N]."""
        own: NDArray[np.bool_] = shards_of(keys, self.count) == self.index
        return own


def shards_in(store: str | Path | StoreUrl) -> list[Shard]:
    """The shards in a store's folder, ascending; none if the store is not sharded, as no store on a server is. Raises
    StoreError if there are shards of different counts."""
    root = store_address(store)
    if isinstance(root, StoreUrl) or (root / CURRENT).exists() or not root.is_dir():
        return []
    shards = _shards_at(root)
    counts = sorted({shard.count for shard in shards})
    if len(counts) > 1:
        raise StoreError(
            f"{root}: holds shards of stores with {counts} shards; keep those of one store and remove the others"
        )
    return shards


def complete_shards(store: str | Path | StoreUrl) -> list[Shard]:
    """As `shards_in`, for a reader of all users. Raises StoreError if a shard is missing, or there are shards of
    different counts."""
    shards = shards_in(store)
    count = shards[0].count if shards else 0
    if missing := sorted(set(range(count)) - {shard.index for shard in shards}):
        raise StoreError(f"{store}: shards {missing} of {count} are missing; refresh them with shard=i/{count}")
    return shards


def _shards_at(root: Path) -> list[Shard]:
    shards = [shard for entry in root.iterdir() if (shard := Shard.named(entry)) is not None and entry.is_dir()]
    return sorted(shards, key=lambda shard: shard.index)


def stores_in(store: str | Path) -> list[Path | StoreUrl]:
    """Folders of the shards in a store's folder, or the folder or URL itself if the store is not sharded."""
    if StoreUrl.matches(store):
        return [StoreUrl.parse(store)]
    return [*(shard.path(store) for shard in shards_in(store))] or [Path(store)]


def shard_to_write(store: str | Path | StoreUrl, shard: Shard | None) -> tuple[Path | StoreUrl, Shard | None]:
    """The folder or URL that a refresh of a store or shard writes to, and the shard that it holds.

    Raises:
        ConfigError: a shard of a store on a server is named; `store` is the folder of a shard, and `shard` is another
            one; or as of `check_place`.
    """
    root = store_address(store)
    if isinstance(root, StoreUrl):
        if shard is not None:
            raise ConfigError(f"shard: a store on a server has no shards; leave it out to refresh {root}")
        return root, None
    own = Shard.named(root)
    if own is not None:
        if shard not in (None, own):
            raise ConfigError(f"store={store}: is the folder of one shard; name the folder above it")
        path, shard = root, own
    else:
        path = Path(str(store)) if shard is None else shard.path(str(store))
    check_place(path)
    return path, shard


def check_place(path: str | Path) -> None:
    """Refuse to write a store or shard where it would hide another one, or be hidden by it. Raises ConfigError if an
    unsharded store and shards, or shards of different counts, would share a folder."""
    path = store_path(path)
    named = Shard.named(path)
    root = path.parent if named else path
    counts = sorted({shard.count for shard in _shards_at(root)}) if root.is_dir() else []
    if (root / CURRENT).exists() and (named or counts):
        raise ConfigError(
            f"{root}: holds an unsharded store ({CURRENT}), which hides all shards in the same folder; name another "
            "folder, or move one of the two"
        )
    if counts and named is None:
        raise ConfigError(f"{root}: is sharded; refresh its shards with shard=i/{counts[0]}, or name another folder")
    if named and counts not in ([], [named.count]):
        raise ConfigError(
            f"{root}: holds shards of a store with {counts} shards, to which {path.name} does not belong; name another "
            "folder"
        )


def users_by_store(store: str | Path, users: Sequence[int] | Sequence[str]) -> list[tuple[Path | StoreUrl, list[Any]]]:
    """Group users by the shard of a store that they belong to, or by the store itself if it is not sharded. Raises
    StoreError if the shard of a user is missing; the message names it."""
    root, shards = store_address(store), shards_in(store)
    if isinstance(root, StoreUrl):
        return [(root, list(users))]
    named = Shard.named(root)
    if named is not None:
        root, shards = root.parent, [named]
    if not shards:
        return [(root, list(users))]
    owner = shards_of(user_keys(users), shards[0].count)
    for user, index in zip(users, owner.tolist(), strict=True):
        if index not in {shard.index for shard in shards}:
            raise StoreError(
                f"{store}: user {user!r} belongs to shard {index} of {shards[0].count}, which is missing; name the "
                "folder that holds it"
            )
    return [
        (shard.path(root), [users[row] for row in np.flatnonzero(owner == shard.index).tolist()])
        for shard in shards
        if (owner == shard.index).any()
    ]


def shards_of(keys: Sequence[bytes], count: int) -> NDArray[np.int64]:
    """Index of each user's shard, [N]."""
    return np.array([xxhash.xxh3_64_intdigest(key) % count for key in keys], np.int64)
