"""Paired differences between rows of a table: the same users, with their metrics averaged over seeds first.

The metrics per user lie in the work folder, next to the models, so a difference is measured where its rows were.

    python -m scripts.experiments.paired window-dev 'vista, counters, K = 64' 'vista, counters' --seeds 1

prints the first row minus the second on test, by quarter of the users with labels, from the shortest histories before
the labels to the longest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scripts.experiments.results import defined, newest_rows
from scripts.experiments.row_measurement import per_user_file, reported_metrics, row_folder, table_log
from scripts.experiments.row_origin import RowOrigin
from scripts.experiments.table_run import UNTRAINED_SEED, command_of, train_config
from scripts.experiments.tables import TABLES
from vista.arrays import Int
from vista.errors import ConfigError, VistaError
from vista.evaluation.comparison import Comparison, PerUserMetrics
from vista.log.splits import split_until, visible_counts

NUM_GROUPS = 4


def paired_lines(settings: argparse.Namespace, lines: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """A result for each pair of rows of the table whose metrics per user exist, unless `lines` has it already.

    Its metrics are those of the pair's first row minus those of the second on test, as `vista compare` shows them with
    the second row as `a`. Its errors are their standard errors over users.
    """
    table = TABLES[settings.table]
    title = f"{settings.table}, paired differences"
    newest = newest_rows(lines)
    for pair in table.pairs:
        seeds = _common_seeds(settings, pair, newest)
        files = {row: _files(settings, row, seeds) for row in pair}
        if not seeds or not all(file.exists() for own in files.values() for file in own):
            continue
        row, reference = (measured_users(settings, name, seeds) for name in pair)
        differences, reported = Comparison.of(reference, row).differences, reported_metrics(table)
        line = {
            "table": title,
            "data": table.data,
            "model": " − ".join(pair),
            "seed": seeds[0],
            "seeds": seeds,
            "metrics": defined({name: differences[name].difference for name in reported}),
            "errors": defined({name: differences[name].standard_error for name in reported}),
            "command": command_of(settings, pair, seeds),
            "config": {"seeds": seeds, "runs": {row: own[0].parts[-3] for row, own in files.items()}},
            **RowOrigin(0.0).fields(),
        }
        before = newest.get((title, table.data, line["model"]), [])
        if not any(all(old[key] == line[key] for key in ("metrics", "config")) for old in before):
            yield line


def measured_users(settings: argparse.Namespace, row: str, seeds: Sequence[int]) -> list[PerUserMetrics]:
    """Metrics per user of a row on test, for each seed.

    Raises:
        ConfigError: the row was not measured in the work folder with one of the seeds.
    """
    for file in (files := _files(settings, row, seeds)):
        if not file.exists():
            raise ConfigError(f"{file}: does not exist; measure the row {row!r} with `reproduce` first")
    return [PerUserMetrics.load(file) for file in files]


def _common_seeds(
    settings: argparse.Namespace,
    pair: Sequence[str],
    newest: Mapping[tuple[str, str, str], Sequence[Mapping[str, Any]]],
) -> list[int]:
    """Seeds of all trained rows of a pair."""
    table = TABLES[settings.table]
    trained = [row for row in pair if not table.rows[row].untrained]
    seeds = [{line["seed"] for line in newest.get((settings.table, table.data, row), [])} for row in trained]
    return sorted(set.intersection(*seeds)) if seeds else [UNTRAINED_SEED]


def _files(settings: argparse.Namespace, row: str, seeds: Sequence[int]) -> list[Path]:
    own = [UNTRAINED_SEED] if TABLES[settings.table].rows[row].untrained else seeds
    return [per_user_file(row_folder(settings, row, seed), row, "test") for seed in own]


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
