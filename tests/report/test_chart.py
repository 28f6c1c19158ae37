"""Charts: where points lie, gaps, intervals, and names that need escapes."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from vista.evaluation.estimate import Estimate
from vista.report.chart import Series, interval_chart, line_chart

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


@pytest.mark.parametrize("values", [[5.0], [0.0], [2.0, 2.0], [-1.0, 1e9], [1e-12, 2e-12]])
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
