"""Benchmark the checksums of an event log: their share of `vista prepare`, and the time of `EventLog.verify`.

    python -m scripts.benchmarks.bench_checksums

A simulated Parquet file is ingested with and without XXH3 checksums of the log's files, in alternation, so that a slow
disk affects both. Their own cost is far below the spread of an ingest, so it is also measured alone: the seconds of
checking the log once from the page cache, and of the SHA-256 of the source, over those of the ingest. The parser's
process has started before.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from unittest import mock

from scripts.benchmarks.benchmark_recorder import BenchmarkRecorder, benchmark_parser
from scripts.benchmarks.timing import interleaved
from vista.config import PrepareConfig, SimulateConfig, SourceConfig
from vista.errors import LogFormatError
from vista.files import HashedFile
from vista.log import array_file
from vista.log.event_log import EventLog
from vista.log.ingest.prepare import prepare
from vista.log.ingest.source_parser import SourceParser
from vista.simulation.simulate import EVENTS_FILE, simulate

EVENTS_PER_USER = 4_000
NUM_USERS, QUICK_USERS = 1_000, 10


class UnhashedFile(HashedFile):
    """A file without a checksum: its digest is that of no bytes."""

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Write all of `data`."""
        view = memoryview(data).cast("B")
        self._file.write(view)
        self.size += len(view)
        return len(view)


def measure(recorder: BenchmarkRecorder, folder: Path, parser: SourceParser) -> None:
    """Run all cases."""
    num_users = QUICK_USERS if recorder.quick else NUM_USERS
    simulate(SimulateConfig(out=str(folder / "source"), num_users=num_users, events_per_user=EVENTS_PER_USER))
    events = SourceConfig(kind="simulated", paths=[str(folder / "source")])
    numbers = count()

    def ingest() -> Path:
        log = folder / f"log-{next(numbers)}"
        prepare(PrepareConfig(out=str(log), events=events, progress=False), parser=parser)
        return log

    def ingest_unhashed() -> Path:
        with mock.patch.object(array_file, "HashedFile", UnhashedFile):
            return ingest()

    def hash_source() -> None:
        with (folder / "source" / EVENTS_FILE).open("rb") as file:
            hashlib.file_digest(file, hashlib.sha256)

    log, unhashed = EventLog.open(ingest()), EventLog.open(ingest_unhashed())
    gigabytes = log.verify() / 1e9
    try:
        unhashed.verify()
    except LogFormatError:
        pass
    else:
        raise AssertionError("the log without checksums has checksums")
    contestants: dict[str, Callable[[], object]] = {
        "with": ingest,
        "without": ingest_unhashed,
        "verify": lambda: EventLog.open(log.path).verify(),
        "source": hash_source,
    }
    timing = interleaved(contestants, rounds=3 if recorder.quick else 7, warmup=1, max_seconds=40)
    seconds = timing["with"].median_s
    name = f"ingest of {log.num_events:,} events, Parquet"
    recorder.add(
        f"{name}: with checksums, against without",
        seconds,
        "s",
        baseline=timing["without"].median_s,
        bar="value <= 1.05 * baseline",
        spread=timing["with"].spread_s,
    )
    for case, part, bar in (
        ("the checksums", timing["verify"], "value <= 5"),
        ("the SHA-256 of the source", timing["source"], None),
    ):
        share, spread = (100 * each / seconds for each in (part.median_s, part.spread_s))
        recorder.add(f"{name}: share of {case}", share, "%", bar=bar, spread=spread)
    recorder.add(
        f"verify a log of {gigabytes * 1e3:.1f} MB, in the page cache",
        timing["verify"].median_s / gigabytes,
        "s per GB",
        bar="value <= 1",
        spread=timing["verify"].spread_s / gigabytes,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    options = benchmark_parser("checksums", __doc__).parse_args(arguments)
    recorder = BenchmarkRecorder("checksums", out=options.out, quick=options.quick)
    with tempfile.TemporaryDirectory(prefix="vista-bench-") as folder, SourceParser() as parser:
        measure(recorder, Path(folder), parser)
    recorder.print_summary()
    return 0


if __name__ == "__main__":
    sys.exit(main())
