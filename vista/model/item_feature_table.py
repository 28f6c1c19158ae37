"""Features of the items that a model ranks, encoded in a table.

R model rows, E entries of all rows together, F dense inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from vista.arrays import Float32s, Int, mapped_tensors, offsets_of
from vista.config.checks import require
from vista.config.model_config import RankingConfig, counted_categories
from vista.counters.counters import CounterSpec
from vista.counters.keys import ItemKeys, largest_key
from vista.errors import ConfigError, shown
from vista.log.features import Column, Columns
from vista.log.histories import ranges
from vista.log.vocabulary import Vocabulary
from vista.model.features import FeatureSpec, HashedVocabulary, Schema, load_values

FEATURES_FILE = "item_features.safetensors"
_VALUES_FILE = "item_values_{}"
_DTYPES = {"entry": np.int64, "weight": np.float32, "offsets": np.int64, "dense": np.float32}


@dataclass(eq=False, slots=True)
class ItemFeatureTable:
    """Rows in the order of a model's item table. Row 0, the unknown item, has no entries and a dense input of 0. The
    arrays are not weights: they are saved in a file of their own."""

    entry: Int
    """int64 [E] rows of the encoder's embedding, in the order of the model rows that have them."""
    weight: Float32s
    """float32 [E]: 1 / number of values that the item has in the column."""
    offsets: Int
    """int64 [R + 1]."""
    dense: Float32s
    """float32 [R, F] standardized numbers and scaled vectors; 0 where they are missing."""
    values: dict[str, Vocabulary]
    """By name of a category column: the values that the model knows."""

    @classmethod
    def of(cls, features: Columns, columns: Sequence[FeatureSpec]) -> ItemFeatureTable:
        """Encode the features of N items; they have the rows 1 to N.

        Args:
            features: of the items, in the order of the model's vocabulary.
            columns: how to read them.
        """
        values: dict[str, Vocabulary] = {}  # in the order of `columns`, by which `load` numbers the files
        owners, entries, weights, first = [], [], [], 0
        num_items = len(next(iter(features.values())).is_known)
        dense = np.zeros((1 + num_items, sum(column.num_dense for column in columns)), np.float32)
        place = 0
        for column in columns:
            given = features[column.name]
            if column.hashed and not isinstance(given.values, HashedVocabulary):
                given = given.recoded(HashedVocabulary(column.size))
            if given.values is not None:
                values[column.name] = given.values
            owner, code = value_codes(given, column)
            missing = np.flatnonzero(~given.is_known)
            owners += [owner, missing]
            entries += [first + 1 + code, np.full(len(missing), first)]
            weights += [1 / np.bincount(owner, minlength=num_items)[owner], np.ones(len(missing))]
            if column.num_dense:
                column.fill_dense(dense[1:, place : place + column.num_dense], given.data)
            first, place = first + column.num_rows, place + column.num_dense
        owner = np.concatenate(owners)
        order = np.argsort(owner, kind="stable")
        counts = np.bincount(owner + 1, minlength=1 + num_items)
        return cls(
            np.concatenate(entries)[order],
            np.concatenate(weights)[order].astype(np.float32),
            offsets_of(counts),
            dense,
            values,
        )

    def extended(self, features: Columns, columns: Sequence[FeatureSpec]) -> ItemFeatureTable:
        """This table with the features of n more items in new rows. Values that the model does not know are missing.

        Args:
            features: of the new items.
            columns: as in `of`.
        """
        new = self._encoded(features, columns)
        return ItemFeatureTable(
            np.concatenate([self.entry, new.entry]),
            np.concatenate([self.weight, new.weight]),
            np.concatenate([self.offsets[:-1], self.offsets[-1] + new.offsets[1:]]),
            np.concatenate([self.dense, new.dense[1:]]),
            self.values,
        )

    def differs(self, rows: Int, features: Columns, columns: Sequence[FeatureSpec]) -> NDArray[np.bool_]:
        """Which of n items have other features than this table: bool [n]. Values that it does not know are missing.

        Args:
            rows: int64 [n], those of the items.
            features: of these items.
            columns: as in `of`.
        """
        new = self._encoded(features, columns)
        own, given = self.offsets, new.offsets[1:]
        starts, counts = own[rows], np.diff(given)
        same: NDArray[np.bool_] = (own[rows + 1] - starts == counts) & (self.dense[rows] == new.dense[1:]).all(1)
        index, other = ranges(starts[same], counts[same]), ranges(given[:-1][same], counts[same])
        unequal = self.entry[index] != new.entry[other]
        same[np.repeat(np.flatnonzero(same), counts[same])[unequal]] = False
        return ~same

    def _encoded(self, features: Columns, columns: Sequence[FeatureSpec]) -> ItemFeatureTable:
        """A table of other items, with the values of this one."""
        return ItemFeatureTable.of(_recoded(features, self.values), columns)

    def category_keys(self, columns: Sequence[FeatureSpec], name: str) -> NDArray[np.int32]:
        """int32 [R] the value of each row in a category of which items have at most one: its code plus 1, 0 for none.

        Args:
            columns: those of the table.
            name: of the category.

        Raises:
            RuntimeError: there is no such category.
        """
        kinds = [column.kind if column.name == name else "" for column in columns]
        if "category" not in kinds:
            raise RuntimeError(f"{name!r}, which the model counts, is not a category of its items")
        place = kinds.index("category")
        value = self.entry - sum(column.num_rows for column in columns[:place])
        found = np.flatnonzero((value > 0) & (value <= columns[place].size))
        keys = np.zeros(len(self.offsets) - 1, np.int32)
        keys[np.searchsorted(self.offsets, found, side="right") - 1] = value[found]
        return keys

    def save(self, folder: Path) -> None:
        """Write the arrays and the values into a folder. Raises OSError, SafetensorError."""
        save_file({name: np.ascontiguousarray(getattr(self, name)) for name in _DTYPES}, folder / FEATURES_FILE)
        for number, values in enumerate(self.values.values()):
            values.save(folder, _VALUES_FILE.format(number))

    @classmethod
    def load(cls, folder: Path, columns: Sequence[FeatureSpec]) -> ItemFeatureTable:
        """Map the files in a folder.

        Args:
            folder: of `save`.
            columns: those of the table.

        Raises:
            OSError, SafetensorError, LogFormatError: a file is missing or damaged.
                ValueError: an array is missing or of another type, or the values do not fit the columns.
        """
        arrays = mapped_tensors(folder / FEATURES_FILE)
        if {name: array.dtype for name, array in arrays.items()} != _DTYPES:
            raise ValueError(f"{FEATURES_FILE} must hold {', '.join(_DTYPES)}, of int64 and float32")
        categories = [column for column in columns if column.kind == "category"]
        values = {}
        for number, column in enumerate(categories):
            values[column.name] = load_values(folder, _VALUES_FILE.format(number), column)
        return cls(**arrays, values=values)

    def fits(self, num_rows: int, num_values: int, num_dense: int) -> bool:
        """Whether it has `num_rows` rows and `num_dense` dense inputs, and all entries are below `num_values`."""
        entry, weight, offsets, dense = self.entry, self.weight, self.offsets, self.dense
        return (
            offsets.shape == (num_rows + 1,)
            and dense.shape == (num_rows, num_dense)
            and entry.shape == weight.shape == (int(offsets[-1]),)
            and int(offsets[0]) == 0
            and bool((offsets[1:] >= offsets[:-1]).all())  # a difference might wrap around
            and (not len(entry) or 0 <= int(entry.min()) <= int(entry.max()) < num_values)
            and bool(np.isfinite(weight).all())
            and bool(np.isfinite(dense).all())
        )

    def content(self, num_rows: int) -> list[memoryview]:
        """The bytes of all arrays, of the first `num_rows` rows."""
        stop = int(self.offsets[num_rows])
        parts = self.entry[:stop], self.weight[:stop], self.offsets[: num_rows + 1], self.dense[:num_rows]
        return [np.ascontiguousarray(part).reshape(-1).view(np.uint8).data for part in parts]


