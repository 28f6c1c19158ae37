"""How a model reads features of rows: of events, of requests, or of users.

N rows, C columns, F dense inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Float32s, Int
from vista.errors import shown
from vista.log.histories import ColumnValues, RowColumn, RowFeatures
from vista.log.item_features import NumberColumn
from vista.log.vocabulary import Vocabulary
from vista.model.feature_spec import MAX_ABS_SCORE, FeatureSpec
from vista.model.hashed_vocabulary import HashedVocabulary, load_values

Recode: TypeAlias = Callable[[RowFeatures, int], RowFeatures]
"""From features of N rows of a log to the same features with a model's codes."""
_VALUES_FILE = "{}_values_{}"


@dataclass(frozen=True, slots=True)
class EncodedRows:
    """What a `RowFeatureEncoder` reads of N rows."""

    entry: Int
    """int64 [N, C] rows of the encoder's embedding, one per column."""
    dense: Float32s
    """float32 [N, F] standardized numbers, 0 where they are missing."""

    def select(self, rows: slice | Int) -> EncodedRows:
        """Some of the rows, or all of them in another order."""
        return EncodedRows(self.entry[rows], self.dense[rows])

    def reshape(self, *shape: int) -> EncodedRows:
        """The rows with other leading axes instead of N."""
        return EncodedRows(
            self.entry.reshape(*shape, self.entry.shape[-1]), self.dense.reshape(*shape, self.dense.shape[-1])
        )


class RowFeatureReader:
    """The columns that a model reads, and the values that it knows.

    Its codes are rows of its own values, because a log may have more. Values that it does not know are missing.
    """

    def __init__(self, columns: Sequence[FeatureSpec], values: ColumnValues) -> None:
        """
        Args:
            columns: categories and numbers.
            values: of these columns, as the model knows them.

        Raises:
            ValueError: if the values do not fit the columns.
        """
        for column in columns:
            known = values[column.name]
            has_texts = known is not None and known.kind == "str" and len(known) <= column.size
            if column.kind == "vector" or not (known is None if column.kind == "number" else has_texts):
                raise ValueError(f"the values of {column.name!r} do not fit a {column.kind} of size {column.size}")
        self.columns = list(columns)
        self.values = {column.name: values[column.name] for column in columns}
        self._bounds = {column.name: np.array(column.bounds) for column in columns}

    @classmethod
    def of(cls, features: RowFeatures, values: ColumnValues) -> RowFeatureReader:
        """All columns of a log, measured on the rows that training may see."""
        columns = [
            FeatureSpec.of(name, NumberColumn(features.columns[name].astype(np.float32)))
            if known is None
            else FeatureSpec(name, "category", max(len(known), 1), hashed=isinstance(known, HashedVocabulary))
            for name, known in values.items()
        ]
        return cls(columns, values)

    def _codes_of(self, values: ColumnValues) -> dict[str, NDArray[np.int32]]:
        """By category: the model's code of each of a log's values, int32 [V + 1]; -1 if it is unknown, and at the end.

        Columns that the log lacks are left out.
        """
        codes = {}
        for name, known in self.values.items():
            given = values.get(name)
            if known is not None and given is not None:
                rows = known.rows(given.ids(np.arange(len(given))).tolist())
                codes[name] = np.append(rows, -1).astype(np.int32)
        return codes

    def recoder(self, values: ColumnValues) -> Recode:
        """Gives features of N rows of a log with these values the model's codes. Columns that it lacks are missing."""
        codes = self._codes_of(values)
        return lambda features, num_rows: self._recoded(features, codes, num_rows)

    def _recoded(self, features: RowFeatures, codes: Mapping[str, NDArray[np.int32]], num_rows: int) -> RowFeatures:
        given = features.columns
        out = dict(RowFeatures.missing(self.values, num_rows).columns)
        for name, known in self.values.items():
            if name in codes and name in given:
                out[name] = codes[name][given[name]]  # -1 reads the last entry
            elif known is None and name in given:
                out[name] = given[name].astype(np.float32)
        return RowFeatures(out)

    def parse(self, given: Mapping[str, Any], num_rows: int) -> RowFeatures:
        """Features that a caller names by their values. Columns and values that are not given are missing.

        Args:
            given: by name of a column: N values each, texts, integers or booleans for a category, floats for a number;
                None or NaN where a value is missing.
            num_rows: N.

        Raises:
            ValueError: if a column is unknown, has another length, or holds something other than its kind of values.
        """
        unknown = [name for name in given if name not in self.values]
        if unknown:
            raise ValueError(f"{shown(unknown[0])} is not one of this model's features, {list(self.values)}")
        out: dict[str, RowColumn] = {}
        for name, known in self.values.items():
            if name not in given:
                out |= RowFeatures.missing({name: known}, num_rows).columns
                continue
            values = given[name]
            if len(values) != num_rows:
                raise ValueError(f"{name!r} has {len(values)} values, but {num_rows} are needed")
            out[name] = _numbers(name, values) if known is None else _codes(name, values, known)
        return RowFeatures(out)

    def digests(self) -> list[tuple[str, int | None, str]]:
        """Per column: its name, and the size of a category with the digest of its values, or None and "" for a number.

        Readers with the same digests have the same codes.
        """
        return [
            (column.name, None if known is None else column.size, "" if known is None else known.digest())
            for column, known in zip(self.columns, self.values.values(), strict=True)
        ]

    def first(self, count: int) -> RowFeatureReader:
        """The reader of the first columns, whose entries are the same rows of the encoder's embedding."""
        return RowFeatureReader(self.columns[:count], self.values)

    def encode(self, features: RowFeatures, num_rows: int) -> EncodedRows:
        """What the encoder reads of N rows with the model's codes. Columns that are not given are missing."""
        entry = np.empty((num_rows, len(self.columns)), np.int64)
        dense = np.zeros((num_rows, sum(column.num_dense for column in self.columns)), np.float32)
        first = place = 0
        for index, column in enumerate(self.columns):
            given = features.columns.get(column.name)
            if given is None:
                entry[:, index] = first
                place += column.num_dense
            elif column.kind == "number":
                numbers = given.astype(np.float64)
                entry[:, index] = self._bounds[column.name].searchsorted(numbers) + (first + 1)
                score = np.maximum((numbers - column.mean) / column.scale, -MAX_ABS_SCORE)
                dense[:, place] = np.minimum(score, MAX_ABS_SCORE)
                is_missing = np.isnan(numbers)
                entry[is_missing, index], dense[is_missing, place] = first, 0.0
                place += 1
            else:
                entry[:, index] = first + 1 + given
            first += column.num_rows
        return EncodedRows(entry, dense)

    def with_values(self, rows: EncodedRows, given: Mapping[str, Any]) -> EncodedRows:
        """The same N rows, with other values in the columns that a caller names; arguments and errors as in `parse`."""
        num_rows, place = len(rows.entry), 0
        new = self.encode(self.parse(given, num_rows), num_rows)
        entry, dense = rows.entry.copy(), rows.dense.copy()
        for index, column in enumerate(self.columns):
            if column.name in given:
                own = slice(place, place + column.num_dense)
                entry[:, index], dense[:, own] = new.entry[:, index], new.dense[:, own]
            place += column.num_dense
        return EncodedRows(entry, dense)

    def missing(self, num_rows: int) -> EncodedRows:
        """What the encoder reads of N rows without values."""
        return self.encode(RowFeatures.missing(self.values, num_rows), num_rows)

    def save(self, folder: Path, name: str) -> None:
        """Write the values of categories into a folder, in files whose names begin with `name`. Raises OSError."""
        for number, known in enumerate(self.values.values()):
            if known is not None:
                known.save(folder, _VALUES_FILE.format(name, number))

    @classmethod
    def load(cls, folder: Path, name: str, columns: Sequence[FeatureSpec]) -> RowFeatureReader | None:
        """Read the files of `save`; None without columns.

        Raises:
            OSError, LogFormatError: a file is missing or damaged.
            ValueError: the values do not fit the columns.
        """
        values: dict[str, Vocabulary | None] = {}
        for number, column in enumerate(columns):
            file = _VALUES_FILE.format(name, number)
            values[column.name] = load_values(folder, file, column) if column.kind == "category" else None
        return cls(columns, values) if columns else None


