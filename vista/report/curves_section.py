"""How training went: losses by step, and metrics by validation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from vista.report.chart import Series, line_chart
from vista.report.html_page import PageSection, heading, table
from vista.runs.curve_points import thinned
from vista.runs.run_files import RunFiles

NOT_LOSSES = ("step", "epoch", "learning_rate", "gradient_norm", "tokens_per_s", "waiting_share")
MAX_POINTS = 400
"""Most points of a curve; longer ones are thinned."""


def curves_section(files: RunFiles) -> PageSection | str:
    """Curves of the losses and the validation metrics; or why there are none."""
    steps, validations = files.steps, files.validations
    if not steps and not validations:
        return f"training curves, because {files.metrics_problem or 'metrics.jsonl has no measurements'}"
    body = []
    if steps:
        steps = thinned(steps, MAX_POINTS)
        names = [name for name in steps[0] if name not in NOT_LOSSES and _is_positive(steps[0][name])]
        series = [
            Series(
                f"{name} (from {steps[0][name]:.2f})",
                [row["step"] for row in steps],
                [_number(row.get(name)) / steps[0][name] for row in steps],
                color=index,
                has_points=False,
            )
            for index, name in enumerate(names)
        ]
        body.append(line_chart(series, x_label="step", y_label="loss relative to its first value", from_zero=True))
        losses = [(name, *(f"{_number(row.get(name)):.4f}" for row in (steps[0], steps[-1]))) for name in names]
        body.append(table(["loss", f"step {steps[0]['step']}", f"step {steps[-1]['step']}"], losses))
    finding = "The run was not validated, so only losses are shown."
    if validations:
        best = files.best or validations[-1]
        last = validations[-1]
        finding = f"Validation was best after epoch {best['epoch']} of {last['epoch']}; that model is measured below."
        if best is last:
            finding += " This is the last epoch, so longer training may improve the model further."
        body += [heading("Validation"), *_validation(validations)]
    return PageSection("Training", finding, body)


def _validation(validations: Sequence[dict[str, Any]]) -> list[str]:
    names = list(validations[0]["validation"])
    plotted = [name for name in names if name.partition("@")[0] == "ndcg" or name.startswith("auc/")]
    plotted = plotted or names[:1]
    charts = [
        line_chart(
            [Series(name, [row["epoch"] for row in validations], [_metric(row, name) for row in validations])],
            x_label="epoch",
            y_label=f"validation: {name}",
        )
        for name in plotted[:2]
    ]
    rows = [(name, *(f"{_metric(row, name):.4f}" for row in validations)) for name in names]
    return [*charts, table(["metric", *(f"epoch {row['epoch']}" for row in validations)], rows)]


def _metric(row: dict[str, Any], name: str) -> float:
    return _number(row["validation"].get(name))


def _number(value: Any) -> float:
    """A number of metrics.jsonl, where null stands for an undefined one."""
    return float(value) if isinstance(value, (int, float)) else float("nan")


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and value > 0 and math.isfinite(value)
