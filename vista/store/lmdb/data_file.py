"""The files of an LMDB environment: opened safely, and checked before LMDB sees them."""

from __future__ import annotations

import errno
import logging
import os
import stat
import struct
from contextlib import suppress
from pathlib import Path

import lmdb
import lmdb.verify

from vista.errors import StoreBusyError, StoreError
from vista.files import open_file
from vista.store.lmdb.permissions import PRIVATE, permissions_of, set_mode

MAP_SIZE_BYTES = 1 << 40
"""Reserved address space, which takes neither memory nor disk; large enough that the map never grows under readers."""
MAX_READERS = 1024
"""Slots of the reader table, one per reading thread of all processes."""
ATTEMPTS = 3
"""How often a whole file is checked again if another process writes it during the check."""

_SMALLEST_MAP_BYTES = 1 << 28
_READER_BYTES = 64
_READER_TABLE_HEAD_BYTES = 128
_PAGE_HEADER_BYTES = 16
_META = struct.Struct("=II16xI92xQQ")  # magic, version, page size, last page, transaction; in the host's byte order
_META_MAGIC = 0xBEEFC0DE
_META_VERSION = 1

logger = logging.getLogger(__name__)

REMEDY = "refresh the store again, or publish the previous generation (`vista store rollback`)"


def open_environment(path: Path, *, readonly: bool, map_size_bytes: int = MAP_SIZE_BYTES) -> lmdb.Environment:
    """Open the environment in a folder; for writing, create it if needed.

    It is always synchronous, with locks and without writemap, in the format of LMDB 0.9. If the address space is
    limited (ulimit -v), a smaller map is reserved and its size is logged.

    Raises:
        StoreError: the environment is missing, truncated, not of LMDB or not accessible, or there is no room for the
            reader table or in the address space; the message has the remedy.
    """
    for name in ("data.mdb", "lock.mdb"):
        _require_regular(path / name)
    if readonly or (path / "data.mdb").exists():
        check_data_file(path / "data.mdb")
    permissions = permissions_of(path)
    made = [(path / name, mode) for name, mode in (("data.mdb", permissions.file), ("lock.mdb", permissions.lock))]
    made = [(file, mode) for file, mode in made if not file.exists()]
    _make_reader_table(path / "lock.mdb")
    size = map_size_bytes
    while True:
        try:
            environment = lmdb.open(
                str(path),
                map_size=size,
                readonly=readonly,
                create=not readonly,
                mode=PRIVATE.file,
                max_readers=MAX_READERS,
                lib_version=0,
            )
            break
        except lmdb.MemoryError as error:
            if size <= _SMALLEST_MAP_BYTES:
                raise StoreError(
                    f"{path}: not enough address space to map {size} bytes; raise the limit (ulimit -v unlimited)"
                ) from error
            size >>= 2
        except lmdb.Error as error:
            raise StoreError(f"{path}: {error}. Readers also need write access to lock.mdb; {REMEDY}") from error
        except OSError as error:  # its folder was removed, as that of an old generation is after a new one is published
            raise StoreError(f"{path}: {error.strerror}; {REMEDY}") from error
    for file, mode in made:  # LMDB applies the umask to its mode, and a shared lock file needs another mode.
        if file.exists():  # On a read-only file system LMDB works without lock.mdb.
            set_mode(file, mode)
    if size < map_size_bytes:
        logger.warning(
            "%s: the address space is limited (ulimit -v); reserved %d bytes instead of %d", path, size, map_size_bytes
        )
    return environment


def _require_regular(path: Path) -> None:
    """Refuse a named pipe, for which LMDB would wait without end, and a link, which may lead out of the store.

    Raises:
        StoreError: the path exists and is not a regular file.
    """
    with suppress(OSError):  # It is missing, or LMDB meets the same error and reports it.
        if not stat.S_ISREG(path.lstat().st_mode):
            raise StoreError(f"{path} is not a regular file; {REMEDY}")


