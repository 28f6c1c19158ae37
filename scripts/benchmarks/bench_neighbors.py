"""Benchmark commands on a machine whose cores are busy: with another process per core, against the same without.

    python -m scripts.benchmarks.bench_neighbors

The first example of docs/guides/serve.md, `vista train`, and `vista score` run in processes of their own, alone and
next to one endless loop per core, in alternation. No thread settings are given. The fair share of each command is then
half of the cores, so twice the time is the goal. Run it on an idle machine: the load average is printed, because every
other process that computes brings the ratio closer to 1.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from scripts.benchmarks.benchmark import interleaved, recording
from vista.machine import usable_cores
from vista.threads import NUM_THREADS, WAIT_POLICY

ROOT = Path(__file__).resolve().parents[2]
BAR = "value <= 2.5 * baseline"
SPLIT = ("data.split=time", "data.validation_from=2026-01-02T06:00", "data.test_from=2026-01-02T09:00")
TRAIN = ("train", "data.path=data/mine", *SPLIT, "run_dir=runs/second", "resume=false", "data.tokens_per_batch=2048")
SCORE = ("score", "model=runs/mine/best", "store=stores/mine", "users=[anna0]", "now=2026-01-03")
CANDIDATES = "candidates=[sku-1,sku-2,sku-3]"


def first_example() -> str:
    """The first Python block of docs/guides/serve.md: a log, a model, and a store."""
    page = (ROOT / "docs" / "guides" / "serve.md").read_text(encoding="utf-8")
    found = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert found is not None
    return found[1]


def run(folder: Path, *words: str) -> None:
    """Run Python in a folder, with the thread settings of a user who has none."""
    environment = {name: value for name, value in os.environ.items() if name not in (NUM_THREADS, WAIT_POLICY)}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)


def run_first_example(folder: Path, code: str) -> None:
    """Run the first example from the start: it does not replace a log or a finished run."""
    for name in ("data", "runs", "stores"):
        shutil.rmtree(folder / name, ignore_errors=True)
    run(folder, "-c", code)


@contextmanager
def busy_cores() -> Iterator[None]:
    """One endless loop per core while a block runs.

    Each has a session of its own: Linux shares the time of cores among sessions first (autogroup), so loops in the
    session of the command would take less from it than processes of other users do, or more on a crowded machine.
    """
    loop = [sys.executable, "-c", "while True: pass"]
    loops = [subprocess.Popen(loop, start_new_session=True) for _ in range(usable_cores())]
    try:
        yield
    finally:
        for process in loops:
            process.kill()
            process.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all cases; returns the exit status."""
    with recording("neighbors", __doc__, arguments) as recorder:
        print(f"load average of this machine: {os.getloadavg()[0]:.1f} on {usable_cores()} cores")
        folder, code = recorder.folder, first_example()
        cases = {  # The first one leaves the log, the model, and the store of the others.
            "first example of serve.md": partial(run_first_example, folder, code),
            "vista train, two epochs": partial(run, folder, "-m", "vista.cli", *TRAIN, "optim.epochs=2"),
            "vista score, three candidates": partial(run, folder, "-m", "vista.cli", *SCORE, CANDIDATES),
        }
        for case, alone in cases.items():
            times = interleaved(
                {"alone": alone, "busy": busy_cores()(alone)},
                rounds=3 if recorder.quick else 7,
                warmup=1,
                max_seconds=600,
            )
            recorder.add_time(f"{case}, busy cores", times["busy"], "s", baseline=times["alone"], bar=BAR)
    return 0


if __name__ == "__main__":
    sys.exit(main())
