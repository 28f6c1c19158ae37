"""RecTools as the baseline: both sides get the same events and are asked the same questions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from scripts.benchmarks.bench_training import call_rectools, words_of
from scripts.experiments import crosscheck_rectools as crosscheck
from scripts.experiments.results import read_results
from tests.conftest import LENGTHS, ratings_folder, small_frame
from vista.config import SourceColumns
from vista.errors import DataError
from vista.evaluation.metrics import ranks_of_targets
from vista.log.event_log import EventLog
from vista.log.splits import visible_counts

pytestmark = pytest.mark.research


LENGTH = 20
"""Inputs per user in these tests; three users of LENGTHS have more training events."""


def make_log(folder: Path, *, times: bool) -> EventLog:
    """Users with LENGTHS events and without repeated items."""
    frame = small_frame()
    frame["item"] = np.concatenate([np.random.default_rng(n).permutation(40)[:n] for n in LENGTHS])
    if times:
        return EventLog.from_frame(frame, folder, time_unit="ms")
    return EventLog.from_frame(frame, folder, columns=SourceColumns(timestamp=None))


@pytest.fixture(params=[True, False], ids=["times", "order"])
def log(request: pytest.FixtureRequest, tmp_path: Path) -> EventLog:
    return make_log(tmp_path / "log", times=request.param)


def test_both_sides_get_the_newest_events(log: EventLog, tmp_path: Path) -> None:
    cut = crosscheck.cut_log(log, tmp_path / "cut", length=LENGTH)
    assert cut.has_time == log.has_time and not cut.has_rating
    assert cut.lengths.max() == LENGTH + 3 and visible_counts(cut, "leave-last-two-out").max() == LENGTH + 1
    for user in range(log.num_users):
        old = log.slice(user, max(int(log.lengths[user]) - LENGTH - 3, 0))
        new = cut[log.users.ids([user])[0]]
        assert cut.items.ids(new.item).tolist() == log.items.ids(old.item).tolist()
        if log.has_time:
            assert np.array_equal(new.timestamp, old.timestamp)


@pytest.mark.parametrize("times", [True, False])
def test_the_baseline_gets_the_split_of_the_log(log: EventLog, tmp_path: Path, times: bool) -> None:
    cases = crosscheck.write_split(log, tmp_path / "baseline.npz", times=times and log.has_time)
    assert cases["test"].user.tolist() == [user for user, n in enumerate(LENGTHS) if n >= 3]
    with np.load(tmp_path / "baseline.npz", allow_pickle=False) as arrays:
        split = dict(arrays)
    for user, length in enumerate(LENGTHS):
        parts = [""] if length < 3 else ["", "validation_", "test_"]
        mine = {part: split[f"{part}user"] == user for part in ("", "validation_", "test_")}
        assert [int(mine[part].sum()) for part in parts] == ([length] if length < 3 else [length - 2, 1, 1])
        item = np.concatenate([split[f"{part}item"][mine[part]] for part in parts])
        assert item.tolist() == log.slice(user).item.tolist()
        clock = np.concatenate([split[f"{part}timestamp"][mine[part]] for part in parts])
        assert (np.diff(clock) > 0).all() and clock.dtype == np.int64
        if times and log.has_time:
            assert clock.tolist() == (np.asarray(log.slice(user).timestamp) // 1000).tolist()
    for part, each in cases.items():
        assert each.item.tolist() == split[f"{part}_item"].tolist()


def test_a_repeated_item_is_refused(tmp_path: Path) -> None:
    log = EventLog.from_frame(
        {"user": [1, 1, 1, 2], "item": [5, 6, 5, 5]}, tmp_path / "log", columns=SourceColumns(timestamp=None)
    )
    with pytest.raises(DataError, match="1 events repeat an item of their user"):
        crosscheck.write_split(log, tmp_path / "baseline.npz", times=False)


def test_ranks_in_lists_are_ranks_of_scores() -> None:
    rng = np.random.default_rng(0)
    scores, label = rng.permuted(np.tile(np.arange(30.0), (50, 1)), axis=1), rng.integers(0, 30, 50)
    lists = np.argsort(-scores, axis=1)[:, :12]
    lists[:5, 3:] = -1  # shorter lists
    expected = ranks_of_targets(scores, label)
    expected[(expected >= 12) | ((np.arange(50) < 5) & (expected >= 3))] = 12
    assert crosscheck.label_ranks(lists, label).tolist() == expected.tolist()
    assert (expected < 12).any() and (expected[:5] == 12).any()


@pytest.mark.rectools
@pytest.mark.parametrize(("model", "times"), [("SASRec", False), ("HSTU", False), ("HSTU", True)])
def test_lists_of_the_real_baseline(rectools: Path, tmp_path: Path, model: str, times: bool) -> None:
    log = make_log(tmp_path / "log", times=times)
    cases = crosscheck.write_split(log, tmp_path / "baseline.npz", times=times)
    words = words_of({"model": model, "session_max_len": 20, "n_factors": 16, "recommend": tmp_path / "lists.npz"})
    words += ["--relative-time"] if times else ["--mask-padding"]
    report = call_rectools(rectools / "bin" / "python", tmp_path / "baseline.npz", [*words, "--top-k", "40"])
    with np.load(tmp_path / "lists.npz", allow_pickle=False) as arrays:
        for part, each in cases.items():
            lists, ranks = arrays[part], crosscheck.label_ranks(arrays[part], each.item)
            assert lists.shape == (len(each.user), 40)
            for row, user in enumerate(each.user):
                seen = log.slice(int(user), 0, int(each.seen[row])).item
                listed = lists[row][lists[row] >= 0]
                assert len(set(listed.tolist())) == len(listed) and not np.isin(listed, seen).any()
            assert report["metrics"][part]["hr@10"] == pytest.approx((ranks < 10).mean())


@pytest.mark.rectools
def test_the_whole_cross_check(
    rectools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ratings_folder(tmp_path / "ml-1m")
    words = ["HSTU", "--data", str(data), "--seeds", "1", "2", "--epochs", "1", "--rectools-venv", str(rectools)]
    words += ["--results", str(tmp_path / "results"), "--times"]
    assert crosscheck.main(words) == 1
    assert "repeat an item of their user" in capsys.readouterr().err
    rng = np.random.default_rng(0)
    rows = [(user, item, 60 * n) for user in range(1, 31) for n, item in enumerate(rng.permutation(80)[:30])]
    (data / "ratings.dat").write_text("".join(f"{user}::{item}::3::{978_300_000 + at}\n" for user, item, at in rows))
    assert crosscheck.main(words) == 0
    printed = capsys.readouterr().out
    assert printed.count("ranges ") == 4
    lines = read_results(tmp_path / "results" / "crosscheck-ml-1m.jsonl")
    assert [(line["model"], line["seed"]) for line in lines] == [
        (model, seed) for seed in (1, 2) for model in ("hstu, times", "hstu, times, RecTools")
    ]
    assert lines[1]["command"].startswith(
        "python -m scripts.experiments.crosscheck_rectools HSTU --data ml-1m --seeds 1 --times"
    )
    assert str(tmp_path) not in str(lines) and str(rectools) not in str(lines)
    assert "| hstu, times, RecTools | 2 |" in (tmp_path / "results" / "crosscheck-ml-1m.md").read_text()
