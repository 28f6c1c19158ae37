"""What all benchmarks share: their arguments, and one JSON line per case.

    arguments = benchmark_parser("latency", __doc__).parse_args()
    recorder = BenchmarkRecorder("latency", out=arguments.out, quick=arguments.quick)
    timing = interleaved({"short": lambda: score(a), "long": lambda: score(b)})
    short, long = timing["short"], timing["long"]
    recorder.add("a user of 10^6 events against one of 10^3", long.median_s, "s", baseline=short.median_s,
                 better="less", bar="value <= 1.05 * baseline", spread=long.spread_s)
    recorder.print_summary()

A line is {bench, case, value, unit, baseline, ratio, bar, met, spread, hardware, commit}. `baseline` is the number that
`value` is compared with, in the same unit. `ratio` says how many times better `value` is. `bar` is the target and `met`
whether it was reached (null without a target). `spread` is in the unit of `value`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from scripts.experiments.results import describe_hardware, hardware, read_lines
from vista.errors import DataError
from vista.installation import source_commit

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"

_NUMBER = r"[+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?"
_BAR = re.compile(rf"(value|ratio) (<=|>=|<|>) ({_NUMBER})(?: \* (baseline))?")


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


class BenchmarkRecorder:
    """Writes the cases of one benchmark to a file, each as soon as it is measured.

    A new measurement replaces the same case of the same machine in the file; Git keeps the old one. Other cases and
    other machines stay. Set torch's threads before you create a recorder, since its rows record them.
    """

    def __init__(self, subject: str, *, out: Path, quick: bool = False) -> None:
        self.bench, self.out, self.quick = subject, out, quick
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
