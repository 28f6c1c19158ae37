"""Benchmark the time per request of each model in the tables of history lengths.

    python -m scripts.benchmarks.bench_lengths

Histories have 200 to 64,000 simulated events; a request has 500 candidates, on one thread, in float32. VISTA answers
through the scorer from an int8 store. Baselines read the raw history from the memory-mapped log in each request and
cache nothing between requests. The models are those of scripts/experiments/tables with random weights; they
alternate over the same users. scripts/experiments/reproduce.py measures their quality.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path

import numpy as np
import torch

from scripts.benchmarks.benchmark import BenchmarkRecorder, benchmark_parser, interleaved
from scripts.experiments.serving_cost import NUM_CANDIDATES, history_model_server
from scripts.experiments.table_run import train_config
from scripts.experiments.tables import TABLES
from scripts.experiments.tables.simulation_tables import LENGTHS, length_case
from scripts.experiments.tables.table import Table
from vista.config import ItemTableConfig, PrepareConfig, SimulateConfig, SourceConfig, TrainConfig
from vista.device import keep_freed_memory, set_threads
from vista.log.event_log import EventLog
from vista.log.ingest.prepare import prepare
from vista.model.baselines.history_model import HistoryModel
from vista.model.ranking_model import RankingModel
from vista.model.registry import ARCHITECTURES
from vista.refresh import refresh
from vista.scorer import Scorer
from vista.simulation.simulate import ITEMS_FILE, simulate
from vista.training.log_schema import schema_of

NUM_USERS = 24
OURS = "vista"
SAME_COST = ("vista-all-labels", "vista-tuned", "sim-tuned", "twin-tuned", "oracle")
"""Rows whose requests cost the same as those of another row."""


def bench_length(recorder: BenchmarkRecorder, table: Table, length: int, folder: Path) -> None:
    """Time all models over users with `length` events on average."""
    source, num_users = folder / "source", 6 if recorder.quick else NUM_USERS
    simulate(SimulateConfig(out=str(source), num_users=num_users, events_per_user=length, impressions_per_user=20))
    events = SourceConfig(kind="simulated", paths=[str(source)])
    topics = ItemTableConfig(paths=[str(source / ITEMS_FILE)], categories=["topic"])
    prepare(PrepareConfig(out=str(folder / "log"), events=events, items=topics))
    log = EventLog.open(folder / "log")
    items = np.random.default_rng(0).integers(0, log.num_items, NUM_CANDIDATES)
    with ExitStack() as opened:
        contestants: dict[str, Callable[[], object]] = {}
        for name, row in table.rows.items():
            if name in SAME_COST:
                continue
            model = untrained_model(train_config(table, row), log)
            contestants[name] = request(model, log, items, folder / name, opened)
        for call in contestants.values():
            assert np.isfinite(np.asarray(call())).all()
        timing = interleaved(contestants, rounds=5 if recorder.quick else 25, max_seconds=120)
    for name, each in timing.items():
        recorder.add_time(length_case(length, name), each, "ms", baseline=timing[OURS])


def untrained_model(config: TrainConfig, log: EventLog) -> RankingModel:
    """A row's model for this log with random weights, in eval mode."""
    torch.manual_seed(1)
    made = ARCHITECTURES[config.model.architecture](config.model, schema_of(log, config), log.items, config.data)
    made.read_item_table(log.item_features)
    return made.eval()


def request(
    model: RankingModel, log: EventLog, items: np.ndarray, folder: Path, opened: ExitStack
) -> Callable[[], object]:
    """A function that scores the first task of all candidates for the next user."""
    rows = cycle(range(log.num_users))
    if isinstance(model, HistoryModel):
        serve = history_model_server(model, log, items)
        return lambda: serve(np.array([next(rows)]))
    model.save_pretrained(folder / "model")
    refresh(model, log, folder / "store")  # type: ignore[arg-type]
    scorer = opened.enter_context(Scorer.open(folder / "model", folder / "store"))
    candidates, ids = scorer.encode(log.items.ids(items)), log.users.ids(np.arange(log.num_users))
    _, now = log.time_range() or (0, 0)

    def ask() -> object:
        user = next(rows)
        return scorer.score(ids[user : user + 1], candidates, now=now)

    return ask


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    options = benchmark_parser("lengths", __doc__).parse_args(arguments)
    set_threads(1)
    keep_freed_memory()
    recorder = BenchmarkRecorder("lengths", out=options.out, quick=options.quick)
    for name, length in LENGTHS.items():
        if recorder.quick and length > 1_000:
            break
        with tempfile.TemporaryDirectory(prefix="vista-bench-") as folder:
            bench_length(recorder, TABLES[name], length, Path(folder))
    recorder.print_summary()
    return 0


if __name__ == "__main__":
    sys.exit(main())
