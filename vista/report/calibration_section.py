"""Calibration of labeled tasks: predicted probabilities against observed frequencies."""

from __future__ import annotations

from vista.arrays import Floats, Int
from vista.evaluation.metrics import calibration
from vista.report.chart import Series, line_chart
from vista.report.comparison_data import ComparisonData
from vista.report.html_page import PageSection, heading, paragraph, table

NUM_BINS = 10


def calibration_section(data: ComparisonData) -> PageSection | str:
    """A chart and a table per task of the run; or why there is none."""
    cases = data.impressions
    if cases is None or not cases.tasks:
        return "calibration, because there are no labeled impressions"
    findings, body, measured = [], [], {}
    for index, task in enumerate(cases.tasks):
        mask = cases.mask[:, index]
        label, predicted = cases.label[mask, index], data.probabilities[data.own][mask, index]
        if not len(label) or not 0 < label.mean() < 1:
            continue
        own = measured[task] = calibration(label, predicted, NUM_BINS)
        findings.append(f"{task} {own.ratio:.3f}")
        ends = [0.0, float(max(own.bin_predictions.max(), own.bin_labels.max()))]
        chart = line_chart(
            [
                Series(data.own, own.bin_predictions.tolist(), own.bin_labels.tolist(), color=0),
                Series("perfect", ends, ends, color=6, dashed=True, has_points=False),
            ],
            x_label="mean predicted probability",
            y_label=f"{task}: share of labels that are 1",
            from_zero=True,
        )
        body += [heading(task), chart, _bins(own.bin_predictions, own.bin_labels, own.bin_counts)]
    if not measured:
        return "calibration, because no task has labels of both kinds"
    errors = [(task, f"{own.ratio:.4f}", f"{own.expected_error:.4f}") for task, own in measured.items()]
    head = [
        paragraph(
            "Cases are sorted by prediction and divided into ten groups of equal size. The ratio is the mean "
            "prediction divided by the mean label; the error is the mean distance of the groups from the diagonal."
        ),
        table(["task", "ratio", "error"], errors),
    ]
    finding = f"Ratio of the mean prediction to the mean label (1 is perfect): {', '.join(findings)}."
    return PageSection("Calibration", finding, head + body)


def _bins(predictions: Floats, labels: Floats, counts: Int) -> str:
    rows = zip(predictions, labels, counts, strict=True)
    return table(["predicted", "observed", "cases"], [(f"{p:.4f}", f"{y:.4f}", f"{n:,}") for p, y, n in rows])
