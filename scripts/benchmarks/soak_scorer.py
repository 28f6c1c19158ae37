"""Soak test of the scorer: requests under load while its store is refreshed, published, erased from and compacted.

Two worker processes with two threads each score, predict, rank, explain, get user vectors and reload without a pause.
A keeper appends events to the log, refreshes incrementally and in full, erases users, compacts the store and replaces
the model. This process is the judge: it asks every question again of frozen copies of the store. An answer is right if
it equals that of one copy that was in service during the call. An answer that is too old, contains an erased user or
mixes two generations is wrong. The judge prints a line per minute.

    python -m scripts.benchmarks.soak_scorer --minutes 10
"""

from __future__ import annotations

import argparse
import math
import queue
import shutil
import sys
import tempfile
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from scripts.benchmarks.benchmark_recorder import RESULTS, BenchmarkRecorder
from scripts.benchmarks.soak_load import (
    OPERATIONS,
    THREADS,
    Arrays,
    SoakAnswer,
    SoakFailure,
    SoakOperation,
    SoakStage,
    ask,
    copies,
    keep,
    work,
)
from scripts.benchmarks.store_workloads import private_bytes
from vista.device import set_threads
from vista.scorer import Scorer
from vista.store import StoreReader

WORKERS = 2
WARMUP_S = 120.0
"""Memory is judged after this time."""
GROWTH_MIB = 16.0
"""Largest allowed growth of a worker's private memory after the warm-up."""
TOLERANCE = 2e-5
"""Of an answer: the tests' tolerance for scores of the same user in different batches."""
HANGS_S = 120.0
OPEN_COPIES = 8
SHOWN_FAILURES = 5


class SoakJudge:
    """Asks questions again of frozen copies of the store."""

    def __init__(self, models: Path, frozen: Path, num_users: int, num_items: int) -> None:
        self._models, self._frozen, self._sizes = models, frozen, (num_users, num_items)
        self._opened: OrderedDict[tuple[int, int], Scorer] = OrderedDict()
        self.latest: dict[int, SoakAnswer] = {}
        self.num_changing = 0
        """Answers that an operation changed during the call."""

    def is_right(self, answer: SoakAnswer) -> bool:
        """Whether a single state of the store that was in service during the call gives this answer."""
        expected = [self._ask(state, answer.question) for state in self._states(answer)]
        same = [_equal(answer.arrays, arrays) for arrays in expected]
        self.num_changing += not all(_equal(expected[0], arrays) for arrays in expected[1:])
        self.latest[answer.thread] = answer
        return any(same)

    def forget(self, num_threads: int) -> None:
        """Remove the copies that no later answer of the threads can come from."""
        if len(self.latest) < num_threads:
            return
        since = min(answer.since for answer in self.latest.values())
        first = min(answer.generations[0] for answer in self.latest.values())
        known = copies(self._frozen)
        for generation, operation in known:
            outdated = any(g == generation and operation < other <= since for g, other in known)
            if generation < first or outdated:
                scorer = self._opened.pop((generation, operation), None)
                if scorer is not None:
                    scorer.close()
                shutil.rmtree(self._frozen / f"{generation}-{operation}")

    def _states(self, answer: SoakAnswer) -> list[tuple[int, int]]:
        """Copies of the generations that were open: the last one before the call, and those made during the call."""
        known = copies(self._frozen)
        states = []
        for generation in range(answer.generations[0], answer.generations[1] + 1):
            operations = sorted(number for other, number in known if other == generation and number <= answer.until)
            before = [number for number in operations if number <= answer.since]
            states += [(generation, number) for number in operations if number >= max(before, default=0)]
        return states

    def _ask(self, state: tuple[int, int], question: int) -> Arrays:
        if state not in self._opened:
            folder = self._frozen / f"{state[0]}-{state[1]}"
            with StoreReader.open(folder) as store:
                model = self._models / store.summarizer_id.hex()
            self._opened[state] = Scorer.open(model, folder, on_missing="nan", task="click")
            if len(self._opened) > OPEN_COPIES:
                self._opened.popitem(last=False)[1].close()
        self._opened.move_to_end(state)
        return ask(self._opened[state], question, *self._sizes)


def _equal(actual: Arrays, expected: Arrays) -> bool:
    return len(actual) == len(expected) and all(
        a.shape == b.shape and np.allclose(a, b, rtol=0, atol=TOLERANCE, equal_nan=True)
        for a, b in zip(actual, expected, strict=True)
    )


