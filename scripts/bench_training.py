"""An epoch on ml-1m against RecTools' SASRec at its fastest setting, in the same run.

Equal: the data (each user's newest 201 training events under leave-last-out), the labels of a pass (RecTools' first
event is an input only, ours labels it too and so has one label more a user), negatives a label, d=64, 2+2 layers, 4
heads, length 200, dropout, bfloat16 where the processor has it, the machine, and the minute: epochs alternate. Not
equal: ours also trains the reconstruction; and it draws its negatives once a batch, where RecTools draws them for
every position. RecTools may take its softmax over the whole catalogue instead, which is no fewer negatives.

A pilot of some batches finds RecTools' fastest loss, batch size, precision, threads and loader processes, one after
the other. Precision is 32-true or bf16-mixed, as ours; bf16-true would round weights and optimizer state too. Dropout
0 lets RecTools take torch's fused attention, so every case comes at its default dropout and at 0, each with its own
pilot. Ours runs at its defaults on all cores, and is timed from outside: `train()` for one epoch, set-up, checkpoint
and export included. RecTools is timed from inside: the epoch alone, without start, data preparation and model
building.

RecTools lives in a virtual environment of its own (--rival-venv or VISTA_RIVAL_VENV; made if absent, some GB). About
25 minutes on two idle cores; --rival-batches 60 estimates RecTools' epochs and halves that. The settings found, and
every sample, go beside --out as <name>_settings.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recorder import Recorder, benchmark_parser, timing_of
from vista.config import DataConfig, ModelConfig, OptimConfig, TrainConfig, to_dict
from vista.data.event_log import EventLog
from vista.training.trainer import train
from workloads import find_ml_1m

RIVAL = Path(__file__).with_name("rival_rectools.py")
LENGTH = 200
HELD_OUT = 2
"""Newest events of a user that leave-last-out keeps from training."""
DIM, HEADS, LAYERS = 64, 4, 2
DEFAULT_DROPOUT = 0.2
PILOT_BATCHES = 8
GATHERED_BYTES = 1 << 29
"""A batch of RecTools gathers [B, 200, negatives, d] vectors; settings beyond this are not tried."""


@dataclass(frozen=True)
class Setting:
    """What the pilot may choose; the fields are options of rival_rectools.py."""

    loss: str
    n_negatives: int
    dropout: float
    threads: int
    batch_size: int = 64
    precision: str = "bf16-mixed"
    workers: int = 0

    def options(self) -> list[str]:
        """As words of a command line."""
        pairs = dataclasses.asdict(self).items()
        return [word for key, value in pairs for word in (f"--{key.replace('_', '-')}", str(value))]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The shared arguments and this benchmark's own."""
    parser = benchmark_parser("training", __doc__)
    parser.add_argument("--data", type=Path, help="ml-1m's events.npz; default: $VISTA_DATA_DIR/ml-1m/events.npz")
    default = Path(os.environ.get("VISTA_RIVAL_VENV", "runs/rival-venv"))
    parser.add_argument("--rival-venv", type=Path, default=default, help="virtual environment with RecTools")
    parser.add_argument("--negatives", type=int, nargs="+", default=[64, 1024], help="negatives a label, one case each")
    parser.add_argument("--repeats", type=int, default=2, help="epochs of each, in alternation")
    parser.add_argument("--rival-batches", type=int, default=0, help="estimate RecTools' epochs from so many batches")
    return parser.parse_args(arguments)


