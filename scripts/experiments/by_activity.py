"""Paired differences of two rows of a table for users with short and long histories.

    python -m scripts.experiments.by_activity window-dev 'vista, counters, K = 64' 'vista, counters' --seeds 1

The rows must have been measured in the same --work folder. Prints the first row minus the second on test, by
quarter of the users with labels, from the shortest histories before the labels to the longest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from scripts.experiments.paired import measured_users
from scripts.experiments.row_measurement import reported_metrics, table_log
from scripts.experiments.table_run import train_config
from scripts.experiments.tables import TABLES
from vista.arrays import Int
from vista.errors import VistaError
from vista.evaluation.comparison import Comparison, PerUserMetrics
from vista.log.splits import split_until, visible_counts

NUM_GROUPS = 4


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table in Markdown; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=sorted(name for name, table in TABLES.items() if table.windows))
    parser.add_argument("rows", nargs=2, metavar="ROW")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--data", type=Path, help="folder of the data set; default: $VISTA_DATA_DIR/<set>")
    parser.add_argument("--work", type=Path, default=Path("runs/tables"), help="folder of `reproduce`")
    settings = parser.parse_args(arguments)
    table = TABLES[settings.table]
    if unknown := [name for name in settings.rows if name not in table.rows]:
        parser.error(f"{settings.table} has no row {unknown[0]!r}")
    try:
        log = table_log(settings, table.rows[settings.rows[0]])
        seen = visible_counts(log, split_until(train_config(table, table.rows[settings.rows[0]]).data, "test"))
        row, reference = (measured_users(settings, name, settings.seeds) for name in settings.rows)
    except VistaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    names = [name for name in reported_metrics(table) if name in row[0].values and name in reference[0].values]
    lengths = seen[log.users.rows(row[0].users)]
    labeled = np.flatnonzero(~np.isnan(row[0].values[names[0]]))
    print("| events | users |", " | ".join(names), "|")
    print("| --- | ---: |", " | ".join(["---:"] * len(names)), "|")
    for group in np.array_split(labeled[np.argsort(lengths[labeled], kind="stable")], NUM_GROUPS):
        chosen = ([_of(metrics, group) for metrics in side] for side in (reference, row))
        differences = Comparison.of(*chosen).differences
        cells = [f"{differences[name].difference:+.4f} ± {differences[name].standard_error:.4f}" for name in names]
        events = f"{lengths[group].min():,} to {lengths[group].max():,}"
        print(f"| {events} | {len(group)} |", " | ".join(cells), "|")
    return 0


def _of(metrics: PerUserMetrics, rows: Int) -> PerUserMetrics:
    values = {name: value[rows] for name, value in metrics.values.items()}
    return PerUserMetrics(metrics.users[rows], values, metrics.question)


if __name__ == "__main__":
    sys.exit(main())
