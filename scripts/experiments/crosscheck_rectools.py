"""Cross-check our SASRec and HSTU with RecTools' models of the same name, trained by the same recipe.

    python -m scripts.experiments.crosscheck_rectools SASRec --data ml-100k --seeds 1 2 3
    python -m scripts.experiments.crosscheck_rectools HSTU --data ml-100k --seeds 1 2 3 --times

Equal on both sides are the events (each user's newest 201 training events and the two held-out ones), sizes, dropout,
the full softmax over cosines divided by one temperature, Adam and its learning rates, clipping, passes, and roughly the
number of users per batch. The last pass is evaluated. Both rank all items that are not in the user's history, for the
validation label and then, with the validation event in the history, for the test label. vista's functions compute the
metrics of both; RecTools' own metrics of its lists must be equal.

Each implementation keeps its own initial values, origin of positions, place of dropout, padding and biases. A user's
first event is only an input for RecTools, and a label too for ours. With --times HSTU gets the times of the log
(RecTools as a bias by the time until the next event, ours as a bias between events and as embeddings of the gaps);
without it, both get only the order.

Use the validation metrics to choose --epochs; the rows hold them next to the test metrics. Rows go to
docs/results/crosscheck-<set>.jsonl and its Markdown table. Rows of the same command are not run again. RecTools needs a
virtual environment of its own (--rectools-venv or VISTA_RECTOOLS_VENV), which is created if missing and takes some GB.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any
from unittest.mock import patch

import numpy as np

from scripts.benchmarks.bench_training import (
    DIM,
    HEADS,
    LAYERS,
    LENGTH,
    SHAPE,
    call_rectools,
    rectools_python,
    words_of,
)
from scripts.experiments.results import append_result, hardware, markdown_table, read_results
from scripts.experiments.sets import set_folder
from vista.arrays import Int
from vista.config import (
    DataConfig,
    EvaluateConfig,
    OptimConfig,
    PrepareConfig,
    SourceColumns,
    SourceConfig,
    TrainConfig,
)
from vista.config.checks import Precision, to_dict
from vista.config.model_config import HstuConfig, SasrecConfig
from vista.config.train_config import without_places
from vista.device import cpu_settings
from vista.errors import DataError, VistaError
from vista.evaluation.cases import NextItemCases, next_item_cases
from vista.evaluation.evaluate import evaluate_model
from vista.evaluation.protocol import ranking_metrics
from vista.files import replace_text
from vista.installation import source_commit
from vista.log.event_log import EventLog
from vista.log.ingest.prepare import prepare
from vista.log.splits import visible_counts
from vista.model.baselines.history_model import HistoryModel
from vista.training import optimizers
from vista.training.optimizers import GRADIENT_CLIP
from vista.training.trainer import train_model

HELD_OUT = 2
"""Newest events per user that leave-last-out holds out from training."""
PARTS = {"validation": ("leave-last-two-out", "leave-last-out"), "test": ("leave-last-out", "all")}
"""Part -> (`until` before its labels, `until` with its labels)."""
TOP_K = [10, 50, 200]
COMPARED = ("hr@10", "ndcg@10")
WARMUP_STEPS, TEMPERATURE = 100, 0.05


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["SASRec", "HSTU"])
    parser.add_argument("--data", type=Path, required=True, help="folder of a MovieLens set, or its name there")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--times", action="store_true", help="HSTU: use the times of the data set")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument(
        "--batch-users", type=int, default=8, help="users per batch of RecTools; ours has as many on average"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each side")
    parser.add_argument("--results", type=Path, default=Path("docs/results"), help="folder of the tables")
    default = Path(os.environ.get("VISTA_RECTOOLS_VENV", "runs/baseline-venv"))
    parser.add_argument("--rectools-venv", type=Path, default=default, help="virtual environment with RecTools")
    options = parser.parse_args(arguments)
    if options.times and options.model != "HSTU":
        parser.error("--times: RecTools' SASRec does not use times; remove the option")
    return options


def cut_log(log: EventLog, folder: Path, *, length: int = LENGTH) -> EventLog:
    """A log of each user's newest length + 1 training events and two held-out events, without ratings and actions.

    So no history is split, and for its last label the model reads `length` events, as RecTools does.
    """
    users = np.arange(log.num_users)
    events = log.gather_ranges(users, np.maximum(log.lengths - HELD_OUT - length - 1, 0), log.lengths)
    frame = {
        "user": log.users.ids(np.repeat(users, events.lengths)),
        "item": log.items.ids(np.asarray(events.item)),
        "timestamp": np.asarray(events.timestamp),
    }
    if log.has_time:
        return EventLog.from_frame(frame, folder, time_unit="ms")
    return EventLog.from_frame(frame, folder, columns=SourceColumns(timestamp=None))


def cases_of(log: EventLog) -> dict[str, NextItemCases]:
    """The labels of both parts, as in vista's evaluation."""
    return {
        part: next_item_cases(log, visible_counts(log, before), end=visible_counts(log, end))
        for part, (before, end) in PARTS.items()
    }


