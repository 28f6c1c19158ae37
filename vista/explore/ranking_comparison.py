"""Two scorers side by side: two models, two stores of one model, or two generations of one store."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from vista.arrays import Floats
from vista.errors import ConfigError, UnfinishedError
from vista.explore.explained_ranking import request_time
from vista.explore.explore_workspace import Workspace, record_of
from vista.explore.what_if import places_of
from vista.scorer import Scorer
from vista.store.layout import store_address
from vista.store.reader import generations_of


@dataclass(frozen=True, slots=True)
class RankingComparison:
    """The best items of one user by two scorers A and B."""

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
    """The first task of A that B has too.

    Raises:
        ConfigError: they have none in common.
    """
    for task in a.tasks:
        if task in b.tasks:
            return task
    raise ConfigError(
        f"the models have no task in common ({', '.join(a.tasks)}; {', '.join(b.tasks)}); compare models of one task"
    )


def earlier_generations(scorer: Scorer) -> list[int]:
    """Numbers of the other complete generations of the same model, newest first; none for a sharded store.

    Raises:
        StoreError: a generation is damaged.
    """
    served, generations = scorer.store.generation, generations_of(store_address(str(scorer.store.path)))
    found = []
    try:
        for number in generations.numbers():
            with contextlib.suppress(UnfinishedError):  # by a refresh that runs, or that was stopped
                if generations.manifest(number).summarizer_id == scorer.store.manifest.summarizer_id:
                    found.append(number)
    finally:
        generations.close()
    return [number for number in reversed(found) if number != served]
