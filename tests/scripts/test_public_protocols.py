"""One command runs the protocol of each public data set, from files in the form of the set to the metrics."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from scripts.experiments import reproduce
from scripts.experiments.results import read_results
from scripts.experiments.sets import SETS, prepare_set
from scripts.experiments.table_run import train_config
from scripts.experiments.tables import TABLES
from scripts.experiments.tables.public_tables import LAST_DAY
from scripts.experiments.tables.public_tables import TABLES as PUBLIC_TABLES
from scripts.experiments.yambda_metrics import yambda_metrics
from tests.log.ingest.public.samples import SAMPLES
from tests.training.test_public_experiments import FEW, TINY
from vista.config import EvaluateConfig
from vista.config.choices import Codec, Target
from vista.evaluation.window_cases import WindowCases
from vista.evaluation.window_evaluation import measure_windows
from vista.log.event_log import EventLog

pytestmark = pytest.mark.research
WINDOWS = {"complete-journey": "window-cj", "dev-packages": "window-dev"}
"""Tables of sets that do not have the name of the set."""


@pytest.mark.parametrize("name", SAMPLES)
def test_from_the_files_to_the_metrics(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, title = tmp_path / "files", WINDOWS.get(name, name)
    folder.mkdir()
    SAMPLES[name](folder)
    table = TABLES[title]
    kept = list(table.rows) if title in PUBLIC_TABLES else ["vista, counters" if name in WINDOWS else "vista"]
    rows = {row: replace(table.rows[row], codecs=(Codec.int8,), tails=()) for row in kept}
    few = {"min_seen": 5, "min_after": 1} if name in WINDOWS else {}
    tiny = replace(table, words=(*table.words, *TINY), rows=rows, pairs=(), asked={**table.asked, **few})
    monkeypatch.setitem(TABLES, title, tiny)
    if name == "kuairand":
        monkeypatch.setitem(SETS, name, replace(SETS[name], prepare=(*SETS[name].prepare, *FEW)))
    work, results = tmp_path / "work", tmp_path / "results"
    words = [title, "--data", str(folder), "--work", str(work), "--results", str(results), "--threads", "1"]
    assert reproduce.main(words) == 0, capsys.readouterr().err
    printed, lines = capsys.readouterr().out, read_results(results / f"{title}.jsonl")
    assert [line["model"] for line in lines] == kept
    if name in WINDOWS:
        metric = "precision@10/50-events"
    else:
        metric = {"yambda": "recall@100", "microvideo": "auc/is_click", "kuaivideo": "gauc/is_click"}.get(name, "hr@10")
    for line in lines:
        assert f"{title}, {line['model']}, seed {line['seed']}\n" in printed
        assert f"  {metric:<22} {line['metrics'][metric]:.4f}\n" in printed


def test_the_metrics_of_yambda(tmp_path: Path) -> None:
    """As the benchmark's code has them: repeats in the test count as labels, but can be found only once."""
    (tmp_path / "files").mkdir()
    SAMPLES["yambda"](tmp_path / "files")
    prepare_set("yambda", tmp_path / "files", tmp_path / "log")
    log, table = EventLog.open(tmp_path / "log"), TABLES["yambda"]
    data = train_config(table, table.rows["vista"]).data
    asked = EvaluateConfig(target=Target.window, progress=False, **{**LAST_DAY, "top_k": [1, 5, 10]})  # type: ignore[arg-type]
    scores = np.random.default_rng(0).standard_normal((log.num_users, log.num_items))

    def score(cases: WindowCases) -> np.ndarray:
        return scores[cases.user]

    _, per_user = measure_windows(log, data, np.arange(log.num_items), asked, score)
    found = yambda_metrics(per_user.values, log, data, asked)
    begin = 1000 * (26_000_000 - 86_400)
    test = {user: log[user] for user in log.users.ids(np.arange(log.num_users)).tolist()}
    labels = [history.item[history.timestamp >= begin] for history in test.values()]
    asked_rows = [
        row
        for row, history in enumerate(test.values())
        if len(labels[row]) and (history.timestamp < begin - 30 * 60_000).any()
    ]
    assert asked_rows and any(len(set(own.tolist())) < len(own) for own in labels)
    for k in (1, 5, 10):
        recalls, gains, best = [], 0.0, 0.0
        for row in asked_rows:
            ranked = np.argsort(-scores[row])[:k]
            hit = np.isin(ranked, labels[row])
            recalls.append(hit.sum() / len(labels[row]))
            gains += sum(1 / math.log2(2 + rank) for rank in np.flatnonzero(hit))
            best += sum(1 / math.log2(2 + rank) for rank in range(min(k, len(labels[row]))))
        assert found[f"recall@{k}"] == pytest.approx(np.mean(recalls))
        assert found[f"ndcg@{k}"] == pytest.approx(gains / best)
