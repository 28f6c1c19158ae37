"""Draw quality against the cost of a request, one panel a length of history, from the tables of docs/results.

    python scripts/plot_lengths.py --out docs/results/lengths.png

A point is a model: milliseconds of one request of 500 candidates, and AUC of the first task, means over seeds. The
truth's AUC is a line.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

from vista.results import read_results

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LENGTHS = {
    "length-200": "200",
    "length-1k": "1,000",
    "simulation": "4,000",
    "length-16k": "16,000",
    "length-64k": "64,000",
}
"""Table -> mean events of a history."""
COST, QUALITY, TRUTH = "request ms", "auc/click", "truth"


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw what the tables have; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/lengths.png"))
    settings = parser.parse_args(arguments)
    files = {table: settings.results / f"{table}.jsonl" for table in LENGTHS}
    found = {table: read_results(path) for table, path in files.items() if path.exists()}
    points = {table: points_of(rows) for table, rows in found.items()}
    drawn = [table for table, models in points.items() if models]
    if not drawn:
        print(f"error: no row in {settings.results} has {COST}; run scripts/reproduce.py length-1k", file=sys.stderr)
        return 1
    figure, axes = plt.subplots(1, len(drawn), figsize=(3.2 * len(drawn), 3.4), sharex=True, sharey=True, squeeze=False)
    for axis, table in zip(axes[0], drawn, strict=True):
        for name, (cost, quality) in points[table].items():
            axis.scatter(cost, quality, color="black" if name.startswith("vista") else "grey")
            axis.annotate(name, (cost, quality), textcoords="offset points", xytext=(4, 4), fontsize=8)
        truth = [row["metrics"][QUALITY] for row in found[table] if row["model"] == TRUTH]
        if truth:
            axis.axhline(truth[-1], linestyle=":", color="grey")
        axis.set(xscale="log", xlabel=COST, title=f"{LENGTHS[table]} events")
    axes[0][0].set_ylabel(QUALITY)
    figure.tight_layout()
    figure.savefig(settings.out, dpi=120)
    print(settings.out)
    return 0


def points_of(rows: Sequence[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Model -> mean cost and quality over its seeds, of the newest row of each; not of other ways to serve it."""
    newest = {(row["model"], row["seed"]): row["metrics"] for row in rows}
    by_model: dict[str, list[tuple[float, float]]] = {}
    for (model, _), metrics in newest.items():
        if ", " not in model and metrics.get(COST) is not None and metrics.get(QUALITY) is not None:
            by_model.setdefault(model, []).append((metrics[COST], metrics[QUALITY]))
    return {model: (fmean(c for c, _ in each), fmean(q for _, q in each)) for model, each in by_model.items()}


if __name__ == "__main__":
    sys.exit(main())
