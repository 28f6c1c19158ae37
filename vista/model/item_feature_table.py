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

from vista.arrays import Int
from vista.log.histories import offsets_of
from vista.log.item_features import CategoryColumn, FeatureColumn, ItemFeatures, VectorColumn
from vista.log.vocabulary import Vocabulary
from vista.model.item_feature import LARGEST_SCORE, ItemFeature

FEATURES_FILE = "item_features.safetensors"
_VALUES_FILE = "item_values_{}"
_NAMES = ("entry", "weight", "offsets", "dense")


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
        for name, tensor in zip(_NAMES, (entry, weight, offsets, dense), strict=True):
            self.register_buffer(name, tensor, persistent=False)
        self.values = dict(values)
        """By name of a category column: the values that the model knows."""

    @classmethod
    def of(cls, features: ItemFeatures, columns: Sequence[ItemFeature]) -> ItemFeatureTable:
        """Encode the features of N items; they have the rows 1 to N.

        Args:
            features: of the items, in the order of the model's vocabulary.
            columns: how to read them.
        """
        owners, entries, weights, dense, first = [], [], [], [], 0
        for column in columns:
            given = features.columns[column.name]
            owner, code = _codes(given, column)
            counts = np.bincount(owner, minlength=len(given.is_known))
            missing = np.flatnonzero(~given.is_known)
            owners += [owner, missing]
            entries += [first + 1 + code, np.full(len(missing), first)]
            weights += [1 / counts[owner], np.ones(len(missing))]
            dense.append(_dense(given, column))
            first += column.num_rows
        owner = np.concatenate(owners)
        order = np.argsort(owner, kind="stable")
        counts = np.bincount(owner + 1, minlength=1 + len(dense[0]))
        return cls(
            torch.from_numpy(np.concatenate(entries)[order]),
            torch.from_numpy(np.concatenate(weights)[order].astype(np.float32)),
            torch.from_numpy(offsets_of(counts)),
            torch.from_numpy(np.pad(np.concatenate(dense, 1), ((1, 0), (0, 0))).astype(np.float32)),
            {name: column.values for name, column in features.columns.items() if isinstance(column, CategoryColumn)},
        )

    def extended(self, features: ItemFeatures, columns: Sequence[ItemFeature]) -> ItemFeatureTable:
        """This table with the features of n more items in new rows. Values that the model does not know are missing.

        Args:
            features: of the new items.
            columns: as in `of`.
        """
        known = {
            name: column.recoded(self.values[name]) if isinstance(column, CategoryColumn) else column
            for name, column in features.columns.items()
        }
        new = ItemFeatureTable.of(ItemFeatures(known), columns)
        return ItemFeatureTable(
            torch.cat([self.entry, new.entry]),
            torch.cat([self.weight, new.weight]),
            torch.cat([self.offsets[:-1], self.offsets[-1] + new.offsets[1:]]),
            torch.cat([self.dense, new.dense[1:]]),
            self.values,
        )

    def save(self, folder: Path) -> None:
        """Write the tensors and the values into a folder. Raises OSError, SafetensorError."""
        save_file({name: getattr(self, name).cpu().contiguous() for name in _NAMES}, folder / FEATURES_FILE)
        for number, values in enumerate(self.values.values()):
            values.save(folder, _VALUES_FILE.format(number))

    @classmethod
    def load(cls, folder: Path, columns: Sequence[ItemFeature]) -> ItemFeatureTable:
        """Map the files in a folder.

        Args:
            folder: of `save`.
            columns: those of the table.

        Raises:
            OSError, SafetensorError, LogFormatError: a file is missing or damaged.
            ValueError: a tensor is missing.
        """
        tensors = load_file(folder / FEATURES_FILE)
        if sorted(tensors) != sorted(_NAMES):
            raise ValueError(f"{FEATURES_FILE} must hold {', '.join(_NAMES)}")
        names = [column.name for column in columns if column.kind == "category"]
        values = {name: Vocabulary.load(folder, _VALUES_FILE.format(number)) for number, name in enumerate(names)}
        return cls(**tensors, values=values)

    def content(self, num_rows: int) -> list[memoryview]:
        """The bytes of all tensors, of the first `num_rows` rows."""
        stop = int(self.offsets[num_rows])
        parts = self.entry[:stop], self.weight[:stop], self.offsets[: num_rows + 1], self.dense[:num_rows]
        return [part.cpu().contiguous().numpy().reshape(-1).view(np.uint8).data for part in parts]


def _codes(column: FeatureColumn, how: ItemFeature) -> tuple[Int, Int]:
    """Item and code of each value that has a row of the embedding: int64 [E] each."""
    if isinstance(column, CategoryColumn):
        return np.repeat(np.arange(len(column.is_known)), np.diff(column.offsets)), column.codes.astype(np.int64)
    if isinstance(column, VectorColumn):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    owner = np.flatnonzero(column.is_known)
    return owner, np.searchsorted(np.array(how.bounds), column.numbers[owner].astype(np.float64), side="left")


def _dense(column: FeatureColumn, how: ItemFeature) -> NDArray[np.float64]:
    """float64 [N, num_dense]."""
    if isinstance(column, CategoryColumn):
        return np.empty((len(column.is_known), 0))
    if isinstance(column, VectorColumn):
        scaled: NDArray[np.float64] = np.nan_to_num(column.vectors.astype(np.float64) / how.scale, nan=0.0)
        return scaled
    score = (column.numbers.astype(np.float64) - how.mean) / how.scale
    clipped: NDArray[np.float64] = np.nan_to_num(score.clip(-LARGEST_SCORE, LARGEST_SCORE), nan=0.0)
    return clipped[:, None]
