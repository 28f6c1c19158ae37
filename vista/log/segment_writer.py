"""Writing of segments: columns in blocks, in a folder that atomically becomes the segment."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import xxhash
from numpy.typing import DTypeLike, NDArray

from vista.arrays import ArrayWriter, Float32s, Int, offsets_of
from vista.errors import DataError, LogBusyError, LogWriteError
from vista.files import make_folders, sync
from vista.log.features import Column, code_type
from vista.log.histories import ColumnValues, RowFeatures
from vista.log.segment import find_segments
from vista.log.segment_files import (
    EVENT_COLUMNS,
    EVENTS,
    IMPRESSIONS,
    ITEMS,
    LOG_FIELDS,
    MANIFEST_FILE,
    SET_ASIDE_FILES,
    USERS,
    FeatureOwner,
    check_manifest,
    manifest_bytes,
)
from vista.log.vocabulary import Vocabulary


class SegmentWriter:
    """Writes the files of a segment into a folder, and notes what the manifest says about each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._arrays: dict[str, ArrayWriter] = {}

    def array(self, name: str, dtype: DTypeLike, shape: tuple[int, ...]) -> ArrayWriter:
        """Begin a `.npy` file, which the caller fills and closes."""
        self._arrays[name] = ArrayWriter(self.folder / name, dtype, shape)
        return self._arrays[name]

    def save(self, name: str, values: NDArray[Any]) -> None:
        """Write a `.npy` file at once."""
        array = self.array(name, values.dtype, values.shape)
        array.append(values)
        array.close()

    def save_vocabulary(self, name: str, vocabulary: Vocabulary) -> None:
        """Write the files of a vocabulary."""
        for ending, values in vocabulary.arrays().items():
            self.save(f"{name}.{ending}.npy", values)

    @property
    def entries(self) -> dict[str, dict[str, Any]]:
        """What the manifest says about the `.npy` files, by name."""
        return {name: array.entry for name, array in self._arrays.items()}

    def write_manifest(self, fields: Mapping[str, Any]) -> None:
        """Write the manifest, after all other files. Files of invalid rows in the folder are listed too.

        Args:
            fields: all fields except `format`, `version`, `files`, and `checksum`.

        Raises:
            DataError: if no reader would accept the manifest, for example because of the name of an action.
        """
        files = self.entries
        for path in (self.folder / name for name in SET_ASIDE_FILES):
            if path.exists():
                with path.open("rb") as file:
                    xxh3 = hashlib.file_digest(file, xxhash.xxh3_64).hexdigest()
                files[path.name] = {"bytes": path.stat().st_size, "xxh3": xxh3}
        content = manifest_bytes({**fields, "files": files})
        try:
            check_manifest(json.loads(content), content)
        except ValueError as error:
            raise DataError(
                f"{self.folder}: a log cannot hold this ({error}); change the source, such as names"
            ) from error
        (self.folder / MANIFEST_FILE).write_bytes(content)


