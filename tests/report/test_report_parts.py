"""Estimates, latencies, and charts of a report, and the parts that its sections show."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import Served
from vista.evaluation.comparison import AucMeasure, Estimate, MeanMeasure, PerUserMetrics, drawn_aucs
from vista.log.event_log import EventLog
from vista.log.features import Column
from vista.log.vocabulary import Vocabulary
from vista.model.inference import item_vectors
from vista.report import case_parts
from vista.report.case_parts import CasePart, age_parts, ages_by_vectors, category_ages, length_parts, similar_ages
from vista.report.html_page import PageSection, Series, interval_chart, line_chart, render_page
from vista.report.report_data import MAX_ROUNDS, MIN_ROUNDS, ORACLE, REQUESTS_PER_ROUND, ComparisonData, Latency, _shown
from vista.report.sections import (
    _against_baselines,
    _of_one_day,
    latency_section,
    quality_section,
    quality_text,
    split_section,
)
from vista.scorer import CandidateSet, Scorer


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
    assert estimate.error == pytest.approx(np.std([1, 2, 4], ddof=1) / np.sqrt(3))
    assert estimate.half_width == pytest.approx(1.959964 * estimate.error)
    assert estimate.text() == f"2.3333 ± {estimate.error:.4f}"
    assert Estimate(float("nan")).text() == "–" and Estimate(0.5).text(signed=True) == "+0.5000"
    standings = [Estimate(value, 0.1).standing for value in (0.21, 0.2, -0.2, -0.21)]
    assert standings == ["ahead", "level", "level", "behind"] and Estimate(0.1).standing == "unknown"


def test_drawn_aucs_are_those_of_repeated_users() -> None:
    from sklearn.metrics import roc_auc_score

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
    from sklearn.metrics import roc_auc_score

    measure = auc_measure()
    estimates, gains = measure.estimates(), measure.gains()
    assert estimates["good"].value == pytest.approx(roc_auc_score(measure.label, measure.probabilities["good"]))
    assert 0 < estimates["good"].half_width < 0.1
    assert gains["bad"].standing == "ahead"
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
    assert isinstance(section, PageSection)
    assert section.finding == "AUC of click: bad is not clearly ahead in any group."
    runs = ComparisonData(["good", "bad"], {}, None, {}, [measure], ["good", "bad", "same"])
    section = split_section("By age", "", runs, [(measure, [CasePart("new", early), CasePart("old", ~early)])], "age")
    assert isinstance(section, PageSection)
    assert "good is furthest ahead of bad for " in section.finding
    assert section.finding.endswith(", and not clearly ahead of the baselines in any group.")
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


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
    assert _shown(["run"], [measure]) == ["run", ORACLE, "pooled-vector baseline", "best"]
    alone = MeanMeasure("m", "m", user, user, None, {"run": nan, "undefined": nan})
    assert _shown(["run"], [alone]) == ["run", ORACLE, "pooled-vector baseline"]
    ranking = {name: PerUserMetrics(user, {"ndcg@10": each}, {}) for name, each in values.items()}
    data = ComparisonData(["run"], ranking, None, {}, [measure], ["run", "best"])
    page = "\n".join(quality_section(data, "test").body)
    rows = re.findall(r"<tr[^>]*><t[dh][^>]*>([^<]*)", page)
    assert [row for row in rows if row in values] == ["best", "run", "weak", "undefined"]


def test_a_difference_within_two_errors_is_called_level_on_the_split() -> None:
    user, own = np.arange(40), np.linspace(0, 1, 40)
    noise = 0.1 * np.cos(np.pi * user)
    for shift, word in ((-0.03, "level with"), (0.03, "level with"), (-0.1, "ahead of"), (0.1, "behind")):
        values = {"run": own, "best": own + noise + shift}
        measure = MeanMeasure("hr@10", "hr@10", user, user, None, values)
        ranking = {name: PerUserMetrics(user, {"hr@10": each}, {}) for name, each in values.items()}
        data = ComparisonData(["run"], ranking, None, {}, [measure], ["run", "best"])
        said, printed = _against_baselines(data, measure, "test"), quality_text(data, "test")
        assert said.startswith(f"hr@10 on test 0.5000: {word} best (")
        assert ("within two standard errors" in said) == (word == "level with")
        assert printed.startswith("hr@10, test ") and f" {word.split()[0]}\n" in printed


def test_days_whose_events_the_tail_has_room_for(tmp_path: Path) -> None:
    day = 86_400_000
    times = {1: [0, 1, 2, day], 2: [day - 5, day - 4, day - 3, day - 2, day - 1], 3: [-31 * day]}
    rows = [(user, 7, 1_500_000_000_000 // day * day + ms) for user, each in times.items() for ms in each]
    log = EventLog.from_frame(
        dict(zip(("user", "item", "timestamp"), zip(*rows, strict=True), strict=True)), tmp_path / "log", time_unit="ms"
    )
    shares = {tail_len: re.findall(r"On (\d+)% of the days", _of_one_day(log, tail_len)) for tail_len in (1, 3, 5)}
    assert shares == {1: ["33"], 3: ["67"], 5: ["100"]}, "user 3 was not active in the newest 30 days"


def test_ages_by_category(impression_log: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    log = impression_log
    items = np.arange(log.num_items)
    topics = Column((items % 5).astype(np.int32), Vocabulary.from_ids(np.arange(5)), np.r_[items, len(items)])
    monkeypatch.setattr(log, "item_features", {"topic": topics})
    user, item = np.arange(log.num_users), np.zeros(log.num_users, np.int64)
    measure = MeanMeasure("m", "m", user, log.lengths, item, {"own": np.ones(log.num_users)})
    ages = category_ages(measure, log, "topic")
    for row in user.tolist():
        places = np.flatnonzero(log.slice(row).item % 5 == 0)
        assert ages[row] == (log.lengths[row] - 1 - places[-1] if len(places) else -1)


CANDIDATES = CandidateSet(np.arange(5), (5, ""))


class TimedScorer:
    """Takes 10 ms per request, and 100 ms for every fourth one of the noisy rounds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, noisy_rounds: int, num_users: int) -> None:
        self.now, self.count, self.noisy_rounds, self.num_users = 0.0, -5 * num_users, noisy_rounds, num_users
        monkeypatch.setattr("vista.report.report_data.time.perf_counter", lambda: self.now)

    def score(self, users: list[int], candidates: Any, *, now: int) -> None:
        number = self.count // (REQUESTS_PER_ROUND * self.num_users)
        slow = 0 <= number < self.noisy_rounds and self.count % 4 == 0
        self.now += 0.1 if slow else 0.01
        self.count += 1


