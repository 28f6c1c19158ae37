"""Estimates with intervals, AUC over resampled users, and the parts that sections show."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from tests.conftest import Served
from vista.evaluation.auc_measure import AucMeasure
from vista.evaluation.estimate import Estimate
from vista.evaluation.mean_measure import MeanMeasure
from vista.evaluation.per_user_metrics import PerUserMetrics
from vista.evaluation.user_bootstrap import drawn_aucs
from vista.log.event_log import EventLog
from vista.model.inference import item_vectors
from vista.report import case_parts
from vista.report.case_parts import age_parts, ages_by_vectors, category_ages, length_parts, similar_ages
from vista.report.comparison_data import ORACLE, ComparisonData, _shown
from vista.report.html_page import PageSection
from vista.report.quality_section import quality_section
from vista.report.split_section import CasePart, split_section


def auc_measure(num_users: int = 60, per_user: int = 30) -> AucMeasure:
    """`good` follows the label closely, `bad` hardly, and `same` is `good` on another scale."""
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(num_users), per_user)
    label = (rng.random(len(user)) < 0.4).astype(np.float32)
    good, bad = label + rng.normal(0, 1, len(user)), label + rng.normal(0, 6, len(user))
    seen = np.tile(np.arange(per_user), num_users)
    return AucMeasure("click", user, seen, user, label, {"good": good, "bad": bad, "same": np.exp(good)})


def test_an_estimate_of_users() -> None:
    values = np.array([1.0, 2.0, 4.0, np.nan])
    estimate = Estimate.of_users(values)
    assert estimate.value == pytest.approx(7 / 3)
    assert estimate.half_width == pytest.approx(1.959964 * np.std([1, 2, 4], ddof=1) / np.sqrt(3))
    assert estimate.text() == f"2.3333 ± {estimate.half_width:.4f}"
    assert Estimate(float("nan")).text() == "–" and Estimate(0.5).text(signed=True) == "+0.5000"
    assert Estimate(-0.2, 0.1).is_clear and not Estimate(0.1, 0.2).is_clear and not Estimate(0.1).is_clear


def test_drawn_aucs_are_those_of_repeated_users() -> None:
    rng = np.random.default_rng(1)
    user = np.array([7, 7, 7, 3, 3, 9, 9, 9])
    label = np.array([1, 0, 0, 1, 0, 0, 1, 1], np.float32)
    score = np.array([0.5, 0.5, 0.1, 0.9, 0.2, 0.5, 0.3, 0.8])
    draws = drawn_aucs(user, label, {"a": score}, seed=1)["a"]
    for draw in draws[:20]:
        chosen = np.array([3, 7, 9])[rng.integers(0, 3, 3)]
        rows = np.concatenate([np.flatnonzero(user == one) for one in chosen])
        assert draw == pytest.approx(roc_auc_score(label[rows], score[rows]))


def test_auc_and_its_paired_differences() -> None:
    measure = auc_measure()
    estimates, gains = measure.estimates(), measure.gains()
    assert estimates["good"].value == pytest.approx(roc_auc_score(measure.label, measure.probabilities["good"]))
    assert 0 < estimates["good"].half_width < 0.1
    assert gains["bad"].is_clear and gains["bad"].value > 0
    assert gains["same"] == Estimate(0.0, 0.0), "the same order of cases gives the same AUC"
    part = measure.user < 20
    assert measure.estimates(part)["bad"].value == pytest.approx(
        roc_auc_score(measure.label[part], measure.probabilities["bad"][part])
    )


def test_an_undefined_auc_has_no_interval() -> None:
    measure = auc_measure()
    only = measure.label == 1
    assert np.isnan(measure.estimates(only)["good"].value)


def test_mean_differences_are_paired() -> None:
    user = np.arange(40)
    own = np.random.default_rng(0).random(40)
    measure = MeanMeasure("ndcg", "ndcg", user, user, user, {"own": own, "less": own - 0.1})
    gain = measure.gains()["less"]
    assert gain.value == pytest.approx(0.1) and gain.half_width < 1e-12 < measure.estimates()["own"].half_width


def test_lengths_divide_all_cases() -> None:
    measure = auc_measure()
    parts = length_parts(measure)
    assert len(parts) == 4 and (np.sum([part.cases for part in parts], axis=0) == 1).all()
    sizes = [int(part.cases.sum()) for part in parts]
    assert max(sizes) - min(sizes) <= 0.1 * len(measure.user)
    bounds = [tuple(map(int, part.name.split("–"))) for part in parts]
    assert all(low <= high for low, high in bounds) and bounds == sorted(bounds)


def test_equal_lengths_are_one_group() -> None:
    user = np.arange(50)
    measure = MeanMeasure("m", "m", user, user * 0 + 7, user, {"own": np.ones(50)})
    assert [part.name for part in length_parts(measure)] == ["7"]


def test_ages() -> None:
    parts = {part.name: np.flatnonzero(part.cases).tolist() for part in age_parts(np.array([-1, 0, 7, 8, 199, 1000]))}
    assert parts == {"0–7": [1, 2], "8–31": [3], "32–199": [4], "200–999": [], "1,000+": [5], "none": [0]}


def test_a_section_says_where_a_run_is_ahead() -> None:
    measure = auc_measure()
    data = ComparisonData(["good"], {}, None, {}, [measure], ["good", "bad"])
    early = measure.seen < 15
    section = split_section(
        "By age", "What age is.", data, [(measure, [CasePart("new", early), CasePart("old", ~early)])], "age"
    )
    assert isinstance(section, PageSection)
    assert section.finding.startswith("AUC of click: good is furthest ahead for ")
    behind = ComparisonData(["bad"], {}, None, {}, [measure], ["bad", "good"])
    section = split_section("By age", "", behind, [(measure, [CasePart("new", early), CasePart("old", ~early)])], "age")
    assert isinstance(section, PageSection) and section.finding == "AUC of click: bad is not ahead in any group."
    runs = ComparisonData(["good", "bad"], {}, None, {}, [measure], ["good", "bad", "same"])
    section = split_section("By age", "", runs, [(measure, [CasePart("new", early), CasePart("old", ~early)])], "age")
    assert isinstance(section, PageSection)
    assert "good is furthest ahead of bad for " in section.finding
    assert section.finding.endswith(", and not ahead of the baselines in any group.")
    few = split_section(
        "By age", "", data, [(measure, [CasePart("new", early), CasePart("old", measure.seen > 28)])], "age"
    )
    assert isinstance(few, PageSection), "60 cases are enough"
    few = split_section(
        "By age", "", data, [(measure, [CasePart("new", early), CasePart("old", measure.user > 59)])], "age"
    )
    assert few == "by age, because fewer than two groups have 30 cases"


def test_the_age_of_the_most_similar_event(served: Served) -> None:
    log, model = served.log, served.model
    user = np.flatnonzero(log.lengths > 3)
    seen = log.lengths[user] - 1
    label = np.array([log.slice(int(row)).item[-1] for row in user]).astype(np.int64)
    measure = MeanMeasure("m", "m", user, seen, label, {"own": np.ones(len(user))})
    ages = similar_ages(measure, log, model)
    vectors = item_vectors(model).float().numpy()[model.rows_of(log.items) - 1]
    for index, row in enumerate(user.tolist()):
        cosines = vectors[log.slice(row).item[: seen[index]]] @ vectors[label[index]]
        assert ages[index] == seen[index] - 1 - int(cosines.argmax())


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=st.data())
def test_ages_by_vectors_are_those_of_a_loop(
    impression_log: EventLog, monkeypatch: pytest.MonkeyPatch, drawn: st.DataObject
) -> None:
    """Vectors of small integers, whose products are exact, so there are many ties."""
    log = impression_log
    rng = np.random.default_rng(drawn.draw(st.integers(0, 2**32 - 1)))
    num_vectors = drawn.draw(st.integers(1, 12))
    vectors = rng.integers(-2, 3, (num_vectors, drawn.draw(st.integers(1, 4)))).astype(np.float32)
    columns = rng.integers(-1, num_vectors, log.num_items)
    user = rng.integers(0, log.num_users, drawn.draw(st.integers(0, 40)))
    seen, item = rng.integers(0, log.lengths[user] + 1), rng.integers(0, log.num_items, len(user))
    monkeypatch.setattr(case_parts, "MAX_PAIRS", drawn.draw(st.sampled_from([1, 50, 1 << 22])))
    measure = MeanMeasure("m", "m", user, seen, item, {"own": np.ones(len(user))})
    expected = np.full(len(user), -1)
    for case, (row, before, label) in enumerate(zip(user.tolist(), seen.tolist(), columns[item].tolist(), strict=True)):
        history = columns[log.slice(row).item[:before]]
        if before and label >= 0:
            cosine = np.where(history >= 0, vectors[history] @ vectors[label], -np.inf)
            expected[case] = before - 1 - cosine.argmax()
    np.testing.assert_array_equal(ages_by_vectors(measure, log, vectors, columns), expected)


def test_an_undefined_baseline_is_neither_shown_nor_listed_first() -> None:
    nan = np.full(3, np.nan)
    values = {"run": np.full(3, 0.2), "undefined": nan, "weak": np.full(3, 0.1), "best": np.full(3, 0.3)}
    user = np.arange(3)
    measure = MeanMeasure("ndcg@10 of the next item", "ndcg@10", user, user, None, values)
    assert _shown(["run"], [measure]) == ["run", ORACLE, "pooled vectors", "best"]
    alone = MeanMeasure("m", "m", user, user, None, {"run": nan, "undefined": nan})
    assert _shown(["run"], [alone]) == ["run", ORACLE, "pooled vectors"]
    ranking = {name: PerUserMetrics(user, {"ndcg@10": each}, {}) for name, each in values.items()}
    data = ComparisonData(["run"], ranking, None, {}, [measure], ["run", "best"])
    page = "\n".join(quality_section(data, "test").body)
    rows = re.findall(r"<tr[^>]*><t[dh][^>]*>([^<]*)", page)
    assert [row for row in rows if row in values] == ["best", "run", "weak", "undefined"]


def test_ages_by_category(impression_log: EventLog, tmp_path: Path) -> None:
    log = impression_log
    ids = log.items.ids(np.arange(log.num_items)).tolist()
    rows = "".join(f"{item},{place % 5}\n" for place, item in enumerate(ids))
    (tmp_path / "topics.csv").write_text("item,topic\n" + rows)
    user, item = np.arange(log.num_users), np.zeros(log.num_users, np.int64)
    measure = MeanMeasure("m", "m", user, log.lengths, item, {"own": np.ones(log.num_users)})
    ages = category_ages(measure, log, tmp_path / "topics.csv", "topic")
    for row in user.tolist():
        places = np.flatnonzero(log.slice(row).item % 5 == 0)
        assert ages[row] == (log.lengths[row] - 1 - places[-1] if len(places) else -1)