class TableWriter:
    """Writes the files of a PackedTable from blocks of complete users, in ascending order of user rows.

    Args:
        segment: the segment with the table.
        prefix: folder of the table in the segment, such as "impressions/"; empty for events.
        num_rows: total number of rows of all blocks.
        columns: name to (dtype, shape of one row).
    """

    def __init__(
        self,
        segment: SegmentWriter,
        prefix: str,
        num_rows: int,
        columns: Mapping[str, tuple[DTypeLike, tuple[int, ...]]],
    ) -> None:
        (segment.folder / prefix).mkdir(exist_ok=True)
        self._segment, self._prefix = segment, prefix
        self._users: list[NDArray[np.int64]] = []
        self._counts: list[NDArray[np.int64]] = []
        self._columns = {
            name: segment.array(f"{prefix}{name}.npy", dtype, (num_rows, *shape))
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
        offsets = offsets_of(np.concatenate([np.empty(0, np.int64), *self._counts]))
        self._segment.save(f"{self._prefix}users.npy", users)
        self._segment.save(f"{self._prefix}offsets.npy", offsets.astype(np.int64))
        return len(users)


class FeatureWriter:
    """Writes the files of the features of items, users, events, or impressions.

    Args:
        segment: the segment with the features.
        owner: what has them.
        rows: of items and users, int64 [F] their rows, ascending and distinct, at least one; of events and impressions,
            the number of rows.
    """

    def __init__(self, segment: SegmentWriter, owner: FeatureOwner, rows: Int | int) -> None:
        self.columns: list[dict[str, str]] = []
        """What the manifest says about the columns."""
        self._segment, self._owner = segment, owner
        self._num_rows = rows if isinstance(rows, int) else len(rows)
        self._open: dict[str, ArrayWriter] = {}
        if not isinstance(rows, int):
            (segment.folder / owner.folder).mkdir()
            segment.save(owner.rows_file, rows)

    def add(self, name: str, column: Column) -> None:
        """Write numbers, or a category, of items or users. `values` are only those that the segment adds."""
        place = self._place(name, column.kind)
        if column.values is None or column.offsets is None:
            self._segment.save(f"{place}.numbers.npy", column.data)
            return
        self._segment.save(f"{place}.codes.npy", column.data)
        self._segment.save(f"{place}.offsets.npy", column.offsets)
        self._segment.save_vocabulary(f"{place}.values", column.values)

    def add_vectors(self, name: str, dim: int, blocks: Iterable[Float32s]) -> None:
        """Write a column of F vectors, from blocks [n, dim] in the order of the rows."""
        writer = self._segment.array(f"{self._place(name, 'vector')}.vectors.npy", np.float32, (self._num_rows, dim))
        for block in blocks:
            writer.append(block)
        writer.close()

    def begin(self, values: ColumnValues, before: ColumnValues = MappingProxyType({})) -> None:
        """Begin the columns of events or impressions, which `append` fills.

        Args:
            values: the columns, with all values that the log has together with this segment.
            before: the values that the log has without this segment: a category of `values` must begin with these.
        """
        segment, owner = self._segment, self._owner
        if values:
            (segment.folder / owner.folder).mkdir()
        for name, known in values.items():
            place = self._place(name, "number" if known is None else "category")
            if known is None:
                self._open[name] = segment.array(f"{place}.numbers.npy", np.float32, (self._num_rows,))
                continue
            old = before.get(name)
            segment.save_vocabulary(f"{place}.values", known.part(0 if old is None else len(old)))
            self._open[name] = segment.array(f"{place}.codes.npy", code_type(len(known)), (self._num_rows,))

    def append(self, block: RowFeatures) -> None:
        """Write the next rows of the columns that `begin` began."""
        for name, writer in self._open.items():
            writer.append(block.columns[name])

    def close(self) -> None:
        """Finish the columns that `begin` began."""
        for writer in self._open.values():
            writer.close()

    def _place(self, name: str, kind: str) -> str:
        """List the next column; returns where its files are, without their endings."""
        place = f"{self._owner.folder}{len(self.columns)}"
        self.columns.append({"name": name, "kind": kind})
        return place


def write_without_events(
    segment: SegmentWriter, newest: Mapping[str, Any], users: Vocabulary, items: Vocabulary
) -> dict[str, Any]:
    """Write the files of a log's next segment if it adds no ids and no events.

    Args:
        newest: the manifest of the log's newest segment.
        users, items: the log's vocabularies.

    Returns:
        The fields of its manifest, for a segment that adds nothing at all.
    """
    segment.save_vocabulary("new_users", users.part(len(users)))
    segment.save_vocabulary("new_items", items.part(len(items)))
    names = [name for name in EVENT_COLUMNS if name != "rating" or newest["has_rating"]]
    TableWriter(segment, "", 0, {name: (EVENT_COLUMNS[name], ()) for name in names}).close()
    number = newest["last_segment"] + 1
    return {name: newest[name] for name in LOG_FIELDS} | {
        "first_segment": number,
        "last_segment": number,
        "counts": {table: {"rows": 0, "users": 0} for table in ("events", "impressions")},
        **{owner.field: [] for owner in (ITEMS, USERS, EVENTS, IMPRESSIONS)},
        "deletions": 0,
        "quarantined": 0,
        "sources": [],
        "offsets": [],
    }


@contextmanager
def locked_log(path: Path) -> Iterator[None]:
    """Lock an existing log against other writers (append, deletions, compaction) during a `with` block.

    Readers are not affected. The lock is released when the process ends.

    Raises:
        LogBusyError: if another process is writing the log.
        LogWriteError: if the folder cannot be locked or synced.
        LogFormatError: if `path` is not a log.
    """
    find_segments(path)
    with ExitStack() as stack:
        try:
            handle = os.open(path, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            sync(path)  # A writer that was killed may have renamed a segment without this.
        except BlockingIOError:
            raise LogBusyError(f"{path}: another process is writing this log; wait until it is done") from None
        except OSError as error:
            raise LogWriteError(
                f"{path}: cannot be written ({error}); free disk space, or correct its permissions"
            ) from error
        yield


def sync_name(target: Path) -> None:
    """Sync the name of a log that exists: a writer that was killed may have renamed it without this.

    An account that may not open the folder above it cannot have made it, and does nothing.

    Raises:
        LogWriteError: the folder that holds it cannot be synced.
    """
    try:
        with suppress(PermissionError):
            sync(target.parent)
    except OSError as error:
        raise LogWriteError(f"{target}: its name cannot be synced ({error}); check the disk and permissions") from error


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
        make_folders(target.parent)
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
