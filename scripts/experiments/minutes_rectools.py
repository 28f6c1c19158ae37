"""Add RecTools' SASRec and HSTU to a newcomer table: its default settings, trained for ten minutes.

    python -m scripts.experiments.minutes_rectools newcomer-ml-latest-small --threads 1
    python -m scripts.experiments.minutes_rectools newcomer-ml-1m-half --models SASRec --threads 1

The rows are measured like those of `scripts.experiments.reproduce` for the same table. All models train on the events
before the validation part and rank all items that are not in the user's history. Validation asks the same users after
each epoch and chooses the epoch that is measured on the test. The seconds include setup and validations. vista's
functions compute the metrics from RecTools' lists.

All settings of RecTools are the defaults of its constructors, except that the time limits training instead of three
epochs. Without times in the log, its HSTU does without its bias by time.

Lines go to docs/results/<table>.jsonl and its Markdown table. Lines of the same command are not run again. RecTools
needs a virtual environment of its own (--rectools-venv or VISTA_RECTOOLS_VENV), which is created if missing and takes
some GB.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scripts.benchmarks.rectools_process import call_rectools, rectools_python, words_of
from scripts.experiments.crosscheck_rectools import PARTS, label_ranks, write_split
from scripts.experiments.results import append_result, hardware, markdown_table, read_results
from scripts.experiments.row_measurement import TOP_K, table_log
from scripts.experiments.table_run import train_config
from scripts.experiments.tables import TABLES
from vista.arrays import Int
from vista.errors import DataError, VistaError
from vista.evaluation.cases import NextItemCases, next_item_cases
from vista.evaluation.protocol import ranking_metrics
from vista.files import replace_text
from vista.installation import source_commit
from vista.log.event_log import EventLog
from vista.log.splits import visible_counts

MODELS = ("SASRec", "HSTU")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    tables = [name for name, table in TABLES.items() if table.curve and not table.windows]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=tables, metavar="TABLE", help=", ".join(tables))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--minutes", type=float, default=10.0, help="time per model and seed; default: 10")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's default")
    parser.add_argument("--data", type=Path, help="folder of the data set; default: $VISTA_DATA_DIR/<set>")
    parser.add_argument("--work", type=Path, default=Path("runs/tables"), help="folder for logs")
    parser.add_argument("--results", type=Path, default=Path("docs/results"), help="folder of the result files")
    default = Path(os.environ.get("VISTA_RECTOOLS_VENV", "runs/baseline-venv"))
    parser.add_argument("--rectools-venv", type=Path, default=default, help="virtual environment with RecTools")
    return parser.parse_args(arguments)


def asked_rows(log: EventLog, cases: NextItemCases, max_users: int) -> Int:
    """int64 [N] rows of the validation cases that vista's validation asks during training (optim.validation_users)."""
    before, end = (visible_counts(log, until) for until in PARTS["validation"])
    return np.searchsorted(cases.user, next_item_cases(log, before, end=end, max_users=max_users).user)


def validation_curve(report: Mapping[str, Any], lists: Int, labels: Int) -> list[list[float]]:
    """[[seconds, NDCG@10], …] of all validations.

    Args:
        report: that of rectools_training.py --minutes.
        lists: int64 [validations, N, 10].
        labels: int64 [N].

    Raises:
        DataError: if the process has computed other metrics, and so may have chosen another epoch for the test.
    """
    values = [ranking_metrics(label_ranks(each, labels), [10])["ndcg@10"] for each in lists]
    if not np.allclose(values, report["ndcg@10"], rtol=0, atol=1e-9):
        raise DataError(f"NDCG@10 of the same lists differs: RecTools' process {report['ndcg@10']}, vista {values}")
    return [list(pair) for pair in zip(report["seconds"], values, strict=True)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the missing lines; returns the exit status."""
    options = parse(arguments)
    try:
        python = rectools_python(options.rectools_venv)
        with tempfile.TemporaryDirectory(prefix="vista-minutes-") as folder:
            _run_all(options, python, Path(folder))
    except VistaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _run_all(options: argparse.Namespace, python: Path, folder: Path) -> None:
    table = TABLES[options.table]
    log = table_log(options, table.rows["vista"])
    cases = write_split(log, folder / "split.npz", times=log.has_time)
    optim = train_config(table, table.rows["vista"]).optim
    asked = asked_rows(log, cases["validation"], optim.validation_users)
    np.save(folder / "asked.npy", asked)
    results = options.results / f"{options.table}.jsonl"
    done = {row["command"] for row in read_results(results)} if results.exists() else set()
    for seed in options.seeds:
        for model in options.models:
            command = _command(options, model, seed)
            if command in done:
                print(f"RecTools {model}, seed {seed}: done already")
                continue
            line = _run(options, python, folder, log, cases, asked, model, seed) | {"command": command}
            append_result(results, line)
            replace_text(results.with_suffix(".md"), markdown_table(read_results(results)))
            best = max(value for _, value in line["curve"])
            print(
                f"RecTools {model}, seed {seed}: {len(line['curve'])} validations in {line['seconds']} s, best NDCG@10 "
                f"{best:.4f}; test: " + ", ".join(f"{name} {value:.4f}" for name, value in line["metrics"].items()),
                flush=True,
            )


def _run(
    options: argparse.Namespace,
    python: Path,
    folder: Path,
    log: EventLog,
    cases: Mapping[str, NextItemCases],
    asked: Int,
    model: str,
    seed: int,
) -> dict[str, Any]:
    """Train and measure a model; returns its line without the command."""
    lists = folder / "lists.npz"
    settings = {
        "model": model,
        "minutes": options.minutes,
        "threads": options.threads,
        "seed": seed,
        "asked": folder / "asked.npy",
        "lists": lists,
        "top_k": max(TOP_K),
    }
    words = [*words_of(settings), *([] if log.has_time or model != "HSTU" else ["--no-times"])]
    report = call_rectools(python, folder / "split.npz", words)
    with np.load(lists, allow_pickle=False) as arrays:
        curve = validation_curve(report, arrays["validation"], cases["validation"].item[asked])
        metrics = ranking_metrics(label_ranks(arrays["test"], cases["test"].item), TOP_K)
    recorded = {key: report[key] for key in ("settings", "parameters", "versions")}
    return {
        "table": options.table,
        "data": TABLES[options.table].data,
        "model": f"RecTools {model}",
        "seed": seed,
        "metrics": metrics,
        "config": {"minutes": options.minutes, **recorded},
        "commit": source_commit(),
        "hardware": hardware() | {"precision": "float32"} | ({"threads": options.threads} if options.threads else {}),
        "seconds": round(report["seconds"][-1], 1),
        "curve": curve,
    }


def _command(options: argparse.Namespace, model: str, seed: int) -> str:
    words = ["python", "-m", "scripts.experiments.minutes_rectools", options.table, "--models", model]
    words += ["--seeds", str(seed), "--minutes", f"{options.minutes:g}"]
    words += ["--threads", str(options.threads)] if options.threads else []
    return shlex.join(words)


if __name__ == "__main__":
    sys.exit(main())
