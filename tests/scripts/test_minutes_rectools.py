"""RecTools' rows of the newcomer tables: the same questions, metrics, and form of a line as those of the other rows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripts.experiments import minutes_rectools
from scripts.experiments.crosscheck_rectools import cases_of
from scripts.experiments.results import read_results
from tests.scripts.test_crosscheck import make_log
from vista.config import DataConfig, OptimConfig, TrainConfig
from vista.errors import DataError
from vista.evaluation.cases import NextItemCases
from vista.training.validation import Validation

pytestmark = pytest.mark.research
TABLE = "newcomer-ml-latest-small"
NUM_USERS = 30


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """Arguments for a small data set without repeated items."""
    data, rng = tmp_path / "ml-latest-small", np.random.default_rng(0)
    data.mkdir()
    rows = [(user, item, 60 * n) for user in range(1, NUM_USERS + 1) for n, item in enumerate(rng.permutation(80)[:30])]
    (data / "ratings.dat").write_text("".join(f"{user}::{item}::3::{978_300_000 + at}\n" for user, item, at in rows))
    return [
        *(TABLE, "--data", str(data), "--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")),
        *("--threads", "1", "--rectools-venv", str(tmp_path / "no-environment")),
    ]


@pytest.mark.parametrize("max_users", [0, 2, 100])
def test_validation_asks_the_users_that_training_asks(tmp_path: Path, max_users: int) -> None:
    log = make_log(tmp_path / "log", times=True)
    config = TrainConfig(data=DataConfig(exclude_seen=True), optim=OptimConfig(validation_users=max_users))
    expected = Validation(log, np.arange(log.num_items) + 1, config)._ranked
    cases = cases_of(log)["validation"]
    rows = minutes_rectools.asked_rows(log, cases, max_users)
    assert isinstance(expected, NextItemCases) and len(rows) == (max_users if max_users == 2 else len(cases))
    assert cases.user[rows].tolist() == expected.user.tolist()
    assert cases.item[rows].tolist() == expected.item.tolist()


def test_the_curve_is_computed_from_the_lists() -> None:
    labels = np.array([7, 8])
    lists = np.full((2, 2, 10), -1)
    lists[:, 0, :2] = [[1, 2], [1, 7]]
    lists[:, 1, 0] = 8
    expected = [0.5, (1 / np.log2(3) + 1) / 2]
    report = {"seconds": [3.5, 7.0], "ndcg@10": expected}
    curve = minutes_rectools.validation_curve(report, lists, labels)
    assert [seconds for seconds, _ in curve] == [3.5, 7.0]
    assert [value for _, value in curve] == pytest.approx(expected)
    with pytest.raises(DataError, match="differs"):
        minutes_rectools.validation_curve({**report, "ndcg@10": [0.5, 0.6]}, lists, labels)


def test_lines_have_the_form_of_the_table(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The process here finds no label in its first validation and all in its second, and ranks test labels second."""
    calls = []

    def call(python: Path, data: Path, given: Sequence[str], script: Path) -> dict[str, Any]:
        assert script.exists() and data.exists()
        options = dict(zip(given[::2], given[1::2], strict=True))
        calls.append(options["--model"])
        with np.load(data, allow_pickle=False) as split:
            labels, tested = split["validation_item"][np.load(options["--asked"])], split["test_item"]
        found = np.full((2, len(labels), 10), -1, np.int64)
        found[1, :, 0] = labels
        ranked = np.full((len(tested), int(options["--top-k"])), -1, np.int64)
        ranked[:, 1] = tested
        np.savez(options["--lists"], validation=found, test=ranked)
        return {"seconds": [1.0, 2.04], "ndcg@10": [0.0, 1.0], "settings": {}, "parameters": 1, "versions": {}}

    monkeypatch.setattr(minutes_rectools, "rectools_python", lambda folder: folder / "bin" / "python")
    monkeypatch.setattr(minutes_rectools, "call_rectools", call)
    assert minutes_rectools.main([*words, "--models", "SASRec"]) == 0
    assert minutes_rectools.main([*words, "--models", "SASRec", "HSTU"]) == 0
    assert calls == ["SASRec", "HSTU"] and "RecTools SASRec, seed 1: done already" in capsys.readouterr().out
    line, other = read_results(tmp_path / "results" / f"{TABLE}.jsonl")
    assert (line["model"], other["model"], line["seed"]) == ("RecTools SASRec", "RecTools HSTU", 1)
    assert line["curve"] == [[1.0, 0.0], [2.04, 1.0]] and line["seconds"] == 2.0
    assert line["metrics"]["ndcg@10"] == pytest.approx(1 / np.log2(3)) and line["metrics"]["hr@200"] == 1
    assert line["command"] == (
        f"python -m scripts.experiments.minutes_rectools {TABLE} --models SASRec --seeds 1 --minutes 10 --threads 1"
    )
    assert "| ml-latest-small | RecTools HSTU | 1 |" in (tmp_path / "results" / f"{TABLE}.md").read_text()


@pytest.mark.parametrize("model", minutes_rectools.MODELS)
def test_the_real_baseline_trains_until_the_time_is_up(words: list[str], tmp_path: Path, model: str) -> None:
    environment = os.environ.get("VISTA_RECTOOLS_VENV")
    if not environment:
        pytest.skip("VISTA_RECTOOLS_VENV names no virtual environment with RecTools")
    words = [*words, "--models", model, "--minutes", "0.1", "--rectools-venv", environment]
    assert minutes_rectools.main(words) == 0
    (line,) = read_results(tmp_path / "results" / f"{TABLE}.jsonl")
    seconds = [at for at, _ in line["curve"]]
    assert len(seconds) > 1 and seconds == sorted(seconds), "one per epoch"
    assert seconds[-2] < 6 and seconds[-1] > 3
    assert line["config"]["settings"]["n_factors"] == 256 and line["config"]["settings"]["batch_size"] == 128
    assert 0 < line["metrics"]["hr@10"] < line["metrics"]["hr@200"] == 1, "all items are in the lists"
