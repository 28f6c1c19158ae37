"""Plot quality on validation against minutes of training, one panel per data set, from the newcomer tables.

    python -m scripts.experiments.plot_minutes

A line is one run with the default settings and ten minutes: NDCG@10 of next items after each epoch. RecTools' lines
are those of `scripts.experiments.minutes_rectools`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

from scripts.experiments.results import newest_rows, read_results
from scripts.experiments.tables import TABLES
from vista.errors import DataError

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STYLES = {
    "vista": ("VISTA", "tab:red"),
    "tail-only": ("VISTA without summaries", "tab:gray"),
    "sasrec": ("SASRec", "tab:blue"),
    "hstu": ("HSTU", "tab:cyan"),
    "fuxi_linear": ("FuXi-Linear", "tab:green"),
    "paper": ("VISTA, sizes of the paper", "tab:orange"),
    "RecTools SASRec": ("RecTools SASRec", "tab:purple"),
    "RecTools HSTU": ("RecTools HSTU", "tab:olive"),
}
"""Row of the tables -> its name in the legend, and color."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Plot the curves in the files of all tables that have them; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/minutes.png"))
    settings = parser.parse_args(arguments)
    files = {name: settings.results / f"{name}.jsonl" for name, table in TABLES.items() if table.curve}
    try:
        rows = {name: newest_rows(read_results(path)) for name, path in files.items() if path.exists()}
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    lines = {
        name: [line for seeds in models.values() for line in seeds if "curve" in line] for name, models in rows.items()
    }
    panels = {name: drawn for name, drawn in lines.items() if drawn}
    if not panels:
        print(
            f"error: no line in {settings.results} has a curve; run scripts.experiments.reproduce {' or '.join(files)}",
            file=sys.stderr,
        )
        return 1
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.6), squeeze=False)
    for axis, (name, drawn) in zip(axes[0], panels.items(), strict=True):
        for line in drawn:
            label, color = STYLES[line["model"]]
            seconds, values = zip(*line["curve"], strict=True)
            axis.plot([value / 60 for value in seconds], values, ".-", color=color, label=label)
        axis.set(xlabel="minutes of training", title=TABLES[name].data, ylim=(0, None))
        axis.grid(alpha=0.3)
        handles, names = axis.get_legend_handles_labels()
        one_each = dict(zip(names, handles, strict=True))  # a model has a line per seed
        axis.legend(list(one_each.values()), list(one_each), fontsize="small")
    axes[0][0].set_ylabel("NDCG@10, validation")
    figure.tight_layout()
    figure.savefig(settings.out, dpi=120)
    print(settings.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
