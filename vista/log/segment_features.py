"""The item features that one segment adds to a log. NumPy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vista.arrays import Int
from vista.errors import LogFormatError
from vista.log.item_features import CategoryColumn, FeatureColumn, NumberColumn, VectorColumn
from vista.log.segment_files import FEATURES, SegmentFiles
from vista.log.segment_manifest import REMEDY


@dataclass(frozen=True, slots=True)
class SegmentColumn:
    """A column as one segment has it: `items` int64 [F] item rows, ascending, and the features of these F items."""

    items: Int
    column: FeatureColumn


@dataclass(frozen=True, slots=True)
class SegmentFeatures:
    """Features of F items, which replace those of earlier segments in the same columns."""

    items: Int
    """int64 [F] item rows, ascending and distinct, at least one."""
    columns: Mapping[str, FeatureColumn]
    """By name. Codes of a category are rows of the values of all segments; `values` are those that this segment adds,
    and come after those of earlier segments."""

    @classmethod
    def read(cls, folder: Path, files: SegmentFiles, columns: Sequence[Mapping[str, str]]) -> SegmentFeatures | None:
        """The features of a segment; None without any.

        Args:
            folder: the segment, for errors.
            columns: the names and kinds in the manifest.

        Raises:
            LogFormatError: if a file is missing, or does not match the others or the manifest.
        """
        if not columns and f"{FEATURES}items.npy" not in files:
            return None
        names = [column["name"] for column in columns]
        items = files.array(f"{FEATURES}items.npy", np.int64)
        if len(set(names)) < len(names) or not names or not len(items):
            raise LogFormatError(
                f"{folder}: {len(items)} items with features in the columns {names}: both must not be empty, and names "
                f"must differ; {REMEDY}"
            )
        read = {
            column["name"]: _read_column(files, f"{FEATURES}{number}", column["kind"])
            for number, column in enumerate(columns)
        }
        for number, (name, column) in enumerate(read.items()):
            if _num_items(column) != len(items):
                raise LogFormatError(
                    f"{folder / FEATURES}: the files of column {number} ({name!r}) do not match the {len(items)} rows "
                    f"of items.npy; {REMEDY}"
                )
        return cls(items, read)


def _read_column(files: SegmentFiles, place: str, kind: str) -> FeatureColumn:
    if kind == "number":
        return NumberColumn(files.array(f"{place}.numbers.npy", np.float32))
    if kind == "vector":
        return VectorColumn(files.array(f"{place}.vectors.npy", np.float32, 2))
    codes, offsets = files.array(f"{place}.codes.npy", np.int32), files.array(f"{place}.offsets.npy", np.int64)
    return CategoryColumn(files.vocabulary(f"{place}.values", "str"), codes, offsets)


def _num_items(column: FeatureColumn) -> int:
    """Number of items of a column as read; -1 if its arrays contradict each other."""
    if isinstance(column, NumberColumn):
        return len(column.numbers)
    if isinstance(column, VectorColumn):
        return len(column.vectors) if column.vectors.shape[1] else -1
    ends = int(column.offsets[-1]) if len(column.offsets) else -1
    return len(column.offsets) - 1 if ends == len(column.codes) else -1