def rival_python(folder: Path) -> Path:
    """The interpreter of RecTools' environment, which is made if it is not there."""
    python = folder.absolute() / "bin" / "python"
    if not python.exists():
        print(f"making {folder} with RecTools (torch comes with it: some GB)", flush=True)
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "rectools[torch]"], check=False)
    done = subprocess.run([python, "-c", "from rectools.models import SASRecModel"], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise SystemExit(
            f"error: {python} has no working RecTools ({reason}); `{python} -m pip install 'rectools[torch]'`, or name "
            "another --rival-venv"
        )
    return python


def write_events(path: Path, folder: Path, max_users: int) -> tuple[EventLog, Path, int]:
    """The same training events for both: our log, the rival's npz, and the number of our labels."""
    with np.load(path, allow_pickle=False) as arrays:
        missing = {"user", "item", "offsets"} - set(arrays.files)
        if missing:
            raise SystemExit(f"error: {path}: has no {', '.join(sorted(missing))}; give a packed events.npz")
        user, item, offsets = arrays["user"].astype(np.int64), arrays["item"].astype(np.int64), arrays["offsets"]
    ends = offsets[1:][: max_users or None]
    starts = np.maximum(offsets[:-1][: len(ends)], ends - HELD_OUT - LENGTH - 1)
    kept = np.concatenate([np.arange(start, end) for start, end in zip(starts, ends, strict=True)])
    log = EventLog.from_frame({"user": user[kept], "item": item[kept]}, folder / "log", timestamp=None)
    trained = np.concatenate([np.arange(start, end - HELD_OUT) for start, end in zip(starts, ends, strict=True)])
    rival = folder / "rival.npz"
    np.savez(rival, user=user[trained], item=item[trained], timestamp=np.arange(len(trained)))
    return log, rival, len(trained)


def run_rival(python: Path, data: Path, setting: Setting, max_batches: int) -> dict[str, Any]:
    """One epoch of RecTools in a process of its own, whole or estimated."""
    shape = {"session-max-len": LENGTH, "n-factors": DIM, "n-blocks": LAYERS, "n-heads": HEADS}
    words = [word for key, value in shape.items() for word in (f"--{key}", str(value))]
    command = [str(python), str(RIVAL), str(data), *words, *setting.options(), "--max-batches", str(max_batches)]
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "OMP_NUM_THREADS")}
    done = subprocess.run(command, cwd=data.parent, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


class Pilot:
    """Finds the rival's fastest setting: one property after the other, each time keeping what was fastest."""

    def __init__(self, python: Path, data: Path, negatives: int, dropout: float, *, quick: bool) -> None:
        self._python, self._data, self._quick = python, data, quick
        self._start = Setting("softmax", negatives, dropout, threads=torch.get_num_threads())
        self.tried: dict[Setting, float] = {}

    def fastest(self) -> Setting:
        start, negatives = self._start, self._start.n_negatives
        sampled = 2 ** int(np.log2(max(1, min(64, GATHERED_BYTES // (4 * DIM * LENGTH * negatives)))))
        self._try([start, *(replace(start, loss=loss, batch_size=sampled) for loss in ("sampled_softmax", "BCE"))])
        if self._quick:
            return self._best()
        size = self._best().batch_size
        self._try(replace(self._best(), batch_size=other) for other in (size // 2, size * 2) if other > 1)
        self._try([replace(self._best(), precision="32-true")])
        self._try([replace(self._best(), threads=1), replace(self._best(), workers=1)])
        return self._best()

    def run(self, setting: Setting, max_batches: int) -> dict[str, Any]:
        """One epoch of the rival, whole (0) or estimated from its first batches; its report."""
        return run_rival(self._python, self._data, setting, max_batches)

    def _try(self, settings: Iterable[Setting]) -> None:
        for setting in dict.fromkeys(settings):
            if setting not in self.tried:
                seconds = self.run(setting, PILOT_BATCHES)["seconds_per_epoch"][0]
                self.tried[setting] = seconds
                print(f"        pilot: {seconds:7.1f} s an epoch, {' '.join(setting.options())}", flush=True)

    def _best(self) -> Setting:
        return min(self.tried, key=lambda setting: self.tried[setting])


def our_config(log: EventLog, negatives: int, dropout: float, run_dir: str) -> TrainConfig:
    """One epoch of this project's defaults at the rival's sizes; every event is a label once, nothing is validated."""
    return TrainConfig(
        model=ModelConfig(dim=DIM, num_heads=HEADS, num_layers=LAYERS, num_target_layers=LAYERS, dropout=dropout),
        data=DataConfig(path=str(log.path), num_negatives=negatives, windows_per_chunk=0),
        optim=OptimConfig(epochs=1, validate_every=0),
        run_dir=run_dir,
        device="cpu",
        progress=False,
    )


def run_ours(log: EventLog, negatives: int, dropout: float) -> float:
    """Seconds of training for one epoch, from the configuration to the exported model."""
    with tempfile.TemporaryDirectory(prefix="vista-run-") as run_dir:
        config = our_config(log, negatives, dropout, run_dir)
        start = time.perf_counter()
        model = train(config, log)
        seconds = time.perf_counter() - start
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    return seconds


def compare(
    recorder: Recorder, pilot: Pilot, log: EventLog, num_labels: int, repeats: int, max_batches: int
) -> dict[str, Any]:
    """One case: pilot, epochs in alternation, one row; returns all that stands behind the row."""
    setting = pilot.fastest()
    negatives, dropout = setting.n_negatives, setting.dropout
    ours: list[float] = []
    reports: list[dict[str, Any]] = []
    for repeat in range(repeats):
        # The order turns, so that neither always comes first.
        for turn in ("rival", "ours") if repeat % 2 == 0 else ("ours", "rival"):
            if turn == "ours":
                ours.append(run_ours(log, negatives, dropout))
            else:
                reports.append(pilot.run(setting, max_batches))
    assert all(num_labels >= report["positions"] for report in reports), "ours must not have fewer labels"
    own, rival = timing_of(ours), timing_of([report["seconds_per_epoch"][0] for report in reports])
    row = recorder.add(
        f"ml-1m epoch, {negatives} negatives a label, dropout {dropout:g}",
        own.median_s,
        "s",
        baseline=rival.median_s,
        bar="ratio >= 2",
        spread=own.spread_s,
    )
    reached = "reached" if row["ratio"] >= 5 else "not reached"
    print(f"        aim: 5 times, {reached}. RecTools: {' '.join(setting.options())}", flush=True)
    return {
        "row": row,
        "our_seconds": ours,
        "our_labels": num_labels,
        "our_config": to_dict(our_config(log, negatives, dropout, "")),
        "rival_reports": reports,
        "pilot": [dataclasses.asdict(tried) | {"seconds": seconds} for tried, seconds in pilot.tried.items()],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    options = parse(arguments)
    path = find_ml_1m(options.data)
    if path is None:
        print("skipped: ml-1m is not at hand; set VISTA_DATA_DIR, or --data path/to/ml-1m/events.npz")
        return 0
    python = rival_python(options.rival_venv)
    quick: bool = options.quick
    recorder = Recorder("training", out=options.out, quick=quick)
    cases = list(itertools.product(options.negatives, (DEFAULT_DROPOUT, 0.0)))
    with tempfile.TemporaryDirectory(prefix="vista-bench-") as folder:
        log, data, num_labels = write_events(path, Path(folder), 200 if quick else 0)
        details = [
            compare(
                recorder,
                Pilot(python, data, negatives, dropout, quick=quick),
                log,
                num_labels,
                1 if quick else options.repeats,
                options.rival_batches,
            )
            for negatives, dropout in (cases[:1] if quick else cases)
        ]
    settings = options.out.with_name(f"{options.out.stem}_settings.json")
    settings.write_text(json.dumps(details, indent=1) + "\n", encoding="utf-8")
    recorder.print_summary()
    print(f"settings and samples: {settings}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