def value_codes(column: Column, spec: FeatureSpec) -> tuple[Int, Int]:
    """Item and code of each value that has a row of the embedding: int64 [E] each."""
    if column.offsets is not None:
        return np.repeat(np.arange(len(column.is_known)), np.diff(column.offsets)), column.data.astype(np.int64)
    if column.kind == "vector":
        return np.empty(0, np.int64), np.empty(0, np.int64)
    owner = np.flatnonzero(column.is_known)
    return owner, spec.entries(column.data[owner]) - 1


def _recoded(features: Columns, values: Mapping[str, Vocabulary]) -> dict[str, Column]:
    """The columns, with the codes of these values of their categories."""
    return {
        name: column if column.values is None else column.recoded(values[name]) for name, column in features.items()
    }


class ItemsByValue:
    """The items of each value of the categories of a model. A column is sorted at its first use.

    Args:
        table: features of the items; None for a model without any.
        columns: of the model's schema.
    """

    def __init__(self, table: ItemFeatureTable | None, columns: Sequence[FeatureSpec]) -> None:
        self._table = table
        self._columns: dict[str, tuple[int, FeatureSpec]] = {}
        """By name of a category: its first row of the embedding, and how it is read."""
        first = 0
        for column in columns:
            if column.kind == "category":
                self._columns[column.name] = first, column
            first += column.num_rows
        self._sorted: dict[str, tuple[NDArray[np.int32], Int]] = {}
        """By name: model rows [E] in the order of their values, and offsets [size + 1]."""

    def mask(self, where: Mapping[str, Any], num_rows: int) -> NDArray[np.bool_]:
        """bool [num_rows]: model rows that have one of the given values in each of the given columns.

        Args:
            where: by name of a category, a value or a list of values.
            num_rows: 1 + V.

        Raises:
            ValueError: the model has no such category, its values are hashed, or it does not know a value.
            TypeError: `where` is not a mapping, or a value has another type than the category's.
        """
        if not isinstance(where, Mapping):
            raise TypeError(f"where: must be a mapping from names of categories to values, got {shown(where)}")
        mask = np.ones(num_rows, np.bool_)
        for name, given in where.items():
            if name not in self._columns:
                known = ", ".join(self._columns) or "none"
                raise ValueError(f"where: {shown(name)} is not a category of this model's items, which are: {known}")
            if isinstance(given, (str, int, np.integer)):
                given = [given]
            elif not isinstance(given, (list, tuple, set, frozenset, np.ndarray)):
                raise TypeError(f"where: {name} must be a value or a list of values, got {shown(given)}")
            mask &= self._has_value(name, list(given), num_rows)
        return mask

    def _has_value(self, name: str, values: list[Any], num_rows: int) -> NDArray[np.bool_]:
        column = self._columns[name][1]
        if column.hashed:
            raise ValueError(
                f"where: {name!r} is hashed in this model, so several values share a row; pass the items as within=…"
            )
        assert self._table is not None
        try:
            codes = self._table.values[name].rows(values) if values else np.zeros(0, np.int64)
        except TypeError as error:
            raise TypeError(f"where: {name}: {error}") from None
        if (codes < 0).any():
            unknown = values[int(np.flatnonzero(codes < 0)[0])]
            raise ValueError(f"where: {shown(unknown)} is not a value of {name!r} that this model knows")
        if name not in self._sorted:  # Two threads that meet here compute the same.
            self._sorted[name] = self._sort(name)
        rows, offsets = self._sorted[name]
        mask = np.zeros(num_rows, np.bool_)
        for code in codes.tolist():
            mask[rows[offsets[code] : offsets[code + 1]]] = True
        return mask

    def _sort(self, name: str) -> tuple[NDArray[np.int32], Int]:
        assert self._table is not None
        first, column = self._columns[name]
        entry, starts = self._table.entry, self._table.offsets
        owner = np.repeat(np.arange(len(starts) - 1, dtype=np.int32), np.diff(starts))
        code = entry - (first + 1)  # The first row stands for items without a value.
        own = (code >= 0) & (code < column.size)
        code, owner = code[own], owner[own]
        return owner[np.argsort(code, kind="stable")], offsets_of(np.bincount(code, minlength=column.size))


