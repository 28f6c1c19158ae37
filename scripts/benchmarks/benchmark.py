"""What all benchmarks share: timing in alternation, their arguments, and one JSON line per case.

    with recording("latency", __doc__) as recorder:
        timing = interleaved({"short": lambda: score(a), "long": lambda: score(b)})
        recorder.add_time("a user of 10^6 events against one of 10^3", timing["long"], "ms",
                          baseline=timing["short"], bar="value <= 1.05 * baseline")

A line is {bench, case, value, unit, baseline, ratio, bar, met, spread, hardware, commit}. `baseline` is the number that
`value` is compared with, in the same unit. `ratio` says how many times better `value` is. `bar` is the target and `met`
whether it was reached (null without a target). `spread` is in the unit of `value`.

    python -m scripts.benchmarks.benchmark    # prints the targets met and missed, from docs/results/bench_*.jsonl
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from scripts.experiments.results import describe_hardware, hardware, read_lines
from vista.errors import DataError, VistaError
from vista.installation import source_commit

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
_NUMBER = r"[+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?"
_BAR = re.compile(rf"(value|ratio) (<=|>=|<|>) ({_NUMBER})(?: \* (baseline))?")


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds per call of one contestant, over the rounds."""

    median_s: float
    p99_s: float
    spread_s: float
    """Interquartile range."""
    samples_s: tuple[float, ...]