def measure(scorer: TimedScorer) -> Latency:
    return Latency.measure(cast(Scorer, scorer), list(range(scorer.num_users)), [10, 1000, 100_000], CANDIDATES, 0)


@pytest.fixture
def scorers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    yield lambda noisy_rounds: TimedScorer(monkeypatch, noisy_rounds, 3)


def test_a_calm_machine_needs_the_fewest_rounds(scorers: Any) -> None:
    result = measure(scorers(0))
    assert (result.num_rounds, result.is_wide) == (MIN_ROUNDS, False)
    assert result.median_s == pytest.approx([0.01] * 3) and result.p90_s == pytest.approx([0.01] * 3)


def test_noisy_rounds_are_repeated_until_they_are_outvoted(scorers: Any) -> None:
    result = measure(scorers(2))
    assert (result.num_rounds, result.is_wide) == (5, False)
    assert result.p90_s == pytest.approx([0.01] * 3), "the 90th percentile of the noisy rounds was ten times the median"


def test_a_spread_that_stays_wide_is_reported(scorers: Any) -> None:
    result = measure(scorers(100))
    assert (result.num_rounds, result.is_wide) == (MAX_ROUNDS, True)
    page = "\n".join(latency_section(result).body)
    assert "The spread stayed wide" in page and f"on {result.num_cores} cores; load average of the machine" in page
    assert "other processes" not in page, "a load average does not tell what made requests slow"
    assert "spread" not in "\n".join(latency_section(measure(scorers(0))).body)


