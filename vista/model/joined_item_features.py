"""The item features of a trained model, joined with those of a log (`vista.model.grown_columns`).

R model rows, E entries of all rows together.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from vista.arrays import Int, offsets_of
from vista.log.item_features import CategoryColumn, ItemFeatures
from vista.model.grown_columns import GrownColumns
from vista.model.item_feature_table import ItemFeatureTable


def joined_features(grown: GrownColumns, old: ItemFeatureTable | None, features: ItemFeatures) -> ItemFeatureTable:
    """Encoded features of the items of a model that has grown.

    Args:
        grown: the columns.
        old: the earlier table, whose items come first; None if the model had no features.
        features: of all items, from the log. Items that have no value there keep those of `old`.
    """
    known = {
        name: column.recoded(grown.values[name]) if isinstance(column, CategoryColumn) else column
        for name, column in features.columns.items()
    }
    fresh = ItemFeatureTable.of(ItemFeatures(known), grown.columns)
    if old is None:
        return fresh
    has_value = np.any([column.is_known for column in features.columns.values()], axis=0)
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
    entries = [fresh.entry.numpy()[is_fresh], new_rows[old.entry.numpy()[is_old]], np.tile(missing, len(kept))]
    ones = np.ones(len(kept) * len(missing), np.float32)
    weights = [fresh.weight.numpy()[is_fresh], old.weight.numpy()[is_old], ones]
    order = np.argsort(owners, kind="stable")
    dense, has_column = fresh.dense.numpy(), np.flatnonzero(grown.dense_rows >= 0)
    dense[np.ix_(kept, has_column)] = old.dense.numpy()[np.ix_(kept, grown.dense_rows[has_column])]
    return ItemFeatureTable(
        torch.from_numpy(np.concatenate(entries)[order]),
        torch.from_numpy(np.concatenate(weights)[order]),
        torch.from_numpy(offsets_of(np.bincount(owners, minlength=len(stays)))),
        fresh.dense,
        fresh.values,
    )


def _owners(table: ItemFeatureTable) -> Int:
    """int64 [E] the model row of each entry."""
    return np.repeat(np.arange(len(table.offsets) - 1), np.diff(table.offsets.numpy()))
