"""Reproduce a table, or some of its rows: prepare the log, train, refresh a store, evaluate through the scorer.

A baseline has no store; it is evaluated on the raw history up to each label.

    python -m scripts.experiments.reproduce ml-1m --list
    python -m scripts.experiments.reproduce ml-1m --data path/to/ml-1m --seeds 1 2 3
    python -m scripts.experiments.reproduce kuairand --data path/to/KuaiRand-27K/data --rows vista hstu
    python -m scripts.experiments.reproduce simulation --rows vista tail-only --minutes 30

Every model and seed adds lines to docs/results/<table>.jsonl; at the end docs/results/<table>.md is written from it,
and the metrics of the new lines are printed.
Lines that exist with the same configuration are not run again, and a stopped run resumes. The exit status is 0 if all
lines exist, 1 after an error, and 130 after the time limit or Ctrl-C. scripts/experiments/tables defines the tables.
"""

from __future__ import annotations

import argparse
import logging
import math
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm.contrib.logging import logging_redirect_tqdm

from scripts.experiments.paired import paired_lines
from scripts.experiments.results import append_result, defined, markdown_table, read_results
from scripts.experiments.row_measurement import RowMeasurement, measure, table_log
from scripts.experiments.row_progress import RowProgress
from scripts.experiments.table_run import TableRun, command_of, listing, table_runs
from scripts.experiments.tables import TABLES
from vista.device import cpu_settings, keep_freed_memory
from vista.errors import VistaError
from vista.files import replace_text, writable_folder


def main(
    arguments: Sequence[str] | None = None,
    progress_of: Callable[[Sequence[float], float | None], RowProgress] = RowProgress,
) -> int:
    """Run or list the missing lines of a table; returns the exit status.

    Args:
        arguments: words of the command line; None for this process's own.
        progress_of: makes the progress bar from the estimates and the limit in seconds.
    """
    settings = _arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # --minutes interrupts as Ctrl-C does, but a shell makes background jobs ignore that signal.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    results = Path(settings.results) / f"{settings.table}.jsonl"
    keep_freed_memory()
    try:
        with cpu_settings(settings.threads):
            runs = table_runs(settings, read_results(results) if results.exists() else [])
            if settings.list:
                print(listing(settings, runs))
                return 0
            writable_folder(settings.results, "--results")
            try:
                status = _run_all(settings, [run for run in runs if run.missing], results, progress_of)
                if results.exists():
                    for line in list(paired_lines(settings, read_results(results))):
                        append_result(results, line)
                return status
            finally:
                if results.exists():
                    replace_text(results.with_suffix(".md"), markdown_table(read_results(results)))
    except VistaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=sorted(TABLES), metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="rows of the table; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--data", type=Path, help="folder of the data set; default: $VISTA_DATA_DIR/<set>")
    parser.add_argument("--work", type=Path, default=Path("runs/tables"), help="folder for logs, runs and stores")
    parser.add_argument("--results", type=Path, default=Path("docs/results"), help="folder of the result files")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's default")
    parser.add_argument("--minutes", type=_minutes, help="stop after this time, as Ctrl-C does; rerun to resume")
    parser.add_argument("--list", action="store_true", help="list finished and missing lines and the estimated time")
    return parser.parse_args(arguments)


def _minutes(text: str) -> float:
    minutes = float(text)
    if not 0 < minutes < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number of minutes, got {text}")
    return minutes


def _run_all(
    settings: argparse.Namespace,
    runs: Sequence[TableRun],
    results: Path,
    progress_of: Callable[[Sequence[float], float | None], RowProgress],
) -> int:
    if not runs:
        print(f"{settings.table}: all runs are done")
        return 0
    lines = []
    limit_s = None if settings.minutes is None else 60 * settings.minutes
    try:
        with logging_redirect_tqdm(), progress_of([run.estimate_s for run in runs], limit_s) as progress:
            for run in runs:
                with progress.run(run.label):
                    log = table_log(settings, run.row)
                    for measured in measure(settings, run, log, progress):
                        lines.append(_line(settings, run, measured))
                        append_result(results, lines[-1])
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "stopped; rerun the command to resume")
        return 130
    for line in lines:
        print(f"{settings.table}, {line['model']}, seed {line['seed']}")
        for name, value in line["metrics"].items():
            print(f"  {name:<22} {'–' if value is None else format(value, '.4f')}")
    return 0


def _line(settings: argparse.Namespace, run: TableRun, measured: RowMeasurement) -> dict[str, Any]:
    table, metrics = TABLES[settings.table], measured.metrics
    if table.validation:
        metrics = {f"validation {name}": value for name, value in measured.origin.validation.items()} | metrics
    return {
        "table": settings.table,
        "data": table.data,
        "model": measured.name,
        "seed": run.seed,
        "metrics": defined(metrics),
        "command": command_of(settings, [run.name], [run.seed]),
        "config": run.config,
        **measured.origin.fields(),
        **({"errors": defined(measured.errors)} if measured.errors else {}),
        **({"curve": list(measured.origin.curve)} if table.curve and measured.origin.curve else {}),
    }


if __name__ == "__main__":
    sys.exit(main())
