"""Features of the events or impressions of a new segment: values, codes, and what is probably a mistake."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int
from vista.errors import DataError
from vista.log.ingest.new_features import MAX_VALUES, NewFeatures
from vista.log.ingest.parts import Part
from vista.log.item_features import feature_line
from vista.log.polars_extra import pl
from vista.log.row_feature_writer import RowFeatureWriter
from vista.log.row_features import ColumnValues, RowColumn, RowFeatures
from vista.log.segment_row_features import code_type
from vista.log.segment_writer import SegmentWriter
from vista.log.vocabulary import Vocabulary

LEAK_SHARE = 0.99
"""Share of the rows with a label, and of those without, in which a feature may equal the label."""
LEAST_LABELS = 20
"""Rows with a label, and rows without, from which on a feature is compared with it."""


class NewRowFeatures:
    """Encodes and writes the features of a table of a new segment, block by block.

    Args:
        table: events | impressions.
        parts: of the table, with the same columns.
        before: the values that the log has without the segment.
        segment: the writer of the segment.
        folder: of the files in the segment.

    Raises:
        DataError: if a category has too many values.
    """

    def __init__(
        self, table: str, parts: Sequence[Part], before: ColumnValues, segment: SegmentWriter, folder: str
    ) -> None:
        roles = [name.partition(":") for name in parts[0].source.columns]
        kinds = {name: role for role, _, name in roles if role in ("category", "number")}
        texts = _distinct(table, parts, [name for name, kind in kinds.items() if kind == "category"])
        self._values: dict[str, Vocabulary | None] = dict.fromkeys(kinds)
        for name, new in texts.items():
            known = (before.get(name) or Vocabulary.empty("str")).extended(new.to_list())
            if len(known) > MAX_VALUES:
                raise _too_many(table, parts, name, f"{len(known):,}")
            self._values[name] = known
        self._table, self._before = table, before
        self._num_rows = sum(part.num_rows for part in parts)
        self._writer = RowFeatureWriter(segment, folder, self._num_rows, self._values, before)
        self._seen = {name: _Seen(1 if known is None else len(known)) for name, known in self._values.items()}

    def encoded(self, rows: pl.LazyFrame) -> pl.LazyFrame:
        """Parsed rows with the codes of categories in place of their values, -1 where they are missing."""
        codes = []
        for name, known in self._values.items():
            if known is not None:
                values = pl.Enum(known.ids(np.arange(len(known))).tolist())
                code = pl.col(f"category:{name}").cast(values, strict=False).to_physical().cast(pl.Int32)
                codes.append(code.fill_null(-1).cast(_POLARS_TYPES[code_type(len(known))]))
        return rows.with_columns(codes)

    def append(self, block: pl.DataFrame) -> None:
        """Write the features of the next rows."""
        columns: dict[str, RowColumn] = {}
        labels = {name.partition(":")[2]: block[name].to_numpy() for name in block.columns if name.startswith("label:")}
        for name, known in self._values.items():
            if known is None:
                columns[name] = block[f"number:{name}"].fill_null(np.nan).to_numpy()
            else:
                columns[name] = block[f"category:{name}"].to_numpy()
            self._seen[name].add(columns[name], labels)
        self._writer.append(RowFeatures(columns))

    def close(self) -> None:
        """Finish the files."""
        self._writer.close()

    def written(self) -> NewFeatures:
        """What was written, after `close`."""
        return NewFeatures(self._writer.columns, self._lines(), self._warnings())

    def _lines(self) -> list[str]:
        lines = []
        for name, known in self._values.items():
            old, kind, size = self._before.get(name), "number", 1
            if known is not None:
                kind, size = "category", len(known)
            line = feature_line(name, kind, size, self._seen[name].num_known / self._num_rows, self._table)
            if known is not None and old is not None and len(old) < len(known):
                line += f", {len(known) - len(old):,} of the values are new"
            lines.append(line)
        return lines

    def _warnings(self) -> list[str]:
        warnings = []
        for name, known in self._before.items():
            if name not in self._values:
                key = "numbers" if known is None else "categories"
                warnings.append(
                    f"column {name!r} of the {self._table} is in the log, but was not named, so it has no value in the "
                    f"new rows; name it under {self._table}.{key} if the files have it"
                )
        for name, known in self._values.items():
            seen, key = self._seen[name], "numbers" if known is None else "categories"
            if seen.is_constant and seen.num_known in (0, self._num_rows) and self._num_rows > 1:
                what = "the same value" if seen.num_known else "no value"
                warnings.append(f"column {name!r} of the {self._table} has {what} in all rows; leave it out")
            for task in seen.equal_labels():
                warnings.append(
                    f"column {name!r} of the {self._table} equals the label {task!r} in at least {LEAK_SHARE:.0%} of "
                    f"the rows; if it is not known before the label, leave it out of {self._table}.{key}"
                )
        return warnings


_POLARS_TYPES = {np.int8: pl.Int8, np.int16: pl.Int16, np.int32: pl.Int32}


@dataclass(slots=True)
class _Seen:
    """What the blocks of a column had. A category has V values; of a number, "not 0" counts as its only value."""

    num_values: int
    num_known: int = 0
    low: float = np.inf
    high: float = -np.inf
    labels: dict[str, tuple[Int, Int]] = field(default_factory=dict)
    """By task, int64 [V + 1]: the number of rows with each value, and without any, whose label is 0, or 1."""

    def add(self, column: RowColumn, labels: Mapping[str, NDArray[np.floating]]) -> None:
        is_number = column.dtype.kind == "f"
        known = column[~np.isnan(column)] if is_number else column[column >= 0]
        self.num_known += len(known)
        if len(known):
            self.low, self.high = min(self.low, float(known.min())), max(self.high, float(known.max()))
        if labels:
            code = np.where(np.nan_to_num(column) != 0, 0, -1) if is_number else column
            for task, label in labels.items():
                counts = [
                    np.bincount(code[label == value].astype(np.int64) + 1, minlength=self.num_values + 1)
                    for value in (0, 1)
                ]
                zeros, ones = self.labels.get(task, (0, 0))
                self.labels[task] = counts[0] + zeros, counts[1] + ones

    @property
    def is_constant(self) -> bool:
        """Whether no two rows have different values."""
        return self.low >= self.high

    def equal_labels(self) -> list[str]:
        """The tasks of which (almost) all rows with one label have one value, and the others do not."""
        tasks = []
        for task, (zeros, ones) in self.labels.items():
            if min(zeros.sum(), ones.sum()) >= LEAST_LABELS:
                in_zeros, in_ones = zeros / zeros.sum(), ones / ones.sum()
                one_way = (in_ones >= LEAK_SHARE) & (in_zeros <= 1 - LEAK_SHARE)
                other_way = (in_zeros >= LEAK_SHARE) & (in_ones <= 1 - LEAK_SHARE)
                if (one_way | other_way).any():
                    tasks.append(task)
        return tasks


def _distinct(table: str, parts: Sequence[Part], names: Sequence[str]) -> dict[str, pl.Series]:
    """The distinct values of categories, by name."""
    if not names:
        return {}
    rows = pl.concat([part.good().select(pl.col(f"category:{name}").alias(name) for name in names) for part in parts])
    # The estimate takes no memory, however many values there are. It is right within a few percent.
    about = rows.select(pl.all().approx_n_unique()).collect(engine="streaming").row(0, named=True)
    for name, count in about.items():
        if count > 2 * MAX_VALUES:
            raise _too_many(table, parts, name, f"about {count:,}")
    columns = [rows.select(pl.col(name).drop_nulls().unique()) for name in names]
    return {frame.columns[0]: frame.to_series() for frame in pl.collect_all(columns, engine="streaming")}


def _too_many(table: str, parts: Sequence[Part], name: str, count: str) -> DataError:
    return DataError(
        f"{parts[0].source.path}: with column {name!r} the log would have {count} distinct values, but a category may "
        f"have at most {MAX_VALUES:,}; leave it out of {table}.categories, or merge rare values"
    )
