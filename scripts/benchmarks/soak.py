"""A soak test: processes that ask, one that changes the store, and the judge of the answers in this process."""

from __future__ import annotations

import argparse
import math
import queue
import time
from collections import Counter
from collections.abc import Callable, Sequence
from multiprocessing.context import SpawnProcess
from pathlib import Path

import numpy as np

from scripts.benchmarks.benchmark_recorder import BenchmarkRecorder
from scripts.benchmarks.soak_judge import SoakJudge
from scripts.benchmarks.soak_load import (
    OPERATIONS,
    SoakAnswer,
    SoakFailure,
    SoakOperation,
    SoakRefusal,
    SoakStage,
    keep,
)
from scripts.benchmarks.store_workloads import private_bytes

HANGS_S = 600.0
SHOWN_FAILURES = 5


class Soak:
    """The processes, and what they reported so far.

    Args:
        stage: what they share.
        judge: of the answers.
        askers: processes that ask questions, not yet started.
        num_threads: of all askers together.
        pause_s: between two operations of the keeper.
        workers: ids of the processes whose memory is measured, 0 for one that is missing; called each minute.
    """

    def __init__(
        self,
        stage: SoakStage,
        judge: SoakJudge,
        askers: Sequence[SpawnProcess],
        num_threads: int,
        pause_s: float,
        workers: Callable[[], list[int]],
    ) -> None:
        self.stage, self.judge, self.num_threads, self._workers = stage, judge, num_threads, workers
        self.keeper = stage.context.Process(target=keep, args=(stage, pause_s), daemon=True)
        self.processes = [*askers, self.keeper]
        self.failures: list[str] = []
        self.wrong: list[str] = []
        self.operations: Counter[str] = Counter()
        self.latencies_s: list[list[float]] = [[]]
        """Per minute."""
        self.memory_mib: list[list[float]] = []
        """Per minute and worker."""
        self.num_retries = 0
        """Questions that were asked again, because the process that should have answered was killed."""
        self.num_refused = 0
        """Questions that were refused, because too many were waiting."""

    @property
    def num_answers(self) -> int:
        """Number of answers that were judged."""
        return sum(map(len, self.latencies_s))

    def run(self, seconds: float, minute_s: float, on_start: Callable[[], None] = lambda: None) -> None:
        """Run all processes until `seconds` after the first answer and until each operation ran, and judge answers.

        Args:
            seconds: see above.
            minute_s: length of what the output calls a minute.
            on_start: called after the first answer.
        """
        for process in self.processes:
            process.start()
        deadline = time.monotonic() + HANGS_S
        while not self.num_answers and time.monotonic() < deadline:
            self._take()
        on_start()
        began = time.monotonic()
        while all(process.is_alive() for process in self.processes):
            now = time.monotonic() - began
            if now >= seconds and (set(self.operations) == set(OPERATIONS) or now >= seconds + HANGS_S):
                break
            self._take()
            if now >= minute_s * len(self.latencies_s):
                self._end_minute()
        self._end_minute()
        early = [process for process in self.processes if not process.is_alive()]
        self.stage.stop.set()
        while any(process.is_alive() for process in self.processes) or not self.stage.said.empty():
            self._take()
        self.failures += [f"{p.name} ended with {p.exitcode}" for p in self.processes if p.exitcode or p in early]

    def _take(self, timeout_s: float = 1.0) -> None:
        try:
            said = self.stage.said.get(timeout=timeout_s)
        except queue.Empty:
            return
        if isinstance(said, SoakAnswer):
            self.num_retries += said.num_retries
            self.latencies_s[-1].append(said.latency_s)
            deadline = time.monotonic() + HANGS_S
            while self.stage.frozen_until.value < said.until:  # Its last copy is not finished.
                if not self.keeper.is_alive() or time.monotonic() > deadline:
                    self.failures.append(f"the keeper did not finish operation {said.until}")
                    return
                time.sleep(0.005)
            if not self.judge.is_right(said):
                states = f"generations {said.generations}, operations {said.since} to {said.until}"
                self.wrong.append(f"question {said.question} of thread {said.thread}: {states}")
        elif isinstance(said, SoakOperation):
            self.operations[said.kind] += 1
            self.judge.forget(self.num_threads)
        elif isinstance(said, SoakRefusal):
            self.num_refused += 1
        elif isinstance(said, SoakFailure):
            self.failures.append(said.text)

    def _end_minute(self) -> None:
        self.memory_mib.append([_private_mib(pid) for pid in self._workers()])
        own = np.array(self.latencies_s[-1] or [np.nan])
        median, p99 = 1e3 * np.percentile(own, [50, 99])
        memory = ", ".join(f"{size:.0f}" for size in self.memory_mib[-1])
        print(
            f"{len(self.latencies_s):3d}: {len(own):,} answers, median {median:.1f} ms, p99 {p99:.1f} ms, workers "
            f"{memory} MiB, generation {self.stage.served.value}, {sum(self.operations.values())} operations; "
            f"{len(self.failures)} failed, {len(self.wrong)} wrong",
            flush=True,
        )
        self.latencies_s.append([])


def soak_parser(description: str | None, out: Path) -> argparse.ArgumentParser:
    """The arguments of a soak test."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--users", type=int, default=2000)
    parser.add_argument("--pause", type=float, default=1.0, metavar="SECONDS", help="pause between operations")
    parser.add_argument("--out", type=Path, default=out, metavar="FILE")
    return parser


def record(soak: Soak, recorder: BenchmarkRecorder, case: str) -> None:
    """Record the answers, the operations, and what went wrong, and print the first failures."""
    recorder.add(f"{case}: answers", soak.num_answers, "answers", bar="value > 0")
    recorder.add(f"{case}: answers that changed while they were asked for", soak.judge.num_changing, "answers")
    for kind in sorted(set(OPERATIONS)):
        recorder.add(f"{case}: operations, {kind}", soak.operations[kind], "operations", bar="value > 0")
    recorder.add(f"{case}: failed", len(soak.failures), "failures", bar="value <= 0")
    recorder.add(f"{case}: wrong", len(soak.wrong), "answers", bar="value <= 0")
    for text in [*soak.failures, *soak.wrong][:SHOWN_FAILURES]:
        print(text)


def record_latencies(soak: Soak, recorder: BenchmarkRecorder, case: str) -> None:
    """Record the 99th percentile, and that of the slowest minute."""
    minutes = [own for own in soak.latencies_s if own]
    if minutes:
        slowest = max(np.percentile(own, 99) for own in minutes)
        recorder.add(f"{case}: p99 of a call", float(1e3 * np.percentile(np.concatenate(minutes), 99)), "ms")
        recorder.add(f"{case}: p99 of a call in the slowest minute", float(1e3 * slowest), "ms")


def _private_mib(pid: int) -> float:
    """Private memory of a process in MiB, NaN if there is none."""
    try:
        return private_bytes(Path(f"/proc/{pid}/smaps").read_text()) / 2**20
    except OSError:
        return math.nan
