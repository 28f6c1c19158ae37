"""Features of the events or impressions of a new segment: values, codes, and what is probably a mistake."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int
from vista.installation import require_module
from vista.log.ingest.new_features import NewFeatures
from vista.log.ingest.part_codes import PartCodes
from vista.log.ingest.parts import Part
from vista.log.item_features import feature_line
from vista.log.row_feature_writer import RowFeatureWriter
from vista.log.row_features import ColumnValues, RowColumn, RowFeatures
from vista.log.segment_writer import SegmentWriter
from vista.log.vocabulary import Vocabulary

if TYPE_CHECKING:
    import polars as pl
else:
    pl = require_module("polars", "data")

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
        self._values: dict[str, Vocabulary | None] = {}
        self._codes: dict[str, PartCodes] = {}
        for name, kind in kinds.items():
            self._values[name] = None
            if kind == "category":
                known = before.get(name) or Vocabulary.empty("str")
                self._codes[name], self._values[name] = PartCodes.of(table, parts, name, known)
        self._table, self._before = table, before
        self._num_rows = sum(part.num_rows for part in parts)
        self._writer = RowFeatureWriter(segment, folder, self._num_rows, self._values, before)
        self._seen = {name: _Seen(1 if known is None else len(known)) for name, known in self._values.items()}

    @property
    def num_columns(self) -> int:
        return len(self._values)

    def rows(self, part: Part) -> pl.LazyFrame:
        """The good rows of a part, with the codes of categories that `append` takes."""
        codes = [codes.of_part(name, part) for name, codes in self._codes.items()]
        return part.good().with_columns(codes)

    def append(self, block: pl.DataFrame) -> None:
        """Write the features of the next rows."""
        columns: dict[str, RowColumn] = {}
        labels = {name.partition(":")[2]: block[name].to_numpy() for name in block.columns if name.startswith("label:")}
        for name, known in self._values.items():
            if known is None:
                columns[name] = block[f"number:{name}"].to_numpy()
            else:
                columns[name] = self._codes[name].row_of_code[block[f"category:{name}"].to_numpy()]
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
        num_known = int(np.count_nonzero(~np.isnan(column) if is_number else column >= 0))
        if num_known:
            self.num_known += num_known
            low = column if num_known == len(column) or is_number else column[column >= 0]
            self.low = min(self.low, float(np.fmin.reduce(low)))
            self.high = max(self.high, float(np.fmax.reduce(column)))
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
