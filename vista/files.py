"""Reads with a limit, and atomic, durable writes of files and folders.

A write is durable once its content and its name are on the disk: fsync of the file, then of the folder that holds it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import xxhash

from vista.errors import ConfigError, LogFormatError, VistaError, shown

_PARTIAL_NAME = re.compile(r"\.(.+)\.\d+\.tmp")
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux
_LIBC = ctypes.CDLL(None, use_errno=True)
_LONGEST_NAME = "-" * 64
"""Vista gives no file a longer name, and a temporary name is not longer than the path's own by more than this."""


def checked_path(path: str | os.PathLike[str], error: type[VistaError]) -> Path:
    """The path of a folder, whether it exists or not, or of a file that is replaced atomically.

    Raises:
        error: the system accepts no such path: it is too long, cannot be encoded, or has a null character.
    """
    try:
        os.lstat(f"{os.fspath(path)}{_LONGEST_NAME}/{_LONGEST_NAME}")
        return Path(path)
    except OSError as cause:
        if cause.errno != errno.ENAMETOOLONG:
            return Path(path)  # The caller knows what it needs from a path that does not exist.
        reason = "it is too long"
    except ValueError as cause:
        reason = str(cause)
    raise error(f"{shown(os.fspath(path))}: cannot be a path ({reason}); choose another one")


def require_log_folder(path: Path) -> None:
    """Require the folder of a log, before what reads logs is imported.

    Raises:
        LogFormatError: there is none.
    """
    if not path.is_dir():
        raise LogFormatError(f"{path}: no such folder; make the log with `vista prepare out={path} ...`")


def open_file(path: Path, flags: int = os.O_RDONLY, mode: int = 0o600, *, follow: bool = True) -> int:
    """Open a regular file and return its descriptor. Unlike opening a named pipe, this never waits.

    Args:
        flags: as for `os.open`.
        mode: permissions of the file if it is created.
        follow: whether the file may be a symbolic link. Its folder may always be one.

    Raises:
        OSError: it cannot be opened, is not a regular file, or is a symbolic link that must not be followed.
    """
    flags |= os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags, mode)
    except OSError as error:
        if error.errno == errno.ELOOP and not follow:
            raise OSError(errno.ELOOP, "is a symbolic link; remove it", str(path)) from None
        if error.errno == errno.ENXIO:  # a named pipe without a reader, or a socket
            raise OSError(errno.EINVAL, "is not a regular file", str(path)) from None
        raise
    except ValueError as error:  # a null character, or one that cannot be encoded
        raise OSError(errno.EINVAL, f"cannot be a path ({error})", str(path)) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return descriptor


