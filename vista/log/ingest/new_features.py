"""Features of a new segment: parsed tables become columns in the order of the log's items, or of its users.

Memory holds the ids of the tables, and one column of categories or numbers at a time. Vectors pass through a file in
the scratch folder.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Float32s, Int, offsets_of
from vista.config import ItemTableConfig
from vista.config.checks import OnBadRows
from vista.errors import DataError, shown
from vista.installation import require_module
from vista.log.features import (
    Column,
    SegmentFeatures,
    declared_columns,
    feature_line,
    merged_features,
    rows_with_features,
)
from vista.log.histories import ColumnValues, RowColumn, RowFeatures
from vista.log.ingest.rows import MARGIN, ORDER, Part, PartCodes, read_part, too_many_values
from vista.log.ingest.source_parser import SourceParser
from vista.log.ingest.sources import open_feature_tables
from vista.log.segment import Segment, features_of
from vista.log.segment_files import ITEMS, FeatureOwner, SegmentFiles
from vista.log.segment_writer import FeatureWriter, SegmentWriter
from vista.log.vocabulary import Vocabulary

if TYPE_CHECKING:
    import polars as pl
else:
    pl = require_module("polars", "data")


LEAST_COVERAGE = 0.5
"""More than this share of the log's items, or users, should have features."""
BLOCK_NUMBERS = 1 << 20
"""Numbers of vectors that are moved at once."""
_PLACE = "place"
_LOG = logging.getLogger("vista.prepare")


