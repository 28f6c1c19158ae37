"""Popularity and transitions: by hand, against a plain loop, and against the numbers of another program."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import real_set
from tests.log.conftest import run
from vista.config import DataConfig, SourceColumns
from vista.config.choices import Split
from vista.errors import ConfigError
from vista.evaluation.counting_baselines import CountingBaseline, evaluate_counting_baseline
from vista.log.event_log import EventLog
from vista.log.splits import visible_counts


def make_log(histories: list[list[int]], folder: Path) -> EventLog:
    user = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
    frame = {"user": user, "item": np.concatenate(histories)}
    return EventLog.from_frame(frame, folder / "log", columns=SourceColumns(timestamp=None))


def test_ranks_by_hand(tmp_path: Path) -> None:
    """The last events are labels, which must not be counted."""
    log = make_log([[1, 2, 3], [1, 2, 4], [5, 1, 2], [2, 4, 5, 3]], tmp_path)
    # Visible: 1 2 | 1 2 | 5 1 | 2 4 5. Counts: 1 three, 2 three, 5 two, 4 one, 3 none; labels 3, 4, 2, 3.
    popular = evaluate_counting_baseline(CountingBaseline.popularity, log, DataConfig()).ranks
    # 3 after 1 2: 5, 4 above. 4 after 1 2: 5 above. 2 after 5 1: alone at the top. 3 after 2 4 5: 1 above.
    assert popular is not None and popular.tolist() == [2, 1, 0, 1]
    # After 2 came 4 once, after 1 came 2 twice, after 5 came 1 once.
    followed = evaluate_counting_baseline(CountingBaseline.transitions, log, DataConfig())
    assert followed.ranks is not None and followed.ranks.tolist() == [2, 0, 0, 1]
    assert followed.metrics == {"hr@10": 1.0, "ndcg@10": pytest.approx((0.5 + 1 + 1 + 1 / np.log2(3)) / 4)}


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_counts_agree_with_counting_event_by_event(event_log: EventLog, exclude_seen: bool) -> None:
    seen = visible_counts(event_log, "leave-last-out")
    histories = [event_log.slice(user).item.tolist() for user in range(event_log.num_users)]
    visible = [history[:count] for history, count in zip(histories, seen, strict=True)]
    popularity = Counter(item for history in visible for item in history)
    pairs = Counter(pair for history in visible for pair in pairwise(history))
    expected: dict[CountingBaseline, list[int]] = {baseline: [] for baseline in CountingBaseline}
    for history, known in zip(histories, visible, strict=True):
        if len(history) == len(known):
            continue
        label = history[len(known)]
        shown = [item == label or not exclude_seen or item not in known for item in range(event_log.num_items)]
        items = np.flatnonzero(shown).tolist()
        for baseline in CountingBaseline:
            weight = [
                (pairs[known[-1], item] if baseline is CountingBaseline.transitions else 0, popularity[item])
                for item in items
            ]
            own = weight[items.index(label)]
            expected[baseline].append(sum(w > own for w in weight) + weight.count(own) // 2)  # ties: half, rounded up
    for baseline in CountingBaseline:
        ranks = evaluate_counting_baseline(baseline, event_log, DataConfig(exclude_seen=exclude_seen)).ranks
        assert ranks is not None and ranks.tolist() == expected[baseline]


def test_a_split_in_time_without_labels_is_refused(event_log: EventLog) -> None:
    data = DataConfig(split=Split.time, validation_from="2100-01-01", test_from="2100-02-01")
    with pytest.raises(ConfigError, match="has no test label to rank"):
        evaluate_counting_baseline(CountingBaseline.popularity, event_log, data)


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "popularity", "transitions"),
    [
        ("ml-1m", (0.039, 0.019), (0.193, 0.113)),
        ("ml-1m-half", (0.038, 0.018), (0.214, 0.128)),
        ("ml-100k", (0.086, 0.044), (0.145, 0.079)),
        ("ml-latest-small", (0.041, 0.019), (0.074, 0.047)),
    ],
)
def test_movielens(
    name: str, popularity: tuple[float, float], transitions: tuple[float, float], tmp_path: Path
) -> None:
    """HR@10 and NDCG@10 equal those of another program."""
    run(tmp_path / "log", [real_set(name)], kind="auto", timestamp=None, time_unit=None)
    log = EventLog.open(tmp_path / "log")
    for baseline, expected in ((CountingBaseline.popularity, popularity), (CountingBaseline.transitions, transitions)):
        values = evaluate_counting_baseline(baseline, log, DataConfig()).metrics
        assert (values["hr@10"], values["ndcg@10"]) == pytest.approx(expected, abs=6e-4)
