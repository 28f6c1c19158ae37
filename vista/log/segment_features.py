"""The features that one segment adds to a log, of items or of users. NumPy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vista.arrays import Int
from vista.errors import LogFormatError
from vista.log.feature_owner import FeatureOwner
from vista.log.item_features import CategoryColumn, FeatureColumn, NumberColumn, VectorColumn
from vista.log.segment_files import SegmentFiles
from vista.log.segment_manifest import REMEDY


@dataclass(frozen=True, slots=True)
class SegmentColumn:
    """A column as one segment has it: int64 [F] rows of items or users, ascending, and their features."""

    rows: Int
    column: FeatureColumn


@dataclass(frozen=True, slots=True)
class SegmentFeatures:
    """Features of F items or users, which replace those of earlier segments in the same columns."""

    owner: FeatureOwner
    rows: Int
    """int64 [F] rows of items or users, ascending and distinct; at least one, unless a later segment erased them."""
    columns: Mapping[str, FeatureColumn]
    """By name. Codes of a category are rows of the values of all segments; `values` are those that this segment adds,
    and come after those of earlier segments."""

    @classmethod
    def read(
        cls, folder: Path, files: SegmentFiles, owner: FeatureOwner, columns: Sequence[Mapping[str, str]]
    ) -> SegmentFeatures | None:
        """The features of a segment; None without any.

        Args:
            folder: the segment, for errors.
            columns: the names and kinds in the manifest.

        Raises:
            LogFormatError: if a file is missing, or does not match the others or the manifest.
        """
        if not columns and owner.rows_file not in files:
            return None
        names = [column["name"] for column in columns]
        rows = files.array(owner.rows_file, np.int64)
        if len(set(names)) < len(names) or not names or not len(rows):
            raise LogFormatError(
                f"{folder}: {len(rows)} {owner.table} with features in the columns {names}: both must not be empty, "
                f"and names must differ; {REMEDY}"
            )
        read = {
            column["name"]: _read_column(files, f"{owner.folder}{number}", column["kind"])
            for number, column in enumerate(columns)
        }
        for number, (name, column) in enumerate(read.items()):
            if _num_rows(column) != len(rows):
                raise LogFormatError(
                    f"{folder / owner.folder}: the files of column {number} ({name!r}) do not match the {len(rows)} "
                    f"rows of {owner.table}.npy; {REMEDY}"
                )
        return cls(owner, rows, read)

    def check_order(self, path: Path) -> None:
        """Raise LogFormatError, naming the segment at `path`, if rows or offsets are not ascending."""
        columns = [column for column in self.columns.values() if isinstance(column, CategoryColumn)]
        ascending = bool((np.diff(self.rows, prepend=-1) > 0).all())
        if not ascending or any(column.offsets[0] != 0 or (np.diff(column.offsets) < 0).any() for column in columns):
            raise LogFormatError(
                f"{path}: {self.owner.name} features: rows of {self.owner.table} or offsets are not ascending; {REMEDY}"
            )

    def without(self, rows: Int) -> SegmentFeatures:
        """These features, whose order was checked, without those of some items or users (int64)."""
        kept = np.flatnonzero(~np.isin(self.rows, rows))
        if len(kept) == len(self.rows):
            return self
        columns = {name: column.select(kept) for name, column in self.columns.items()}
        return SegmentFeatures(self.owner, self.rows[kept], columns)


def _read_column(files: SegmentFiles, place: str, kind: str) -> FeatureColumn:
    if kind == "number":
        return NumberColumn(files.array(f"{place}.numbers.npy", np.float32))
    if kind == "vector":
        return VectorColumn(files.array(f"{place}.vectors.npy", np.float32, 2))
    codes, offsets = files.array(f"{place}.codes.npy", np.int32), files.array(f"{place}.offsets.npy", np.int64)
    return CategoryColumn(files.vocabulary(f"{place}.values", "str"), codes, offsets)


def _num_rows(column: FeatureColumn) -> int:
    """Number of rows of a column as read; -1 if its arrays contradict each other."""
    if isinstance(column, NumberColumn):
        return len(column.numbers)
    if isinstance(column, VectorColumn):
        return len(column.vectors) if column.vectors.shape[1] else -1
    ends = int(column.offsets[-1]) if len(column.offsets) else -1
    return len(column.offsets) - 1 if ends == len(column.codes) else -1
