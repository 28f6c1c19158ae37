"""Why an item has its score: shares of what the model reads, relative to the average candidate, and words for them.

A share says by how much a part raises the score of an item above the mean score of the candidates. So the shares of an
item add up to its score minus that mean, and what all candidates have in common, such as a bias, has no share. There
are two steps. First, each score is divided among its parts:

- Attention over the summary and the tail is a sum if its weights, its gates, and the spreads of its norms are held
  constant (`vista.model.attribution`). Weighted statistics, transitions, and pooled vectors are sums anyway.
- A network over counters and other inputs is not a sum. Its inputs get Shapley values: what an input adds when it
  joins, on average over all orders in which the inputs can join. Before it joins, the network reads the mean input of
  the candidates, and that nothing is counted.

Then the mean over the candidates is subtracted from the shares of each part.

C items that are explained, N rows: these items, then the candidates that the mean is over. S seeds, L' events of the
tail, M model dim, F values per key of G counted fields (`CounterSpec`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Floats

PARTS = ("counters", "history", "recent", "transitions", "popularity", "rate", "tail", "summary", "own")
"""What a score consists of, as far as a model has it:

counters: how often and when the user had the item, and what else `model.counter_keys` lists;
history, recent: how similar the item is to all that the user had, and to the newest events (pooled vectors);
transitions: whether the item often comes right after the newest events;
popularity: the item's statistics over all users; rate: how often its impressions have each label;
tail, summary: what attention reads of the newest events, and of the summary;
own: the item itself, with the time and the features of the request and of the user.
"""
Names = Callable[[Sequence[Any]], Sequence[str]]
"""Names of item ids."""


@dataclass(frozen=True, slots=True)
class Reason:
    """A part that raises a score above the mean, in words."""

    part: str
    """One of PARTS."""
    share: float
    text: str
    items: list[Any]
    """Ids of items with which the text ends."""

    def words(self, names: Names | None = None) -> str:
        """The text with the names of its items, by default their ids."""
        shown = map(str, self.items) if names is None else names(self.items)
        return " ".join([self.text, " and ".join(shown)]) if self.items else self.text


@dataclass(frozen=True, slots=True)
class Explanation:
    """The shares of C items in their scores for one user, relative to the mean candidate; float64.

    `sum(shares.values())` equals `value - mean`, beyond the rounding of float64.
    """

    items: list[Any]
    """[C] ids, as they were asked."""
    value: Floats
    """[C] the explained values: logits of a labeled task, whose sigmoid `score` returns, or the scores of `next`."""
    mean: float
    """Mean value of the candidates."""
    shares: dict[str, Floats]
    """By part of PARTS that the model has: [C]. What rounding leaves is in "own"."""
    tail: Floats
    """[C, L'] shares of the events of the tail, oldest first, which add up to that of "tail". The score of `next` of a
    counted item is an exception: its head reads a score, of which these are shares."""
    tail_items: list[Any]
    """[L'] ids of their items; None for items that the model does not know."""
    counts: NDArray[np.float32]
    """[C, G * F] the user's counters as of the request, in the units and with the F columns of `CounterSpec`: of the
    item, then of its other keys (`model.counter_keys`); NaN where it is not counted. G is 0 for a model without
    counters."""
    reasons: list[list[Reason]]
    """[C] the parts with the largest positive shares, the largest first, at most MOST_REASONS."""

    def why(self, place: int, names: Names | None = None) -> str:
        """The reasons of an item in one line, such as "about 89 times before, last about 1 day ago (+6.21)".

        Args:
            place: of the item, from 0.
            names: of items; by default their ids.
        """
        words = [f"{reason.words(names)} ({reason.share:+.2f})" for reason in self.reasons[place]]
        return "; ".join(words) or "nothing raises it above the average candidate"


def about(seconds: float) -> str:
    """A duration that was stored as a code, in words."""
    return f"{'about ' * (seconds >= 60)}{duration(seconds)}"


def duration(seconds: float) -> str:
    """A duration in its largest fitting unit, rounded, such as "3 hours"."""
    for unit, size in (("day", 86_400), ("hour", 3_600), ("minute", 60)):
        if seconds >= size:
            count = round(seconds / size)
            return f"{count:,} {unit}{'s' * (count != 1)}"
    return "less than a minute"
