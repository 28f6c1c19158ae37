"""What a model counts for each user: items, and chosen categories of items."""

from __future__ import annotations

import numpy as np

from vista.config import ModelConfig
from vista.config.checks import require
from vista.counters.counter_codes import CounterSpec, ItemKeys
from vista.log.item_features import CategoryColumn, ItemFeatures
from vista.log.vocabulary import Vocabulary
from vista.model.item_feature_table import ItemFeatureTable
from vista.model.schema import Schema


def check_categories(config: ModelConfig, features: ItemFeatures | None, items: Vocabulary, where: str) -> None:
    """Check that counted categories are categories, of which each item has at most one value.

    Args:
        features: of the items; None if they have none.
        where: the log or the files that the features come from.

    Raises:
        ConfigError: naming the category.
    """
    columns = {} if features is None else features.columns
    categories = {name: column for name, column in columns.items() if isinstance(column, CategoryColumn)}
    for name in config.counter_categories:
        require(
            name in categories,
            "model.counter_categories",
            f"{name!r} is not a category of the items of {where}; those are: {', '.join(categories) or 'none'}",
        )
        several = np.flatnonzero(np.diff(categories[name].offsets) > 1)
        require(
            len(several) == 0,
            "model.counter_categories",
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
    category = np.zeros((spec.num_fields - 1, num_rows), np.int32)
    if table is not None:
        for keys, name in zip(category, spec.fields[1:], strict=True):
            keys[:] = table.category_keys(schema.item_features, name)
    return ItemKeys(spec, category)


def largest_keys(spec: CounterSpec, schema: Schema, num_items: int) -> list[int]:
    """The largest key of each field of a spec, for a model of `num_items` items."""
    sizes = {column.name: column.size for column in schema.item_features}
    return [num_items, *(sizes[name] for name in spec.fields[1:])]
