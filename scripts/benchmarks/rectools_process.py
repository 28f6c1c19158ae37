"""Runs RecTools in its own environment, and searches the fastest setting of its SASRec for bench_training.py."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import venv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch


def words_of(options: Mapping[str, Any]) -> list[str]:
    """Options as command-line arguments."""
    return [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", str(value))]


SCRIPT = Path(__file__).with_name("rectools_training.py")
LENGTH = 200
"""Labels per user of RecTools; its histories have one event more, which is only an input."""
DIM, HEADS, LAYERS = 64, 4, 2
SHAPE = words_of({"session_max_len": LENGTH, "n_factors": DIM, "n_blocks": LAYERS, "n_heads": HEADS})
"""The sizes, as arguments of rectools_training.py."""
PILOT_BATCHES = 8
"""Batches per trial; the first two are warm-up."""
GATHERED_BYTES = 1 << 29
"""RecTools gathers [B, 200, negatives, d] vectors per batch; settings beyond this size are not tried."""


@dataclass(frozen=True)
class RecToolsSetting:
    """The settings that the pilot chooses; the fields are options of rectools_training.py."""

    loss: str
    n_negatives: int
    dropout: float
    threads: int
    batch_size: int = 64
    precision: str = "bf16-mixed"
    workers: int = 0

    def options(self) -> list[str]:
        """The setting as command-line arguments."""
        return words_of(dataclasses.asdict(self))


def rectools_python(folder: Path) -> Path:
    """The interpreter of RecTools' environment, which is created if missing.

    Raises:
        SystemExit: if RecTools cannot be imported there.
    """
    python = folder.absolute() / "bin" / "python"
    if not python.exists():
        print(f"creating {folder} with RecTools and torch (some GB)", flush=True)
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "rectools[torch]"], check=False)
    done = subprocess.run([python, "-c", "from rectools.models import SASRecModel"], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise SystemExit(
            f"error: {python} cannot import RecTools ({reason}); run `{python} -m pip install 'rectools[torch]'`, or "
            "give another --rectools-venv"
        )
    return python


def run_rectools(python: Path, data: Path, setting: RecToolsSetting, max_batches: int) -> dict[str, Any]:
    """Run one epoch of RecTools in its own process, whole (max_batches=0) or estimated from some batches."""
    return call_rectools(python, data, [*SHAPE, *setting.options(), "--max-batches", str(max_batches)])


def call_rectools(python: Path, data: Path, words: Sequence[str]) -> dict[str, Any]:
    """Run rectools_training.py in its own process and return its report."""
    command = [str(python), str(SCRIPT), str(data), *words]
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "OMP_NUM_THREADS")}
    done = subprocess.run(command, cwd=data.parent, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)} failed:\n{done.stderr[-2000:]}")
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


class RecToolsPilot:
    """Finds the baseline's fastest setting, one property after the other."""

    def __init__(self, python: Path, data: Path, negatives: int, dropout: float, *, quick: bool) -> None:
        self._python, self._data, self._quick = python, data, quick
        self._start = RecToolsSetting("softmax", negatives, dropout, threads=torch.get_num_threads())
        self.tried: dict[RecToolsSetting, float] = {}

    def fastest(self) -> RecToolsSetting:
        """Try settings with some batches each, and return the fastest."""
        start, negatives = self._start, self._start.n_negatives
        sampled = 2 ** int(np.log2(max(1, min(64, GATHERED_BYTES // (4 * DIM * LENGTH * negatives)))))
        self._try([start, *(replace(start, loss=loss, batch_size=sampled) for loss in ("sampled_softmax", "BCE"))])
        if self._quick:
            return self._best()
        size = self._best().batch_size
        self._try(replace(self._best(), batch_size=other) for other in (size // 2, size * 2) if other > 1)
        self._try([replace(self._best(), precision="32-true")])
        best = self._best()
        self._try([replace(best, threads=1), replace(best, workers=1), replace(best, threads=1, workers=1)])
        return self._best()

    def run(self, setting: RecToolsSetting, max_batches: int) -> dict[str, Any]:
        """The report of one epoch of the baseline, whole (max_batches=0) or estimated from its first batches."""
        return run_rectools(self._python, self._data, setting, max_batches)

    def _try(self, settings: Iterable[RecToolsSetting]) -> None:
        for setting in dict.fromkeys(settings):
            if setting not in self.tried:
                seconds = self.run(setting, PILOT_BATCHES)["seconds_per_epoch"][0]
                self.tried[setting] = seconds
                print(f"        pilot: {seconds:7.1f} s per epoch, {' '.join(setting.options())}", flush=True)

    def _best(self) -> RecToolsSetting:
        return min(self.tried, key=lambda setting: self.tried[setting])
