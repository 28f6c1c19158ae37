"""The files of a segment as its manifest lists them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import DTypeLike, NDArray

from vista.arrays import Content, Int, array_in, map_file
from vista.errors import LogFormatError
from vista.log.feature_owner import ITEMS, USERS, FeatureOwner
from vista.log.packed_table import PackedTable
from vista.log.segment_manifest import MANIFEST_FILE, REMEDY, SET_ASIDE_FILES
from vista.log.vocabulary import Vocabulary
from vista.progress_bar import progress_bar

EVENT_COLUMNS = {"item": np.int32, "timestamp": np.int64, "action": np.uint8, "rating": np.float32}
IMPRESSION_COLUMNS = {
    "item": np.int32,
    "timestamp": np.int64,
    "label": np.uint8,
    "mask": np.uint8,
    "probability": np.float32,
}
FORGOTTEN_COLUMNS = {"item": np.int32, "timestamp": np.int64, "action": np.uint8}
EVENT_FEATURES, REQUEST_FEATURES = "event_features/", "request_features/"
"""Folders of the features of events and of impressions."""
_PER_TASK = ("label", "mask", "probability")
"""Columns with one value per row and task."""
_OPTIONAL = ("rating", "probability")
_LARGE = {
    *SET_ASIDE_FILES,
    *(f"{name}.npy" for name in EVENT_COLUMNS),
    *(f"impressions/{name}.npy" for name in IMPRESSION_COLUMNS),
}
"""Files with an entry per event, impression, or invalid row. Those of features are large too, except for the values
of categories, from which an appended segment continues."""


@dataclass(frozen=True, slots=True)
class SegmentFile:
    """A file of a segment, mapped into memory, with the manifest's entry for it."""

    path: Path
    entry: Mapping[str, Any]
    content: Content

    @classmethod
    def open(cls, path: Path, entry: Mapping[str, Any]) -> SegmentFile:
        """Map a file.

        Raises:
            LogFormatError: if it is missing, is not a regular file, or does not have the size in the manifest.
        """
        return cls(path, entry, map_file(path, REMEDY, entry["bytes"]))

    def array(self, dtype: DTypeLike, num_dims: int) -> NDArray[Any]:
        """The array of a `.npy` file, as a read-only view.

        Raises:
            LogFormatError: if it has another type or shape than expected, or than the manifest says.
        """
        array = array_in(self.content, self.path, REMEDY)
        if array.dtype != dtype or array.ndim != num_dims:
            raise LogFormatError(
                f"{self.path}: has type {array.dtype} and {array.ndim} dimensions instead of {np.dtype(dtype)} and "
                f"{num_dims}; {REMEDY}"
            )
        if (array.dtype.str, list(array.shape)) != (self.entry["dtype"], self.entry["shape"]):
            raise LogFormatError(f"{self.path}: has another type or shape than the manifest says; {REMEDY}")
        return array

    def verify(self) -> int:
        """Compare the content with the manifest; returns the number of bytes that were read.

        Raises:
            LogFormatError: if a byte has changed.
        """
        digest = xxhash.xxh3_64_hexdigest(self.content)
        if digest != self.entry["xxh3"]:
            raise LogFormatError(
                f"{self.path}: its content has changed since it was written (XXH3-64 {digest}, the manifest says "
                f"{self.entry['xxh3']}); restore the file from a copy, or {REMEDY}"
            )
        return len(self.content)


class SegmentFiles:
    """All files of a segment that its manifest lists, by their path in the segment's folder.

    They are opened together, so a reader that has them keeps reading them after a compaction removed the segment.

    Raises:
        LogFormatError: as `SegmentFile.open`.
    """

    def __init__(self, folder: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
        self._folder = folder
        self._files = {name: SegmentFile.open(folder / name, entry) for name, entry in entries.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def array(self, name: str, dtype: DTypeLike, num_dims: int = 1) -> NDArray[Any]:
        """An array, as a read-only view.

        Raises:
            LogFormatError: if the manifest does not list it, or as `SegmentFile.array`.
        """
        if name not in self._files:
            raise LogFormatError(f"{self._folder / MANIFEST_FILE}: does not list {name}; {REMEDY}")
        return self._files[name].array(dtype, num_dims)

    def type_of(self, name: str, allowed: Sequence[type[np.generic]]) -> DTypeLike:
        """The one of these types that an array has by the manifest; the first if it has none of them."""
        entry = self._files[name].entry if name in self._files else {}
        return next((dtype for dtype in allowed if np.dtype(dtype).str == entry.get("dtype")), allowed[0])

    def table(self, prefix: str, columns: Mapping[str, DTypeLike]) -> PackedTable:
        """A table, with these columns. Ratings and probabilities may be missing.

        Raises:
            LogFormatError: as `array`, or if the arrays do not match.
        """
        users, offsets = (self.array(f"{prefix}{name}.npy", np.int64) for name in ("users", "offsets"))
        values = {
            name: self.array(f"{prefix}{name}.npy", dtype, 2 if name in _PER_TASK else 1)
            for name, dtype in columns.items()
            if name not in _OPTIONAL or f"{prefix}{name}.npy" in self._files
        }
        end = int(offsets[-1]) if len(offsets) else -1
        lengths = {len(array) for array in values.values()}
        if len(offsets) != len(users) + 1 or lengths != {end}:
            raise LogFormatError(
                f"{self._folder / prefix}: {len(users)} users, {len(offsets)} offsets that end at {end}, and columns "
                f"of {sorted(lengths)} rows do not match; {REMEDY}"
            )
        return PackedTable(users, offsets, values)

    def rows(self, name: str) -> Int | None:
        """An int64 array; None if the segment has none of this name."""
        return self.array(name, np.int64) if name in self._files else None

    def vocabulary(self, name: str, kind: str) -> Vocabulary:
        """The vocabulary `name`, with ids of the given kind ("int" or "str").

        Raises:
            LogFormatError: as `array`, or if the arrays do not match.
        """
        ids = self.array(f"{name}.ids.npy", np.int64 if kind == "int" else np.uint8)
        offsets = None if kind == "int" else self.array(f"{name}.offsets.npy", np.int64)
        return Vocabulary.of_arrays(ids, offsets, self.rows(f"{name}.blank.npy"), self._folder / name, REMEDY)

    def verify(self, *, large: bool = True) -> int:
        """Compare the content of every file with the manifest.

        Args:
            large: also read the files with an entry per event, impression, quarantined row, item, or user. Without
                them, the ids, the offsets, and the deletions are checked.

        Returns:
            The number of bytes that were read.

        Raises:
            LogFormatError: naming the first file with a byte that has changed.
        """
        files = [file for name, file in self._files.items() if large or not _is_large(name)]
        total = sum(len(file.content) for file in files)
        with progress_bar(total=total, desc="verify log", unit="B", unit_scale=True, leave=False) as bar:
            for file in files:
                bar.update(file.verify())
        return total

    def verify_features(self, owner: FeatureOwner) -> None:
        """Compare the content of the files of features with the manifest.

        Raises:
            LogFormatError: naming the first file with a byte that has changed.
        """
        for name, file in self._files.items():
            if name.startswith(owner.folder):
                file.verify()


def _is_large(name: str) -> bool:
    in_features = name.startswith((ITEMS.folder, USERS.folder, EVENT_FEATURES, REQUEST_FEATURES))
    return name in _LARGE or (in_features and ".values." not in name)
