"""How well scores rank the items of a window: precision, recall and NDCG over a set of labels.

Letters: n cases, V items, L labels of all cases, K longest list.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Floats, Int
from vista.evaluation.window_cases import WindowCases

COLD = ":cold"
KINDS = ("", ":returns", ":new", COLD)
"""Suffixes of the metrics: all items, the items that the user had before, the items that are new to the user, and those
that no user had before."""
SCORES_PER_CHUNK = 1 << 22


def window_metrics(
    scores: NDArray[np.floating[Any]],
    cases: WindowCases,
    columns: Int,
    seen_columns: tuple[Int, Int],
    ks: Sequence[int],
    cold: NDArray[np.bool_] | None = None,
) -> dict[str, Floats]:
    """Metrics per case, for lists of all items, and of each other of KINDS.

    With n labels, precision@k is hits / k, recall@k is hits / min(k, n), so that a perfect list reaches 1, and ndcg@k
    is the discounted gain of the hits over that of a perfect list. Equal scores count as if they were in random order:
    each metric is its expected value. A score of -inf is never in a list.

    Args:
        scores: [n, V] of any float dtype.
        cases: n of them.
        columns: int64 [log.num_items], the column of each of the log's items in `scores`; -1 where the model does not
            know the item, which then is a miss.
        seen_columns: (columns of the items before each question, repeats allowed; offsets int64 [n + 1]).
        ks: lengths of the lists.
        cold: bool [log.num_items], the log's items that no user had before; None leaves out their metrics.

    Returns:
        {"precision@10": float64 [n], "precision@10:returns": …, "precision@10:new": …, …}; NaN where a case has no
        label of the kind.

    Raises:
        ValueError: on NaN scores, with the row.
    """
    owner = np.repeat(np.arange(len(cases)), np.diff(cases.offsets))
    column = columns[cases.item]
    seen_row = np.repeat(np.arange(len(cases)), np.diff(seen_columns[1]))
    kinds = KINDS if cold is not None else KINDS[:-1]
    metrics = {f"{name}@{k}{kind}": np.full(len(cases), np.nan) for name in _NAMES for k in ks for kind in kinds}
    step = max(1, SCORES_PER_CHUNK // max(scores.shape[1], 1))
    for start in range(0, len(cases), step):
        stop = min(start + step, len(cases))
        chunk = scores[start:stop]
        invalid = np.flatnonzero(np.isnan(chunk.max(axis=1, initial=-np.inf)))
        if len(invalid):
            raise ValueError(f"scores: row {start + int(invalid[0])} holds NaN and cannot be ranked")
        low, high = np.searchsorted(seen_row, [start, stop])
        seen = seen_row[low:high] - start, seen_columns[0][low:high]
        had = np.full_like(chunk, -np.inf)
        had[seen] = chunk[seen]
        fresh = chunk.copy()
        fresh[seen] = -np.inf
        labels = slice(cases.offsets[start], cases.offsets[stop])
        is_new = cases.is_new[labels]
        lists = [(chunk, np.ones_like(is_new)), (had, ~is_new), (fresh, is_new)]
        if cold is not None:
            of_cold = columns[cold & (columns >= 0)]
            never = np.full_like(chunk, -np.inf)
            never[:, of_cold] = chunk[:, of_cold]
            lists.append((never, cold[cases.item[labels]]))
        for kind, (part, wanted) in zip(kinds, lists, strict=True):
            values = _list_metrics(part, owner[labels][wanted] - start, column[labels][wanted], ks)
            for name, value in values.items():
                metrics[name + kind][start:stop] = value
    return metrics


_NAMES = ("precision", "recall", "ndcg")


def _list_metrics(scores: NDArray[np.floating[Any]], owner: Int, column: Int, ks: Sequence[int]) -> dict[str, Floats]:
    """Metrics float64 [n] of one kind of list; owner, column: int64 [L] of the labels, column -1 for a miss."""
    num_cases, num_items = scores.shape
    num_labels = np.bincount(owner, minlength=num_cases)
    known = column >= 0
    owner, column = owner[known], column[known]
    own = scores[owner, column]
    listed = own > -np.inf
    owner, own = owner[listed], own[listed]
    longest = min(max(ks), num_items)
    top = -np.sort(np.partition(-scores, longest - 1, axis=1)[:, :longest], axis=1)  # [n, K], descending
    before, ties = np.zeros(len(own), np.int64), np.ones(len(own), np.int64)
    first = np.searchsorted(owner, np.arange(num_cases + 1))
    for row in np.flatnonzero(np.diff(first)):
        labels = slice(first[row], first[row + 1])
        ascending = top[row, ::-1]
        before[labels] = longest - np.searchsorted(ascending, own[labels], side="right")
        ties[labels] = np.maximum(longest - np.searchsorted(ascending, own[labels], side="left") - before[labels], 1)
        at_the_end = own[labels] == ascending[0]  # these ties may continue beyond the longest list
        if at_the_end.any():
            ties[labels][at_the_end] = np.count_nonzero(scores[row] == ascending[0])
    gains = np.concatenate([[0], np.cumsum(1 / np.log2(np.arange(max(ks)) + 2))])
    out: dict[str, Floats] = {}
    has = num_labels > 0
    for k in ks:
        # A label is at each of the ranks before .. before + ties - 1 with the same probability.
        low, high = np.minimum(before, k), np.minimum(before + ties, k)
        hits = np.bincount(owner, (high - low) / ties, num_cases)
        gain = np.bincount(owner, (gains[high] - gains[low]) / ties, num_cases)
        best = np.minimum(num_labels, k)
        for name, value, whole in (("precision", hits, k), ("recall", hits, best), ("ndcg", gain, gains[best])):
            out[f"{name}@{k}"] = np.divide(value, whole, out=np.full(num_cases, np.nan), where=has)
    return out
