"""Content neighbors, against a plain loop over items and columns."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from tests.evaluation.baselines.conftest import order_only_log
from vista.config import SourceColumns
from vista.evaluation.baselines.content_neighbors import ContentNeighbors
from vista.log.event_log import EventLog

NAN = math.nan
TABLE = {
    "item": ["a", "b", "c", "d"],
    "kind": [["red", "big"], ["red"], ["big", "small"], []],
    "price": [1.0, 2.0, NAN, 2.0],
    "text": [[3.0, 4.0], [0.0, 2.0], None, [-1.0, 0.0]],
}


def cosine(a: Counter[object], b: Counter[object]) -> float:
    def length(values: Counter[object]) -> float:
        return math.sqrt(sum(value**2 for value in values.values()))

    product = sum(a[value] * b[value] for value in a)
    return 0.0 if product == 0 else product / (length(a) * length(b))


def weighted(values: list[object], all_values: list[list[object]]) -> Counter[object]:
    """Inverse frequencies of an item's values."""
    items_of = Counter(value for own in all_values for value in own)
    return Counter({value: math.log((1 + len(all_values)) / (1 + items_of[value])) for value in values})


def similarity(i: int, j: int) -> float:
    kinds: list[list[object]] = [list(own) for own in TABLE["kind"]]
    prices: list[list[object]] = [[] if math.isnan(own) else [own] for own in TABLE["price"]]
    total = sum(cosine(weighted(own[i], own), weighted(own[j], own)) for own in (kinds, prices))
    texts = [Counter(dict(enumerate(own or []))) for own in TABLE["text"]]
    return total + cosine(texts[i], texts[j])  # type: ignore[arg-type]


def test_scores_equal_a_plain_loop(tmp_path: Path) -> None:
    histories = [["a", "a", "c"], ["d"], ["b", "c", "a", "d"]]
    user = np.repeat(np.arange(3), [len(own) for own in histories])
    frame = pl.DataFrame({"user": user, "item": [item for own in histories for item in own]})
    log = EventLog.from_frame(
        frame, tmp_path / "log", columns=SourceColumns(timestamp=None), items=pl.DataFrame(TABLE, strict=False)
    )
    baseline, seen = ContentNeighbors(), np.array([3, 1, 2])
    baseline.fit(log, seen, np.random.default_rng(0))
    found = baseline.scores(np.arange(3), seen, None)
    rows = log.items.rows(TABLE["item"])
    for row, own in enumerate(histories):
        expected = [sum(similarity(i, "abcd".index(item)) for item in own[: seen[row]]) for i in range(4)]
        np.testing.assert_allclose(found[row, rows], expected, atol=1e-7)
    # b has no similarity of its own to d but for the price, and the popularity of visible events breaks ties.
    assert found[1, rows[3]] == found[1].max()


def test_a_log_without_features_has_none(tmp_path: Path) -> None:
    log = order_only_log([[0, 1]], tmp_path)
    with pytest.raises(ValueError, match="no features of items"):
        ContentNeighbors().fit(log, log.lengths, np.random.default_rng(0))