# Columns of features that a trained model knows, joined with those of a log that has more columns, or more values.
#
# What the model knows keeps its meaning: numbers keep their buckets, means, and scales, and each value keeps its row of
# the encoder's embedding.


@dataclass(frozen=True, slots=True)
class GrownColumns:
    """Columns of a model in their order, then those that only a log has."""

    columns: list[FeatureSpec]
    values: dict[str, Vocabulary]
    """By name of a category: the model's values, then those that only the log has."""
    value_rows: Int
    """For each row of the new encoder's `values`, the row that the model has for it, or -1."""
    dense_rows: Int
    """Likewise for `dense`."""

    @classmethod
    def of(
        cls,
        known: Sequence[FeatureSpec],
        known_values: Mapping[str, Vocabulary | None],
        given: Sequence[FeatureSpec],
        given_values: Mapping[str, Vocabulary | None],
    ) -> GrownColumns:
        """Join the columns.

        Args:
            known: the model's columns; known_values: the values of its categories, by name.
            given: the log's columns; given_values: likewise.

        Raises:
            ConfigError: naming a column of the model that the log lacks, or has with another kind or size.
        """
        _check(known, {column.name: column for column in given})
        names = {column.name for column in known}
        columns: list[FeatureSpec] = []
        values: dict[str, Vocabulary] = {}
        for column in (*known, *(column for column in given if column.name not in names)):
            if column.hashed:
                values[column.name] = HashedVocabulary(column.size)
            elif (more := given_values.get(column.name)) is not None:
                own = known_values.get(column.name) or Vocabulary.empty("str")
                values[column.name] = own.extended(more.ids(np.arange(len(more))).tolist())
                column = replace(column, size=max(len(values[column.name]), 1))
            columns.append(column)
        return cls(
            columns,
            values,
            _rows([column.num_rows for column in columns], [column.num_rows for column in known]),
            _rows([column.num_dense for column in columns], [column.num_dense for column in known]),
        )

    @property
    def new_missing_rows(self) -> Int:
        """The rows of `values` for a missing value, of the columns that only the log has."""
        sizes = [column.num_rows for column in self.columns]
        first = np.cumsum([0, *sizes[:-1]])
        new: Int = first[self.value_rows[first] < 0]
        return new


