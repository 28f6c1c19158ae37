"""The distinct ids of a table's rows, and their rows in the log's vocabularies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vista.installation import require_module
from vista.log.ingest.parts import Part
from vista.log.vocabulary import Vocabulary

if TYPE_CHECKING:
    import polars as pl
else:
    pl = require_module("polars", "data")

USER_ROW, ITEM_ROW = "user_row", "item_row"
"""Names of the columns of vocabulary rows."""


@dataclass(frozen=True, slots=True)
class DistinctIds:
    """Every user and item of a table once.

    users: columns `user` and `len`, the number of the user's rows; items: column `item`.
    """

    users: pl.DataFrame
    items: pl.DataFrame

    @classmethod
    def of(cls, parts: Sequence[Part]) -> DistinctIds:
        """The ids of a table's parts."""
        everything = pl.concat([part.good().select("user", "item") for part in parts])
        users, items = pl.collect_all(
            [everything.group_by("user").len(), everything.select(pl.col("item").unique())], engine="streaming"
        )
        return cls(users, items)

    def user_rows(self, vocabulary: Vocabulary) -> pl.DataFrame:
        """Columns `user`, `len` and `user_row` (int64)."""
        return self.users.join(_rows(vocabulary, self.users["user"], USER_ROW, np.int64), on="user")

    def item_rows(self, vocabulary: Vocabulary) -> pl.DataFrame:
        """Columns `item` and `item_row` (int32)."""
        return _rows(vocabulary, self.items["item"], ITEM_ROW, np.int32)


def _rows(vocabulary: Vocabulary, ids: pl.Series, name: str, dtype: type[np.integer]) -> pl.DataFrame:
    rows = vocabulary.rows(ids.to_numpy() if vocabulary.kind == "int" else ids.to_list())
    return pl.DataFrame({ids.name: ids, name: rows.astype(dtype)})


def extended(vocabulary: Vocabulary, ids_of_tables: Sequence[pl.Series]) -> Vocabulary:
    """The vocabulary with the ids of several tables."""
    ids = pl.concat(ids_of_tables, how="vertical").unique() if len(ids_of_tables) > 1 else ids_of_tables[0]
    return vocabulary.extended(ids.to_numpy() if vocabulary.kind == "int" else ids.to_list())
