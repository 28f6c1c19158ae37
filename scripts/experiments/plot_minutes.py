"""Plot quality on validation against minutes of training, one panel per data set, from the newcomer tables.

    python -m scripts.experiments.plot_minutes

A line is one run with the default settings and ten minutes: NDCG@10 of next items after each pass.
Dotted lines are counting baselines on the test, which differs from the validation by one event per user.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from scripts.experiments.results import newest_rows, read_results
from scripts.experiments.tables import TABLES

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STYLES = {"vista": ("VISTA", "tab:red"), "sasrec": ("SASRec", "tab:blue"), "hstu": ("HSTU", "tab:cyan")}
"""Row of the tables -> its name in the legend, and color."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Plot the curves in the files of all tables that have them; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/minutes.png"))
    settings = parser.parse_args(arguments)
    files = {name: settings.results / f"{name}.jsonl" for name, table in TABLES.items() if table.curve}
    rows = {
        name: [line for seeds in newest_rows(read_results(path)).values() for line in seeds]
        for name, path in files.items()
        if path.exists()
    }
    panels = {name: lines for name, lines in rows.items() if any("curve" in line for line in lines)}
    if not panels:
        names = " or ".join(files)
        print(
            f"error: no line in {settings.results} has a curve; run scripts.experiments.reproduce {names}",
            file=sys.stderr,
        )
        return 1
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.6), squeeze=False)
    for axis, (name, lines) in zip(axes[0], panels.items(), strict=True):
        _draw(axis, lines)
        axis.set(xlabel="minutes of training", title=TABLES[name].data, ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    axes[0][0].set_ylabel("NDCG@10, validation")
    figure.tight_layout()
    figure.savefig(settings.out, dpi=120)
    print(settings.out)
    return 0


def _draw(axis: Any, lines: Sequence[Mapping[str, Any]]) -> None:
    labeled = set[str]()
    for line in lines:
        model = line["model"]
        if "curve" in line:
            label, color = STYLES[model]
            seconds, values = zip(*line["curve"], strict=True)
            minutes = [value / 60 for value in seconds]
            axis.plot(minutes, values, ".-", color=color, label=None if model in labeled else label)
            labeled.add(model)
        elif "ndcg@10" in line["metrics"]:
            axis.axhline(line["metrics"]["ndcg@10"], linestyle=":", color="gray")
            axis.annotate(model, (0, line["metrics"]["ndcg@10"]), fontsize="x-small")


if __name__ == "__main__":
    sys.exit(main())
