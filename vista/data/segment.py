"""A segment of an EventLog on disk: a folder of `.npy` files and a manifest, written once, never changed.

    segment-000001/                     or segment-000001-000004/ once compacted
        manifest.json                   format, range, counts, sources, and each file's dtype, shape, bytes
        new_users.ids.npy [+ .offsets]  ids that this segment adds to the user vocabulary; likewise new_items
        users.npy       int64 [U]       user rows with events here, ascending
        offsets.npy     int64 [U + 1]   where each one's events start
        item.npy        int32 [T]       item rows
        timestamp.npy   int64 [T]       milliseconds, or the ordinal where the log has no times
        action.npy      uint8 [T]       codes into the manifest's `actions`
        rating.npy      float32 [T]     where the log has ratings
        impressions/                    the same for impressions: users, offsets, item, timestamp, and
            label.npy   uint8 [N, tasks]; mask.npy uint8 [N, tasks]; probability.npy float32 [N, tasks], where known
        quarantine.csv                  rows that failed validation, if any

A user's events lie together, by time, then sequence, then input order. Vocabularies are the segments' new ids end
to end, so that renaming one folder publishes everything at once. `deletions` is reserved and 0 in this version.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from vista.data.vocabulary import Vocabulary
from vista.errors import DataError, LogFormatError
from vista.files import sync

FORMAT = "vista-event-log"
VERSION = 1
EVENT_COLUMNS = {"item": np.int32, "timestamp": np.int64, "action": np.uint8, "rating": np.float32}
IMPRESSION_COLUMNS = {
    "item": np.int32,
    "timestamp": np.int64,
    "label": np.uint8,
    "mask": np.uint8,
    "probability": np.float32,
}
_NAME = re.compile(r"segment-(\d{6})(?:-(\d{6}))?")


def segment_name(number: int) -> str:
    """Folder name of one segment."""
    return f"segment-{number:06d}"


@dataclass(frozen=True, slots=True)
class PackedTable:
    """Rows of several users end to end.

    Args:
        users: int64 [U] user rows, ascending.
        offsets: int64 [U + 1].
        columns: arrays with one row an event.
    """

    users: NDArray[np.int64]
    offsets: NDArray[np.int64]
    columns: dict[str, NDArray[Any]]

    @property
    def num_rows(self) -> int:
        return int(self.offsets[-1])

    def locate(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First row and number of rows of each of the users `rows` [B]; both int64 [B]."""
        if not len(self.users):
            return np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
        at: NDArray[np.int64]
        if int(self.users[-1]) == len(self.users) - 1:  # users 0..U-1, all present
            found = rows < len(self.users)
            at = np.where(found, rows, 0)
        else:
            at = np.minimum(np.searchsorted(self.users, rows), len(self.users) - 1).astype(np.int64)
            found = self.users[at] == rows
        starts = np.where(found, self.offsets[at], 0)
        return starts, np.where(found, self.offsets[at + 1] - starts, 0)

    def counts(self, num_users: int) -> NDArray[np.int64]:
        """Rows of every user: int64 [num_users]."""
        counts = np.zeros(num_users, np.int64)
        counts[self.users] = np.diff(self.offsets)
        return counts


@dataclass(frozen=True, slots=True)
class Segment:
    """One opened segment; arrays are memory-mapped."""

    path: Path
    first: int
    last: int
    manifest: dict[str, Any]
    events: PackedTable
    impressions: PackedTable | None
    new_users: Vocabulary
    new_items: Vocabulary


class ColumnWriter:
    """Writes one `.npy` file of known length piece by piece.

    Raises:
        ValueError: on closing, if fewer or more rows came than announced.
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
    """Writes the files of a PackedTable; blocks of whole users arrive in ascending order of user row.

    Args:
        folder: made if absent.
        num_rows: of all blocks together.
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
    """Write manifest.json with format, version and the dtype, shape and bytes of each `.npy` file in `folder`."""
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


def read_segment(path: Path) -> Segment:
    """Open one segment and check every file against its manifest.

    Raises:
        LogFormatError: naming the file, what was expected and found, and what to do.
    """
    manifest = _read_manifest(path)
    _check_files(path, manifest["files"])
    impressions = None
    if "impressions/users.npy" in manifest["files"]:
        impressions = _read_table(path, manifest["files"], "impressions/", IMPRESSION_COLUMNS)
    return Segment(
        path,
        manifest["first_segment"],
        manifest["last_segment"],
        manifest,
        _read_table(path, manifest["files"], "", EVENT_COLUMNS),
        impressions,
        Vocabulary.load(path, "new_users"),
        Vocabulary.load(path, "new_items"),
    )


