"""Features of items, users, events, and impressions: their columns, in a segment and merged over segments. NumPy only.

N rows, V values of a column, E entries of all rows together, D entries of a vector. A column has one of three kinds:

- *category*: any number of values per row, such as a brand, or all genres of a movie;
- *number*: one float, such as a price;
- *vector*: D floats, such as the embedding of a text or an image.

A row without a value is missing in that column: it has no entry, NaN, or a vector of NaN. Only items have vectors, or
several values in one column. Of the features of an item or a user, the newest count, column by column.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int, offsets_of
from vista.errors import LogFormatError
from vista.log.histories import ColumnValues, RowFeatures, ranges
from vista.log.segment_files import REMEDY, USERS, FeatureOwner, SegmentFiles
from vista.log.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class Column:
    """A column of N rows."""

    data: NDArray[Any]
    """What the rows have, by the kind of the column: codes, which are rows of `values`, [E] with `offsets`, or else [N]
    with -1 where it is missing; float32 numbers [N]; or float32 vectors [N, D], NaN in all of D where it is missing."""
    values: Vocabulary | None = None
    """Of a category: its V distinct values, as text."""
    offsets: Int | None = None
    """[N + 1] of a category of which a row can have several values: the codes of all rows lie end to end, ascending and
    distinct per row. None if a row has at most one value."""

    @property
    def kind(self) -> str:
        """category, number, or vector."""
        if self.values is not None:
            return "category"
        return "number" if self.data.ndim == 1 else "vector"

    @property
    def is_single(self) -> bool:
        """Whether it is a category of which no row has several values."""
        return self.values is not None and (self.offsets is None or np.diff(self.offsets).max(initial=0) <= 1)

    @property
    def size(self) -> int:
        """Number of values of a category, or dimensions of a vector; 1 for a number."""
        if self.values is not None:
            return len(self.values)
        return 1 if self.data.ndim == 1 else self.data.shape[1]

    @property
    def form(self) -> str:
        """What stays the same in all segments of a log: the kind, and the length of vectors."""
        return f"vector of {self.size} numbers" if self.kind == "vector" else self.kind

    @property
    def is_known(self) -> NDArray[np.bool_]:
        """Whether each row has a value: bool [N]."""
        if self.offsets is not None:
            return np.diff(self.offsets) > 0
        first: NDArray[Any] = self.data if self.data.ndim == 1 else self.data[:, 0]
        known: NDArray[np.bool_] = ~np.isnan(first) if self.values is None else first >= 0
        return known

    def select(self, rows: Int) -> Column:
        """The column of rows int64 [n], such as those of a model's items; a row of -1 has no value."""
        if self.offsets is not None:
            starts = self.offsets[rows]
            counts = np.where(rows < 0, 0, self.offsets[rows + 1] - starts)
            return Column(self.data[ranges(starts, counts)], self.values, offsets_of(counts))
        chosen = self.data[rows]
        chosen[rows < 0] = -1 if self.values is not None else np.nan
        return Column(chosen, self.values)

    def recoded(self, values: Vocabulary) -> Column:
        """A category with `offsets`, with codes of other `values`; values that these lack are left out."""
        assert self.values is not None and self.offsets is not None
        code = values.rows(self.values.ids(np.arange(len(self.values))).tolist())[self.data]
        owner = np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))[code >= 0]
        code = code[code >= 0]
        counts = np.bincount(owner, minlength=len(self.offsets) - 1)
        return Column(code[np.lexsort((code, owner))].astype(np.int32), values, offsets_of(counts))

    def with_used_values(self) -> Column:
        """A category with `offsets`, without values that no row has."""
        assert self.values is not None
        used = np.unique(self.data)
        if len(used) == len(self.values):
            return self
        return self.recoded(Vocabulary.empty("str").extended(self.values.ids(used).tolist()))

    def with_one_value(self) -> Column:
        """The same column without `offsets`; no row has several values."""
        if self.offsets is None:
            return self
        codes = np.full(len(self.offsets) - 1, -1, np.int32)
        codes[self.is_known] = self.data
        return Column(codes, self.values)


Columns: TypeAlias = Mapping[str, Column]
"""Features of N rows by name, in the order in which the columns were declared."""


def selected(columns: Columns, rows: Int) -> dict[str, Column]:
    """`Column.select` of every column."""
    return {name: column.select(rows) for name, column in columns.items()}


def row_features(columns: Columns) -> tuple[RowFeatures, ColumnValues]:
    """Columns with at most one value per row, apart from what their codes stand for."""
    rows = RowFeatures({name: column.data for name, column in columns.items()})
    return rows, {name: column.values for name, column in columns.items()}


def described(columns: Columns, owners: str) -> list[str]:
    """One line per column: its name, kind, and size, and the share of the owners that have a value."""
    return [
        feature_line(name, column.kind, column.size, float(column.is_known.mean()), owners)
        for name, column in columns.items()
    ]


