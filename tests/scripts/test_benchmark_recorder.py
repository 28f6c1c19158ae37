"""The benchmark recorder: rows, bars, summaries, and timing in alternation."""

from __future__ import annotations

import gc
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripts.benchmarks import bench_summary
from scripts.benchmarks import benchmark_recorder as recorder
from scripts.benchmarks.benchmark_recorder import BenchmarkRecorder, benchmark_parser, read_cases
from scripts.benchmarks.timing import interleaved, timing_of
from vista.errors import DataError

pytestmark = pytest.mark.research
KEYS = ["bench", "case", "value", "unit", "baseline", "ratio", "bar", "met", "spread", "hardware", "commit"]


def test_a_case_is_one_line_with_ratio_and_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "docs" / "bench_x.jsonl"
    bench = BenchmarkRecorder("x", out=out)
    bench.add("epoch", 5.0, "s", baseline=20.0, bar="ratio >= 2", spread=0.5)
    bench.add("ingest", 2e6, "events/s", baseline=1e6, better="more", bar="ratio >= 5")
    bench.add("memory", 0.25, "GiB", bar="value < 1")
    bench.add("users", np.int64(100), "users/s")  # type: ignore[arg-type]
    rows = read_cases(out)
    assert [list(row) for row in rows] == [KEYS] * 4
    assert [row["ratio"] for row in rows] == [4.0, 2.0, None, None]
    assert [row["met"] for row in rows] == [True, False, True, None]
    assert rows == bench.rows
    assert out.stat().st_mode & 0o777 == 0o644 and [path.name for path in out.parent.iterdir()] == [out.name]
    capsys.readouterr()
    bench.print_summary()
    text = capsys.readouterr().out
    assert text.index("MISSED  x: ingest") < text.index("met  x: epoch: 5 ± 0.5 s, against 20, 4.00 times better")
    assert "bars: 2 met, 1 missed; 1 cases without a bar" in text and str(out) in text


@pytest.mark.parametrize(
    ("bar", "value", "baseline", "met"),
    [
        ("value <= 1.05 * baseline", 1.05, 1.0, True),
        ("value <= 1.05 * baseline", 1.06, 1.0, False),
        ("ratio > 1", 1.0, 1.0, False),
        ("ratio >= 1e0", 1.0, 1.0, True),
        ("value >= 0.27", 0.27, None, True),
        ("value < -1", -1.5, None, True),
    ],
)
def test_bars(tmp_path: Path, bar: str, value: float, baseline: float | None, met: bool) -> None:
    row = BenchmarkRecorder("x", out=tmp_path / "f").add("c", value, "s", baseline=baseline, bar=bar)
    assert row["met"] is met


def test_bad_cases_are_refused(tmp_path: Path) -> None:
    bench = BenchmarkRecorder("x", out=tmp_path / "f")
    with pytest.raises(ValueError, match="expected the form"):
        bench.add("c", 1.0, "s", bar="2x faster")
    with pytest.raises(ValueError, match="needs a baseline"):
        bench.add("c", 1.0, "s", bar="ratio >= 2")
    with pytest.raises(ValueError, match="needs a baseline"):
        bench.add("c", 1.0, "s", bar="value <= 2 * baseline")
    with pytest.raises(ValueError, match="x, c: spread is nan"):
        bench.add("c", 1.0, "s", spread=math.nan)
    assert not bench.out.exists()
    bench.out.write_text('{"bench": "x"}\n')
    with pytest.raises(DataError, match="line 1: is not a benchmark case"):
        bench.add("c", 1.0, "s")


def test_a_new_measurement_replaces_only_its_own_case_and_machine(tmp_path: Path) -> None:
    out = tmp_path / "bench_x.jsonl"
    bench = BenchmarkRecorder("x", out=out)
    bench.add("a", 1.0, "s")
    other = bench.add("b", 2.0, "s") | {"hardware": {"cpu": "Another CPU", "cores": 2}}
    with out.open("a") as file:
        file.write(json.dumps(other) + "\n")
    BenchmarkRecorder("x", out=out).add("b", 3.0, "s")
    BenchmarkRecorder("x", out=out, quick=True).add("b", 9.0, "s")
    assert [(row["case"], row["value"]) for row in read_cases(out)] == [
        ("a", 1.0),
        ("b", 3.0),
        ("b", 2.0),
        ("b (quick)", 9.0),
    ]


def test_arguments() -> None:
    parser = benchmark_parser("latency", "Latency.")
    assert parser.parse_args([]).out == recorder.RESULTS / "bench_latency.jsonl"
    assert recorder.RESULTS.parts[-2:] == ("docs", "results") and not parser.parse_args([]).quick
    given = parser.parse_args(["--quick", "--out", "x.jsonl"])
    assert given.quick and given.out == Path("x.jsonl")


def test_the_summary_of_all_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_summary, "RESULTS", tmp_path)
    assert bench_summary.main([]) == 0
    assert "no benchmark results yet" in capsys.readouterr().out
    BenchmarkRecorder("x", out=tmp_path / "bench_x.jsonl").add("a", 1.0, "s", bar="value < 2")
    BenchmarkRecorder("y", out=tmp_path / "bench_y.jsonl").add("b", 3.0, "s", bar="value < 2")
    (tmp_path / "ml-1m.jsonl").write_text("not a benchmark\n")
    capsys.readouterr()
    assert bench_summary.main([]) == 0
    text = capsys.readouterr().out
    assert "MISSED  y: b: 3 s  [value < 2]" in text and "bars: 1 met, 1 missed; 0 cases" in text
    assert bench_summary.main(["--strict"]) == 1
    assert bench_summary.main(["--strict", str(tmp_path / "bench_x.jsonl")]) == 0
    (tmp_path / "bench_z.jsonl").write_text("{\n")
    assert bench_summary.main([]) == 2
    assert "bench_z.jsonl, line 1" in capsys.readouterr().err


def test_contestants_alternate_in_reversing_order() -> None:
    seen: list[str] = []

    def contestant(name: str) -> Any:
        def call() -> None:
            seen.append(name)
            assert len(seen) <= 2 or not gc.isenabled()

        return call

    times = interleaved({"a": contestant("a"), "b": contestant("b")}, rounds=4, warmup=1, min_sample_s=0)
    assert "".join(seen) == "ab" + "abbaabba"  # one warm-up each, then four rounds
    assert gc.isenabled() and [len(timing.samples_s) for timing in times.values()] == [4, 4]


def test_fast_calls_are_repeated_and_slow_benchmarks_shortened() -> None:
    counts = {"fast": 0, "slow": 0}

    def fast() -> None:
        counts["fast"] += 1

    def slow() -> None:
        counts["slow"] += 1
        time.sleep(0.02)

    times = interleaved({"fast": fast, "slow": slow}, rounds=50, warmup=1, min_sample_s=0.001, max_seconds=0.01)
    assert counts["slow"] == 4 and counts["fast"] > 100  # the warm-up and the minimum of three rounds
    assert times["slow"].median_s >= 0.02 and times["fast"].median_s < 0.001


def test_the_device_is_waited_for() -> None:
    waits: list[None] = []
    interleaved({"a": lambda: None}, rounds=2, warmup=1, min_sample_s=0, synchronize=lambda: waits.append(None))
    assert len(waits) == 2 * 3


def test_timing_by_hand() -> None:
    timing = timing_of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (timing.median_s, timing.spread_s) == (3.0, 2.0)
    assert timing.p99_s == pytest.approx(4.96)