def find_segments(path: Path) -> list[Path]:
    """Folders of the segments in force, oldest first: a compacted range replaces those inside it.

    Raises:
        LogFormatError: if `path` is no log, or a segment is missing.
    """
    if not path.is_dir():
        raise LogFormatError(f"{path}: no such folder; make the log with `vista prepare out={path} …`")
    found = []
    for entry in path.iterdir():
        if match := _NAME.fullmatch(entry.name):
            found.append((int(match[1]), int(match[2] or match[1]), entry))
    found.sort(key=lambda range_: (range_[0], -range_[1]))
    chosen: list[Path] = []
    last = 0
    for first, end, entry in found:
        if end <= last:
            continue
        if first != last + 1:
            raise LogFormatError(
                f"{path}: {segment_name(last + 1)} is missing, found {entry.name}; restore the whole folder"
            )
        chosen.append(entry)
        last = end
    if not chosen:
        raise LogFormatError(
            f"{path}: holds no segment, so it is no EventLog; make one with `vista prepare out={path} …`"
        )
    return chosen


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that becomes `target` when the block ends well, and vanishes when it fails.

    Everything in it is fsynced, then it is renamed. One writer at a time: the folder is locked, and what a killed
    writer left in it is removed.

    Raises:
        DataError: if the place cannot be written, another writer is at work, or `target` appeared meanwhile.
    """
    staging = target.parent / f".{target.name}.tmp"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle = _lock_folder(staging)
    except BlockingIOError:
        raise DataError(f"{target}: another process is writing it right now; wait for it to end") from None
    except OSError as error:
        raise DataError(f"{target}: cannot be written ({error.strerror}); choose another `out`") from error
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
            raise DataError(f"{target}: appeared while it was being written ({error.strerror}); try again") from error
        sync(target.parent)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise DataError(f"{target}: writing failed ({error}); free disk space, or choose another `out`") from error
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    finally:
        os.close(handle)


def _lock_folder(folder: Path) -> int:
    """Make and lock `folder`; returns the descriptor that holds the lock."""
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
        os.close(handle)  # its owner renamed or removed it between the two calls


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / "manifest.json"
    try:
        manifest: dict[str, Any] = json.loads(file.read_text())
    except FileNotFoundError:
        raise LogFormatError(f"{file}: missing; prepare the log anew from its sources") from None
    except (ValueError, RecursionError, OSError) as error:  # RecursionError: JSON that is nested too deep.
        raise LogFormatError(f"{file}: unreadable ({error}); prepare the log anew from its sources") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise LogFormatError(f"{file}: not the manifest of an EventLog segment; check the path")
    if manifest.get("version") != VERSION:
        raise LogFormatError(
            f"{file}: format version {manifest.get('version')}, this vista reads {VERSION}; "
            "install a newer vista, or prepare the log anew"
        )
    if manifest.get("deletions", 0):
        raise LogFormatError(
            f"{file}: holds {manifest['deletions']} deletion rows, which this vista cannot obey; install a newer vista"
        )
    return manifest


def _check_files(path: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    for name, entry in files.items():
        try:
            found = (path / name).stat().st_size
        except OSError:
            raise LogFormatError(f"{path / name}: missing; prepare the log anew from its sources") from None
        if found != entry["bytes"]:
            raise LogFormatError(
                f"{path / name}: expected {entry['bytes']} bytes, found {found}; the file is "
                f"{'truncated' if found < entry['bytes'] else 'overlong'}: copy it again, "
                "or prepare the log anew from its sources"
            )


def _read_table(
    path: Path, files: Mapping[str, Mapping[str, Any]], prefix: str, known: Mapping[str, DTypeLike]
) -> PackedTable:
    def column(name: str, dtype: DTypeLike) -> NDArray[Any]:
        file = path / f"{prefix}{name}.npy"
        array = load_array(file)
        if array.dtype != dtype:
            raise LogFormatError(f"{file}: holds {array.dtype}, expected {np.dtype(dtype)}; prepare the log anew")
        return array

    users, offsets = column("users", np.int64), column("offsets", np.int64)
    columns = {name: column(name, dtype) for name, dtype in known.items() if f"{prefix}{name}.npy" in files}
    lengths = {len(array) for array in columns.values()}
    if len(offsets) != len(users) + 1 or lengths != {int(offsets[-1])}:
        raise LogFormatError(
            f"{path / prefix}: {len(users)} users, {len(offsets)} offsets ending at {int(offsets[-1])} and columns of "
            f"{sorted(lengths)} rows do not fit together; prepare the log anew from its sources"
        )
    return PackedTable(users, offsets, columns)


def load_array(path: Path) -> NDArray[Any]:
    """Memory-map a `.npy` file, read-only.

    Raises:
        LogFormatError: if it is damaged.
    """
    try:
        # np.asarray drops the memmap subclass, which is slow to index.
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (ValueError, OSError, EOFError) as error:
        raise LogFormatError(f"{path}: unreadable ({error}); prepare the log anew from its sources") from error