class Soak:
    """The processes, and what they reported so far."""

    def __init__(self, stage: SoakStage, pause_s: float) -> None:
        self.stage = stage
        self.judge = SoakJudge(stage.models, stage.frozen, stage.num_users, stage.num_items)
        context = stage.context
        self.workers = [context.Process(target=work, args=(stage, number), daemon=True) for number in range(WORKERS)]
        self.keeper = context.Process(target=keep, args=(stage, pause_s), daemon=True)
        self.processes = [*self.workers, self.keeper]
        self.failures: list[str] = []
        self.wrong: list[str] = []
        self.operations: Counter[str] = Counter()
        self.latencies_s: list[list[float]] = [[]]
        """Per minute."""
        self.memory_mib: list[list[float]] = []
        """Per minute and worker."""

    def run(self, seconds: float, minute_s: float) -> None:
        """Run all processes until `seconds` after the first answer and until each operation ran, and judge answers."""
        for process in self.processes:
            process.start()
        self._take(timeout_s=HANGS_S)
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
            self.latencies_s[-1].append(said.latency_s)
            deadline = time.monotonic() + HANGS_S
            while self.stage.done.value < said.until:  # Its last copy is not finished.
                if not self.keeper.is_alive() or time.monotonic() > deadline:
                    self.failures.append(f"the keeper did not finish operation {said.until}")
                    return
                time.sleep(0.005)
            if not self.judge.is_right(said):
                states = f"generations {said.generations}, operations {said.since} to {said.until}"
                self.wrong.append(f"question {said.question} of thread {said.thread}: {states}")
        elif isinstance(said, SoakOperation):
            self.operations[said.kind] += 1
            self.judge.forget(WORKERS * THREADS)
        elif isinstance(said, SoakFailure):
            self.failures.append(said.text)

    def _end_minute(self) -> None:
        smaps = [Path(f"/proc/{p.pid}/smaps") if p.is_alive() else None for p in self.workers]
        self.memory_mib.append(
            [math.nan if path is None else private_bytes(path.read_text()) / 2**20 for path in smaps]
        )
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

    def growth_mib(self, warm_minutes: int) -> float:
        """Largest growth of a running worker's private memory since the warm-up."""
        sizes = np.array(self.memory_mib)
        return float(np.nanmax(sizes[-1] - sizes[min(warm_minutes, len(sizes)) - 1]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the soak test; return 1 if anything failed, was wrong or grew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--users", type=int, default=2000)
    parser.add_argument("--pause", type=float, default=1.0, metavar="SECONDS", help="pause between operations")
    parser.add_argument("--out", type=Path, default=RESULTS / "bench_soak.jsonl", metavar="FILE")
    options = parser.parse_args(arguments)
    set_threads(1)
    seconds = 60 * options.minutes
    minute_s = min(60.0, seconds / 5)
    with tempfile.TemporaryDirectory(prefix="vista-soak-") as folder:
        soak = Soak(SoakStage(Path(folder), options.users, num_items=500), options.pause)
        soak.run(seconds, minute_s)
    for text in [*soak.failures, *soak.wrong][:SHOWN_FAILURES]:
        print(text)
    return int(not report(soak, options.minutes, minute_s, options.out))


def report(soak: Soak, minutes: float, minute_s: float, out: Path) -> bool:
    """Record the measurements; returns whether all bars were met."""
    recorder = BenchmarkRecorder("soak", out=out)
    case = f"{minutes:g} minutes, {WORKERS} processes x {THREADS} threads"
    latencies = [1e3 * np.percentile(own, 99) for own in soak.latencies_s if own]
    everything = np.concatenate([own for own in soak.latencies_s if own] or [[]])
    recorder.add(f"{case}: answers", len(everything), "answers", bar="value > 0")
    recorder.add(f"{case}: answers that changed while they were asked for", soak.judge.num_changing, "answers")
    for kind in sorted(set(OPERATIONS)):
        recorder.add(f"{case}: operations, {kind}", soak.operations[kind], "operations", bar="value > 0")
    recorder.add(f"{case}: failed", len(soak.failures), "failures", bar="value <= 0")
    recorder.add(f"{case}: wrong", len(soak.wrong), "answers", bar="value <= 0")
    warm = max(1, round(min(WARMUP_S, 60 * minutes / 2) / minute_s))
    growth = soak.growth_mib(warm)
    recorder.add(f"{case}: growth of a worker's private memory", growth, "MiB", bar=f"value <= {GROWTH_MIB:g}")
    if latencies:
        recorder.add(f"{case}: p99 of a call", float(1e3 * np.percentile(everything, 99)), "ms")
        recorder.add(f"{case}: p99 of a call in the slowest minute", float(max(latencies)), "ms")
    recorder.print_summary()
    return all(row["met"] is not False for row in recorder.rows)


if __name__ == "__main__":
    sys.exit(main())
