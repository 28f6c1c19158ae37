"""`vista evaluate baselines=true`: the rows of the baselines, their files, and their questions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import Served
from tests.evaluation.test_window_evaluation import ASKED
from vista.config import CompareConfig, DataConfig, EvaluateConfig
from vista.errors import ConfigError
from vista.evaluation.baselines.evaluate_baseline import evaluate_baseline
from vista.evaluation.baselines.own_frequency import OwnFrequency
from vista.evaluation.baselines.transitions import Transitions
from vista.evaluation.compare import compare
from vista.evaluation.evaluate import evaluate, evaluate_scorer
from vista.log.splits import split_until, visible_counts
from vista.scorer import Scorer


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_next_items_are_ranked_as_without_a_model(served: Served, tmp_path: Path, exclude_seen: bool) -> None:
    out = tmp_path / "metrics.json"
    config = EvaluateConfig(
        data=str(served.log.path),
        model=str(served.model_dir),
        store=str(served.test_store),
        exclude_seen=exclude_seen,
        top_k=[5],
        baselines=True,
        out=str(out),
        num_threads=1,
        progress=False,
    )
    report = evaluate(config)
    written = json.loads(out.read_text())
    expected = evaluate_baseline(Transitions(), served.log, DataConfig(exclude_seen=exclude_seen), top_k=[5]).metrics
    assert written["baselines"]["transitions"] == pytest.approx(expected)
    assert ("own frequency" in written["baselines"]) != exclude_seen
    row = next(line for line in str(report).splitlines() if line.startswith("  transitions  "))
    assert row.split()[1::3] == [f"{expected['hr@5']:.4f}", f"{expected['ndcg@5']:.4f}"]
    paired = compare(CompareConfig(a=[str(out)], b=[f"{out}.transitions"]))
    assert f"{expected['hr@5'] - report.metrics['hr@5']:+.4f}" in str(paired)


def test_windows_are_asked_of_the_same_users(served_tasks: Served) -> None:
    log = served_tasks.log
    with Scorer.open(served_tasks.model, served_tasks.test_store) as scorer:
        report = evaluate_scorer(scorer, log, EvaluateConfig(**ASKED, baselines=True))
    assert report.per_user is not None and report.baselines is not None
    seen = visible_counts(log, split_until(served_tasks.config.data, "test"))
    own = report.baselines.per_user["own frequency"]
    assert own.users.tolist() == report.per_user.users.tolist() and own.question == report.per_user.question
    baseline = OwnFrequency()
    baseline.fit(log, seen, np.random.default_rng(0))
    for user, value in zip(
        log.users.rows(own.users.tolist()).tolist(), own.values["precision@4/3-events"], strict=True
    ):
        scores = baseline.scores(np.array([user]), seen[[user]], None)[0]
        best = set(np.argsort(-scores)[:4].tolist())
        window = log.slice(user, int(seen[user]), int(seen[user]) + 3).item.tolist()
        if len(np.unique(np.sort(-scores)[:5])) == 5:  # without a tie at the end of the list
            assert value == pytest.approx(len(best & set(window)) / 4)
    text = str(report)
    assert "baselines, next 3 events" in text and "baselines, next 8 events" in text and "recall@4:new" in text


def test_a_model_that_ranks_no_items_is_refused(served: Served) -> None:
    with (
        Scorer.open(served.model, served.test_store) as scorer,
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(ConfigError, match="baselines=true: this model does not rank items"),
    ):
        patch.setattr(type(served.model), "has_retrieval", False)
        evaluate_scorer(scorer, served.log, EvaluateConfig(baselines=True))
