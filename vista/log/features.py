"""Features of items, users, events, and impressions: their columns, in a segment and merged over segments. NumPy only.

N rows, V values of a column, E entries of all rows together, D entries of a vector. A column has one of three kinds:

- *category*: any number of values per row, such as a brand, or all genres of a movie;
- *number*: one float, such as a price;
- *vector*: D floats, such as the embedding of a text or an image.

A row without a value is missing in that column: it has no entry, NaN, or a vector of NaN. Only items have vectors, or
several values in one column. Of the features of an item or a user, the newest count, column by column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Float32s, Int, offsets_of
from vista.errors import LogFormatError
from vista.log.histories import ColumnValues, RowColumn, RowFeatures, ranges
from vista.log.segment_files import REMEDY, USERS, FeatureOwner, SegmentFiles
from vista.log.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class CategoryColumn:
    """Values of N items, packed: items end to end."""

    kind: ClassVar[str] = "category"
    values: Vocabulary
    """The V distinct values, as text."""
    codes: NDArray[np.int32]
    """[E] rows of `values`, ascending and distinct per item."""
    offsets: Int
    """[N + 1]."""

    def recoded(self, values: Vocabulary) -> CategoryColumn:
        """The same items with codes of other `values`; values that these lack are left out."""
        code = values.rows(self.values.ids(np.arange(len(self.values))).tolist())[self.codes]
        owner = np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))[code >= 0]
        code = code[code >= 0]
        counts = np.bincount(owner, minlength=len(self.offsets) - 1)
        return CategoryColumn(values, code[np.lexsort((code, owner))].astype(np.int32), offsets_of(counts))

    def with_used_values(self) -> CategoryColumn:
        """The same items, without values that none of them has."""
        used = np.unique(self.codes)
        return (
            self
            if len(used) == len(self.values)
            else self.recoded(Vocabulary.empty("str").extended(self.values.ids(used).tolist()))
        )

    def select(self, rows: Int) -> CategoryColumn:
        """The values of items int64 [n]; a row of -1 is an item without any."""
        starts = self.offsets[rows]
        counts = np.where(rows < 0, 0, self.offsets[rows + 1] - starts)
        index = ranges(starts, counts)
        return CategoryColumn(self.values, self.codes[index], offsets_of(counts))

    @property
    def is_known(self) -> NDArray[np.bool_]:
        """Whether each item has a value: bool [N]."""
        return np.diff(self.offsets) > 0


@dataclass(frozen=True, slots=True)
class NumberColumn:
    """One number per item."""

    kind: ClassVar[str] = "number"
    numbers: Float32s
    """[N], NaN where it is missing."""

    def select(self, rows: Int) -> NumberColumn:
        """The numbers of items int64 [n]; a row of -1 is missing."""
        return NumberColumn(np.where(rows < 0, np.float32(np.nan), self.numbers[rows]))

    @property
    def is_known(self) -> NDArray[np.bool_]:
        """Whether each item has a number: bool [N]."""
        return ~np.isnan(self.numbers)


@dataclass(frozen=True, slots=True)
class VectorColumn:
    """One vector per item."""

    kind: ClassVar[str] = "vector"
    vectors: Float32s
    """[N, D], NaN in all of D where it is missing."""

    def select(self, rows: Int) -> VectorColumn:
        """The vectors of items int64 [n]; a row of -1 is missing."""
        return VectorColumn(np.where(rows[:, None] < 0, np.float32(np.nan), self.vectors[rows]))

    @property
    def is_known(self) -> NDArray[np.bool_]:
        """Whether each item has a vector: bool [N]."""
        return ~np.isnan(self.vectors[:, 0])


FeatureColumn: TypeAlias = CategoryColumn | NumberColumn | VectorColumn


@dataclass(frozen=True, slots=True)
class ItemFeatures:
    """Features of N items, in the order of a vocabulary of items."""

    columns: Mapping[str, FeatureColumn]
    """By name, at least one, in the order in which they were declared."""

    def select(self, rows: Int) -> ItemFeatures:
        """Features of items int64 [n], such as those of a model's vocabulary; a row of -1 has none."""
        return ItemFeatures({name: column.select(rows) for name, column in self.columns.items()})

    def described(self) -> list[str]:
        """One line per column: its name, kind, and size, and the share of items that have a value."""
        return [
            feature_line(name, column.kind, _size(column), float(column.is_known.mean()))
            for name, column in self.columns.items()
        ]


