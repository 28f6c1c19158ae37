"""Run the whole pipeline, from a log to a store, scores and metrics, and write a report.

    make demo                          simulates a lifelong log with labeled impressions
    make demo DATA=events.csv          uses your own events, whose columns are guessed as by `vista prepare events.csv`
    make demo DATA=path/to/ml-1m       MovieLens (ml-1m, ml-1m-half, ml-latest-small, ml-100k)

All files go to demo/<name>: log/, vista/ and without-summary/ (two runs), the stores, and report.html.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vista.config import PrepareConfig, ReportConfig, SimulateConfig, SourceColumns, TrainConfig
from vista.config.checks import WorldName, to_dict
from vista.config.composition import compose_config
from vista.config.train_config import without_places
from vista.errors import ConfigError, VistaError
from vista.installation import __version__
from vista.log.event_log import EventLog
from vista.log.ingest.prepare import prepare
from vista.log.splits import split_until
from vista.machine import usable_cores
from vista.model.vista_model import VistaModel
from vista.progress_bar import progress_shown
from vista.refresh import RefreshOptions, refresh
from vista.report.report import WrittenReport, write_report
from vista.report.report_data import Latency
from vista.scorer import Scorer
from vista.simulation.simulate import simulate
from vista.training.trainer import train

TRAINED_EVENTS = 1_600_000
"""Events that training reads over all epochs with DATA, so that the demo takes some minutes on two cores."""

NOTE = (
    "This page was written by make demo. It shows a small model after a minute of training: after epoch 0, which fits "
    "counters and pooled vectors without attention; with attention to the newest events (without-summary, K = 0); and "
    "with a summary of the whole history. Baselines read all events and labels before each question."
)
SIMULATED_NOTE = (
    "In this simulated world, half of the candidates are items that the user comes back to: how often and how recently "
    "decides a click. The others need two old interests at once. Each impression is an event of the history, too, with "
    "the action click or no_click. The oracle knows the true probabilities."
)


@dataclass(frozen=True, slots=True)
class DemoSizes:
    """Sizes of the simulated log and of the measurement of latency."""

    num_users: int = 150
    events_per_user: int = 2_000
    episode_events: int = 150
    history_lengths: tuple[int, ...] = (100, 1_000, 10_000, 100_000)
    num_candidates: int = 500


FULL_SIZES = DemoSizes()


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, help="file of events, or folder of a MovieLens set; default: simulate a log"
    )
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for all files; default: demo")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="arguments of `vista train`, such as optim.epochs=1"
    )
    settings = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        with progress_shown():
            run(settings.data, settings.out, settings.overrides)
    except VistaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run(data: Path | None, out: Path, overrides: list[str], sizes: DemoSizes = FULL_SIZES) -> WrittenReport:
    """Run the demo and return what was written."""
    began = time.perf_counter()
    folder = out / ("simulation" if data is None else data.resolve().stem if data.is_file() else data.resolve().name)
    words = ["experiment=demo-log" if data else "experiment=demo", f"data.path={folder / 'log'}"]
    words += [f"run_dir={folder / 'vista'}", *overrides]
    config = compose_config(TrainConfig, words)
    _clear_if_other(folder, data, config, sizes)
    _say(1, "prepare the log")
    _prepare(data, folder, sizes)
    log = EventLog.open(folder / "log")
    print(log)
    # The user's overrides come later and win.
    first = [f"num_threads={max(usable_cores() // 2, 1)}"]
    if data:  # as many epochs as take some minutes
        first.append(f"optim.epochs={int(np.clip(TRAINED_EVENTS // max(log.num_events, 1), 1, 12))}")
    words = [words[0], *first, *words[1:]]

    _say(2, "train; at the same time, the same model without a summary, whose attention reads the newest events alone")
    with _alongside(
        [*words, f"run_dir={folder / 'without-summary'}", "model.num_seeds=0"], folder / "without-summary.log"
    ):
        model = train(compose_config(TrainConfig, words), log)

    _say(3, "refresh the stores: one without test labels, one with all events for serving; score")
    options = RefreshOptions()
    tested = refresh(model, log, folder / "store-test", until=split_until(config.data, "test"), options=options)
    served = refresh(model, log, folder / "store", options=options)
    print(tested, served, sep="\n")
    with Scorer.open(model, folder / "store") as scorer:
        user = log.users.ids(np.array([0])).tolist()[0]
        _, end = log.time_range() or (0, 0)
        ranking = scorer.rank(user, top_k=5, exclude_tail=True, now=end)
        print(
            f"user {user}: " + ", ".join(f"{i} ({s:.3f})" for i, s in zip(ranking.items, ranking.scores, strict=True))
        )
    latency = measure_latency(model, folder / "latency", sizes)

    often = f"refreshed every {config.data.refresh_days:g} days" if config.data.refresh_days else "refreshed once"
    _say(4, f"evaluate from the store ({often}), next to baselines, and write the report")
    report = write_report(
        ReportConfig(
            run=str(folder / "vista"),
            others=[str(folder / "without-summary")],
            store=str(folder / "store-test"),
            out=str(folder / "report.html"),
            verify_log=False,
            num_threads=config.num_threads,
            category=None if data else "topic",
        ),
        latency=latency,
        notes=(NOTE,) if data else (NOTE, SIMULATED_NOTE),
    )
    print(report)
    print(f"\nreport: {report.path} ({time.perf_counter() - began:.0f} s in all)")
    return report


@contextmanager
def _alongside(words: list[str], output: Path) -> Iterator[None]:
    """Run `vista train` with these words, while the block runs, in a process of its own whose output is a file. If the
    block fails, that run stops with a checkpoint."""
    command = [sys.executable, "-m", "vista.cli", "train", *words]
    with output.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield
        if process.wait():
            raise VistaError(f"vista train {' '.join(words)} failed; see {output}")
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def measure_latency(model: VistaModel, folder: Path, sizes: DemoSizes) -> Latency:
    """Score latency of users with growing history lengths."""
    shutil.rmtree(folder, ignore_errors=True)
    rng = np.random.default_rng(0)
    ids = model.items.ids(np.arange(len(model.items)))
    lengths = np.array(sizes.history_lengths)
    events = {
        "user": np.repeat(np.arange(len(lengths)), lengths),
        "item": ids[rng.integers(0, len(ids), lengths.sum())],
        "action": np.array(model.schema.actions)[np.arange(lengths.sum()) % len(model.schema.actions)],
        "timestamp": 1_700_000_000_000 + 60_000 * np.concatenate([np.arange(n) for n in lengths]),
    }
    log = EventLog.from_frame(events, folder / "log", time_unit="ms", columns=SourceColumns(action="action"))
    refresh(model, log, folder / "store", options=RefreshOptions(users_per_batch=1))
    candidates = ids[rng.integers(0, len(ids), sizes.num_candidates)]
    with Scorer.open(model, folder / "store") as scorer:
        encoded = scorer.encode(candidates)
        return Latency.measure(scorer, range(len(lengths)), lengths.tolist(), encoded, 1_800_000_000_000)


def _prepare(data: Path | None, folder: Path, sizes: DemoSizes) -> None:
    """Create folder/log unless it exists, so that a repeated demo resumes."""
    source = data or folder / "source"
    if not (folder / "log").exists():
        if data is None:
            simulation = SimulateConfig(
                out=str(source),
                world=WorldName.mixed,
                num_users=sizes.num_users,
                events_per_user=sizes.events_per_user,
                episode_events=sizes.episode_events,
            )
            print(simulate(simulation))
        words = ["events.kind=simulated", f"events.paths=[{source}]"]
        words += [f"items.paths=[{source / 'items.parquet'}]", "items.categories=[topic]"]
        words += ["impressions.as_events=click"]
        words = [f"files=[{source}]"] if data else words
        print(prepare(compose_config(PrepareConfig, [f"out={folder / 'log'}", *words])))


def _clear_if_other(folder: Path, data: Path | None, config: TrainConfig, sizes: DemoSizes) -> None:
    """Empty the folder if its demo had other data, settings or another version, so that only the same demo resumes."""
    mark = folder / "demo.json"
    mine, theirs = folder.resolve(), data.resolve() if data else None
    if theirs is not None and (mine == theirs or mine in theirs.parents or theirs in mine.parents):
        raise ConfigError(f"--out: {folder} overlaps with the folder of --data; choose another folder")
    if not mark.exists() and folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"--out: {folder} holds files that are not the demo's; choose another folder, or remove it")
    simulated = [sizes.num_users, sizes.events_per_user, sizes.episode_events]
    source = [str(data.resolve()), TRAINED_EVENTS] if data else simulated
    trained = without_places(to_dict(config)) | {"seed": config.seed}
    asked = json.dumps({"data": source, "train": trained, "version": __version__})
    if mark.exists() and mark.read_text() != asked:
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(asked)


def _say(number: int, what: str) -> None:
    print(f"\n[{number}/4] {what}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