def _make_reader_table(path: Path) -> None:
    """Make lock.mdb with all its blocks, unless it exists.

    LMDB would make a sparse file and write to it through a map, which kills the process (SIGBUS) if the disk is full.

    Raises:
        StoreError: the disk is full.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.exists():
            return
        with open(partial, "xb", opener=lambda name, flags: os.open(name, flags, PRIVATE.file)) as file:
            file.write(bytes(_READER_BYTES * MAX_READERS + _READER_TABLE_HEAD_BYTES))
        with suppress(FileExistsError):  # Another process was first.
            os.link(partial, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreError(
                f"{path}: {error.strerror}; readers need this table of {_READER_BYTES * MAX_READERS} bytes, so "
                "free some space and open the store again"
            ) from error
        logger.debug("%s: %s", path, error)  # LMDB meets the same error and reports it.
    finally:
        with suppress(OSError):
            partial.unlink()


def check_data_file(path: Path) -> None:
    """Refuse a truncated data file: LMDB maps as many pages as the meta page promises, and would crash on it.

    A file that only lacks pages at the end that nothing refers to is not truncated (`complete_size`).

    Raises:
        StoreError: missing, truncated, or not of LMDB; the message has the sizes and the remedy.
    """
    size, expected = committed_size(path)
    if size < expected and _structural_problems(path.parent):
        raise StoreError(f"{path} is truncated: it has {size} bytes, but its pages need {expected}; {REMEDY}")


def committed_size(path: Path) -> tuple[int, int]:
    """Size of a data file, and the size according to its last committed transaction, in bytes.

    Raises:
        StoreError: missing, or not of LMDB.
    """
    size, expected, _ = _committed(path)
    return size, expected


def _committed(path: Path) -> tuple[int, int, int]:
    """As `committed_size`, and the number of that transaction."""
    try:
        with open(open_file(path, follow=False), "rb") as file:
            metas = [_read_meta(file.read(_PAGE_HEADER_BYTES + _META.size))]
            if metas[0] is not None:
                file.seek(metas[0][0])
                metas.append(_read_meta(file.read(_PAGE_HEADER_BYTES + _META.size)))
            size = os.fstat(file.fileno()).st_size  # last, because a writer grows the file before it commits
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}; {REMEDY}") from error
    valid = [meta for meta in metas if meta is not None]
    if len(valid) < 2:
        raise StoreError(f"{path} is not an LMDB 0.9 data file ({size} bytes); {REMEDY}")
    page_bytes, last_page, transaction = max(valid, key=lambda meta: meta[2])
    return size, (last_page + 1) * page_bytes, transaction


def complete_size(folder: Path) -> None:
    """Extend an environment's file to the size in its meta page, so that readers can recognize a truncated file.

    LMDB does not write pages at the end that a transaction allocated and freed. Nobody else may write at the same time.
    """
    path = folder / "data.mdb"
    size, expected = committed_size(path)
    if size < expected:
        with path.open("r+b") as file:
            file.truncate(expected)
            os.fsync(file.fileno())


def check_structure(folder: Path) -> None:
    """Check every page of an environment's file without opening it with LMDB, which may crash on a damaged file.

    If another process writes the file during a failed check, the check is repeated.

    Raises:
        StoreError: missing, truncated, damaged, or not of LMDB.
        StoreBusyError: the file was written during every check.
    """
    for _ in range(ATTEMPTS):
        transaction = last_transaction(folder)
        try:
            check_data_file(folder / "data.mdb")
            problems = _structural_problems(folder)
            if not problems:
                return
            raise StoreError(f"{folder}: the structure of the database is damaged: {problems[0]}; {REMEDY}")
        except StoreError:
            if last_transaction(folder) == transaction:
                raise
    raise StoreBusyError(f"{folder} is being written; try again when the refresh or erasure has ended")


def last_transaction(folder: Path) -> int:
    """Number of an environment's last committed transaction; -1 if its file is missing or not of LMDB."""
    try:
        return _committed(folder / "data.mdb")[2]
    except StoreError:
        return -1


def _structural_problems(folder: Path) -> list[str]:
    try:
        return list(lmdb.verify.verify(str(folder)))  # type: ignore[no-untyped-call]
    except lmdb.verify.VerifyError as error:
        return [str(error)]


def _read_meta(block: bytes) -> tuple[int, int, int] | None:
    if len(block) < _PAGE_HEADER_BYTES + _META.size:
        return None
    magic, version, page_bytes, last_page, transaction = _META.unpack_from(block, _PAGE_HEADER_BYTES)
    if magic != _META_MAGIC or version != _META_VERSION or not 512 <= page_bytes <= 65536:
        return None
    return page_bytes, last_page, transaction