def feature_line(name: str, kind: str, size: int, share: float, owners: str = "items") -> str:
    """A column in words.

    Args:
        size: number of values of a category, or dimensions of a vector.
        share: of the items, users, events, or impressions that have a value.
        owners: items | users | events | impressions.
    """
    plural = "" if size == 1 else "s"
    sizes = {"category": f" of {size:,} value{plural}", "vector": f" of {size:,} dimension{plural}"}
    return f"{name}: {kind}{sizes.get(kind, '')}, {share:.0%} of {owners}"


def _size(column: FeatureColumn) -> int:
    if isinstance(column, CategoryColumn):
        return len(column.values)
    return column.vectors.shape[1] if isinstance(column, VectorColumn) else 1


CODE_TYPES = (np.int8, np.int16, np.int32)
"""Types in which a `CodeColumn` is stored."""


def code_type(num_values: int) -> type[np.signedinteger[Any]]:
    """The smallest type for the codes of `num_values` values, and for -1."""
    return next(dtype for dtype in CODE_TYPES if num_values <= np.iinfo(dtype).max + 1)


@dataclass(frozen=True, slots=True)
class CodeColumn:
    """A category with at most one value per row, as events and impressions have it."""

    kind: ClassVar[str] = "category"
    values: Vocabulary
    codes: NDArray[Any]
    """[N], of one of `CODE_TYPES`; -1 where it is missing."""