def _check(known: Sequence[FeatureSpec], given: Mapping[str, FeatureSpec]) -> None:
    def described(column: FeatureSpec) -> str:
        if column.hashed:
            return f"category of {column.size} hashed rows"
        return f"vector of {column.size}" if column.kind == "vector" else column.kind

    for column in known:
        found = given.get(column.name)
        if found is None:
            raise ConfigError(
                f"init_from: the model reads the feature {column.name!r}, which the log lacks; append a table that has "
                "it, with `vista prepare append=true`"
            )
        if described(found) != described(column):
            raise ConfigError(
                f"init_from: the feature {column.name!r} is a {described(found)}, but was a {described(column)} in "
                "training; prepare the log with the same kind of feature, and hash the same features "
                "(model.hashed_features)"
            )


def _rows(new: Sequence[int], old: Sequence[int]) -> Int:
    """Rows of a table of columns [sum(new)]: the row of the same column and place in the old table, or -1. `new`: rows
    per column; old: likewise, of the first len(old) columns."""
    rows = np.full(sum(new), -1, np.int64)
    first = np.cumsum([0, *new[:-1]])
    for start, before, size in zip(first, np.cumsum([0, *old[:-1]]), old, strict=False):
        rows[start : start + size] = before + np.arange(size)
    return rows


# The item features of a trained model, joined with those of a log (`vista.model.item_feature_table`).
#
# R model rows, E entries of all rows together.


def joined_features(grown: GrownColumns, old: ItemFeatureTable | None, features: Columns) -> ItemFeatureTable:
    """Encoded features of the items of a model that has grown.

    Args:
        grown: the columns.
        old: the earlier table, whose items come first; None if the model had no features.
        features: of all items, from the log. Items that have no value there keep those of `old`.
    """
    fresh = ItemFeatureTable.of(_recoded(features, grown.values), grown.columns)
    if old is None:
        return fresh
    has_value = np.any([column.is_known for column in features.values()], axis=0)
    stays = np.zeros(1 + len(has_value), np.bool_)
    num_old = len(old.offsets) - 1
    stays[1:num_old] = ~has_value[: num_old - 1]
    return _with_rows(fresh, old, stays, grown)