def interleaved(
    contestants: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 15,
    warmup: int = 2,
    min_sample_s: float = 0.005,
    max_seconds: float = 60.0,
    synchronize: Callable[[], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time contestants in alternation, so that a slow phase of the machine affects all of them.

    Each round runs every contestant once and reverses the order of the previous round. A contestant faster than
    min_sample_s is called several times per sample, so its p99 is one of means. The garbage collector is off meanwhile.

    Args:
        contestants: name -> call.
        rounds: samples per contestant; fewer, but at least 3, once max_seconds have passed.
        warmup: uncounted calls of each contestant beforehand, at least 1.
        synchronize: waits for the device, such as torch.cuda.synchronize; called before each reading of the clock.
        clock: in seconds; time.thread_time for calls of one thread on a machine that others use too.
    """
    wait = synchronize or (lambda: None)
    calls: dict[str, int] = {}
    for name, call in contestants.items():
        fastest = min(_sample(call, 1, wait, clock) for _ in range(warmup))
        calls[name] = max(1, math.ceil(min_sample_s / max(fastest, 1e-9)))
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants)
    collecting, start = gc.isenabled(), time.perf_counter()
    gc.collect()
    gc.disable()
    try:
        for done in range(rounds):
            if done >= 3 and time.perf_counter() - start > max_seconds:
                break
            for name in order:
                samples[name].append(_sample(contestants[name], calls[name], wait, clock))
            order.reverse()
    finally:
        if collecting:
            gc.enable()
    return {name: timing_of(values) for name, values in samples.items()}


def timing_of(samples_s: Sequence[float]) -> Timing:
    """Median, 99th percentile and interquartile range of samples that were taken elsewhere, such as epochs."""
    low, median, high, p99 = np.percentile(samples_s, [25, 50, 75, 99]).tolist()
    return Timing(median, p99, high - low, tuple(samples_s))


def _sample(call: Callable[[], object], calls: int, wait: Callable[[], object], clock: Callable[[], float]) -> float:
    wait()
    start = clock()
    for _ in range(calls):
        call()
    wait()
    return (clock() - start) / calls


def benchmark_parser(subject: str, description: str | None) -> argparse.ArgumentParser:
    """An argument parser with --quick and --out (a Path), to which a benchmark adds its own arguments."""
    parser = argparse.ArgumentParser(
        prog=f"python -m scripts.benchmarks.bench_{subject}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help='run smaller and fewer cases, marked "(quick)"')
    default = RESULTS / f"bench_{subject}.jsonl"
    parser.add_argument(
        "--out", type=Path, default=default, metavar="FILE", help=f"default: docs/results/{default.name}"
    )
    return parser


@contextmanager
def recording(
    subject: str, description: str | None, arguments: Sequence[str] | argparse.Namespace | None = None
) -> Iterator[BenchmarkRecorder]:
    """A recorder for the arguments of a benchmark, with a temporary folder; prints its summary in the end.

    Set torch's threads before, since rows record them.

    Args:
        arguments: words of the command line, None for this process's own, or what a `benchmark_parser` has parsed.
    """
    options = arguments
    if not isinstance(options, argparse.Namespace):
        options = benchmark_parser(subject, description).parse_args(options)
    recorder = BenchmarkRecorder(subject, out=options.out, quick=options.quick)
    with tempfile.TemporaryDirectory(prefix="vista-bench-") as folder:
        recorder.folder = Path(folder)
        yield recorder
    recorder.print_summary()


class BenchmarkRecorder:
    """Writes the cases of one benchmark to a file, each as soon as it is measured.

    A new measurement replaces the same case of the same machine in the file; Git keeps the old one. Other cases and
    other machines stay. Set torch's threads before you create a recorder, since its rows record them.
    """

    def __init__(self, subject: str, *, out: Path, quick: bool = False) -> None:
        self.bench, self.out, self.quick = subject, out, quick
        self.folder = Path()
        """A temporary folder, within `recording`."""
        self.rows: list[dict[str, Any]] = []
        self._hardware, self._commit = hardware(), source_commit()

    def add(
        self,
        case: str,
        value: float,
        unit: str,
        *,
        baseline: float | None = None,
        better: Literal["less", "more"] = "less",
        bar: str | None = None,
        spread: float | None = None,
    ) -> dict[str, Any]:
        """Record one case: write it to the file, print it, and return its row.

        Args:
            case: what was measured; unique within the benchmark.
            value: the measurement, in `unit`.
            baseline: the number to compare with, in the same unit. The ratio is baseline / value if less is better,
                and value / baseline if more is better.
            better: whether less or more of `unit` is better.
            bar: the target: "value <= 1.5", "ratio >= 2" or "value <= 1.05 * baseline".
            spread: spread of `value`, in `unit` (`Timing.spread_s`, or a standard deviation over seeds).

        Raises:
            ValueError: if a number is not finite, or if the bar has another form or needs a missing baseline.
        """
        for name, number in {"value": value, "baseline": baseline, "spread": spread}.items():
            if number is not None and not math.isfinite(number):
                raise ValueError(f"{self.bench}, {case}: {name} is {number}; measurements are finite")
        ratio = None
        if baseline is not None:
            over, under = (baseline, value) if better == "less" else (value, baseline)
            ratio = float(over / under) if under else None
        row = {
            "bench": self.bench,
            "case": f"{case} (quick)" if self.quick else case,
            "value": float(value),
            "unit": unit,
            "baseline": None if baseline is None else float(baseline),
            "ratio": ratio,
            "bar": bar,
            "met": None if bar is None else _is_met(bar, value, ratio, baseline),
            "spread": None if spread is None else float(spread),
            "hardware": self._hardware,
            "commit": self._commit,
        }
        self.rows.append(row)
        self._write(row)
        print(describe(row), flush=True)
        return row

    def add_time(
        self, case: str, timing: Timing, unit: str, *, baseline: Timing | None = None, bar: str | None = None
    ) -> dict[str, Any]:
        """`add` the median and the spread of a timing, in s, ms, CPU ms, or µs."""
        scale = {"s": 1.0, "µs": 1e6}.get(unit, 1e3)
        against = None if baseline is None else scale * baseline.median_s
        return self.add(case, scale * timing.median_s, unit, baseline=against, bar=bar, spread=scale * timing.spread_s)

    def add_rate(
        self,
        case: str,
        count: int,
        timing: Timing,
        unit: str,
        *,
        baseline: Timing | None = None,
        bar: str | None = None,
    ) -> dict[str, Any]:
        """`add` how many of `unit`, such as events/s, a call that processes `count` of them reaches."""
        rate, against = count / timing.median_s, None if baseline is None else count / baseline.median_s
        spread = rate * timing.spread_s / timing.median_s
        return self.add(case, rate, unit, baseline=against, better="more", bar=bar, spread=spread)

    def _write(self, row: dict[str, Any]) -> None:
        """Replace the row's predecessor atomically."""
        rows = read_cases(self.out) if self.out.exists() else []
        place = next((i for i, other in enumerate(rows) if _identity(other) == _identity(row)), len(rows))
        rows[place : place + 1] = [row]
        self.out.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(each, allow_nan=False, ensure_ascii=False) + "\n" for each in rows)
        with tempfile.NamedTemporaryFile(
            "w", dir=self.out.parent, prefix=".bench-", delete=False, encoding="utf-8"
        ) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(file.name, 0o644)
        os.replace(file.name, self.out)

    def print_summary(self) -> None:
        """Print the cases of this run, the targets met and missed, and the path of the file."""
        print(f"\n{summary(self.rows)}\nwritten to {self.out}")


def read_cases(path: Path) -> list[dict[str, Any]]:
    """The rows of a benchmark file.

    Raises:
        DataError: if a line is not a benchmark row; names file and line.
    """
    rows = []
    for number, row in read_lines(path):
        if not {"bench", "case", "value", "unit", "met", "hardware"} <= row.keys():
            raise DataError(f"{path}, line {number}: is not a benchmark case; remove the line and rerun its benchmark")
        rows.append(row)
    return rows


def describe(row: Mapping[str, Any]) -> str:
    """One readable line: verdict, case, value with spread, baseline, ratio and bar."""
    verdict = {True: "met", False: "MISSED", None: "-"}[row["met"]]
    text = f"{verdict:>6}  {row['bench']}: {row['case']}: {_short(row['value'])}"
    if row.get("spread") is not None:
        text += f" ± {_short(row['spread'])}"
    text += f" {row['unit']}"
    if row.get("baseline") is not None:
        text += f", against {_short(row['baseline'])}"
    if row.get("ratio") is not None:
        text += f", {row['ratio']:.2f} times better"
    return text + (f"  [{row['bar']}]" if row.get("bar") else "")


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """A readable summary: per machine the cases that missed their bar, then those that met it, then the others."""
    lines = []
    for machine in dict.fromkeys(describe_hardware(row["hardware"]) for row in rows):
        own = [row for row in rows if describe_hardware(row["hardware"]) == machine]
        lines.append(machine)
        for verdict in (False, True, None):
            lines += [f"  {describe(row)}" for row in own if row["met"] is verdict]
    met, missed = (sum(row["met"] is verdict for row in rows) for verdict in (True, False))
    lines.append(f"bars: {met} met, {missed} missed; {len(rows) - met - missed} cases without a bar")
    return "\n".join(lines)


def _is_met(bar: str, value: float, ratio: float | None, baseline: float | None) -> bool:
    match = _BAR.fullmatch(bar)
    if match is None:
        raise ValueError(f'bar {bar!r}: expected the form "value <= 1.5", "ratio >= 2" or "value <= 1.05 * baseline"')
    subject, sign, number, times = match.groups()
    left = value if subject == "value" else ratio
    scale = baseline if times else 1.0
    if left is None or scale is None:
        raise ValueError(f"bar {bar!r}: needs a baseline (and a nonzero value)")
    right = float(number) * scale
    return bool({"<=": left <= right, ">=": left >= right, "<": left < right, ">": left > right}[sign])


def _identity(row: Mapping[str, Any]) -> tuple[str, str, str, int]:
    machine = row["hardware"]
    return row["bench"], row["case"], machine.get("gpu") or machine.get("cpu", ""), machine.get("cores", 0)


def _short(number: float) -> str:
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.4g}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the summary of all files; return 2 if one is unreadable, and with --strict 1 if a bar was missed."""
    parser = argparse.ArgumentParser(description="Print the targets that the benchmarks met and missed.")
    parser.add_argument("files", nargs="*", type=Path, help="default: docs/results/bench_*.jsonl")
    parser.add_argument("--strict", action="store_true", help="exit with status 1 if a bar was missed")
    options = parser.parse_args(arguments)
    try:
        rows = [row for file in options.files or sorted(RESULTS.glob("bench_*.jsonl")) for row in read_cases(file)]
    except VistaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(summary(rows) if rows else "no benchmark results yet; run `make bench`")
    return int(options.strict and any(row["met"] is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
