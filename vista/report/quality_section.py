"""Quality of the run next to other runs and to baselines that need no training."""

from __future__ import annotations

import numpy as np

from vista.evaluation.comparison import AucMeasure, Estimate, Measure, mean_and_error
from vista.evaluation.metrics import calibration, gauc, normalized_entropy
from vista.report.chart import interval_chart
from vista.report.comparison_data import ORACLE, ComparisonData
from vista.report.html_page import PageSection, heading, paragraph, table


def quality_section(data: ComparisonData, split: str) -> PageSection:
    """One chart and table for the labels of impressions, and one for the ranking of items."""
    findings, body = [], []
    for measure in data.measures:
        estimates, gains = measure.estimates(), measure.gains()
        findings.append(_finding(data, measure, estimates, gains))
        body += [heading(f"{measure.title}, {split} labels"), paragraph(_cases(measure))]
        order = sorted(measure.names, key=lambda name: (np.isnan(estimates[name].value), -estimates[name].value))
        body.append(
            interval_chart(
                [(name, estimates[name]) for name in order],
                own=data.own,
                x_label=f"{measure.title}, with 95 % intervals",
            )
        )
        more = _more_metrics(data, measure)
        head = ["", measure.metric, f"{data.own} minus it"]
        head += list(next(iter(more.values())))
        rows = []
        for name in order:
            gain = gains[name].text(signed=True) if name in gains else ""
            rows.append((name, estimates[name].text(), gain, *more[name].values()))
        body.append(table(head, rows, own=data.own))
    if data.impressions is not None and len(data.impressions.tasks) > 1:
        body += [heading("Further tasks"), _further_tasks(data)]
    body.append(
        paragraph(
            "± is half of a 95 % confidence interval over users. Differences are paired: both models are evaluated on "
            "the same cases of the same users. The baselines count events, or fit a logistic regression to earlier "
            "labels (item rate, counters, pooled vectors)."
        )
    )
    return PageSection("Quality", " ".join(findings), body)


def _cases(measure: Measure) -> str:
    what = "impressions" if isinstance(measure, AucMeasure) else "cases"
    return f"{len(measure.user):,} {what} of {len(np.unique(measure.user)):,} users."


def _finding(data: ComparisonData, measure: Measure, estimates: dict[str, Estimate], gains: dict[str, Estimate]) -> str:
    """What the run gains on each other run, and on the best baseline."""
    finding = f"{measure.title}: {data.own} reaches {estimates[data.own].value:.4f}"
    runs = [name for name in data.runs if name in gains]
    rest = [name for name in gains if name not in (*runs, ORACLE) and np.isfinite(estimates[name].value)]
    best = [max(rest, key=lambda name: estimates[name].value)] if rest else []
    compared = [f"{_gain(gains[name])} {name}" for name in runs]
    compared += [f"{_gain(gains[name])} {name}, the best baseline" for name in best]
    return f"{finding}; {'; '.join(compared)}." if compared else f"{finding}; it was not compared with anything."


def _gain(gain: Estimate) -> str:
    if not gain.is_clear:
        return f"no measurable difference ({gain.text(signed=True)}) from"
    return f"{abs(gain.value):.4f} ± {gain.half_width:.4f} {'more' if gain.value > 0 else 'less'} than"


def _more_metrics(data: ComparisonData, measure: Measure) -> dict[str, dict[str, str]]:
    """Further metrics of each predictor, as cells by the head of their column."""
    if isinstance(measure, AucMeasure):
        return _task_metrics(measure)
    names = [name for name in next(iter(data.ranking.values())).values if name != measure.metric]
    return {
        predictor: {name: f"{mean_and_error(each.values[name])[0]:.4f}" for name in names}
        for predictor, each in data.ranking.items()
    }


def _task_metrics(measure: AucMeasure) -> dict[str, dict[str, str]]:
    """GAUC, normalized entropy, and calibration of the first task."""
    return {
        name: {
            "GAUC": f"{gauc(measure.user, measure.label, values).value:.4f}",
            "NE": f"{normalized_entropy(measure.label, values):.4f}",
            "calibration": f"{calibration(measure.label, values).ratio:.3f}",
        }
        for name, values in measure.probabilities.items()
    }


def _further_tasks(data: ComparisonData) -> str:
    """AUC of every task but the first, with intervals."""
    cases = data.impressions
    assert cases is not None
    columns: dict[str, dict[str, Estimate]] = {}
    for index, task in enumerate(cases.tasks[1:], 1):
        mask = cases.mask[:, index]
        values = {name: each[mask, index] for name, each in data.probabilities.items()}
        measure = AucMeasure(task, cases.user[mask], cases.seen[mask], None, cases.label[mask, index], values)
        columns[measure.title] = measure.estimates()
    rows = [(name, *(each[name].text() for each in columns.values())) for name in data.probabilities]
    return table(["", *columns], rows, own=data.own)
