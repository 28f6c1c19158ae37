"""Benchmark `vista watch source=kafka://` against `vista watch folder=` on the same events: from arrival to the store.

    python -m scripts.benchmarks.bench_kafka

Each look appends the same new events of all users to a copy of a small log, and brings a copy of its store up to date.
The topic holds JSON objects; the folder holds one CSV or Parquet file. The topic is served by the mock cluster in
librdkafka, in this process, so its work counts as part of the watch's. The time of a look includes its parser process
or its fetches, validation, sorting, fsync, rename, and the incremental refresh, but not the start of the watch.

The rounds of all sources alternate. A result is the median over rounds.
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from scripts.benchmarks.benchmark import BenchmarkRecorder, benchmark_parser, interleaved, recording
from scripts.benchmarks.workloads import ACTIONS, START_MS, lifelong_log, popular_items, untrained
from vista.config import SourceConfig, WatchConfig
from vista.config.log_config import StreamConfig
from vista.device import keep_freed_memory, set_threads
from vista.log.event_log import EventLog
from vista.log.histories import DAY_MS
from vista.refresh import refresh
from vista.refresh.watch import Watch

NUM_ITEMS = 5_000
OLD_EVENTS = 50
"""Events per user before the new ones."""
EVENTS = SourceConfig(timestamp="timestamp", time_unit="ms", action="action")
NUM_PARTITIONS = 4
"""Partitions that the mock cluster gives a topic."""


class WatchWorkload:
    """New events of all users of a small log, as files and as topics of a mock cluster."""

    def __init__(self, folder: Path, num_users: int, num_events: int) -> None:
        from confluent_kafka import Producer

        self.folder, self.num_events = folder, num_events
        log = lifelong_log(folder / "log", [OLD_EVENTS] * num_users, num_items=NUM_ITEMS)
        model = untrained(log, dim=64, num_seeds=32)
        model.save_pretrained(folder / "model")
        refresh(model, log, folder / "store")
        rng = np.random.default_rng(3)
        self.frame = pl.DataFrame(
            {
                "user": rng.integers(1, num_users + 1, num_events),
                "item": popular_items(rng, num_events, NUM_ITEMS) + 1,
                "timestamp": START_MS + 365 * DAY_MS + np.arange(num_events),
                "action": pl.Series(ACTIONS).gather(rng.integers(0, len(ACTIONS), num_events)),
            }
        )
        self.messages = [json.dumps(row).encode() for row in self.frame.iter_rows(named=True)]
        self.partitions = (self.frame["user"].to_numpy() % NUM_PARTITIONS).tolist()
        self._cluster = Producer({"test.mock.num.brokers": 1, "queue.buffering.max.messages": 0, "log_level": 0})
        broker = next(iter(self._cluster.list_topics(timeout=10).brokers.values()))
        self._servers = f"{broker.host}:{broker.port}"
        self._numbers = itertools.count()

    def watch(self, kind: str) -> Watch:
        """A watch of a new copy of the log and the store, after the events have arrived as "kafka" or as a suffix."""
        number = next(self._numbers)
        own = self.folder / f"copy-{number}"
        for name in ("log", "store"):
            shutil.copytree(self.folder / name, own / name)
        settings: dict[str, Any] = {"source": f"kafka://{self._servers}/events-{number}"}
        if kind == "kafka":
            for partition, message in zip(self.partitions, self.messages, strict=True):
                self._cluster.produce(f"events-{number}", message, partition=partition)
            self._cluster.flush()
        else:
            settings = {"folder": str(own / "incoming")}
            file = own / "incoming" / f"events.{kind}"
            file.parent.mkdir()
            self.frame.write_parquet(file) if kind == "parquet" else self.frame.write_csv(file)
            file.with_name(f"{file.name}.done").touch()
        return Watch(
            WatchConfig(
                data=str(own / "log"),
                model=str(self.folder / "model"),
                store=str(own / "store"),
                stream=StreamConfig(max_messages=self.num_events),
                events=EVENTS,
                **settings,
            )
        )

    def look(self, watching: Watch) -> None:
        """One look, which must bring all events into the log and the store."""
        report = watching.look()
        assert report.refreshes and EventLog.open(watching.config.data).segments[-1].events.num_rows == self.num_events


def bench_watch(recorder: BenchmarkRecorder, folder: Path, num_users: int, num_events: int, rounds: int) -> None:
    """Events per second from arrival to the store, by source."""
    workload = WatchWorkload(folder, num_users, num_events)
    kinds = ("kafka", "csv", "parquet")
    ready = {kind: [workload.watch(kind) for _ in range(rounds + 1)] for kind in kinds}

    def look(kind: str) -> Callable[[], None]:
        return lambda: workload.look(ready[kind].pop())

    timing = interleaved({kind: look(kind) for kind in kinds}, rounds=rounds, warmup=1, min_sample_s=0)
    name = f"{num_events:,} events of {num_users:,} users from Kafka to the store"
    for kind in kinds[1:]:
        case, ours = f"{name}, against watch folder= with {kind}", timing["kafka"]
        recorder.add_rate(case, num_events, ours, "events/s", baseline=timing[kind], bar="ratio >= 0.7")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    options = benchmark_parser("kafka", __doc__).parse_args(arguments)
    set_threads(0)
    keep_freed_memory()
    sizes = [(50, 500)] if options.quick else [(200, 20_000), (2_000, 50_000)]
    with recording("kafka", __doc__, options) as recorder:
        for number, (num_users, num_events) in enumerate(sizes):
            bench_watch(
                recorder, recorder.folder / str(number), num_users, num_events, rounds=3 if options.quick else 5
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
