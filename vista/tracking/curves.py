"""The plot of a run: its loss and its validation metrics."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vista.installation import require_module

CURVES_FILE = "curves.png"


def plot_curves(run_dir: Path, rows: Sequence[dict[str, Any]], metric: str | None) -> Path:
    """Write curves.png to the run's folder.

    Args:
        rows: of metrics.jsonl.
        metric: the one by which the best model is chosen; None without validation.
    """
    figure = require_module("matplotlib.figure", "plots").Figure(figsize=(9, 3.5), layout="constrained")
    loss, quality = figure.subplots(1, 2)
    trained = [row for row in rows if "validation" not in row]
    validated = [row for row in rows if metric in row.get("validation", {})]
    loss.plot([row["step"] for row in trained], [row["loss"] for row in trained])
    loss.set(xlabel="step", ylabel="loss", title="training")
    if validated:
        steps = [row["step"] for row in validated]
        quality.plot(steps, [row["validation"][metric] for row in validated], marker="o")
    quality.set(xlabel="step", ylabel=metric or "", title="validation")
    path = run_dir / CURVES_FILE
    figure.savefig(path, dpi=100)
    return path
