"""A user's best items and what their scores consist of, after what the user could do now, or by two scorers."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Floats
from vista.errors import ConfigError, UnfinishedError
from vista.explore.workspace import Workspace, escaped, record_of
from vista.log.inspection import ItemNames
from vista.scorer import Explanation, Ranking, Scorer
from vista.scorer.request import current_times
from vista.store.backend import open_backend
from vista.store.record import Tail

LISTED = 1_000
"""Ranks that are looked up before and after added events; items beyond have no rank."""


@dataclass(frozen=True, slots=True)
class ExplainedRanking:
    """The best C items of the catalog for one user, best first."""

    names: list[str]
    scores: NDArray[np.float32]
    """[C] as the scorer returns them."""
    explanation: Explanation
    """Relative to the catalog."""
    item_names: ItemNames
    is_probability: bool
    """Whether a score is the sigmoid of the explained value; otherwise both are equal."""

    def rows(self) -> list[dict[str, Any]]:
        """One row per item: rank, name, score, and its shares."""
        return [
            {
                "rank": place + 1,
                "item": name,
                "score": float(self.scores[place]),
                **{part: float(shares[place]) for part, shares in self.explanation.shares.items()},
            }
            for place, name in enumerate(self.names)
        ]

    def tail_events(self, place: int) -> list[dict[str, Any]]:
        """Shares of the tail's events in the score of one item, newest event first."""
        shares = self.explanation.tail[place].tolist()
        names = self.item_names.of_ids(self.explanation.tail_items)
        events = list(zip(names, shares, strict=True))[::-1]
        return [{"age": age + 1, "item": name, "share": share} for age, (name, share) in enumerate(events)]

    def reason(self, place: int) -> str:
        """Why an item has its rank, in Markdown."""
        value, told = float(self.explanation.value[place]), self.explanation
        odds = f"log-odds of {value:+.2f} (probability {float(self.scores[place]):.2f})"
        total = f"{odds if self.is_probability else f'a score of {value:.2f}'}, {value - told.mean:+.2f} compared with"
        why = told.why(place, lambda items: [escaped(name) for name in self.item_names.of_ids(items)])
        return f"**Item {escaped(self.names[place])}** has rank {place + 1} and {total} the average item: {why}."


def explained_ranking(
    workspace: Workspace, scorer: Scorer, user: int | str, *, top_k: int, now: int | None, exclude_tail: bool = False
) -> ExplainedRanking | None:
    """Rank the catalog for a user and explain the best items; None if no item has a finite score. Raises StoreError or
    ValueError as in `Scorer.rank`."""
    ranking = scorer.rank(user, top_k=top_k, exclude_tail=exclude_tail, now=now)
    if not len(ranking.items):
        return None
    return ExplainedRanking(
        workspace.names.of_ids(ranking.items.tolist()),
        ranking.scores,
        scorer.explain(user, ranking.items, now=now),
        workspace.names,
        scorer.task in scorer.model.schema.tasks,
    )


def request_time(user: int | str, *scorers: Scorer) -> int | None:
    """Time of a request to some scorers in ms, for which none is given (`current_times`); None if no model reads times.
    The newest of the events in their records counts."""
    timed = [scorer for scorer in scorers if scorer.model.schema.has_time]
    if not timed:
        return None
    newest = max(record_of(scorer, user).last_event_ts for scorer in timed)
    return int(current_times(newest)[0])


def tail_of_events(events: list[tuple[Any, int]], now: int | None, newest: int) -> Tail:
    """Events (item, action code) of one user as a tail, the last one newest.

    Args:
        events: oldest first.
        now: time of the request, ms; the last event is a minute earlier. None for a model that reads no times.
        newest: ordinal of the user's newest stored event, which the events follow without times; negative for none.
    """
    count = len(events)
    times = max(newest, -1) + np.arange(1, count + 1) if now is None else now - 60_000 * np.arange(count, 0, -1)
    actions = np.array([action for _, action in events], np.uint8)
    items: Any = [item for item, _ in events]
    return Tail(items, times, actions, np.array([0, count], np.int64))


@dataclass(frozen=True, slots=True)
class WhatIf:
    """The ranking before and after some added events."""

    rows: list[dict[str, Any]]
    """The best items afterwards, those that they replaced, and those of the added events: item, rank before and after
    (None beyond LISTED), change of the rank (positive: up), and the scores."""
    num_changed: int
    """Items among the best `top_k` afterwards that were not among them before."""

    def summary(self, top_k: int) -> str:
        """The change in words, in Markdown."""
        moved = [row for row in self.rows if row["change"] is not None and min(row["before"], row["after"]) <= top_k]
        if not self.num_changed and all(row["change"] == 0 for row in moved):
            return f"The order of the best {top_k} items stays the same."
        up = max(moved, key=lambda row: row["change"], default=None)
        first, are = self.rows[0], "is" if self.num_changed == 1 else "are"
        text = f"**{self.num_changed} of the best {top_k}** items {are} new."
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
    return changes(workspace, before, after, top_k, [item for item, _ in events])


