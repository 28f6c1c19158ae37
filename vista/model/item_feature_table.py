"""Encoded features of the items that a model ranks: what its `FeatureEncoder` reads.

R model rows, E entries of all rows together, F dense inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vista.arrays import Float32s, Int, offsets_of
from vista.log.histories import ranges
from vista.log.item_features import CategoryColumn, FeatureColumn, ItemFeatures, NumberColumn, VectorColumn
from vista.log.vocabulary import Vocabulary
from vista.model.feature_spec import MAX_ABS_SCORE, FeatureSpec
from vista.model.hashed_vocabulary import HashedVocabulary, load_values

FEATURES_FILE = "item_features.safetensors"
_VALUES_FILE = "item_values_{}"
_DTYPES = {"entry": torch.int64, "weight": torch.float32, "offsets": torch.int64, "dense": torch.float32}


class ItemFeatureTable(nn.Module):
    """Rows in the order of a model's item table. Row 0, the unknown item, has no entries and a dense input of 0.

    The tensors are not weights: they are saved in a file of their own.
    """

    entry: Tensor
    """int64 [E] rows of the encoder's embedding, in the order of the model rows that have them."""
    weight: Tensor
    """float32 [E]: 1 / number of values that the item has in the column."""
    offsets: Tensor
    """int64 [R + 1]."""
    dense: Tensor
    """float32 [R, F] standardized numbers and scaled vectors; 0 where they are missing."""

    def __init__(
        self, entry: Tensor, weight: Tensor, offsets: Tensor, dense: Tensor, values: Mapping[str, Vocabulary]
    ) -> None:
        super().__init__()
        for name, tensor in zip(_DTYPES, (entry, weight, offsets, dense), strict=True):
            self.register_buffer(name, tensor, persistent=False)
        self.values = dict(values)
        """By name of a category column: the values that the model knows."""

    @classmethod
    def of(cls, features: ItemFeatures, columns: Sequence[FeatureSpec]) -> ItemFeatureTable:
        """Encode the features of N items; they have the rows 1 to N.

        Args:
            features: of the items, in the order of the model's vocabulary.
            columns: how to read them.
        """
        values: dict[str, Vocabulary] = {}  # in the order of `columns`, by which `load` numbers the files
        owners, entries, weights, first = [], [], [], 0
        num_items = len(next(iter(features.columns.values())).is_known)
        dense = np.zeros((1 + num_items, sum(column.num_dense for column in columns)), np.float32)
        place = 0
        for column in columns:
            given = features.columns[column.name]
            if isinstance(given, CategoryColumn):
                if column.hashed and not isinstance(given.values, HashedVocabulary):
                    given = given.recoded(HashedVocabulary(column.size))
                values[column.name] = given.values
            owner, code = value_codes(given, column)
            missing = np.flatnonzero(~given.is_known)
            owners += [owner, missing]
            entries += [first + 1 + code, np.full(len(missing), first)]
            weights += [1 / np.bincount(owner, minlength=num_items)[owner], np.ones(len(missing))]
            _fill_dense(dense[1:, place : place + column.num_dense], given, column)
            first, place = first + column.num_rows, place + column.num_dense
        owner = np.concatenate(owners)
        order = np.argsort(owner, kind="stable")
        counts = np.bincount(owner + 1, minlength=1 + num_items)
        return cls(
            torch.from_numpy(np.concatenate(entries)[order]),
            torch.from_numpy(np.concatenate(weights)[order].astype(np.float32)),
            torch.from_numpy(offsets_of(counts)),
            torch.from_numpy(dense),
            values,
        )

    def extended(self, features: ItemFeatures, columns: Sequence[FeatureSpec]) -> ItemFeatureTable:
        """This table with the features of n more items in new rows. Values that the model does not know are missing.

        Args:
            features: of the new items.
            columns: as in `of`.
        """
        new = self._encoded(features, columns).to(self.entry.device)
        return ItemFeatureTable(
            torch.cat([self.entry, new.entry]),
            torch.cat([self.weight, new.weight]),
            torch.cat([self.offsets[:-1], self.offsets[-1] + new.offsets[1:]]),
            torch.cat([self.dense, new.dense[1:]]),
            self.values,
        )

    def differs(self, rows: Int, features: ItemFeatures, columns: Sequence[FeatureSpec]) -> NDArray[np.bool_]:
        """Which of n items have other features than this table: bool [n]. Values that it does not know are missing.

        Args:
            rows: int64 [n], those of the items.
            features: of these items.
            columns: as in `of`.
        """
        new = self._encoded(features, columns)
        own, given = self.offsets.cpu().numpy(), new.offsets.numpy()[1:]
        starts, counts = own[rows], np.diff(given)
        same: NDArray[np.bool_] = (own[rows + 1] - starts == counts) & (
            self.dense.cpu().numpy()[rows] == new.dense.numpy()[1:]
        ).all(1)
        index, other = ranges(starts[same], counts[same]), ranges(given[:-1][same], counts[same])
        unequal = self.entry.cpu().numpy()[index] != new.entry.numpy()[other]
        same[np.repeat(np.flatnonzero(same), counts[same])[unequal]] = False
        return ~same

    def _encoded(self, features: ItemFeatures, columns: Sequence[FeatureSpec]) -> ItemFeatureTable:
        """A table of other items, with the values of this one."""
        known = {
            name: column.recoded(self.values[name]) if isinstance(column, CategoryColumn) else column
            for name, column in features.columns.items()
        }
        return ItemFeatureTable.of(ItemFeatures(known), columns)

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
        value = self.entry.cpu().numpy() - sum(column.num_rows for column in columns[:place])
        found = np.flatnonzero((value > 0) & (value <= columns[place].size))
        keys = np.zeros(len(self.offsets) - 1, np.int32)
        keys[np.searchsorted(self.offsets.cpu().numpy(), found, side="right") - 1] = value[found]
        return keys

    def save(self, folder: Path) -> None:
        """Write the tensors and the values into a folder. Raises OSError, SafetensorError."""
        save_file({name: getattr(self, name).cpu().contiguous() for name in _DTYPES}, folder / FEATURES_FILE)
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
                ValueError: a tensor is missing or of another type, or the values do not fit the columns.
        """
        tensors = load_file(folder / FEATURES_FILE)
        if {name: tensor.dtype for name, tensor in tensors.items()} != _DTYPES:
            raise ValueError(f"{FEATURES_FILE} must hold {', '.join(_DTYPES)}, of int64 and float32")
        categories = [column for column in columns if column.kind == "category"]
        values = {}
        for number, column in enumerate(categories):
            values[column.name] = load_values(folder, _VALUES_FILE.format(number), column)
        return cls(**tensors, values=values)

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
            and bool(weight.isfinite().all())
            and bool(dense.isfinite().all())
        )

    def content(self, num_rows: int) -> list[memoryview]:
        """The bytes of all tensors, of the first `num_rows` rows."""
        stop = int(self.offsets[num_rows])
        parts = self.entry[:stop], self.weight[:stop], self.offsets[: num_rows + 1], self.dense[:num_rows]
        return [part.cpu().contiguous().numpy().reshape(-1).view(np.uint8).data for part in parts]


def value_codes(column: FeatureColumn, spec: FeatureSpec) -> tuple[Int, Int]:
    """Item and code of each value that has a row of the embedding: int64 [E] each."""
    if isinstance(column, CategoryColumn):
        return np.repeat(np.arange(len(column.is_known)), np.diff(column.offsets)), column.codes.astype(np.int64)
    if isinstance(column, VectorColumn):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    owner = np.flatnonzero(column.is_known)
    return owner, np.searchsorted(np.array(spec.bounds), column.numbers[owner].astype(np.float64), side="left")


def _fill_dense(out: Float32s, column: FeatureColumn, spec: FeatureSpec) -> None:
    """Write the dense inputs of a column into zeros [N, num_dense]."""
    if isinstance(column, VectorColumn):
        np.divide(column.vectors, np.float32(spec.scale), out=out)
        np.nan_to_num(out, copy=False, nan=0.0)
    elif isinstance(column, NumberColumn):
        score = (column.numbers.astype(np.float64) - spec.mean) / spec.scale
        out[:, 0] = np.nan_to_num(score.clip(-MAX_ABS_SCORE, MAX_ABS_SCORE), nan=0.0)