def write_split(log: EventLog, path: Path, *, times: bool) -> dict[str, NextItemCases]:
    """Write the split of a log for rectools_training.py, with users and items by row; returns the labels.

    Args:
        times: write the events' times in seconds; otherwise ordinals, which keep the log's order.

    Raises:
        DataError: if an event repeats an item of its user, which RecTools would exclude from its lists.
    """
    cases = cases_of(log)
    clock = np.arange(log.num_events, dtype=np.int64)
    first = np.concatenate([[0], np.cumsum(log.lengths)])
    everything = log.gather(np.arange(log.num_users))
    item = np.asarray(everything.item).astype(np.int64)
    if times:
        clock = np.asarray(everything.timestamp) // 1000
    seen = visible_counts(log, "leave-last-two-out")
    user = np.repeat(np.arange(log.num_users), log.lengths)
    trained = np.arange(log.num_events) - first[user] < seen[user]
    arrays = {"user": user[trained], "item": item[trained], "timestamp": clock[trained]}
    for part, each in cases.items():
        at = first[each.user] + each.seen
        arrays |= {f"{part}_user": each.user, f"{part}_item": each.item, f"{part}_timestamp": clock[at]}
    pairs = np.unique(user * log.num_items + item)
    if len(pairs) < log.num_events:
        raise DataError(
            f"{log.path}: {log.num_events - len(pairs)} events repeat an item of their user, which RecTools never "
            "recommends; use a data set without repeated items"
        )
    np.savez(path, **arrays)
    return cases


def label_ranks(lists: Int, label: Int) -> Int:
    """0-based rank int64 [N] of each label int64 [N] in its list int64 [N, k]; k if the list lacks the label."""
    hit = lists == label[:, None]
    ranks: Int = np.where(hit.any(1), hit.argmax(1), lists.shape[1])
    return ranks


def our_config(options: argparse.Namespace, log: EventLog, seed: int, run_dir: Path) -> TrainConfig:
    """The shared recipe: softmax over the whole catalog, and export of the last pass."""
    trained = int(visible_counts(log, "leave-last-two-out").sum())
    return TrainConfig(
        model={"SASRec": SasrecConfig, "HSTU": HstuConfig}[options.model](
            dim=DIM,
            num_heads=HEADS,
            num_layers=LAYERS,
            history_limit=LENGTH,
            dropout=options.dropout,
            temperature=TEMPERATURE,
            ignore=[] if options.times else ["times"],
        ),
        data=DataConfig(
            path=str(log.path),
            tokens_per_batch=round(options.batch_users * trained / log.num_users),
            num_negatives=log.num_items,
            exclude_seen=True,
        ),
        optim=OptimConfig(
            learning_rate=options.learning_rate,
            warmup_steps=WARMUP_STEPS,
            epochs=options.epochs,
            next_weight=1.0,
            window_weight=0.0,
            validate_every=0,
        ),
        run_dir=str(run_dir),
        seed=seed,
        device="cpu",
        precision=Precision.float32,
        num_threads=options.threads,
    )


def run_ours(config: TrainConfig, log: EventLog) -> tuple[dict[str, float], dict[str, Any], float]:
    """Train and evaluate ours; returns metrics, configuration and seconds of training."""
    began = time.perf_counter()
    with patch.object(optimizers, "WEIGHT_DECAY", 0.0):  # as in RecTools
        model = train_model(config, log)
    seconds = time.perf_counter() - began
    assert isinstance(model, HistoryModel)
    with cpu_settings(config.num_threads):
        metrics = {part: evaluate_model(model, log, EvaluateConfig(split=part, top_k=TOP_K)).metrics for part in PARTS}
    recorded = without_places(to_dict(config))
    recorded["optim"]["weight_decay"] = 0.0
    return joined(metrics), recorded, seconds


