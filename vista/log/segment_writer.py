"""Writing of segments: columns in blocks, in a folder that atomically becomes the segment."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from vista.errors import LogBusyError, LogWriteError
from vista.files import sync
from vista.log.segment import FORMAT, VERSION, find_segments


class ColumnWriter:
    """Writes a `.npy` file of known length block by block.

    Raises:
        ValueError: on closing, if more or fewer rows were written than announced.
    """

    def __init__(self, path: Path, dtype: DTypeLike, shape: tuple[int, ...]) -> None:
        self._file = path.open("wb")
        self._dtype = np.dtype(dtype)
        self._shape = shape
        self._rows = 0
        header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)

    def append(self, values: NDArray[Any]) -> None:
        if values.shape[1:] != self._shape[1:]:
            raise ValueError(f"{self._file.name}: rows have shape {values.shape[1:]}, expected {self._shape[1:]}")
        self._rows += len(values)
        self._file.write(np.ascontiguousarray(values, dtype=self._dtype).data)

    def close(self) -> None:
        self._file.close()
        if self._rows != self._shape[0]:
            raise ValueError(f"{self._file.name}: {self._rows} rows written, {self._shape[0]} announced")


class TableWriter:
    """Writes the files of a PackedTable from blocks of complete users, in ascending order of user rows.

    Args:
        folder: folder of the table; made if it does not exist.
        num_rows: total number of rows of all blocks.
        columns: name to (dtype, shape of one row).
    """

    def __init__(self, folder: Path, num_rows: int, columns: Mapping[str, tuple[DTypeLike, tuple[int, ...]]]) -> None:
        folder.mkdir(exist_ok=True)
        self._folder = folder
        self._users: list[NDArray[np.int64]] = []
        self._counts: list[NDArray[np.int64]] = []
        self._columns = {
            name: ColumnWriter(folder / f"{name}.npy", dtype, (num_rows, *shape))
            for name, (dtype, shape) in columns.items()
        }

    def append(self, user_rows: NDArray[np.int64], columns: Mapping[str, NDArray[Any]]) -> None:
        """Add a block: `user_rows` int64 [N] ascending, and the columns in the same order."""
        starts = np.flatnonzero(np.diff(user_rows, prepend=-1))
        self._users.append(user_rows[starts])
        self._counts.append(np.diff(starts, append=len(user_rows)))
        for name, writer in self._columns.items():
            writer.append(columns[name])

    def close(self) -> int:
        """Write users and offsets; returns the number of users."""
        for writer in self._columns.values():
            writer.close()
        users = np.concatenate([np.empty(0, np.int64), *self._users])
        offsets = np.concatenate([[0], np.cumsum(np.concatenate([np.empty(0, np.int64), *self._counts]))])
        np.save(self._folder / "users.npy", users)
        np.save(self._folder / "offsets.npy", offsets.astype(np.int64))
        return len(users)


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write manifest.json, with the format version and the dtype, shape, and bytes of each `.npy` file in `folder`."""
    files = {}
    for path in sorted(folder.rglob("*.npy")):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        files[path.relative_to(folder).as_posix()] = {
            "dtype": array.dtype.str,
            "shape": list(array.shape),
            "bytes": path.stat().st_size,
        }
    whole = {"format": FORMAT, "version": VERSION, **manifest, "files": files}
    (folder / "manifest.json").write_text(json.dumps(whole, indent=1, sort_keys=True) + "\n")


@contextmanager
def locked_log(path: Path) -> Iterator[None]:
    """Lock an existing log against other writers (append, deletions, compaction) during a `with` block.

    Readers are not affected. The lock is released when the process ends.

    Raises:
        LogBusyError: if another process is writing the log.
        LogFormatError: if `path` is not a log.
    """
    find_segments(path)
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise LogBusyError(f"{path}: another process is writing this log; wait until it is done") from None
    finally:
        os.close(handle)


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the `with` block ends, or is removed if the block fails.

    All files are fsynced before the folder is renamed. The folder is locked, so there is one writer at a time, and
    leftovers of a killed writer are removed.

    Raises:
        LogWriteError: if the folder cannot be written.
        LogBusyError: if another process is writing, or `target` appeared meanwhile.
    """
    staging = target.parent / f".{target.name}.tmp"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle = _lock_folder(staging)
    except BlockingIOError:
        raise LogBusyError(f"{target}: another process is writing it; wait until it is done") from None
    except OSError as error:
        raise LogWriteError(f"{target}: cannot be written ({error.strerror}); choose another folder") from error
    try:
        for leftover in staging.iterdir():
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        yield staging
        for folder, _, names in os.walk(staging):
            for name in names:
                sync(Path(folder, name))
            sync(Path(folder))
        try:
            os.rename(staging, target)
        except OSError as error:
            raise LogBusyError(
                f"{target}: was created by another process meanwhile ({error.strerror}); try again"
            ) from error
        sync(target.parent)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise LogWriteError(f"{target}: writing failed ({error}); free disk space, or choose another folder") from error
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    finally:
        os.close(handle)


def _lock_folder(folder: Path) -> int:
    """Make and lock `folder`; returns the file descriptor that holds the lock."""
    while True:
        folder.mkdir(exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if folder.exists() and os.path.samestat(os.fstat(handle), os.stat(folder)):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its owner renamed or removed the folder between the two calls
