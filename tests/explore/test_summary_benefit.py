"""Quality with and without summaries, by the length of histories."""

from __future__ import annotations

import numpy as np
import pytest

from tests.conftest import Served
from vista.config import EvaluateConfig
from vista.config.choices import OnMissing, Precision
from vista.errors import LeakageError
from vista.evaluation.estimate import Estimate
from vista.evaluation.evaluate import evaluate_scorer
from vista.explore.summary_benefit import BenefitRow, EmptySummaryScorer, SummaryBenefit, summary_benefit
from vista.scorer import Scorer
from vista.scorer.serving_source import ServingSource


def empty_scorer(served: Served) -> EmptySummaryScorer:
    source = ServingSource(served.model_dir, served.test_store, "cpu", None, Precision.float32)
    return EmptySummaryScorer(source, OnMissing.empty, None, None)


def test_users_are_grouped_by_length(served: Served) -> None:
    with Scorer.open(served.model_dir, served.test_store) as scorer, empty_scorer(served) as without:
        benefit = summary_benefit(scorer, without, served.log)
        report = evaluate_scorer(scorer, served.log, EvaluateConfig(progress=False))
    assert benefit.metric == "hit rate at 10" and sum(row.users for row in benefit.rows) == report.num_cases
    mean = sum(row.with_summary * row.cases for row in benefit.rows) / report.num_cases
    assert np.isclose(mean, report.metrics["hr@10"])
    assert all(np.isclose(row.gain.value, row.with_summary - row.without) for row in benefit.rows)
    assert benefit.answer().startswith("For the users with the longest histories")


def test_impressions_are_measured_where_there_are_some(served_tasks: Served) -> None:
    with Scorer.open(served_tasks.model_dir, served_tasks.test_store) as scorer, empty_scorer(served_tasks) as without:
        benefit = summary_benefit(scorer, without, served_tasks.log)
    assert benefit.metric == f"AUC of {served_tasks.model.schema.tasks[0]}" and len(benefit.rows) == 4


def test_without_summaries_users_differ_only_by_their_tail(served: Served) -> None:
    """A user without a tail and a record gets the same scores either way."""
    with Scorer.open(served.model_dir, served.test_store) as scorer, empty_scorer(served) as without:
        items = [0, 10, 20]
        assert np.array_equal(scorer.score([999_999], items), without.score([999_999], items))
        assert not np.array_equal(scorer.score([104], items), without.score([104], items))


def test_a_store_that_covers_the_labels_is_refused(served: Served) -> None:
    refused = pytest.raises(LeakageError, match="its records cover them")
    with Scorer.open(served.model_dir, served.store) as scorer, empty_scorer(served) as without, refused:
        summary_benefit(scorer, without, served.log)


def benefit_of(first: Estimate, last: Estimate, num_positive: int = 30) -> SummaryBenefit:
    """Of two groups of 75 impressions with these gains; `num_positive` is of the one whose gain is not defined."""
    rows = [
        BenefitRow(group, 75, 75, 0.6 + gain.value, 0.6, gain, 30 if gain.value == gain.value else num_positive)
        for group, gain in (("1 to 9 events", first), ("10 to 99 events", last))
    ]
    return SummaryBenefit("AUC of click", rows)


def test_a_difference_within_its_interval_is_not_announced() -> None:
    text = benefit_of(Estimate(-0.004, 0.02), Estimate(0.03, 0.04)).answer()
    assert text.count("no clear difference") == 2 and "more" not in text and "+0.030 ± 0.040" in text
    text = benefit_of(Estimate(-0.004, 0.002), Estimate(0.03, 0.01)).answer()
    assert "**0.030 more** (± 0.010)" in text and "**0.004 less** (± 0.002)" in text


def test_a_group_of_one_class_cannot_be_measured() -> None:
    undefined = Estimate(float("nan"))
    text = benefit_of(Estimate(0.03, 0.01), undefined, num_positive=0).answer()
    assert "cannot be measured: none of the impressions has a positive label" in text and "nan" not in text
    text = benefit_of(undefined, Estimate(0.03, 0.01), num_positive=75).answer()
    assert "cannot be measured: all of the impressions have a positive label" in text and "nan" not in text


def test_intervals_of_impressions_come_from_users(served_tasks: Served) -> None:
    with Scorer.open(served_tasks.model_dir, served_tasks.test_store) as scorer, empty_scorer(served_tasks) as without:
        benefit = summary_benefit(scorer, without, served_tasks.log)
    assert all(row.gain.half_width > 0 for row in benefit.rows if row.unmeasured is None)
