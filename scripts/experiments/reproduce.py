"""Reproduce a table, or some of its rows: prepare the log, train, refresh a store, evaluate through the scorer.

A baseline has no store; it is evaluated on the raw history up to each label.

    python -m scripts.experiments.reproduce ml-1m --list
    python -m scripts.experiments.reproduce ml-1m --data path/to/ml-1m --seeds 1 2 3
    python -m scripts.experiments.reproduce kuairand --data path/to/KuaiRand-27K/data --rows vista hstu
    timeout -s INT 30m python -m scripts.experiments.reproduce simulation --rows vista tail-only

Every model and seed adds lines to docs/results/<table>.jsonl; at the end docs/results/<table>.md is written from it,
and the metrics of the new lines are printed.
Lines that exist with the same configuration are not run again, and a stopped run resumes. The exit status is 0 if all
lines exist, 1 after an error, and 130 after Ctrl-C. scripts/experiments/tables defines the tables.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.contrib.logging import logging_redirect_tqdm

from scripts.experiments.results import append_result, defined, markdown_table, read_results
from scripts.experiments.row_measurement import RowMeasurement, measure, paired_lines, table_log
from scripts.experiments.table_run import TableRun, command_of, listing, table_runs
from scripts.experiments.tables import TABLES
from vista.device import cpu_settings, keep_freed_memory
from vista.errors import VistaError
from vista.files import replace_text, writable_folder
from vista.progress_bar import progress_bar, progress_shown, ticking


def main(arguments: Sequence[str] | None = None) -> int:
    """Run or list the missing lines of a table; returns the exit status."""
    settings = _arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # `timeout -s INT` interrupts as Ctrl-C does, but a shell makes background jobs ignore that signal.
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
                status = _run_all(settings, [run for run in runs if run.missing], results)
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
    parser.add_argument("--list", action="store_true", help="list finished and missing lines and the estimated time")
    return parser.parse_args(arguments)


def _run_all(settings: argparse.Namespace, runs: Sequence[TableRun], results: Path) -> int:
    if not runs:
        print(f"{settings.table}: all runs are done")
        return 0
    lines = []
    total_s = round(sum(run.estimate_s for run in runs), 1)
    try:
        with (
            logging_redirect_tqdm(),
            progress_shown(),
            progress_bar(total=total_s, desc="runs", unit="s") as bar,
        ):
            for number, run in enumerate(runs, start=1):
                bar.set_description(f"{number} of {len(runs)}: {run.label}", refresh=False)
                with ticking(bar):
                    log = table_log(settings, run.row)
                    for measured in measure(settings, run, log):
                        lines.append(_line(settings, run, measured))
                        append_result(results, lines[-1])
                bar.update(run.estimate_s)
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