def read_limited(path: Path, limit: int, *, follow: bool = True) -> bytes:
    """Read a regular file of at most `limit` bytes. Raises OSError as for `open_file`; with EFBIG if the file is
    larger."""
    with open(open_file(path, follow=follow), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(size + 1) if size <= limit else b""  # Python allocates up front what it is asked to read
        if len(content) > size:  # the file is growing
            content += file.read(limit + 1 - len(content))
    if size > limit or len(content) > limit:
        raise OSError(errno.EFBIG, f"holds {max(size, len(content))} bytes, but at most {limit} are read", str(path))
    return content


def sync(path: Path) -> None:
    """fsync a file or a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_replaceable(path: Path) -> None:
    """Require that a path names a regular file, or nothing yet. To replace /dev/null by a file would break the system.
    Raises OSError if it is, or leads to, a device, a pipe, a socket or a folder."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "is not a regular file", str(path))


def create_file(path: str | Path, mode: int = 0o600, folder: int | None = None) -> IO[bytes]:
    """Create a file, usually one with a temporary name. Whatever has that name, such as a link, is removed first.

    Args:
        mode: permissions, before the umask.
        folder: descriptor of the folder in which a relative path is resolved.

    Raises:
        OSError: it cannot be created, or the name belongs to a folder.
    """
    with suppress(FileNotFoundError):
        os.unlink(path, dir_fd=folder)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return open(os.open(path, flags, mode, dir_fd=folder), "wb")


@contextmanager
def replaced_file(path: Path, mode: int | None = None) -> Iterator[IO[bytes]]:
    """Yield a file that replaces `path` when the `with` block ends without an error: atomically and durably.

    It has a temporary name until then. A symbolic link of the name is replaced, not followed. All names are resolved in
    the folder that was opened first.

    Args:
        mode: exact permissions of the file; None for the default of a new file under the umask.

    Raises:
        OSError: it cannot be written, or the name belongs to something other than a regular file.
    """
    check_replaceable(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    partial = f".{path.name}.{os.getpid()}.tmp"
    try:
        with create_file(partial, 0o666 if mode is None else 0o600, folder) as file:
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        os.fsync(folder)
    except BaseException:
        with suppress(OSError):
            os.unlink(partial, dir_fd=folder)
        raise
    finally:
        os.close(folder)


def replace_file(path: Path, content: bytes, mode: int | None = None) -> None:
    """`replaced_file` for a small file."""
    with replaced_file(path, mode) as file:
        file.write(content)


def replace_text(path: Path, text: str) -> None:
    """`replace_file` for text, as UTF-8."""
    replace_file(path, text.encode())


def make_folders(folder: Path, mode: int = 0o777) -> None:
    """Make a folder and its missing parents durably: each name is on the disk when this returns.

    Existing folders are synced too, because a process that was killed may have made them without a sync.

    Args:
        mode: permissions of new folders, before the umask.
    """
    folder = folder.absolute()
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        with suppress(FileExistsError):  # another process made it at the same time
            path.mkdir(mode)
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    device = folder.stat().st_dev
    for path in (folder, *folder.parents):
        if path.stat().st_dev != device:
            break
        with suppress(PermissionError):  # a system folder that this account cannot read is not new
            sync(path)


def remove_folder(folder: Path, removed: Path) -> None:
    """Remove a folder with all its files, after durably renaming it.

    After a crash the folder is complete, or its files are under `removed`, which the next caller must remove.

    Args:
        removed: a path in the same parent folder; anything that already has that name is removed too.
    """
    remove_renamed(removed)
    folder.rename(removed)
    remove_renamed(removed)


def remove_renamed(folder: Path) -> None:
    """Remove a folder that was renamed for removal, perhaps by a process that was killed before it synced the new name.

    The parent is synced first. Otherwise, the removal of the files could reach the disk before the new name does, and
    leave the old name without files.
    """
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        sync(folder.parent)
        shutil.rmtree(folder, ignore_errors=True)


class HashedFile:
    """A file that is written from start to end, with the XXH3-64 of all bytes so far. NumPy can write arrays to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._hash = xxhash.xxh3_64()
        self.size = 0

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Write all of `data`."""
        view = memoryview(data).cast("B")
        self._hash.update(view)
        self._file.write(view)
        self.size += len(view)
        return len(view)

    def hexdigest(self) -> str:
        """XXH3-64 of what was written, as 16 hex digits."""
        return self._hash.hexdigest()


def writable_folder(folder: Path, key: str) -> None:
    """Make a folder durably if it does not exist, and check that files can be written in it. Raises ConfigError if they
    cannot, or it lies in an EventLog; the message names `key` (the setting of the folder) and the reason."""
    folder = checked_path(folder, ConfigError)
    probe = folder / f".probe.{os.getpid()}.tmp"
    for parent in Path(os.path.realpath(probe)).parents:
        if any(parent.glob("segment-000001*/manifest.json")):
            raise ConfigError(f"{key}={folder}: lies in the EventLog {parent}; choose another folder")
    try:
        make_folders(folder)
        create_file(probe).close()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"{key}={folder}: cannot be written ({error.strerror}); choose another folder, or make this one writable"
        ) from None


RUN_FILES = ("run.json", "train.log", "metrics.jsonl")
"""Files that only runs have."""
_OF_RUNS = (*RUN_FILES, "config.yaml", "best", "checkpoints")


def writable_file(path: Path, key: str) -> None:
    """As `writable_folder` for the folder of a file that will be written. It must not be a device, a folder, or one of
    the files that a run keeps for itself."""
    writable_folder(checked_path(path, ConfigError).absolute().parent, key)
    place = Path(os.path.realpath(path.parent), path.name)
    for folder in place.parents:
        own = place.relative_to(folder).parts[0]
        if own in _OF_RUNS and any(os.path.isfile(folder / name) for name in RUN_FILES if name != own):
            raise ConfigError(f"{key}={path}: belongs to the run {folder}; name another file")
    try:
        check_replaceable(path)
    except OSError as error:
        raise ConfigError(f"{key}={path}: {error.strerror}; name a file") from None


def remove_leftovers(folder: Path, *names: str) -> None:
    """Remove what `replaced_file` and `replaced_folder` left behind in killed processes.

    Args:
        folder: no other process may write files of these names in it. Folders that a process is writing stay.
        names: of files and folders; if none are given, the leftovers of all names are removed.
    """
    for path in folder.iterdir():
        match = _PARTIAL_NAME.fullmatch(path.name)
        if match is None or (names and match[1] not in names):
            continue
        if path.is_symlink() or not path.is_dir():
            path.unlink()
            continue
        with suppress(BlockingIOError, FileNotFoundError), _locked_folder(path):
            remove_renamed(path)  # It may hold the old files of an exchange of names that is not on the disk yet.


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that replaces `folder` when the `with` block ends without an error.

    A crash leaves the old folder or the new one, never a mixture. Other processes find one of the two at any time where
    the file system can exchange two names (ext4, XFS, Btrfs, tmpfs). Elsewhere, there is neither between two renames. A
    crash in between leaves the old folder as `<name>.old`, and `recover_folder` gives it its name back.
    """
    if folder.name in ("", ".."):
        raise OSError(errno.EINVAL, "a folder can be replaced by its name only", str(folder))
    make_folders(folder.parent)
    partial = partial_name(folder)
    recover_folder(folder)
    partial.mkdir()
    try:
        with _locked_folder(partial):
            yield partial
            for file in partial.rglob("*"):
                sync(file)
            sync(partial)
            old = old_name(folder)
            if not os.path.lexists(folder):
                partial.rename(folder)
            elif not _exchanged(partial, folder):
                folder.rename(old)
                partial.rename(folder)
            sync(folder.parent)
            if old.is_dir() or old.is_symlink():
                remove_folder(old, partial)  # so that a kill leaves no part of it under its name
    finally:
        remove_renamed(partial)


def recover_folder(folder: Path) -> None:
    """Finish or undo a `replaced_folder` that was killed: the folder has its name again, and nothing is left over. No
    other process may be replacing the folder by two renames."""
    old = old_name(folder)
    if not os.path.lexists(folder) and old.is_dir():
        old.rename(folder)
    elif old.is_dir() or old.is_symlink():
        remove_folder(old, partial_name(folder))
    if folder.parent.is_dir():
        remove_leftovers(folder.parent, folder.name)


def old_name(folder: Path) -> Path:
    """What `replaced_folder` names the folder that it replaces, for a moment, where two names cannot be exchanged."""
    return folder.parent / f"{folder.name}.old"


def partial_name(folder: Path) -> Path:
    """Where this process builds or removes a folder; `remove_leftovers` removes it after a kill."""
    return folder.with_name(f".{folder.name}.{os.getpid()}.tmp")


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange the names of two folders atomically. False if the system or the file system cannot."""
    if not hasattr(_LIBC, "renameat2"):
        return False
    if (
        _LIBC.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), ctypes.c_uint(_RENAME_EXCHANGE))
        == 0
    ):
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(other))


