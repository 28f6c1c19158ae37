"""Names of items for people: a title from the log's features if it has one, with the id."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vista.log.event_log import EventLog
from vista.log.item_features import CategoryColumn
from vista.log.vocabulary import Vocabulary

TITLE_WORDS = ("title", "name", "description")
"""Parts of the names of columns that hold a text of each item."""
MAX_GROUPS = 200
"""Most values of a category that sorts items into groups."""
MAX_TITLE = 60
"""Characters of a title that are shown."""


@dataclass(frozen=True, slots=True)
class ItemNames:
    """Titles and groups of a log's items; without such columns, items are shown by their ids."""

    items: Vocabulary
    titles: CategoryColumn | None = None
    groups: CategoryColumn | None = None
    group_name: str = ""
    """Name of the column of groups, such as genres."""

    @classmethod
    def of(cls, log: EventLog | None) -> ItemNames:
        """The names that a log has; None for a page without a log.

        Raises:
            LogFormatError: the log's features are damaged.
        """
        if log is None or log.item_features is None:
            return cls.by_id(log)
        columns = {n: c for n, c in log.item_features.columns.items() if isinstance(c, CategoryColumn)}
        titles = next((c for n, c in columns.items() if any(word in n.lower() for word in TITLE_WORDS)), None)
        few = (n for n, c in columns.items() if c is not titles and 1 < len(c.values) <= MAX_GROUPS)
        group_name = next(few, "")
        return cls(log.items, titles, columns.get(group_name), group_name)

    @classmethod
    def by_id(cls, log: EventLog | None) -> ItemNames:
        """The ids of a log's items; None for a page without a log."""
        return cls(Vocabulary.empty("int") if log is None else log.items)

    def of_ids(self, ids: Iterable[Any]) -> list[str]:
        """A name per item id; "unknown item" for None."""
        known = list(ids)
        titles = self._values(self.titles, known)
        return [
            "unknown item" if item is None else f"{_shortened(title)} ({item})" if title else str(item)
            for item, title in zip(known, titles, strict=True)
        ]

    def groups_of_ids(self, ids: Iterable[Any]) -> list[str]:
        """The first group of each item id; "" without one."""
        return self._values(self.groups, list(ids))

    def _values(self, column: CategoryColumn | None, ids: list[Any]) -> list[str]:
        """The first value of each item in a column; "" without one."""
        if column is None:
            return [""] * len(ids)
        given = [place for place, item in enumerate(ids) if item is not None]
        rows = np.full(len(ids), -1, np.int64)
        rows[given] = self.items.rows([ids[place] for place in given]) if given else []
        chosen = column.select(rows)
        has = np.diff(chosen.offsets) > 0
        texts = iter(column.values.ids(chosen.codes[chosen.offsets[:-1][has]]).tolist())
        return [str(next(texts)) if one else "" for one in has.tolist()]


def _shortened(title: str) -> str:
    return title if len(title) <= MAX_TITLE else f"{title[: MAX_TITLE - 1]}…"
