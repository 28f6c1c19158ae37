"""Features of a new segment: parsed tables become columns in the order of the log's items, or of its users.

Memory holds the ids of the tables, and one column of categories or numbers at a time. Vectors pass through a file in
the scratch folder.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Float32s, Int, offsets_of
from vista.errors import DataError, shown
from vista.installation import require_module
from vista.log.feature_owner import FeatureOwner
from vista.log.ingest.category_encoder import MARGIN, too_many_values
from vista.log.ingest.parts import ORDER, Part
from vista.log.item_features import CategoryColumn, NumberColumn, feature_line
from vista.log.merged_features import declared_columns, form_of, rows_with_features
from vista.log.segment import Segment
from vista.log.segment_features import SegmentColumn
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
    """What was written.

    columns: names and kinds, for the manifest; lines: a description of each column; warnings: what is allowed, but is
    probably a mistake.
    """

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
    earlier = declared_columns(before, owner)
    source = parts[0].source
    columns = [(name, *name.split(":", 1)) for name in source.columns if name != owner.name]
    for _, kind, name in columns:
        if name in earlier and earlier[name][0].column.kind != kind:
            raise _other_form(source.path, name, kind, earlier[name])
    places, rows = _places(owner, parts, vocabulary)
    features = FeatureWriter(writer, owner, rows)
    table = _Table(parts, places, len(rows))
    new = NewFeatures(features.columns)
    for column, kind, name in columns:
        if kind == "category":
            category, size = table.category(column, name, earlier.get(name, ()), owner.table)
            features.add(name, category)
            num_known, is_constant = int(category.is_known.sum()), len(np.unique(category.codes)) < 2
        elif kind == "number":
            number, size = table.number(column), 1
            features.add(name, number)
            known = number.numbers[number.is_known]
            num_known, is_constant = len(known), len(known) == 0 or bool(known.min() == known.max())
        else:
            vectors = table.vectors(column, name, earlier.get(name, ()), scratch / "vectors", dims.get(name))
            size = vectors.shape[1]
            features.add_vectors(name, size, _blocks(vectors))
            num_known, is_constant = _spread(vectors)
        new.lines.append(feature_line(name, kind, size, num_known / len(vocabulary), owner.table))
        if is_constant and num_known in (0, len(rows)) and len(rows) > 1:
            what = "the same value" if num_known else "no value"
            new.warnings.append(
                f"column {name!r} of the {owner.name} features has {what} for all {owner.table}; leave it out"
            )
    covered = len(np.union1d(rows_with_features(before, owner), rows))
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


def _other_form(path: str, name: str, form: str, earlier: Sequence[SegmentColumn]) -> DataError:
    return DataError(
        f"{path}: column {name!r} is a {form}, but in the log it is a {form_of(earlier[0].column)}; give the column "
        "another name, or prepare the log again"
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

    def category(
        self, column: str, name: str, earlier: Sequence[SegmentColumn], table: str
    ) -> tuple[CategoryColumn, int]:
        """A column with the values that it adds to those of the log, and the number of all of them.

        Args:
            table: items | users, for the error.
        """
        rows = self._rows(column).explode("value").filter(pl.col("value").fill_null("") != "")
        source = self.parts[0].source
        about = rows.select(pl.col("value").approx_n_unique()).collect(engine="streaming").item()
        if about > source.max_values * MARGIN:  # before all values are held in memory
            raise too_many_values(source, table, name, f"about {about:,}")
        entries = rows.unique().collect(engine="streaming")
        texts = entries["value"].unique()
        known = [part.column.values for part in earlier if isinstance(part.column, CategoryColumn)]
        old = Vocabulary.concatenated(known) if known else Vocabulary.empty("str")
        values = old if len(texts) > source.max_values else old.extended(texts.to_list())
        if max(len(texts), len(values)) > source.max_values:
            raise too_many_values(source, table, name, f"{max(len(texts), len(values)):,}")
        codes = pl.DataFrame({"value": texts, "code": values.rows(texts.to_list()).astype(np.int32)})
        entries = entries.join(codes, on="value").select(_PLACE, "code").sort(_PLACE, "code")
        counts = np.bincount(entries[_PLACE].to_numpy(), minlength=self.num_rows)
        new = CategoryColumn(values.part(len(old)), entries["code"].to_numpy(), offsets_of(counts))
        return new, len(values)

    def number(self, column: str) -> NumberColumn:
        entries = self._rows(column).collect(engine="streaming")
        numbers = np.full(self.num_rows, np.nan, np.float32)
        numbers[entries[_PLACE].to_numpy()] = entries["value"].to_numpy()
        return NumberColumn(numbers)

    def vectors(
        self, column: str, name: str, earlier: Sequence[SegmentColumn], file: Path, needed: int | None
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
        if earlier and form_of(earlier[0].column) != f"vector of {dim} numbers":
            raise _other_form(first, name, f"vector of {dim} numbers", earlier)
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
