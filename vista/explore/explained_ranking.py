"""A user's best items, and what their scores consist of."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.explore.explore_workspace import Workspace, record_of
from vista.explore.markdown_text import escaped
from vista.scorer import Explanation, Scorer
from vista.store.tail import Tail

HOUR_MS = 3_600_000
PARTS = ("summary", "tail", "counters", "item and request", "state", "bias")
"""What a score consists of, as the page names it: `Explanation` has the fields in another order."""


@dataclass(frozen=True, slots=True)
class ExplainedRanking:
    """The best C items for one user, best first."""

    items: list[Any]
    names: list[str]
    scores: NDArray[np.float32]
    """[C] as the scorer returns them."""
    parts: dict[str, NDArray[np.float32]]
    """By name in PARTS: [C] shares of the explained value. Parts that the model lacks are left out."""
    explanation: Explanation
    tail_names: list[str]
    """Names of the tail's items, oldest event first."""
    is_probability: bool
    """Whether a score is the sigmoid of the explained value; otherwise both are equal."""

    def rows(self) -> list[dict[str, Any]]:
        """One row per item: rank, name, score, and its parts."""
        return [
            {
                "rank": place + 1,
                "item": name,
                "score": float(self.scores[place]),
                **{part: float(shares[place]) for part, shares in self.parts.items()},
            }
            for place, name in enumerate(self.names)
        ]

    def tokens(self, place: int) -> list[dict[str, Any]]:
        """Shares of the summary's tokens in the score of one item, in the order of the tokens."""
        shares = self.explanation.summary[place].tolist()
        return [{"token": number + 1, "share": share} for number, share in enumerate(shares)]

    def tail_events(self, place: int) -> list[dict[str, Any]]:
        """Shares of the tail's events in the score of one item, newest event first."""
        shares = self.explanation.tail[place].tolist()
        events = list(zip(self.tail_names, shares, strict=True))[::-1]
        return [{"age": age + 1, "item": name, "share": share} for age, (name, share) in enumerate(events)]

    def reason(self, place: int) -> str:
        """Why an item has its rank, in Markdown: its largest parts, and what sets it apart from the other items."""
        value = float(self.explanation.value[place])
        ordered = sorted(self.parts, key=lambda part: -abs(float(self.parts[part][place])))
        main = [f"{part} {self.parts[part][place]:+.2f}{self._detail(part, place)}" for part in ordered[:3]]
        odds = f"the log-odds {value:+.2f} (probability {float(self.scores[place]):.2f})"
        total = odds if self.is_probability else f"the score {value:.2f}"
        name = escaped(self.names[place])
        text = f"**Item {name}** has rank {place + 1}. Of {total}, the largest parts are {', '.join(main)}."
        others = np.delete(np.arange(len(self.items)), place)
        if len(others):
            means = {part: float(shares[others].mean()) for part, shares in self.parts.items()}
            best = max(means, key=lambda part: abs(float(self.parts[part][place]) - means[part]))
            text += (
                f" Compared with the mean of the other {len(others)} items, the largest difference is in the {best}: "
                f"it {compared(float(self.parts[best][place]), means[best])}."
            )
        return text

    def _detail(self, part: str, place: int) -> str:
        if part == "summary" and self.explanation.summary.shape[1] > 1:
            first, second = np.argsort(-np.abs(self.explanation.summary[place]))[:2] + 1
            return f" (largest: tokens {first} and {second})"
        if part == "tail" and self.tail_names:
            largest = int(np.abs(self.explanation.tail[place]).argmax())
            age, share = len(self.tail_names) - largest, float(self.explanation.tail[place][largest])
            return (
                f" (largest: item {escaped(self.tail_names[largest])}, the {ordinal(age)} newest event, {share:+.2f})"
            )
        return ""


def explained_ranking(
    workspace: Workspace, scorer: Scorer, user: int | str, *, top_k: int, now: int | None, exclude_tail: bool = False
) -> ExplainedRanking | None:
    """Rank the catalog for a user and explain the best items; None if no item has a finite score.

    Raises:
        StoreError, ValueError: as in `Scorer.rank`.
    """
    ranking = scorer.rank(user, top_k=top_k, exclude_tail=exclude_tail, now=now)
    items = ranking.items.tolist()
    if not items:
        return None
    explanation = scorer.explain(user, ranking.items, now=now)
    parts = {
        "summary": explanation.summary.sum(1),
        "tail": explanation.tail.sum(1),
        "counters": explanation.counted,
        "item and request": explanation.own,
        "state": explanation.state,
        "bias": explanation.remainder,
    }
    has = {
        "summary": scorer.model.config.num_seeds > 0,
        "counters": scorer.model.counter_spec is not None,
        "state": bool(np.any(explanation.state)),
    }
    return ExplainedRanking(
        items,
        workspace.names.of_ids(items),
        ranking.scores,
        {part: parts[part] for part in PARTS if has.get(part, True)},
        explanation,
        workspace.names.of_ids(explanation.tail_items),
        scorer.task in scorer.model.schema.tasks,
    )


def request_time(user: int | str, *scorers: Scorer, current: int | None = None) -> int | None:
    """Time of a request to some scorers in ms: `current`, or an hour after the user's newest event in their records.

    A log that ended long ago would make every request look late, so the page asks an hour after the newest event. For
    a user without an event, it asks the clock. None if no model reads times.
    """
    timed = [scorer for scorer in scorers if scorer.model.schema.has_time]
    if not timed:
        return None
    newest = max(int(record_of(scorer, user).last_event_ts[0]) for scorer in timed)
    if current is None:
        current = newest + HOUR_MS if newest > 0 else time.time_ns() // 1_000_000
    return max(current, newest)


def compared(own: float, other: float) -> str:
    """How a part changes this score and other scores, such as "lowers this score by 0.06 and raises others by 0.19"."""
    verbs = ["raises" if value >= 0 else "lowers" for value in (own, other)]
    text = f"{verbs[0]} this score by {abs(own):.2f}"
    if verbs[0] != verbs[1]:
        return f"{text} and {verbs[1]} others by {abs(other):.2f}"
    more = "more" if abs(own) >= abs(other) else "less"
    return f"{text}, {more} than it {verbs[1]} others ({abs(other):.2f})"


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th, ..."""
    ending = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


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
