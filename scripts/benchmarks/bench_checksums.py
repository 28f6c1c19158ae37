"""Benchmark the checksums of an event log: their share of `vista prepare`, and the time of `EventLog.verify`.

    python -m scripts.benchmarks.bench_checksums

A simulated Parquet file is ingested, and the XXH3 checksums of the log's files are timed within each ingest: their cost
is far below the spread of an ingest, so a comparison with an ingest without checksums could not show it. The SHA-256 of
the source, which runs in the parser's process, is timed alone. That process has started before.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from unittest import mock

from scripts.benchmarks.benchmark import BenchmarkRecorder, interleaved, recording, timing_of
from vista import arrays
from vista.config import PrepareConfig, SimulateConfig, SourceConfig
from vista.files import HashedFile
from vista.log.event_log import EventLog
from vista.log.ingest.prepare import prepare
from vista.log.ingest.source_parser import SourceParser
from vista.simulation.simulate import EVENTS_FILE, simulate

EVENTS_PER_USER = 4_000
NUM_USERS, QUICK_USERS = 1_000, 10


class TimedFile(HashedFile):
    """A file that times its checksum."""

    seconds = 0.0
    """Of all files together."""

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Write all of `data`."""
        view = memoryview(data).cast("B")
        start = time.perf_counter()
        self._hash.update(view)
        TimedFile.seconds += time.perf_counter() - start
        self._file.write(view)
        self.size += len(view)
        return len(view)


def measure(recorder: BenchmarkRecorder, folder: Path, parser: SourceParser) -> None:
    """Run all cases."""
    num_users = QUICK_USERS if recorder.quick else NUM_USERS
    simulate(SimulateConfig(out=str(folder / "source"), num_users=num_users, events_per_user=EVENTS_PER_USER))
    events = SourceConfig(kind="simulated", paths=[str(folder / "source")])
    numbers, shares = count(), []

    def ingest() -> Path:
        path, before, start = folder / f"log-{next(numbers)}", TimedFile.seconds, time.perf_counter()
        with mock.patch.object(arrays, "HashedFile", TimedFile):
            prepare(PrepareConfig(out=str(path), events=events), parser=parser)
        shares.append(100 * (TimedFile.seconds - before) / (time.perf_counter() - start))
        return path

    def hash_source() -> None:
        with (folder / "source" / EVENTS_FILE).open("rb") as file:
            hashlib.file_digest(file, hashlib.sha256)

    log = EventLog.open(ingest())
    gigabytes = log.verify() / 1e9
    contestants: dict[str, Callable[[], object]] = {
        "ingest": ingest,
        "verify": lambda: EventLog.open(log.path).verify(),
        "source": hash_source,
    }
    timing = interleaved(contestants, rounds=3 if recorder.quick else 9, warmup=1, max_seconds=40)
    name, share, seconds = f"ingest of {log.num_events:,} events, Parquet", timing_of(shares), timing["ingest"].median_s
    assert share.median_s > 0, "no checksum was computed"
    recorder.add(f"{name}: share of the checksums", share.median_s, "%", bar="value <= 5", spread=share.spread_s)
    recorder.add(
        f"{name}: share of the SHA-256 of the source",
        100 * timing["source"].median_s / seconds,
        "%",
        spread=100 * timing["source"].spread_s / seconds,
    )
    recorder.add(
        f"verify a log of {gigabytes * 1e3:.1f} MB, in the page cache",
        timing["verify"].median_s / gigabytes,
        "s per GB",
        bar="value <= 1",
        spread=timing["verify"].spread_s / gigabytes,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    with recording("checksums", __doc__, arguments) as recorder, SourceParser() as parser:
        measure(recorder, recorder.folder, parser)
    return 0


if __name__ == "__main__":
    sys.exit(main())