@contextmanager
def _locked_folder(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder that is being written, which ends with the process."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


# Rules for fields of JSON files that vista reads back: a damaged or crafted file must not cause a TypeError.


@dataclass(frozen=True, slots=True)
class FieldRule:
    """What the value of a field must be."""

    expected: str
    """In words, for the error message."""
    holds: Callable[[Any], bool]


TABLE = FieldRule("a table of keys", lambda value: type(value) is dict)
"""A mapping; its fields are checked on their own."""

NUMBER = FieldRule(
    "a finite number",
    # `math.isfinite` would raise an OverflowError for a whole number that is too large for a float.
    lambda value: isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max,
)
"""A number that a float can hold, and not a bool."""


def whole(least: int = 0, most: int = 2**62) -> FieldRule:
    """A whole number in a range, and not a bool."""
    return FieldRule(
        f"a whole number from {least} to {most}", lambda value: type(value) is int and least <= value <= most
    )


def text(most: int = 4_096) -> FieldRule:
    """A string of at most `most` characters."""
    return FieldRule(f"a string of at most {most} characters", lambda value: type(value) is str and len(value) <= most)


def hexadecimal(length: int) -> FieldRule:
    """A string of `length` lowercase hex digits."""
    pattern = re.compile(f"[0-9a-f]{{{length}}}")
    return FieldRule(f"{length} hex digits", lambda value: type(value) is str and pattern.fullmatch(value) is not None)


def one_of(*values: object) -> FieldRule:
    """One of these values, with its type."""
    known = [(type(value), value) for value in values]
    return FieldRule(f"one of {', '.join(map(repr, values))}", lambda value: (type(value), value) in known)


def either(*rules: FieldRule) -> FieldRule:
    """A value that satisfies at least one of these rules."""
    return FieldRule(
        " or ".join(rule.expected for rule in rules), lambda value: any(rule.holds(value) for rule in rules)
    )


def list_of(rule: FieldRule, least: int = 0, most: int | None = None) -> FieldRule:
    """A list of at least `least` and at most `most` values that each satisfy a rule; None for no limit."""
    size = f" of length {least}" if least == most else ""
    return FieldRule(
        f"a list{size} in which each entry is {rule.expected}",
        lambda value: (
            type(value) is list
            and least <= len(value)
            and (most is None or len(value) <= most)
            and all(rule.holds(entry) for entry in value)
        ),
    )


def check_fields(fields: object, rules: Mapping[str, FieldRule]) -> None:
    """Require a mapping with exactly the fields of `rules`, each of which satisfies its rule. Raises ValueError if the
    message names the field, what is expected, and the value."""
    if not isinstance(fields, dict):
        raise ValueError(f"expected a mapping of fields, got {shown(fields)}")
    for name in rules:
        if name not in fields:
            raise ValueError(f"the field {name!r} is missing")
    for name, value in fields.items():
        if name not in rules:
            raise ValueError(f"the field {shown(name)} is unknown")
        if not rules[name].holds(value):
            raise ValueError(f"{name}: expected {rules[name].expected}, got {shown(value)}")