@dataclass(frozen=True, slots=True)
class SegmentColumn:
    """A column as one segment has it. rows: see `SegmentFeatures`."""

    rows: Int
    column: FeatureColumn | CodeColumn


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
    columns: Mapping[str, FeatureColumn | CodeColumn]
    """By name. Codes of a category are rows of the values of all segments; `values` are those that this segment adds,
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
        read: dict[str, FeatureColumn | CodeColumn] = {}
        for number, column in enumerate(columns):
            name, place = column["name"], f"{owner.folder}{number}"
            read[name] = _read_column(files, place, column["kind"], has_one_value=num_rows is not None)
            if _num_rows(read[name]) != expected:
                raise LogFormatError(
                    f"{folder / owner.folder}: the files of column {number} ({name!r}) do not match the {expected} "
                    f"rows of {table}; {REMEDY}"
                )
        return cls(owner, folder, files, rows, read)

    @property
    def row_columns(self) -> dict[str, NDArray[Any]]:
        """The codes and numbers of the rows of a table, by name."""
        return {
            name: column.codes if isinstance(column, CodeColumn) else column.numbers
            for name, column in self.columns.items()
            if isinstance(column, CodeColumn | NumberColumn)
        }

    def verify(self) -> None:
        """Compare the content of the files with the manifest.

        Raises:
            LogFormatError: naming the first file with a byte that has changed.
        """
        self.files.verify_folder(self.owner.folder)

    def check_order(self) -> None:
        """Raise LogFormatError if rows or offsets are not ascending."""
        columns = [column for column in self.columns.values() if isinstance(column, CategoryColumn)]
        ascending = bool((np.diff(self.rows, prepend=-1) > 0).all())
        if not ascending or any(column.offsets[0] != 0 or (np.diff(column.offsets) < 0).any() for column in columns):
            raise LogFormatError(
                f"{self.folder}: {self.owner.title}: rows of {self.owner.table} or offsets are not ascending; {REMEDY}"
            )

    def without(self, rows: Int) -> SegmentFeatures:
        """These features of items or users, whose order was checked, without those of some (int64)."""
        kept = np.flatnonzero(~np.isin(self.rows, rows))
        if len(kept) == len(self.rows):
            return self
        columns = {
            name: column.select(kept) for name, column in self.columns.items() if not isinstance(column, CodeColumn)
        }
        return replace(self, rows=self.rows[kept], columns=columns)


def _read_column(files: SegmentFiles, place: str, kind: str, *, has_one_value: bool) -> FeatureColumn | CodeColumn:
    if kind == "number":
        return NumberColumn(files.array(f"{place}.numbers.npy", np.float32))
    if kind == "vector":
        return VectorColumn(files.array(f"{place}.vectors.npy", np.float32, 2))
    name = f"{place}.codes.npy"
    values = files.vocabulary(f"{place}.values", "str")
    if has_one_value:
        return CodeColumn(values, files.array(name, files.type_of(name, CODE_TYPES)))
    return CategoryColumn(values, files.array(name, np.int32), files.array(f"{place}.offsets.npy", np.int64))


def _num_rows(column: FeatureColumn | CodeColumn) -> int:
    """Number of rows of a column as read; -1 if its arrays contradict each other."""
    if isinstance(column, CodeColumn):
        return len(column.codes)
    if isinstance(column, NumberColumn):
        return len(column.numbers)
    if isinstance(column, VectorColumn):
        return len(column.vectors) if column.vectors.shape[1] else -1
    ends = int(column.offsets[-1]) if len(column.offsets) else -1
    return len(column.offsets) - 1 if ends == len(column.codes) else -1


def merged_features(segments: Sequence[SegmentFeatures], num_rows: int) -> dict[str, FeatureColumn]:
    """Features of all items or users by column; empty without any. Reads and verifies their files.

    Args:
        segments: oldest first.
        num_rows: how many items or users the log has.

    Raises:
        LogFormatError: if a file is damaged, or a column is not of one kind.
    """
    for features in segments:
        features.verify()
    rows = np.arange(num_rows)
    return {name: merged_column(parts, rows) for name, parts in declared_columns(segments).items()}


def declared_columns(segments: Sequence[SegmentFeatures]) -> dict[str, list[SegmentColumn]]:
    """The segments' columns by name, oldest first, in the order in which the names first occur.

    Raises:
        LogFormatError: if a column is not of one kind, its vectors are not of one length, or rows or offsets are not
            ascending.
    """
    declared: dict[str, list[SegmentColumn]] = {}
    for features in segments:
        features.check_order()
        for name, column in features.columns.items():
            parts = declared.setdefault(name, [])
            if parts and form_of(parts[0].column) != form_of(column):
                raise LogFormatError(
                    f"{features.folder}: column {name!r} of the {features.owner.title} is a {form_of(column)}, but in "
                    f"an earlier segment it is a {form_of(parts[0].column)}; {REMEDY}"
                )
            parts.append(SegmentColumn(features.rows, column))
    return declared


def form_of(column: FeatureColumn | CodeColumn) -> str:
    """What stays the same in all segments of a log: the kind, and the length of vectors."""
    return f"vector of {column.vectors.shape[1]} numbers" if isinstance(column, VectorColumn) else column.kind


def values_of(declared: Mapping[str, Sequence[SegmentColumn]]) -> ColumnValues:
    """The values of each category: those that the segments add, end to end. Codes are their rows. None for a number."""
    values: dict[str, Vocabulary | None] = {}
    for name, parts in declared.items():
        added = [part.column.values for part in parts if isinstance(part.column, CategoryColumn | CodeColumn)]
        values[name] = Vocabulary.concatenated(added) if added else None
    return values


def rows_with_features(segments: Sequence[SegmentFeatures]) -> Int:
    """Rows of the items or users that have features in any segment: int64, ascending."""
    return np.unique(np.concatenate([np.empty(0, np.int64), *(features.rows for features in segments)]))


def merged_column(parts: Sequence[SegmentColumn], rows: Int) -> FeatureColumn:
    """Features of the rows int64 [n] in one column, each from the newest part that has the row.

    The time depends on n, but hardly on the size of the parts.

    Args:
        parts: of one kind, oldest first, at least one.

    Returns:
        The column of n rows, a view if it equals the only part.

    Raises:
        LogFormatError: if a code has no value.
    """
    if len(parts) == 1 and np.array_equal(parts[0].rows, rows):
        merged = parts[0].column
    else:
        merged = _merged([part.column for part in parts], _places(parts, rows))
    assert not isinstance(merged, CodeColumn)  # items and users have none
    if isinstance(merged, CategoryColumn) and len(merged.codes):
        low, high = int(merged.codes.min()), int(merged.codes.max())
        if low < 0 or high >= len(merged.values):
            raise LogFormatError(
                f"features of items or users: codes {low} to {high} for {len(merged.values)} values; {REMEDY}"
            )
    return merged


def _places(parts: Sequence[SegmentColumn], rows: Int) -> list[Int]:
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


def _merged(columns: Sequence[FeatureColumn | CodeColumn], places: Sequence[Int]) -> FeatureColumn:
    num = len(places[0])
    numbers = [column for column in columns if isinstance(column, NumberColumn)]
    vectors = [column for column in columns if isinstance(column, VectorColumn)]
    if numbers:
        out = np.full(num, np.nan, np.float32)
        for number, place in zip(numbers, places, strict=True):
            out[place >= 0] = number.numbers[place[place >= 0]]
        return NumberColumn(out)
    if vectors:
        out = np.full((num, vectors[0].vectors.shape[1]), np.nan, np.float32)
        for vector, place in zip(vectors, places, strict=True):
            out[place >= 0] = vector.vectors[place[place >= 0]]
        return VectorColumn(out)
    categories = [column for column in columns if isinstance(column, CategoryColumn)]
    chosen = [category.select(place) for category, place in zip(categories, places, strict=True)]
    offsets = offsets_of(sum((np.diff(part.offsets) for part in chosen), np.zeros(num, np.int64)))
    codes = np.empty(int(offsets[-1]), np.int32)
    for part in chosen:
        codes[ranges(offsets[:-1], np.diff(part.offsets))] = part.codes
    return CategoryColumn(Vocabulary.concatenated([part.values for part in chosen]), codes, offsets)


@dataclass(frozen=True, slots=True)
class UserFeatureParts:
    """The columns of user features in each segment."""

    values: ColumnValues
    columns: Mapping[str, Sequence[SegmentColumn]]
    """By name, oldest segment first."""

    @classmethod
    def of(cls, segments: Sequence[SegmentFeatures]) -> UserFeatureParts:
        """Those of a log, oldest first. Reads and verifies their files.

        Raises:
            LogFormatError: if a file is damaged, or a column is not of one kind, or is not of a kind that users have.
        """
        for features in segments:
            features.verify()
        columns = declared_columns(segments)
        for name, parts in columns.items():
            if not all(_has_one_value(part) for part in parts):
                raise LogFormatError(
                    f"{segments[0].folder.parent}: column {name!r} of the user features does not hold one number or "
                    f"category per user; {REMEDY}"
                )
        return cls(values_of(columns), columns)

    def rows(self, users: Int) -> RowFeatures:
        """Features of users int64 [B], rows of the log.

        Raises:
            LogFormatError: if a code has no value.
        """
        rows: dict[str, RowColumn] = {}
        for name, parts in self.columns.items():
            column = merged_column(parts, users)
            assert not isinstance(column, VectorColumn)  # by `of`
            rows[name] = column.numbers if isinstance(column, NumberColumn) else _codes(column)
        return RowFeatures(rows)


def _has_one_value(part: SegmentColumn) -> bool:
    """Whether no user has several values, or a vector."""
    if isinstance(part.column, CategoryColumn):
        return int(np.diff(part.column.offsets).max(initial=0)) <= 1
    return isinstance(part.column, NumberColumn)


def _codes(column: CategoryColumn) -> NDArray[np.int32]:
    """The code of each user int32 [N]; -1 where it is missing."""
    codes = np.full(len(column.offsets) - 1, -1, np.int32)
    codes[column.is_known] = column.codes
    return codes


@dataclass(frozen=True, slots=True)
class UserFeatures:
    """Features of all users of a log, in the order of its vocabulary; no columns without any."""

    values: ColumnValues
    rows: RowFeatures

    def described(self) -> list[str]:
        """A line per column: its name, kind, and size, and the share of users that have a value."""
        return [
            feature_line(name, "number", 1, float((~np.isnan(self.rows.columns[name])).mean()), USERS.table)
            if known is None
            else feature_line(name, "category", len(known), float((self.rows.columns[name] >= 0).mean()), USERS.table)
            for name, known in self.values.items()
        ]
