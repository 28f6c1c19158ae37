"""What a ranking would be if the user did something now."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from vista.explore.explained_ranking import tail_of_events
from vista.explore.explore_workspace import Workspace, record_of
from vista.explore.markdown_text import escaped
from vista.scorer import Ranking, Scorer

LISTED = 1_000
"""Ranks that are looked up; items beyond have no rank."""


@dataclass(frozen=True, slots=True)
class WhatIf:
    """The ranking before and after some added events."""

    rows: list[dict[str, Any]]
    """The best items afterwards and those that they replaced: item, rank before and after (None beyond LISTED), change
    of the rank (positive: up), and the scores."""
    num_changed: int
    """Items among the best `top_k` afterwards that were not among them before."""

    def summary(self, top_k: int) -> str:
        """The change in words, in Markdown."""
        moved = [row for row in self.rows if row["change"] is not None]
        if not self.num_changed and all(row["change"] == 0 for row in moved):
            return f"The order of the best {top_k} items stays the same."
        up = max(moved, key=lambda row: row["change"], default=None)
        first, text = self.rows[0], f"**{self.num_changed} of the best {top_k}** items are new."
        if first["before"] != 1:
            was = f"was beyond rank {LISTED:,}" if first["before"] is None else f"had rank {first['before']:,}"
            text += f" Item {escaped(first['item'])} is first now and {was} before."
        if up is not None and up["change"] > 0 and up is not first:
            text += f" Item {escaped(up['item'])} moves up most, from rank {up['before']:,} to {up['after']:,}."
        return text


def what_if(
    workspace: Workspace, scorer: Scorer, user: int | str, events: list[tuple[Any, int]], *, now: int | None, top_k: int
) -> WhatIf:
    """Rank the catalog for a user with and without events that are not in the store.

    Args:
        events: ids of items and codes of actions, oldest first; they end a minute before the request.
        now: time of the request, ms; None for a model that reads no times, for which they follow the stored events.
        top_k: number of best items to compare.

    Raises:
        ValueError, TypeError, StoreError: as in `Scorer.rank`.
    """
    most = max(LISTED, top_k)
    added = tail_of_events(events, now, int(record_of(scorer, user).last_event_ts[0]))
    before = scorer.rank(user, top_k=most, now=now)
    after = scorer.rank(user, top_k=most, now=now, tail=added)
    return changes(workspace, before, after, top_k)


def changes(workspace: Workspace, before: Ranking, after: Ranking, top_k: int) -> WhatIf:
    """Compare two rankings of one user, of at least `top_k` items if there are so many."""
    old, new = places_of(before), places_of(after)
    best_before, best_after = before.items[:top_k].tolist(), after.items[:top_k].tolist()
    left = [item for item in best_before if item not in set(best_after)]
    rows = []
    listed = [*best_after, *left]
    for item, name in zip(listed, workspace.names.of_ids(listed), strict=True):
        was, is_now = old.get(item), new.get(item)
        rows.append(
            {
                "item": name,
                "before": None if was is None else was + 1,
                "after": None if is_now is None else is_now + 1,
                "change": None if was is None or is_now is None else was - is_now,
                "score before": None if was is None else float(before.scores[was]),
                "score after": None if is_now is None else float(after.scores[is_now]),
            }
        )
    return WhatIf(rows, len(set(best_after) - set(best_before)))


def places_of(ranking: Ranking) -> dict[Any, int]:
    """0-based place of each item of a ranking."""
    return dict(zip(ranking.items.tolist(), np.arange(len(ranking.items)).tolist(), strict=True))