NAN = float("nan")


def svg_of(chart: str) -> ElementTree.Element:
    """The SVG, parsed as XML, which fails if it is not well-formed."""
    found = re.search(r"<svg.*</svg>", chart, re.S)
    assert found is not None
    return ElementTree.fromstring(found[0])


def circles(chart: str) -> list[tuple[float, float]]:
    return [(float(one.attrib["cx"]), float(one.attrib["cy"])) for one in svg_of(chart).iter("circle")]


def test_points_are_in_order_and_within_the_view() -> None:
    places = circles(line_chart([Series("a", [0, 1, 4], [1.0, 3.0, 2.0])], x_label="x", y_label="y"))
    xs, ys = zip(*places, strict=True)
    assert xs[1] - xs[0] == pytest.approx((xs[2] - xs[0]) / 4, abs=0.2)
    assert ys[1] < ys[2] < ys[0], "larger values are higher up"
    assert all(0 < x < 480 and 0 < y < 290 for x, y in places)


def test_a_logarithmic_axis() -> None:
    places = circles(line_chart([Series("a", [10, 100, 1000], [1, 1, 1])], x_label="x", y_label="y", log_x=True))
    assert places[1][0] - places[0][0] == pytest.approx(places[2][0] - places[1][0], abs=0.2)


def test_nan_leaves_a_gap() -> None:
    chart = line_chart([Series("a", [0, 1, 2, 3], [1.0, NAN, 2.0, 3.0])], x_label="x", y_label="y")
    assert len(circles(chart)) == 3
    line = next(path.attrib["d"] for path in svg_of(chart).iter("path") if path.attrib.get("stroke-width") == "2")
    assert line.count("M") == 2 and line.count("L") == 1


@pytest.mark.parametrize("values", [[0.0], [2.0, 2.0], [-1.0, 1e9]])
def test_any_range_of_values(values: list[float]) -> None:
    chart = line_chart([Series("a", range(len(values)), values)], x_label="x", y_label="y")
    assert len(circles(chart)) == len(values) and "nan" not in chart
    ticks = [text.text for text in svg_of(chart).iter("text")]
    assert len(ticks) > 3


def test_no_points_give_no_chart() -> None:
    assert line_chart([Series("a", [0], [NAN])], x_label="x", y_label="y") == ""
    assert interval_chart([("a", Estimate(NAN))], own="a", x_label="x") == ""


def test_intervals() -> None:
    chart = interval_chart([("own", Estimate(0.5, 0.1)), ("b", Estimate(0.4))], own="own", x_label="x")
    (first, second) = circles(chart)
    assert first[0] > second[0] and first[1] < second[1]
    assert "var(--c0)" in chart and "var(--c6)" in chart


def test_names_are_escaped() -> None:
    chart = line_chart([Series("<b>&", [0, 1], [1, 2])], x_label="<x>", y_label='"y"', x_names=["<1>", "2"])
    assert "<b>" not in chart and "&lt;b&gt;&amp;" in chart
    svg_of(chart)


def test_narrow_sections_share_a_row() -> None:
    narrow = [PageSection(title, "", ["<p>body</p>"], is_narrow=True) for title in ("one", "two")]
    page = render_page("title", [], [], [PageSection("first", ""), *narrow, PageSection("last", "")])
    row = page.partition('<div class="pair">')[2].partition("</div>")[0]
    assert re.findall(r'id="s(\d)"', row) == ["2", "3"] and page.count("</section>") == 4
