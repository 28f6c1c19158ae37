"""Plot quality against the cost of a request, one panel per history length, from the files of docs/results.

    python -m scripts.experiments.plot_lengths

A point is a model: milliseconds of a request with 500 candidates (bench_lengths.jsonl, all models in one process), and
the mean AUC of clicks over seeds in the table of that length. The line is the oracle, the true click probability.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

from scripts.benchmarks.benchmark_recorder import read_cases
from scripts.experiments.results import newest_rows, read_results
from scripts.experiments.tables.simulation_tables import LENGTHS, length_case

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COSTS, QUALITY, ORACLE = "bench_lengths.jsonl", "auc/click", "oracle"
STYLES = {
    "vista": ("VISTA", "*", "tab:red"),
    "tail-only": ("last 32 events (K = 0)", "v", "tab:gray"),
    "sasrec": ("SASRec, last 200", "o", "tab:blue"),
    "hstu": ("HSTU, last 200", "s", "tab:cyan"),
    "din": ("DIN, last 200", "D", "tab:olive"),
    "sim": ("SIM, soft search", "P", "tab:green"),
    "sim-hard": ("SIM, hard search", "X", "tab:green"),
    "twin": ("TWIN", "^", "tab:purple"),
}
"""Row of the tables -> its name in the legend, marker and color."""


def main(arguments: Sequence[str] | None = None, *, lengths: Mapping[str, int] = LENGTHS) -> int:
    """Plot the models in the files of these tables (name -> events per user); returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/lengths.png"))
    settings = parser.parse_args(arguments)
    if not (settings.results / COSTS).exists():
        print(
            f"error: {settings.results / COSTS} does not exist; run scripts.benchmarks.bench_lengths", file=sys.stderr
        )
        return 1
    cases = read_cases(settings.results / COSTS)
    costs = {row["case"]: row["value"] for row in cases if row["hardware"] == cases[-1]["hardware"]}  # of one run
    files = {table: settings.results / f"{table}.jsonl" for table in lengths}
    qualities = {table: qualities_of(read_results(path)) for table, path in files.items() if path.exists()}
    points = {table: points_of(lengths[table], models, costs) for table, models in qualities.items()}
    drawn = [table for table, models in points.items() if models]
    if not drawn:
        print(
            f"error: no row in {settings.results} has {QUALITY}; run scripts.experiments.reproduce length-1k",
            file=sys.stderr,
        )
        return 1
    figure, axes = plt.subplots(1, len(drawn), figsize=(3 * len(drawn), 3.8), sharex=True, sharey=True, squeeze=False)
    for axis, table in zip(axes[0], drawn, strict=True):
        for name, (cost, quality) in points[table].items():
            label, marker, color = STYLES[name]
            axis.scatter(cost, quality, marker=marker, color=color, s=140 if name == "vista" else 50, label=label)
        if ORACLE in qualities[table]:
            axis.axhline(qualities[table][ORACLE], linestyle=":", color="black", label="best possible")
        axis.set(xscale="log", xlabel="ms per request", title=f"{lengths[table]:,} events")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("AUC of clicks")
    legend = {name: handle for axis in axes[0] for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(list(legend.values()), list(legend), loc="lower center", ncols=min(len(legend), 5), frameon=False)
    figure.suptitle("Quality against the cost of a request with 500 candidates, by history length")
    figure.tight_layout(rect=(0, 0.14, 1, 1))
    figure.savefig(settings.out, dpi=120)
    print(settings.out)
    return 0


def qualities_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Model -> mean AUC of clicks, as in the table."""
    values_of = {
        name: [row["metrics"].get(QUALITY) for row in group] for (_, _, name), group in newest_rows(rows).items()
    }
    known = {name: [value for value in values if value is not None] for name, values in values_of.items()}
    return {name: fmean(values) for name, values in known.items() if values}


def points_of(
    length: int, qualities: Mapping[str, float], costs: Mapping[str, float]
) -> dict[str, tuple[float, float]]:
    """Model -> (milliseconds of a request, AUC) for models with both; the AUC is that of row `…-tuned` if it exists."""
    cases = {name: length_case(length, name) for name in STYLES}
    best = {name: qualities.get(f"{name}-tuned", qualities.get(name)) for name in STYLES}
    return {
        name: (costs[cases[name]], quality)
        for name, quality in best.items()
        if quality is not None and cases[name] in costs
    }


if __name__ == "__main__":
    sys.exit(main())
