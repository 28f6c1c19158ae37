"""Quality over parts of the cases: by history length, by activity, and by the age of the deciding event."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vista.evaluation.comparison import Estimate, Measure
from vista.report.chart import Series, line_chart
from vista.report.comparison_data import ORACLE, ComparisonData
from vista.report.html_page import PageSection, heading, paragraph, table

MIN_CASES = 30
"""A part with fewer cases is not shown."""


@dataclass(frozen=True, slots=True)
class CasePart:
    """Some of the cases of a measure."""

    name: str
    cases: NDArray[np.bool_]


def split_section(
    title: str, definition: str, data: ComparisonData, parts: Sequence[tuple[Measure, Sequence[CasePart]]], label: str
) -> PageSection | str:
    """Each measure over its parts, as a chart and a table; or why there is none.

    Args:
        definition: what the parts are, as a sentence.
        parts: measures with their parts, in order; parts with few cases are left out.
        label: name of the horizontal axis.
    """
    findings, body = [], [paragraph(definition)]
    for measure, own_parts in parts:
        kept = [part for part in own_parts if part.cases.sum() >= MIN_CASES]
        if len(kept) < 2:
            continue
        shown = [name for name in data.shown if name in measure.names]
        estimates = [measure.estimates(part.cases) for part in kept]
        series = [_series(name, data, estimates) for name in shown]
        findings.append(_finding(measure, data, kept, estimates, shown))
        chart = line_chart(
            series, x_label=label, y_label=f"{measure.title}, with 95 % intervals", x_names=[part.name for part in kept]
        )
        rows = [
            (part.name, f"{int(part.cases.sum()):,}", *(each[name].text() for name in shown))
            for part, each in zip(kept, estimates, strict=True)
        ]
        body += [heading(measure.title), chart, table([label, "cases", *shown], rows)]
    if not findings:
        return f"{title[0].lower()}{title[1:]}, because fewer than two groups have {MIN_CASES} cases"
    return PageSection(title, " ".join(findings), body)


def _series(name: str, data: ComparisonData, estimates: Sequence[dict[str, Estimate]]) -> Series:
    own = [each[name] for each in estimates]
    return Series(
        name,
        range(len(own)),
        [each.value for each in own],
        [each.ends() for each in own],
        color=data.color(name),
        dashed=name == ORACLE,
    )


def _finding(
    measure: Measure,
    data: ComparisonData,
    parts: Sequence[CasePart],
    estimates: Sequence[dict[str, Estimate]],
    shown: Sequence[str],
) -> str:
    """Where the run is furthest ahead of each other run and of the best baseline, or that it is not ahead anywhere."""
    runs = [name for name in shown if name in data.runs[1:]]
    baselines = [name for name in shown if name not in (*data.runs, ORACLE)]
    leads = [_lead(data.own, parts, estimates, [name], f"of {name} ") for name in runs]
    leads += [_lead(data.own, parts, estimates, baselines, "of the baselines " if runs else "")] if baselines else []
    if not leads:
        first, last = estimates[0][data.own].value, estimates[-1][data.own].value
        return f"{measure.title} of {data.own}: {first:.4f} for {parts[0].name}, {last:.4f} for {parts[-1].name}."
    return f"{measure.title}: {data.own} is {', and '.join(leads)}."


def _lead(
    own: str,
    parts: Sequence[CasePart],
    estimates: Sequence[dict[str, Estimate]],
    others: Sequence[str],
    whom: str,
) -> str:
    """Where a run is furthest ahead of the best of some others; whom: what the text calls these."""
    leads = [each[own].value - max(_or_low(each[name].value) for name in others) for each in estimates]
    most = int(np.nanargmax(leads)) if np.isfinite(leads).any() else 0
    if not leads[most] > 0:
        return f"not ahead {whom}in any group"
    best = max(others, key=lambda name: _or_low(estimates[most][name].value))
    # The intervals of both, added in squares as if they were independent, are wider than that of a paired difference.
    noise = np.hypot(estimates[most][own].half_width, estimates[most][best].half_width)
    doubt = "" if leads[most] > noise else ", which is within the intervals"
    by = f"{leads[most]:+.4f}" if len(others) == 1 else f"{leads[most]:+.4f} ahead of {best}"
    return f"furthest ahead {whom}for {parts[most].name} ({by}{doubt})"


def _or_low(value: float) -> float:
    return value if np.isfinite(value) else -np.inf