def changes(workspace: Workspace, before: Ranking, after: Ranking, top_k: int, added: Sequence[Any] = ()) -> WhatIf:
    """Compare two rankings of one user, of at least `top_k` items if there are so many. `added`: ids of more items."""
    old, new = places_of(before), places_of(after)
    best_before, best_after = before.items[:top_k].tolist(), after.items[:top_k].tolist()
    rows, listed = [], list(dict.fromkeys([*best_after, *best_before, *added]))
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


@dataclass(frozen=True, slots=True)
class RankingComparison:
    """The best items of one user by two scorers A and B: of two models, two stores, or two generations of one store."""

    rows: list[dict[str, Any]]
    """One row per rank: the items of A and B, and the rank that the other scorer gives each (None beyond its list)."""
    shared: int
    """Items in both lists."""
    a_has_record: bool
    b_has_record: bool
    num_events: tuple[int, int]
    """Events that the records of A and B cover."""


@dataclass(frozen=True, slots=True)
class OverlapOfUsers:
    """How alike two scorers rank, over several users."""

    users: list[int | str]
    overlap: Floats
    """[N] share of the best items that both lists have."""
    same_first: float
    """Share of users whose first item is the same."""


def compare_rankings(
    workspace: Workspace, a: Scorer, b: Scorer, user: int | str, *, top_k: int, listed: int = 200
) -> RankingComparison:
    """Rank the catalog for one user with two scorers, at the same time of the request.

    Args:
        top_k: items per list.
        listed: ranks that are looked up in the other list.

    Raises:
        StoreError, ValueError: as in `Scorer.rank`.
    """
    now = request_time(user, a, b)
    rankings = [scorer.rank(user, top_k=max(listed, top_k), now=now) for scorer in (a, b)]
    places = [places_of(ranking) for ranking in rankings]
    best = [ranking.items[:top_k].tolist() for ranking in rankings]
    names = [workspace.names.of_ids(items) for items in best]
    rows = []
    for place in range(max(map(len, best))):
        row: dict[str, Any] = {"rank": place + 1}
        for side, other in ((0, 1), (1, 0)):
            inside = place < len(best[side])
            own = places[other].get(best[side][place]) if inside else None
            row["AB"[side]] = names[side][place] if inside else ""
            row[f"{'AB'[side]} in {'AB'[other]}"] = None if own is None else own + 1
        rows.append(row)
    records = [record_of(scorer, user) for scorer in (a, b)]
    of_a, of_b = (int(record.event_count[0]) for record in records)
    shared = len(set(best[0]) & set(best[1]))
    return RankingComparison(rows, shared, bool(records[0].found[0]), bool(records[1].found[0]), (of_a, of_b))


def compare_users(a: Scorer, b: Scorer, users: list[int | str], *, top_k: int) -> OverlapOfUsers:
    """Rank the catalog for several users with two scorers; errors as of `Scorer.rank`."""
    overlap, same = [], 0
    for user in users:
        now = request_time(user, a, b)
        one, two = (scorer.rank(user, top_k=top_k, now=now).items.tolist() for scorer in (a, b))
        overlap.append(len(set(one) & set(two)) / max(len(one), len(two), 1))
        same += one[:1] == two[:1]
    return OverlapOfUsers(users, np.array(overlap), same / max(len(users), 1))


def common_task(a: Scorer, b: Scorer) -> str:
    """The first task of A that B has too. Raises ConfigError if they have none in common."""
    for task in a.tasks:
        if task in b.tasks:
            return task
    raise ConfigError(
        f"the models have no task in common ({', '.join(a.tasks)}; {', '.join(b.tasks)}); compare models of one task"
    )


def earlier_generations(scorer: Scorer) -> list[int]:
    """Numbers of the other complete generations of the same model, newest first; none for a sharded store. Raises
    StoreError if a generation is damaged."""
    served, generations = scorer.store.generation, open_backend(str(scorer.store.path))
    found = []
    try:
        for number in generations.numbers():
            with contextlib.suppress(UnfinishedError):  # by a refresh that runs, or that was stopped
                if generations.manifest(number).summarizer_id == scorer.store.manifest.summarizer_id:
                    found.append(number)
    finally:
        generations.close()
    return [number for number in reversed(found) if number != served]
