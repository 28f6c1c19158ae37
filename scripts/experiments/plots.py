"""Plot the results in docs/results: quality against the cost of a request, or against minutes of training.

    python -m scripts.experiments.plots lengths    # one panel per history length
    python -m scripts.experiments.plots minutes    # one panel per data set

A point of `lengths` is a model: milliseconds of a request with 500 candidates (bench_lengths.jsonl, all models in one
process), and the mean AUC of clicks over seeds in the table of that length. The dotted line is the oracle, the true
click probability. A line of `minutes` is one run with the default settings and ten minutes: NDCG@10 of next items on
validation after each epoch. RecTools' lines are those of `scripts.experiments.minutes_rectools` at commit `722927ee`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from scripts.benchmarks.benchmark import read_cases
from scripts.experiments.results import newest_rows, read_results
from scripts.experiments.tables import TABLES
from scripts.experiments.tables.simulation_tables import LENGTHS, length_case
from vista.errors import DataError, VistaError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COSTS, QUALITY, ORACLE = "bench_lengths.jsonl", "auc/click", "oracle"
MODELS = {
    "vista": ("VISTA", "*", "tab:red"),
    "tail-only": ("last 32 events (K = 0)", "v", "tab:gray"),
    "sasrec": ("SASRec, last 200", "o", "tab:blue"),
    "hstu": ("HSTU, last 200", "s", "tab:cyan"),
    "din": ("DIN, last 200", "D", "tab:olive"),
    "sim": ("SIM, soft search", "P", "tab:green"),
    "sim-hard": ("SIM, hard search", "X", "tab:green"),
    "twin": ("TWIN", "^", "tab:purple"),
}
"""Row of the tables of history lengths -> its name in the legend, marker and color."""
RUNS = {
    "vista": ("VISTA", "tab:red"),
    "tail-only": ("VISTA without summaries", "tab:gray"),
    "sasrec": ("SASRec", "tab:blue"),
    "hstu": ("HSTU", "tab:cyan"),
    "fuxi_linear": ("FuXi-Linear", "tab:green"),
    "paper": ("VISTA, sizes of the paper", "tab:orange"),
    "RecTools SASRec": ("RecTools SASRec", "tab:purple"),
    "RecTools HSTU": ("RecTools HSTU", "tab:olive"),
}
"""Row of the newcomer tables -> its name in the legend, and color."""


def plot_lengths(results: Path, lengths: Mapping[str, int] = LENGTHS) -> Figure:
    """Plot the models in the files of these tables (name -> events per user).

    Raises:
        DataError: a file is missing or invalid, or no row can be plotted.
    """
    if not (results / COSTS).exists():
        raise DataError(f"{results / COSTS} does not exist; run scripts.benchmarks.bench_lengths")
    cases = read_cases(results / COSTS)
    costs = {row["case"]: row["value"] for row in cases if row["hardware"] == cases[-1]["hardware"]}  # of one run
    files = {table: results / f"{table}.jsonl" for table in lengths}
    qualities = {table: qualities_of(read_results(path)) for table, path in files.items() if path.exists()}
    points = {table: points_of(lengths[table], models, costs) for table, models in qualities.items()}
    drawn = [table for table, models in points.items() if models]
    if not drawn:
        raise DataError(f"no row in {results} has {QUALITY}; run scripts.experiments.reproduce length-1k")
    figure: Figure
    figure, axes = pyplot().subplots(
        1, len(drawn), figsize=(3 * len(drawn), 3.8), sharex=True, sharey=True, squeeze=False
    )
    for axis, table in zip(axes[0], drawn, strict=True):
        for name, (cost, quality) in points[table].items():
            label, marker, color = MODELS[name]
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
    return figure


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
    cases = {name: length_case(length, name) for name in MODELS}
    best = {name: qualities.get(f"{name}-tuned", qualities.get(name)) for name in MODELS}
    return {
        name: (costs[cases[name]], quality)
        for name, quality in best.items()
        if quality is not None and cases[name] in costs
    }


def pyplot() -> Any:
    """matplotlib.pyplot without a display. It takes a second to import, and few users of this module plot."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def plot_minutes(results: Path) -> Figure:
    """Plot the curves in the files of all tables that have them.

    Raises:
        DataError: a file is invalid, or no line has a curve.
    """
    files = {name: results / f"{name}.jsonl" for name, table in TABLES.items() if table.curve}
    rows = {name: newest_rows(read_results(path)) for name, path in files.items() if path.exists()}
    lines = {
        name: [line for seeds in models.values() for line in seeds if "curve" in line] for name, models in rows.items()
    }
    panels = {name: drawn for name, drawn in lines.items() if drawn}
    if not panels:
        raise DataError(f"no line in {results} has a curve; run scripts.experiments.reproduce {' or '.join(files)}")
    figure: Figure
    figure, axes = pyplot().subplots(1, len(panels), figsize=(5 * len(panels), 3.6), squeeze=False)
    for axis, (name, drawn) in zip(axes[0], panels.items(), strict=True):
        for line in drawn:
            label, color = RUNS[line["model"]]
            seconds, values = zip(*line["curve"], strict=True)
            axis.plot([value / 60 for value in seconds], values, ".-", color=color, label=label)
        axis.set(xlabel="minutes of training", title=TABLES[name].data, ylim=(0, None))
        axis.grid(alpha=0.3)
        handles, names = axis.get_legend_handles_labels()
        one_each = dict(zip(names, handles, strict=True))  # a model has a line per seed
        axis.legend(list(one_each.values()), list(one_each), fontsize="small")
    axes[0][0].set_ylabel("NDCG@10, validation")
    figure.tight_layout()
    return figure


PLOTS = {"lengths": plot_lengths, "minutes": plot_minutes}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a plot; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plot", choices=PLOTS)
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    parser.add_argument("--out", type=Path, help="default: docs/results/<plot>.png")
    settings = parser.parse_args(arguments)
    out = settings.out or Path("docs/results") / f"{settings.plot}.png"
    try:
        PLOTS[settings.plot](settings.results).savefig(out, dpi=120)
    except VistaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