def run_theirs(
    options: argparse.Namespace, python: Path, data: Path, cases: Mapping[str, NextItemCases], seed: int
) -> tuple[dict[str, float], dict[str, Any], float]:
    """Train and evaluate RecTools; returns metrics, configuration and seconds of training."""
    lists = data.with_name(f"lists-{seed}.npz")
    settings = {
        "model": options.model,
        "epochs": options.epochs,
        "dropout": options.dropout,
        "batch_size": options.batch_users,
        "loss": "softmax",
        "distance": "cosine",
        "temperature": TEMPERATURE,
        "lr": options.learning_rate,
        "warmup_steps": WARMUP_STEPS,
        "gradient_clip": GRADIENT_CLIP,
        "threads": options.threads,
        "seed": seed,
        "recommend": lists,
        "top_k": max(TOP_K),
    }
    flags = ["--decay", "--scale-inputs", "--mask-padding", *(["--relative-time"] if options.times else [])]
    report = call_rectools(python, data, [*SHAPE, *words_of(settings), *flags])
    with np.load(lists, allow_pickle=False) as arrays:
        own = {part: ranking_metrics(label_ranks(arrays[part], each.item), TOP_K) for part, each in cases.items()}
    for part, metrics in report["metrics"].items():
        if any(abs(own[part][name] - value) > 1e-9 for name, value in metrics.items()):
            raise DataError(f"{part} metrics of the same lists differ: RecTools {metrics}, vista {own[part]}")
    config = {key: report[key] for key in ("settings", "versions", "parameters", "items")}
    return joined(own), config, sum(report["seconds_per_epoch"])


def joined(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """All test metrics, and the compared validation metrics as "validation <name>"."""
    return {**metrics["test"], **{f"validation {name}": metrics["validation"][name] for name in COMPARED}}


def comparison(ours: Sequence[Mapping[str, float]], theirs: Sequence[Mapping[str, float]]) -> str:
    """Means and spreads of both sides, and whether their ranges over seeds overlap."""
    lines = []
    for name in [*COMPARED, *(f"validation {name}" for name in COMPARED)]:
        own, other = ([row[name] for row in rows] for rows in (ours, theirs))
        overlap = max(min(own), min(other)) <= min(max(own), max(other))
        lines.append(
            f"{name:<20} ours {_spread(own)}, RecTools {_spread(other)}: {fmean(own) / fmean(other) - 1:+.1%}, "
            f"ranges {'overlap' if overlap else 'do not overlap'}"
        )
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cross-check; returns the exit status."""
    options = parse(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        python = rectools_python(options.rectools_venv)
        with tempfile.TemporaryDirectory(prefix="vista-crosscheck-") as folder:
            print(_crosscheck(options, python, Path(folder)))
    except VistaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _crosscheck(options: argparse.Namespace, python: Path, folder: Path) -> str:
    source = set_folder(options.data.name, options.data if options.data.exists() else None)
    prepare(PrepareConfig(out=str(folder / "whole"), events=SourceConfig(kind="auto", paths=[str(source)])))
    log = cut_log(EventLog.open(folder / "whole"), folder / "log")
    cases = write_split(log, folder / "baseline.npz", times=options.times)
    name = options.model.lower() + (", times" if options.times else "")
    theirs, ours = f"{name}, RecTools", name
    results = options.results / f"crosscheck-{source.name}.jsonl"
    rows = read_results(results) if results.exists() else []
    done = {(row["model"], row["command"]): row["metrics"] for row in rows}
    metrics_of: dict[str, list[dict[str, float]]] = {ours: [], theirs: []}
    for seed in options.seeds:
        config = our_config(options, log, seed, folder / f"run-{seed}")
        for model in metrics_of:
            command = _command(options, source.name, seed)
            metrics = done.get((model, command))
            if metrics is None:
                run = (
                    run_ours(config, log)
                    if model == ours
                    else run_theirs(options, python, folder / "baseline.npz", cases, seed)
                )
                metrics = run[0]
                append_result(results, _line(options, source.name, model, seed, command, *run))
            metrics_of[model].append(metrics)
            print(
                f"{model}, seed {seed}: " + ", ".join(f"{key} {value:.4f}" for key, value in metrics.items()),
                flush=True,
            )
    replace_text(results.with_suffix(".md"), markdown_table(read_results(results)))
    return comparison(*metrics_of.values())


def _command(options: argparse.Namespace, data: str, seed: int) -> str:
    words = ["python", "-m", "scripts.experiments.crosscheck_rectools", options.model]
    words += ["--data", data, "--seeds", str(seed)]
    words += ["--times"] if options.times else []
    words += words_of({key: getattr(options, key) for key in ("epochs", "learning_rate", "dropout", "batch_users")})
    return shlex.join(words)


def _line(
    options: argparse.Namespace,
    data: str,
    model: str,
    seed: int,
    command: str,
    metrics: Mapping[str, float],
    config: Mapping[str, Any],
    seconds: float,
) -> dict[str, Any]:
    return {
        "table": f"crosscheck-{data}",
        "data": data,
        "model": model,
        "seed": seed,
        "metrics": dict(metrics),
        "command": command,
        "config": dict(config),
        "commit": source_commit(),
        "hardware": hardware() | {"threads": options.threads},
        "seconds": round(seconds, 1),
    }


if __name__ == "__main__":
    sys.exit(main())
