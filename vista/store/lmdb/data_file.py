"""The files of an LMDB environment: opened the one way that is safe, and checked before LMDB sees them."""

from __future__ import annotations

import errno
import logging
import os
import struct
from contextlib import suppress
from pathlib import Path

import lmdb
import lmdb.verify

from vista.errors import StoreBusyError, StoreError
from vista.store.lmdb.permissions import PRIVATE, modes_of, set_mode

MAP_SIZE_BYTES = 1 << 40
"""Address space reserved; neither memory nor disk. Reserved once, so that the map never has to grow under readers."""
MAX_READERS = 1024
"""Slots of the reader table: at least processes x threads. The first opener of a generation decides."""
ATTEMPTS = 3
"""Looks at a file as a whole, if it is written meanwhile."""

_SMALLEST_MAP_BYTES = 1 << 28
_READER_BYTES = 64
_READER_TABLE_HEAD_BYTES = 128
_PAGE_HEADER_BYTES = 16
_META = struct.Struct("=II16xI92xQQ")  # magic, version, …, page size, …, last page, transaction; host byte order
_META_MAGIC = 0xBEEFC0DE
_META_VERSION = 1

logger = logging.getLogger(__name__)

REMEDY = "refresh the store again, or write the name of the generation before into CURRENT"


def open_environment(path: Path, *, readonly: bool, max_readers: int = MAX_READERS) -> lmdb.Environment:
    """Open (a writer: or create) the environment in a folder.

    Always synchronous, locked, without writemap, in LMDB 0.9's format. Where the address space is limited (ulimit -v),
    a smaller map is reserved and its size logged.

    Raises:
        StoreError: no environment, truncated, foreign, not accessible, no room for the reader table, or no address
            space; the message has the remedy.
    """
    if readonly or (path / "data.mdb").exists():
        check_data_file(path / "data.mdb")
    modes = modes_of(path)
    made = [(path / name, mode) for name, mode in (("data.mdb", modes.file), ("lock.mdb", modes.lock))]
    made = [(file, mode) for file, mode in made if not file.exists()]
    _make_reader_table(path / "lock.mdb", max_readers)
    size = MAP_SIZE_BYTES
    while True:
        try:
            environment = lmdb.open(
                str(path),
                map_size=size,
                readonly=readonly,
                create=not readonly,
                mode=PRIVATE.file,
                max_readers=max_readers,
                lib_version=0,
            )
            break
        except lmdb.MemoryError as error:
            if size <= _SMALLEST_MAP_BYTES:
                raise StoreError(
                    f"{path}: no address space for a map of {size} bytes; raise the limit (ulimit -v unlimited)"
                ) from error
            size >>= 2
        except lmdb.Error as error:
            raise StoreError(f"{path}: {error}. Readers too need write access to lock.mdb; {REMEDY}") from error
        except OSError as error:  # its folder is gone, as that of an old generation is after a flip
            raise StoreError(f"{path}: {error.strerror}; {REMEDY}") from error
    for file, mode in made:  # LMDB's own mode loses the umask's bits, and a shared lock file needs one of its own.
        if file.exists():  # On a file system that is read-only LMDB does without lock.mdb.
            set_mode(file, mode)
    if size < MAP_SIZE_BYTES:
        logger.warning("%s: address space is limited (ulimit -v); reserved %d bytes instead of 1 TiB", path, size)
    return environment


def _make_reader_table(path: Path, max_readers: int) -> None:
    """Make lock.mdb with all its blocks where there is none.

    LMDB would make a file of holes and write to it through a map, which on a full disk ends the process (SIGBUS).

    Raises:
        StoreError: the disk is full.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.exists():
            return
        with open(partial, "xb", opener=lambda name, flags: os.open(name, flags, PRIVATE.file)) as file:
            file.write(bytes(_READER_BYTES * max_readers + _READER_TABLE_HEAD_BYTES))
        with suppress(FileExistsError):  # Another process was first.
            os.link(partial, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreError(
                f"{path}: {error.strerror}, and its readers need a table of {_READER_BYTES * max_readers} bytes; free "
                "some space and open the store again"
            ) from error
        logger.debug("%s: %s", path, error)  # LMDB meets the same, and says what it means for it.
    finally:
        with suppress(OSError):
            partial.unlink()


def check_data_file(path: Path) -> None:
    """Refuse a data file that LMDB would crash on: it maps what the meta page promises, whatever the file's size.

    A file that lacks pages which nothing refers to is whole (`complete_size`).

    Raises:
        StoreError: missing, foreign or truncated; the message holds the sizes and the remedy.
    """
    found, expected = committed_size(path)
    if found < expected and _structural_problems(path.parent):
        raise StoreError(f"{path} is truncated: {found} bytes, its pages need {expected}; {REMEDY}")


def committed_size(path: Path) -> tuple[int, int]:
    """Size of a data file, and the size that its last committed transaction speaks of, in bytes.

    Raises:
        StoreError: missing or foreign.
    """
    found, expected, _ = _committed(path)
    return found, expected


def _committed(path: Path) -> tuple[int, int, int]:
    """As `committed_size`, and the number of that transaction."""
    try:
        with path.open("rb") as file:
            metas = [_read_meta(file.read(_PAGE_HEADER_BYTES + _META.size))]
            if metas[0] is not None:
                file.seek(metas[0][0])
                metas.append(_read_meta(file.read(_PAGE_HEADER_BYTES + _META.size)))
            found = os.fstat(file.fileno()).st_size  # Last: a file that is being written grows first.
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}; {REMEDY}") from error
    valid = [meta for meta in metas if meta is not None]
    if len(valid) < 2:
        raise StoreError(f"{path} is no LMDB 0.9 data file ({found} bytes); {REMEDY}")
    page_bytes, last_page, transaction = max(valid, key=lambda meta: meta[2])
    return found, (last_page + 1) * page_bytes, transaction


def complete_size(folder: Path) -> None:
    """Give an environment's file the size that its meta page speaks of, so that readers can tell a truncated one.

    LMDB does not write pages at the end that a transaction took and gave back. Nobody else may write meanwhile.
    """
    path = folder / "data.mdb"
    found, expected = committed_size(path)
    if found < expected:
        with path.open("r+b") as file:
            file.truncate(expected)
            os.fsync(file.fileno())


def check_structure(folder: Path) -> None:
    """Check every page of an environment's file without handing it to LMDB, which a damaged one may crash.

    What another process writes meanwhile makes a bad verdict void, and it is checked again.

    Raises:
        StoreError: missing, foreign, truncated or damaged.
        StoreBusyError: it was written each time.
    """
    for _ in range(ATTEMPTS):
        transaction = last_transaction(folder)
        try:
            check_data_file(folder / "data.mdb")
            problems = _structural_problems(folder)
            if not problems:
                return
            raise StoreError(f"{folder}: the database's structure is damaged: {problems[0]}; {REMEDY}")
        except StoreError:
            if last_transaction(folder) == transaction:
                raise
    raise StoreBusyError(f"{folder} is being written; try again when the refresh or erasure has ended")


def last_transaction(folder: Path) -> int:
    """Number of an environment's last committed transaction; -1 where its file is missing or foreign."""
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
