"""Benchmark a training step with features of items, events, and requests against one with ids alone.

    python -m scripts.benchmarks.bench_training_features

Both models train on the same simulated log with the settings of `experiment=simulation`, on the same chunks and labels;
one log also has eight features of items, two of events, and four of requests. A step contains building the batch, which
training does in another thread. The steps alternate on one thread. Their CPU time counts, because other load on the
machine hardly affects it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from scripts.benchmarks.benchmark import BenchmarkRecorder, interleaved, recording, timing_of
from vista.config import SimulateConfig, SourceColumns, TrainConfig
from vista.config.composition import compose_config
from vista.device import keep_freed_memory, set_threads
from vista.examples.batch import Batch
from vista.log.event_log import EventLog
from vista.simulation.simulate import EVENTS_FILE, IMPRESSIONS_FILE, generate, write
from vista.training.trainer import Trainer

SIMULATIONS = {
    f"{num_items:,} items": SimulateConfig(num_users=100, events_per_user=4_000, num_items=num_items)
    for num_items in (1_600, 50_000)
}
QUICK_SIMULATIONS = {"400 items": SimulateConfig(num_users=20, events_per_user=500, num_items=400)}
CATEGORIES_OF_ITEMS, NUMBERS_OF_ITEMS, NUM_VALUES = 5, 3, 100
OF_EVENTS = ["surface"], ["dwell"]
OF_REQUESTS = ["device", "shelf"], ["hour", "place"]
"""Categories and numbers."""
WARM_UP = 3
"""Steps that do not count."""


def drawn(names: tuple[list[str], list[str]], num_rows: int, rng: np.random.Generator) -> list[pl.Series]:
    """Columns of categories with values as skewed as a Zipf law, and of numbers."""
    categories, numbers = names
    values = pl.Series([f"value {number}" for number in range(NUM_VALUES)])
    texts = [values.gather(rng.zipf(1.3, num_rows) % NUM_VALUES).alias(name) for name in categories]
    return texts + [pl.Series(name, rng.lognormal(size=num_rows)) for name in numbers]


def simulated(folder: Path, config: SimulateConfig) -> tuple[EventLog, EventLog]:
    """One simulated log without features, and with them."""
    log, rng = generate(config), np.random.default_rng(0)
    write(log, folder)
    events, shown = (pl.read_parquet(folder / name) for name in (EVENTS_FILE, IMPRESSIONS_FILE))
    columns = SourceColumns(action="action", labels=["click", "like", "long_view"])
    frames: dict[str, Any] = {"time_unit": "ms", "columns": columns}
    of_items = (
        [f"category {number}" for number in range(CATEGORIES_OF_ITEMS)],
        [f"number {number}" for number in range(NUMBERS_OF_ITEMS)],
    )
    featured = EventLog.from_frame(
        events.with_columns(drawn(OF_EVENTS, len(events), rng)),
        folder / "featured",
        impressions=shown.with_columns(drawn(OF_REQUESTS, len(shown), rng)),
        items=pl.DataFrame({"item": np.arange(1, config.num_items + 1)}).with_columns(
            drawn(of_items, config.num_items, rng)
        ),
        categories=OF_EVENTS[0],
        numbers=OF_EVENTS[1],
        request_categories=OF_REQUESTS[0],
        request_numbers=OF_REQUESTS[1],
        **frames,
    )
    return EventLog.from_frame(events, folder / "plain", impressions=shown, **frames), featured


class TrainingSteps:
    """A trainer, and calls that each take its next step."""

    def __init__(self, log: EventLog, run_dir: Path) -> None:
        words = ["experiment=simulation", f"data.path={log.path}", f"run_dir={run_dir}", "device=cpu"]
        self.trainer = Trainer(compose_config(TrainConfig, [*words, "optim.validate_every=0"]), log)
        self.trainer.model.train()
        self.seconds: list[float] = []
        """CPU time of each step."""

    def step(self) -> Batch:
        """Build the next batch and train on it."""
        source, began = self.trainer.source, time.process_time()
        batch = source.batch(*divmod(len(self.seconds), source.num_batches(0)))
        self.trainer._step(batch)
        self.seconds.append(time.process_time() - began)
        return batch


def measure(recorder: BenchmarkRecorder, name: str, config: SimulateConfig, folder: Path) -> None:
    """Run the case of one simulation."""
    plain, featured = (TrainingSteps(log, folder / "run") for log in simulated(folder, config))
    model = featured.trainer.model
    num = tuple(map(len, (model.schema.item_features, model.schema.event_features, model.schema.request_features)))
    assert num == (CATEGORIES_OF_ITEMS + NUMBERS_OF_ITEMS, 2, 4)
    for _ in range(WARM_UP):
        ours, ids = featured.step(), plain.step()
        assert torch.equal(ours.user, ids.user) and torch.equal(ours.labels.gap, ids.labels.gap)
    interleaved({"ids": plain.step, "features": featured.step}, rounds=5 if recorder.quick else 41, warmup=1)
    assert all(bool(weight.isfinite().all()) for weight in model.parameters())
    ours_s, ids_s = (timing_of(each.seconds[WARM_UP:]) for each in (featured, plain))
    recorder.add_time(
        f"{name}, training step, d={model.config.dim}: with {num[0]} features of items, {num[1]} of events, and "
        f"{num[2]} of requests against ids alone",
        ours_s,
        "CPU ms",
        baseline=ids_s,
        bar="value <= 1.5 * baseline",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    keep_freed_memory()
    set_threads(1)
    with recording("training_features", __doc__, arguments) as recorder:
        for name, config in (QUICK_SIMULATIONS if recorder.quick else SIMULATIONS).items():
            measure(recorder, name, config, recorder.folder / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