def feature_line(name: str, kind: str, size: int, share: float, owners: str) -> str:
    """A column in words.

    Args:
        size: as of `Column`.
        share: of the owners that have a value.
        owners: items | users | events | impressions.
    """
    plural = "" if size == 1 else "s"
    sizes = {"category": f" of {size:,} value{plural}", "vector": f" of {size:,} dimension{plural}"}
    return f"{name}: {kind}{sizes.get(kind, '')}, {share:.0%} of {owners}"


CODE_TYPES = (np.int8, np.int16, np.int32)
"""Types in which codes of events and impressions are stored."""


def code_type(num_values: int) -> type[np.signedinteger[Any]]:
    """The smallest type for the codes of `num_values` values, and for -1."""
    return next(dtype for dtype in CODE_TYPES if num_values <= np.iinfo(dtype).max + 1)


@dataclass(frozen=True, slots=True)
class SegmentFeatures:
    """The features that one segment adds to a log, of F rows. Those of items and users replace earlier ones."""

    owner: FeatureOwner
    folder: Path
    """The segment."""
    files: SegmentFiles
    rows: Int
    """int64 [F] rows of items or users, ascending and distinct; at least one, unless a later segment erased them. Empty
    for events and impressions, which are the rows of the segment's own table."""
    columns: Columns
    """Codes of a category are rows of the values of all segments; `values` are those that this segment adds,
    and come after those of earlier segments."""

    @classmethod
    def read(
        cls,
        folder: Path,
        files: SegmentFiles,
        owner: FeatureOwner,
        columns: Sequence[Mapping[str, str]],
        num_rows: int | None = None,
    ) -> SegmentFeatures | None:
        """The features of a segment; None without any.

        Args:
            columns: the names and kinds in the manifest.
            num_rows: of the table of events or impressions; None for items and users.

        Raises:
            LogFormatError: if a file is missing, or does not match the others or the manifest.
        """
        if not columns and owner.rows_file not in files:
            return None
        names = [column["name"] for column in columns]
        if len(set(names)) < len(names):
            raise LogFormatError(f"{folder}: column names of {owner.field} must be unique; {REMEDY}")
        rows, table = np.empty(0, np.int64), "the table"
        if num_rows is None:
            rows, table = files.array(owner.rows_file, np.int64), f"{owner.table}.npy"
            if not names or not len(rows):
                raise LogFormatError(
                    f"{folder}: {len(rows)} {owner.table} with features in the columns {names}: both must not be "
                    f"empty; {REMEDY}"
                )
        expected = len(rows) if num_rows is None else num_rows
        read: dict[str, Column] = {}
        for number, column in enumerate(columns):
            name, place = column["name"], f"{owner.folder}{number}"
            read[name] = _read_column(files, place, column["kind"], has_one_value=num_rows is not None)
            if _num_rows(read[name]) != expected:
                raise LogFormatError(
                    f"{folder / owner.folder}: the files of column {number} ({name!r}) do not match the {expected} "
                    f"rows of {table}; {REMEDY}"
                )
        return cls(owner, folder, files, rows, read)

    def verify(self) -> None:
        """Compare the content of the files with the manifest.

        Raises:
            LogFormatError: naming the first file with a byte that has changed.
        """
        self.files.verify_folder(self.owner.folder)

    def check(self) -> None:
        """Raise LogFormatError if rows or offsets are not ascending, or a user has a vector or several values."""
        counts = {
            name: np.diff(column.offsets, prepend=0)
            for name, column in self.columns.items()
            if column.offsets is not None
        }
        ascending = bool((np.diff(self.rows, prepend=-1) > 0).all())
        if not ascending or any(each[0] != 0 or (each < 0).any() for each in counts.values()):
            raise LogFormatError(
                f"{self.folder}: {self.owner.title}: rows of {self.owner.table} or offsets are not ascending; {REMEDY}"
            )
        for name, column in self.columns.items() if self.owner is USERS else ():
            if column.kind == "vector" or (name in counts and counts[name].max() > 1):
                raise LogFormatError(
                    f"{self.folder}: column {name!r} of the user features does not hold one number or category per "
                    f"user; {REMEDY}"
                )

    def without(self, rows: Int) -> SegmentFeatures:
        """These features of items or users, which were checked, without those of some (int64)."""
        kept = np.flatnonzero(~np.isin(self.rows, rows))
        if len(kept) == len(self.rows):
            return self
        return replace(self, rows=self.rows[kept], columns=selected(self.columns, kept))


def _read_column(files: SegmentFiles, place: str, kind: str, *, has_one_value: bool) -> Column:
    if kind != "category":
        return Column(files.array(f"{place}.{kind}s.npy", np.float32, 1 if kind == "number" else 2))
    name, values = f"{place}.codes.npy", files.vocabulary(f"{place}.values", "str")
    if has_one_value:
        return Column(files.array(name, files.type_of(name, CODE_TYPES)), values)
    return Column(files.array(name, np.int32), values, files.array(f"{place}.offsets.npy", np.int64))


def _num_rows(column: Column) -> int:
    """Number of rows of a column as read; -1 if its arrays contradict each other."""
    if column.offsets is None:
        return len(column.data) if column.values is not None or column.size else -1
    ends = int(column.offsets[-1]) if len(column.offsets) else -1
    return len(column.offsets) - 1 if ends == len(column.data) else -1


