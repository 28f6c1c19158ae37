"""Parts of the cases of a measure: by length of the history, by activity, and by age of the deciding event. N cases."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Float32s, Int
from vista.evaluation.cases import EarlierEvents, questions_by_user
from vista.evaluation.comparison import Measure
from vista.log.event_log import EventLog
from vista.log.histories import DAY_MS
from vista.log.splits import Until
from vista.model.inference import item_vectors
from vista.model.item_feature_table import category_codes
from vista.model.ranking_model import RankingModel

NUM_GROUPS = 4
ACTIVE_DAYS = 30
AGE_BOUNDS = (0, 8, 32, 200, 1000)
"""Lower ends of the groups of age, in events; the last one has no upper end."""
MAX_PAIRS = 1 << 22
"""Limit on the pairs of a label and a history item that are compared at once."""


@dataclass(frozen=True, slots=True)
class CasePart:
    """Some of the cases of a measure."""

    name: str
    cases: NDArray[np.bool_]


def length_parts(measure: Measure) -> list[CasePart]:
    """Four groups of about as many cases, by the number of events before the question."""
    return _quantile_parts(measure.seen)


def activity_parts(measure: Measure, log: EventLog, until: Until) -> list[CasePart]:
    """Four groups by the number of events of the user in the last days before `until`, or before the newest event."""
    newest = log.time_range()
    assert newest is not None
    end = newest[1] + 1 if until.before is None else until.before
    begin = end - ACTIVE_DAYS * DAY_MS
    active = log.counts_before(end) - log.counts_before(begin)
    return _quantile_parts(active[measure.user])


def _quantile_parts(value: Int) -> list[CasePart]:
    edges = np.unique(np.quantile(value, np.arange(1, NUM_GROUPS) / NUM_GROUPS, method="inverted_cdf"))
    group = np.searchsorted(edges, value, side="left")
    parts = []
    for number in range(len(edges) + 1):
        cases = group == number
        if cases.any():
            low, high = int(value[cases].min()), int(value[cases].max())
            parts.append(CasePart(f"{low:,}" if low == high else f"{low:,}–{high:,}", cases))
    return parts


def age_parts(age: Int) -> list[CasePart]:
    """Groups by age in events, int64 [N]; negative ages stand for no such event."""
    parts = [CasePart(f"{low:,}–{high - 1:,}", (age >= low) & (age < high)) for low, high in pairwise(AGE_BOUNDS)]
    return [*parts, CasePart(f"{AGE_BOUNDS[-1]:,}+", age >= AGE_BOUNDS[-1]), CasePart("none", age < 0)]


def category_ages(measure: Measure, log: EventLog, category: str) -> Int:
    """Events since the user's newest event whose item has the category of the label, int64 [N]; -1 if there is none.
    Raises ConfigError as `category_codes` does."""
    codes = category_codes(log.item_features, category, "category")[1:]
    return _newest_ages(measure, log, np.where(codes > 0, codes, -1))


def item_ages(measure: Measure, log: EventLog) -> Int:
    """Events since the user's newest event of the label's item, int64 [N]; -1 if there is none."""
    return _newest_ages(measure, log, np.arange(log.num_items))


def _newest_ages(measure: Measure, log: EventLog, group: Int) -> Int:
    assert measure.item is not None
    return EarlierEvents.of(log, group, measure.user, measure.seen, measure.item).newest_age


def similar_ages(measure: Measure, log: EventLog, model: RankingModel) -> Int:
    """Events since the one whose item vector is most similar to the label's (cosine), int64 [N]. -1 for users without
    events, and for labels that the model does not know."""
    vectors = item_vectors(model).detach().float().cpu().numpy()
    return ages_by_vectors(measure, log, vectors, model.rows_of(log.items) - 1)


def ages_by_vectors(measure: Measure, log: EventLog, vectors: Float32s, columns: Int) -> Int:
    """`similar_ages` for item vectors float32 [V, M]. `columns`: int64 [log.num_items], the row in `vectors` of each of
    the log's items; -1 for unknown items."""
    assert measure.item is not None
    age = np.full(len(measure.user), -1, np.int64)
    for row, chosen in questions_by_user(measure.user, "similar events"):
        items, first = np.unique(columns[np.asarray(log.slice(row).item)], return_index=True)
        order = np.argsort(first)  # Of equally similar events, the oldest one counts.
        items, first = items[order], first[order]
        seen, label = measure.seen[chosen], columns[measure.item[chosen]]
        asked = np.flatnonzero((seen > 0) & (label >= 0))
        if not len(asked):
            continue
        for part in np.array_split(asked, 1 + len(asked) * len(items) // MAX_PAIRS):
            similarity = vectors[label[part]] @ vectors[items].T
            similarity[(items < 0) | (first >= seen[part, None])] = -np.inf
            age[chosen[part]] = seen[part] - 1 - first[similarity.argmax(axis=1)]
    return age