@dataclass(frozen=True, slots=True)
class NewFeatures:
    """What was written. columns: names and kinds, for the manifest; lines: a description of each column; warnings: what
    is allowed, but is probably a mistake."""

    columns: list[dict[str, str]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def write_features(
    owner: FeatureOwner,
    parts: Sequence[Part],
    vocabulary: Vocabulary,
    before: Sequence[Segment],
    writer: SegmentWriter,
    scratch: Path,
    *,
    dims: Mapping[str, int] = MappingProxyType({}),
) -> NewFeatures:
    """Write the features of a segment.

    Args:
        owner: items or users.
        parts: tables of features with the same columns; none if there are no features.
        vocabulary: the log's items or users, with those of the new segment.
        before: the earlier segments of the log.
        scratch: folder for temporary files.
        dims: by name of a column, the length that its vectors must have, even if there are none.

    Raises:
        DataError: if an item or user has two rows, none is in the log, or a column does not fit that of the log, has
            too many values, or has no vectors.
    """
    if not parts:
        return NewFeatures()
    in_log = features_of(before, owner)
    earlier = declared_columns(in_log)
    source = parts[0].source
    columns = [(name, *name.split(":", 1)) for name in source.columns if name != owner.name]
    for _, kind, name in columns:
        if name in earlier and earlier[name][0].columns[name].kind != kind:
            raise _other_form(source.path, name, kind, earlier[name][0].columns[name])
    places, rows = _places(owner, parts, vocabulary)
    features = FeatureWriter(writer, owner, rows)
    table = _Table(parts, places, len(rows))
    new = NewFeatures(features.columns)
    for column, kind, name in columns:
        known = [part.columns[name] for part in earlier.get(name, ())]
        if kind == "vector":
            vectors = table.vectors(column, name, known, scratch / "vectors", dims.get(name))
            size = vectors.shape[1]
            features.add_vectors(name, size, _blocks(vectors))
            num_known, is_constant = _spread(vectors)
        else:
            made, size = table.number(column) if kind == "number" else table.category(column, name, known, owner.table)
            features.add(name, made)
            num_known = int(made.is_known.sum())
            given = made.data[~np.isnan(made.data)]  # codes are never NaN
            is_constant = not len(given) or bool(given.min() == given.max())
        new.lines.append(feature_line(name, kind, size, num_known / len(vocabulary), owner.table))
        if is_constant and num_known in (0, len(rows)) and len(rows) > 1:
            what = "the same value" if num_known else "no value"
            new.warnings.append(f"column {name!r} of the {owner.title} has {what} for all {owner.table}; leave it out")
    covered = len(np.union1d(rows_with_features(in_log), rows))
    if covered <= LEAST_COVERAGE * len(vocabulary):
        new.warnings.append(
            f"only {covered:,} of the log's {len(vocabulary):,} {owner.table} have features; check the ids in column "
            f"{source.columns[owner.name]!r}, or add the other {owner.table} to the table"
        )
    return new


def _places(owner: FeatureOwner, parts: Sequence[Part], vocabulary: Vocabulary) -> tuple[pl.DataFrame, Int]:
    """Where the rows of the tables go: columns ORDER and _PLACE, and the vocabulary's rows int64 [F], ascending."""
    name, source = owner.name, parts[0].source
    ids = pl.concat([part.good().select(ORDER, name) for part in parts]).collect(engine="streaming").sort(ORDER)
    check_one_row_each(ids, parts)
    given = ids[name]
    found = vocabulary.rows(given.to_numpy() if vocabulary.kind == "int" else given.to_list())
    known = found >= 0
    if not known.any():
        example = vocabulary.ids(np.flatnonzero(vocabulary.has_ids(np.arange(len(vocabulary))))[:1]).tolist()
        such_as = f", such as {shown(example[0])}" if example else ""
        raise DataError(
            f"{source.path}: column {source.columns[name]!r} contains none of the log's {owner.table}{such_as}; use "
            "the log's ids"
        )
    if not known.all():
        left_out = int((~known).sum())
        _LOG.info("%s: left out %d %s that the log does not contain", source.path, left_out, owner.table)
    rows_with_values = np.sort(found[known])
    place = np.searchsorted(rows_with_values, found[known])
    return pl.DataFrame({ORDER: ids[ORDER].filter(pl.Series(known)), _PLACE: place}), rows_with_values


def check_one_row_each(ids: pl.DataFrame, parts: Sequence[Part]) -> None:
    """Refuse tables in which an item, or a user, has two rows.

    Args:
        ids: columns ORDER and `item` or `user` of all good rows of the parts, sorted by ORDER.

    Raises:
        DataError: naming both rows.
    """
    (name,) = (column for column in ids.columns if column != ORDER)
    twice = ids.filter(ids[name].is_duplicated())
    if len(twice):
        repeated, column = twice[name][0], parts[0].source.columns[name]
        rows = twice.filter(pl.col(name) == repeated)[ORDER][:2].to_list()
        (first, row), (second, other_row) = ((parts[order // 2**32].source.path, order % 2**32) for order in rows)
        raise DataError(
            f"{second}: row {other_row}, column {column!r}: {name} {shown(repeated)} is also in row {row} of {first}; "
            f"keep one row per {name}"
        )


def _other_form(path: str, name: str, form: str, in_log: Column) -> DataError:
    return DataError(
        f"{path}: column {name!r} is a {form}, but in the log it is a {in_log.form}; give the column another name, or "
        "prepare the log again"
    )


@dataclass(frozen=True, slots=True)
class _Table:
    """The columns of the tables. parts, places: see `_places`; num_rows: F."""

    parts: Sequence[Part]
    places: pl.DataFrame
    num_rows: int

    def _rows(self, column: str) -> pl.LazyFrame:
        """Columns _PLACE and `value`, of the rows that have a value, in any order."""
        rows = pl.concat([part.good().select(ORDER, pl.col(column).alias("value")) for part in self.parts])
        return rows.drop_nulls("value").join(self.places.lazy(), on=ORDER, how="inner").select(_PLACE, "value")

    def category(self, column: str, name: str, earlier: Sequence[Column], table: str) -> tuple[Column, int]:
        """A column with the values that it adds to those of the log, and the number of all of them.

        Args:
            earlier: what earlier segments have of the column.
            table: items | users, for the error.
        """
        rows = self._rows(column).explode("value").filter(pl.col("value").fill_null("") != "")
        source = self.parts[0].source
        about = rows.select(pl.col("value").approx_n_unique()).collect(engine="streaming").item()
        if about > source.max_values * MARGIN:  # before all values are held in memory
            raise too_many_values(source, table, name, f"about {about:,}")
        entries = rows.unique().collect(engine="streaming")
        texts = entries["value"].unique()
        known = [part.values for part in earlier if part.values is not None]
        old = Vocabulary.concatenated(known) if known else Vocabulary.empty("str")
        values = old if len(texts) > source.max_values else old.extended(texts.to_list())
        if max(len(texts), len(values)) > source.max_values:
            raise too_many_values(source, table, name, f"{max(len(texts), len(values)):,}")
        codes = pl.DataFrame({"value": texts, "code": values.rows(texts.to_list()).astype(np.int32)})
        entries = entries.join(codes, on="value").select(_PLACE, "code").sort(_PLACE, "code")
        counts = np.bincount(entries[_PLACE].to_numpy(), minlength=self.num_rows)
        return Column(entries["code"].to_numpy(), values.part(len(old)), offsets_of(counts)), len(values)

    def number(self, column: str) -> tuple[Column, int]:
        """A column of numbers, whose size is 1."""
        entries = self._rows(column).collect(engine="streaming")
        numbers = np.full(self.num_rows, np.nan, np.float32)
        numbers[entries[_PLACE].to_numpy()] = entries["value"].to_numpy()
        return Column(numbers), 1

    def vectors(
        self, column: str, name: str, earlier: Sequence[Column], file: Path, needed: int | None
    ) -> NDArray[np.float32]:
        """Vectors [F, D], in a temporary file that is mapped into memory; `needed` is D, if that is known."""
        lengths = [
            part.good().select(pl.col(column).list.len().max()).collect(engine="streaming").item() or 0
            for part in self.parts
        ]
        given = [(length, part.source.path) for length, part in zip(lengths, self.parts, strict=True) if length]
        if not given and needed is None:
            raise DataError(f"{self.parts[0].source.path}: column {name!r} has no vectors; leave it out")
        dim, first = given[0] if given else (needed or 0, "")
        if needed not in (dim, None):
            raise DataError(
                f"{first}: column {name!r} has vectors of {dim} numbers, but the model expects {needed}; compute them "
                "as for the training log"
            )
        for length, path in given:
            if length != dim:
                raise DataError(
                    f"{path}: column {name!r} has vectors of {length} numbers, but {first} has {dim}; write vectors of "
                    "one length"
                )
        if earlier and earlier[0].size != dim:
            raise _other_form(first, name, f"vector of {dim} numbers", earlier[0])
        step = _rows_of_block(dim)
        with file.open("wb") as handle:  # A full disk is an error here, but would be a signal in a mapped file.
            for start in range(0, self.num_rows, step):
                handle.write(np.full((min(step, self.num_rows - start), dim), np.nan, np.float32).data)
        vectors = np.memmap(file, np.float32, "r+", shape=(self.num_rows, dim))
        for batch in self._rows(column).collect_batches(chunk_size=step):
            numbers = batch["value"].explode().to_numpy().reshape(-1, dim)
            vectors[batch[_PLACE].to_numpy()] = numbers
        return vectors


def _rows_of_block(dim: int) -> int:
    return max(1, BLOCK_NUMBERS // dim)


def _blocks(vectors: Float32s) -> Iterator[Float32s]:
    step = _rows_of_block(vectors.shape[1])
    for start in range(0, len(vectors), step):
        yield vectors[start : start + step]


def _spread(vectors: Float32s) -> tuple[int, bool]:
    """The number of items with a vector, and whether these vectors are all equal."""
    first: Any = None
    num_known, is_constant = 0, True
    for block in _blocks(vectors):
        known = block[~np.isnan(block[:, 0])]
        num_known += len(known)
        if len(known):
            first = known[0].copy() if first is None else first
            is_constant = is_constant and bool((known == first).all())
    return num_known, is_constant


LEAK_SHARE = 0.99
"""Share of the rows with a label, and of those without, in which a feature may equal the label."""
LEAST_LABELS = 20
"""Rows with a label, and rows without, from which on a feature is compared with it."""


class NewRowFeatures:
    """Encodes and writes the features of a table of a new segment, block by block.

    Args:
        owner: events or impressions.
        parts: of the table, with the same columns.
        before: the values that the log has without the segment.
        segment: the writer of the segment.

    Raises:
        DataError: if a category has too many values.
    """

    def __init__(
        self, owner: FeatureOwner, parts: Sequence[Part], before: ColumnValues, segment: SegmentWriter
    ) -> None:
        roles = [name.partition(":") for name in parts[0].source.columns]
        kinds = {name: role for role, _, name in roles if role in ("category", "number")}
        self._values: dict[str, Vocabulary | None] = {}
        self._codes: dict[str, PartCodes] = {}
        for name, kind in kinds.items():
            self._values[name] = None
            if kind == "category":
                known = before.get(name) or Vocabulary.empty("str")
                self._codes[name], self._values[name] = PartCodes.of(owner.table, parts, name, known)
        self._table, self._before = owner.table, before
        self._num_rows = sum(part.num_rows for part in parts)
        self._writer = FeatureWriter(segment, owner, self._num_rows)
        self._writer.begin(self._values, before)
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


def read_items(table: ItemTableConfig, kind: str, dims: Mapping[str, int]) -> tuple[Vocabulary, dict[str, Column]]:
    """Read a table of items for a trained model, which has no log.

    Args:
        table: its files and columns.
        kind: of its ids, int or str.
        dims: by name of a column of vectors, their length.

    Returns:
        The ids in sorted order, and the features of these items; no columns if there are no items.

    Raises:
        ConfigError, DataError: naming file, row, column, and remedy, if the table is invalid.
    """
    with SourceParser() as parser, tempfile.TemporaryDirectory() as folder:
        sources = open_feature_tables(table, parser)
        kinds = {"user": "str", "item": kind}
        parts = [
            read_part(source, kinds, "items", Path(folder), number, OnBadRows.error)
            for number, source in enumerate(sources)
        ]
        ids = pl.concat([part.good().select("item") for part in parts]).unique().collect()["item"]
        items = Vocabulary.empty(kind).extended(ids.to_numpy() if kind == "int" else ids.to_list())
        if not len(items):
            return items, {}
        writer = SegmentWriter(Path(folder))
        written = write_features(ITEMS, parts, items, (), writer, Path(folder), dims=dims)
        # The files stay mapped after the folder is removed.
        files = SegmentFiles(writer.folder, writer.entries)
        features = SegmentFeatures.read(writer.folder, files, ITEMS, written.columns)
        assert features is not None and np.array_equal(features.rows, np.arange(len(items)))
        return items, merged_features(declared_columns([features]), features.rows)


def with_columns(table: ItemTableConfig, kinds: Mapping[str, str]) -> ItemTableConfig:
    """The table with these columns in place of its own. `kinds`: name of each column -> category, number, or vector."""
    named = {kind: [name for name, its in kinds.items() if its == kind] for kind in ("category", "number", "vector")}
    return replace(table, categories=named["category"], numbers=named["number"], vectors=named["vector"])