RowReaders: TypeAlias = Mapping[str, RowFeatureReader]
"""By field of Schema that lists columns of rows, such as "event_features", if it lists any."""


def log_encoder(
    reader: RowFeatureReader | None, values: ColumnValues
) -> Callable[[RowFeatures, int], EncodedRows | None]:
    """`encode` for N rows of a log, whose codes may differ from the model's; without a reader, it gives None.

    Args:
        values: of the log.
    """
    if reader is None:
        return lambda features, num_rows: None
    recode = reader.recoder(values)
    return lambda features, num_rows: reader.encode(recode(features, num_rows), num_rows)


def _numbers(name: str, values: Any) -> Float32s:
    try:
        numbers = np.array(values, np.float64)  # None becomes NaN
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name!r} needs numbers: {error}") from error
    if numbers.ndim != 1:
        raise ValueError(f"{name!r} needs numbers, one per row")
    with np.errstate(over="ignore"):
        rounded = numbers.astype(np.float32)
    if np.isinf(rounded).any():
        raise ValueError(f"{name!r}: value number {int(np.isinf(rounded).argmax())} is infinite, or too large")
    return rounded


def _codes(name: str, values: Any, known: Vocabulary) -> NDArray[np.int32]:
    # Empty text is missing too, so that no known value is empty.
    return known.rows([_text(name, value) or "" for value in values]).astype(np.int32)


def _text(name: str, value: Any) -> str | None:
    """A value of a category as logs hold it: text."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float) and math.isnan(value):  # how pandas marks a missing value
        return None
    if isinstance(value, (bool, np.bool_)):
        return "true" if value else "false"
    if isinstance(value, (int, np.integer)):
        return str(int(value))
    raise ValueError(f"{name!r} is a category and needs texts, integers, or booleans, got {shown(value)}")
