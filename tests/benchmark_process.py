"""Runs a benchmark in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def run_benchmark(subject: str, out: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m scripts.benchmarks.bench_<subject> --quick --out <out>` on one thread without data and GPU."""
    path = os.pathsep.join(str(REPOSITORY / folder) for folder in (".", "kernels"))
    settings = {key: value for key, value in os.environ.items() if key not in ("VISTA_DATA_DIR", "VISTA_RECTOOLS_VENV")}
    settings |= {"OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "-m", f"scripts.benchmarks.bench_{subject}", "--quick", "--out", str(out), *words],
        cwd=out.parent,
        env={**settings, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
    )
