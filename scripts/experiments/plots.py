"""Plot docs/results: AUC of clicks against the length of histories, with a line per model.

    python -m scripts.experiments.plots

A point is the mean over seeds in the table of that length, of the row `…-tuned` if there is one. The dotted line is the
oracle, the true click probability.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from scripts.experiments.results import newest_rows, read_results
from scripts.experiments.tables.simulation_tables import LENGTHS
from vista.errors import DataError, VistaError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUALITY = "auc/click"
MODELS = {
    "oracle": ("oracle: the true probability", ":", "black"),
    "vista": ("vista, no pooled vectors", "*-", "tab:red"),
    "epoch 0": ("vista, epoch 0", "P--", "tab:red"),
    "tail-only": ("the last 32 events (K = 0)", "v-", "tab:gray"),
    "counters": ("counters", "p-", "tab:pink"),
    "label trees": ("trees on counters and clicks", "h-", "goldenrod"),
    "pooled vectors": ("pooled vectors", "d-", "tab:orange"),
    "sasrec": ("SASRec, last 200", "o-", "tab:blue"),
    "hstu": ("HSTU, last 200", "s-", "tab:cyan"),
    "din": ("DIN, last 200", "D-", "tab:olive"),
    "sim": ("SIM, soft search", "P-", "tab:green"),
    "sim-hard": ("SIM, hard search", "X-", "tab:brown"),
    "twin": ("TWIN", "^-", "tab:purple"),
}
"""Row of the tables of history lengths -> its name in the legend, line, and color."""


def plot_lengths(results: Path, lengths: Mapping[str, int] = LENGTHS) -> Figure:
    """Plot the models in the files of these tables (name -> events per user).

    Raises:
        DataError: a file is invalid, or no row can be plotted.
    """
    files = {lengths[table]: results / f"{table}.jsonl" for table in sorted(lengths, key=lambda table: lengths[table])}
    qualities = {length: qualities_of(read_results(path)) for length, path in files.items() if path.exists()}
    if not any(qualities.values()):
        raise DataError(f"no row in {results} has {QUALITY}; run scripts.experiments.reproduce length-1k")
    import matplotlib

    matplotlib.use("Agg")  # needs no display
    import matplotlib.pyplot as plt

    figure: Figure
    figure, axis = plt.subplots(figsize=(8, 4.5))
    for name, (label, line, color) in MODELS.items():
        points = [(length, models[name]) for length, models in qualities.items() if name in models]
        if points:
            axis.plot(*zip(*points, strict=True), line if len(points) > 1 else line[0], color=color, label=label)
    axis.set(xscale="log", xlabel="events per user (simulated)", ylabel="AUC of clicks", xticks=list(qualities))
    axis.set_xticks([], minor=True)
    axis.set_xticklabels([f"{length:,}" for length in qualities])
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    figure.set_layout_engine("constrained")
    return figure


def qualities_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Model of MODELS -> mean AUC of clicks over seeds, of its row `…-tuned` if there is one."""
    values_of = {
        name: [row["metrics"].get(QUALITY) for row in group] for (_, _, name), group in newest_rows(rows).items()
    }
    known = {name: [value for value in values if value is not None] for name, values in values_of.items()}
    best = {name: known.get(f"{name}-tuned") or known.get(name) for name in MODELS}
    return {name: fmean(values) for name, values in best.items() if values}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the plot; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/lengths.png"))
    settings = parser.parse_args(arguments)
    try:
        plot_lengths(settings.results).savefig(settings.out, dpi=120)
    except VistaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(settings.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