Declared: TypeAlias = Mapping[str, Sequence[SegmentFeatures]]
"""By name of a column, in the order in which the names first occur: the segments that have it, oldest first."""


def declared_columns(segments: Sequence[SegmentFeatures]) -> dict[str, list[SegmentFeatures]]:
    """The columns of all segments.

    Args:
        segments: of one owner, oldest first.

    Raises:
        LogFormatError: if a column is not of one kind, its vectors are not of one length, or a segment's features are
            damaged (`SegmentFeatures.check`).
    """
    declared: dict[str, list[SegmentFeatures]] = {}
    for features in segments:
        features.check()
        for name, column in features.columns.items():
            parts = declared.setdefault(name, [])
            if parts and parts[0].columns[name].form != column.form:
                raise LogFormatError(
                    f"{features.folder}: column {name!r} of the {features.owner.title} is a {column.form}, but in "
                    f"an earlier segment it is a {parts[0].columns[name].form}; {REMEDY}"
                )
            parts.append(features)
    return declared


def values_of(declared: Declared) -> ColumnValues:
    """The values of each category: those that the segments add, end to end. Codes are their rows. None for a number."""
    return {name: _joined_values(part.columns[name] for part in parts) for name, parts in declared.items()}


def _joined_values(columns: Iterable[Column]) -> Vocabulary | None:
    """The values of the parts of a column, end to end; None if it is not a category."""
    added = [column.values for column in columns if column.values is not None]
    return Vocabulary.concatenated(added) if added else None


def rows_with_features(segments: Sequence[SegmentFeatures]) -> Int:
    """Rows of the items or users that have features in any segment: int64, ascending."""
    return np.unique(np.concatenate([np.empty(0, np.int64), *(features.rows for features in segments)]))


def verified_columns(segments: Sequence[SegmentFeatures]) -> dict[str, list[SegmentFeatures]]:
    """`declared_columns` of items or users, after a comparison of their files with the manifests.

    Raises:
        LogFormatError: also if a file is damaged.
    """
    for features in segments:
        features.verify()
    return declared_columns(segments)


def merged_features(declared: Declared, rows: Int) -> dict[str, Column]:
    """Features of items or users int64 [n], rows of the log; those of users have at most one value per row.

    Raises:
        LogFormatError: if a code has no value.
    """
    merged = {name: merged_column(name, parts, rows) for name, parts in declared.items()}
    return {
        name: column.with_one_value() if declared[name][0].owner is USERS else column for name, column in merged.items()
    }


def merged_column(name: str, parts: Sequence[SegmentFeatures], rows: Int) -> Column:
    """Features of the rows int64 [n] in one column of items or users, each from the newest part that has the row.

    The time depends on n, but hardly on the size of the parts.

    Args:
        parts: as of `Declared`, at least one.

    Returns:
        The column of n rows, a view if it equals the only part.

    Raises:
        LogFormatError: if a code has no value.
    """
    columns = [part.columns[name] for part in parts]
    if len(parts) == 1 and np.array_equal(parts[0].rows, rows):
        merged = columns[0]
    else:
        merged = _merged(columns, _places(parts, rows))
    if merged.values is not None and len(merged.data):
        low, high = int(merged.data.min()), int(merged.data.max())
        if low < 0 or high >= len(merged.values):
            raise LogFormatError(
                f"features of items or users: codes {low} to {high} for {len(merged.values)} values; {REMEDY}"
            )
    return merged


def _places(parts: Sequence[SegmentFeatures], rows: Int) -> list[Int]:
    """Per part, where it has each row: int64 [n]; -1 if it does not, or a newer part has it."""
    places: list[Int] = []
    taken = np.zeros(len(rows), np.bool_)
    for part in reversed(parts):
        if not len(part.rows):
            places.append(np.full(len(rows), -1))
            continue
        at = np.minimum(np.searchsorted(part.rows, rows), len(part.rows) - 1)
        mine = (part.rows[at] == rows) & ~taken
        taken |= mine
        places.append(np.where(mine, at, -1))
    return places[::-1]


def _merged(columns: Sequence[Column], places: Sequence[Int]) -> Column:
    num, first = len(places[0]), columns[0]
    if first.values is None:
        out = np.full((num, *first.data.shape[1:]), np.nan, np.float32)
        for column, place in zip(columns, places, strict=True):
            out[place >= 0] = column.data[place[place >= 0]]
        return Column(out)
    chosen = [column.select(place) for column, place in zip(columns, places, strict=True)]
    starts = [part.offsets for part in chosen if part.offsets is not None]
    offsets = offsets_of(sum(map(np.diff, starts), np.zeros(num, np.int64)))
    codes = np.empty(int(offsets[-1]), np.int32)
    for part, start in zip(chosen, starts, strict=True):
        codes[ranges(offsets[:-1], np.diff(start))] = part.data
    return Column(codes, _joined_values(columns), offsets)