def _with_rows(
    fresh: ItemFeatureTable, old: ItemFeatureTable, stays: NDArray[np.bool_], grown: GrownColumns
) -> ItemFeatureTable:
    """`fresh` with rows of `old` where `stays` bool [R]. Columns that `old` lacks are missing there."""
    is_taken = grown.value_rows >= 0
    new_rows = np.zeros(np.count_nonzero(is_taken), np.int64)
    new_rows[grown.value_rows[is_taken]] = np.flatnonzero(is_taken)
    kept, missing = np.flatnonzero(stays), grown.new_missing_rows
    owner, old_owner = _owners(fresh), _owners(old)
    is_fresh, is_old = ~stays[owner], stays[old_owner]
    owners = np.concatenate([owner[is_fresh], old_owner[is_old], np.repeat(kept, len(missing))])
    entries = [fresh.entry[is_fresh], new_rows[old.entry[is_old]], np.tile(missing, len(kept))]
    ones = np.ones(len(kept) * len(missing), np.float32)
    weights = [fresh.weight[is_fresh], old.weight[is_old], ones]
    order = np.argsort(owners, kind="stable")
    dense, has_column = fresh.dense, np.flatnonzero(grown.dense_rows >= 0)
    dense[np.ix_(kept, has_column)] = old.dense[np.ix_(kept, grown.dense_rows[has_column])]
    return ItemFeatureTable(
        np.concatenate(entries)[order],
        np.concatenate(weights)[order],
        offsets_of(np.bincount(owners, minlength=len(stays))),
        dense,
        fresh.values,
    )


def _owners(table: ItemFeatureTable) -> Int:
    """int64 [E] the model row of each entry."""
    return np.repeat(np.arange(len(table.offsets) - 1), np.diff(table.offsets))


# What a model counts for each user: items, categories of items, and their products with other parts.


def check_categories(config: RankingConfig, features: Columns, items: Vocabulary, where: str) -> None:
    """Check that counted categories are categories, of which each item has at most one value.

    Args:
        features: of the items.
        where: the log or the files that the features come from.

    Raises:
        ConfigError: naming the category.
    """
    categories = {name: column.offsets for name, column in features.items() if column.offsets is not None}
    for name in counted_categories(config.counter_keys or []):
        require(
            name in categories,
            "model.counter_keys",
            f"{name!r} is not a category of the items of {where}; those are: {', '.join(categories) or 'none'}",
        )
        several = np.flatnonzero(np.diff(categories[name]) > 1)
        require(
            len(several) == 0,
            "model.counter_keys",
            f"{len(several):,} items of {where} have several values of {name!r}, such as "
            f"{items.ids(several[:1]).tolist()}; an event counts for one value, so give each item one",
        )


def item_keys(spec: CounterSpec, schema: Schema, table: ItemFeatureTable | None, num_rows: int) -> ItemKeys:
    """What each of a model's items is counted as.

    Args:
        spec: of the model.
        table: the features of `num_rows` model rows; None if the model has none.

    Raises:
        RuntimeError: the table has no such category.
    """
    sizes = {column.name: column.size for column in schema.item_features}
    keys = ItemKeys.of_spec(spec, num_rows, sizes, schema.actions)
    if table is not None:
        for name, codes in keys.categories.items():
            codes[:] = table.category_keys(schema.item_features, name)
    return keys


def largest_keys(spec: CounterSpec, schema: Schema, num_items: int) -> list[int]:
    """The largest key of each field of a spec, for a model of `num_items` items."""
    sizes = {column.name: column.size for column in schema.item_features}
    return [largest_key(field, num_items, sizes) for field in spec.fields]


def category_codes(features: Columns, name: str, key: str) -> Int:
    """Codes int64 [1 + V] of a category of the log's items, from 1; 0 for items without a value. Raises ConfigError
    naming the key of the configuration that names the category."""
    column = features.get(name)
    if column is None or column.offsets is None:
        known = ", ".join(each for each, own in features.items() if own.kind == "category")
        raise ConfigError(f"{key}={name}: is not a category of the log's items, which have {known or 'none'}; name one")
    counts = np.diff(column.offsets)
    if counts.max(initial=0) > 1:
        raise ConfigError(f"{key}={name}: some items have several values; name a category with one value per item")
    codes = np.zeros(1 + len(counts), np.int64)
    codes[1:][counts == 1] = 1 + column.data
    return codes
