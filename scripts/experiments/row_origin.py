"""The origin of a row's models: seconds, commits and machines of the processes that trained them.

The model may be older than the measurement: tables with equal configurations share a run, a stopped run resumes, and a
later call may measure more lines of the same model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from scripts.experiments.results import describe_hardware, hardware
from vista.config import TrainConfig
from vista.config.train_config import without_places
from vista.device import choose_precision, resolve_device
from vista.files import replace_text
from vista.installation import source_commit
from vista.log.event_log import EventLog
from vista.model.ranking_model import RankingModel
from vista.training.checkpoint import latest_checkpoint, load_checkpoint
from vista.training.trainer import train_model

MACHINE = ("cpu", "gpu", "cores", "threads")
"""Keys of a row's hardware that its time depends on."""
ORIGINS = "origins.jsonl"


@dataclass(frozen=True, slots=True)
class RowOrigin:
    """How the models of a row were trained."""

    seconds: float
    """Time of training and validation over all processes of the runs, or of counting for a counting baseline."""
    origins: tuple[Mapping[str, Any], ...] = ()
    """{commit, hardware} of these processes; empty for counting baselines and for runs without the file."""
    validation: Mapping[str, float] = field(default_factory=dict)
    """Validation metrics of the exported pass, the best one."""
    curve: tuple[tuple[float, float], ...] = ()
    """(seconds of the run, NDCG@10) of each validation that ranked next items, in a row with one model."""
    resolved: Mapping[str, Any] = field(default_factory=dict)
    """{part of the split: settings {model, data, optim} of its model}, with null settings as the run planned them."""

    @classmethod
    def read(cls, folders: Mapping[str, Path]) -> RowOrigin:
        """Read the origins of all models of a row.

        Args:
            folders: {part of the split: folder of its model, whose run is in folder/run}.
        """
        seconds, validation, resolved = 0.0, dict[str, float](), dict[str, Any]()
        curve = list[tuple[float, float]]()
        for part, folder in folders.items():
            run = folder / "run"
            newest = latest_checkpoint(run / "checkpoints")
            assert newest is not None  # training ends with one
            _, state = load_checkpoint(newest)
            seconds += state["run"]["progress"]["seconds"]
            rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            best: dict[str, float | None] = next(
                (row["validation"] for row in reversed(rows) if row.get("is_best")), {}
            )
            for row in rows:
                if (value := row.get("validation", {}).get("ndcg@10")) is not None:
                    curve.append((row["seconds"], value))
            validation |= {name: value for name, value in best.items() if value is not None}
            resolved[part] = without_places(yaml.safe_load((run / "config.yaml").read_text()))
        origins = [json.loads(line) for folder in folders.values() for line in _text(folder / ORIGINS).splitlines()]
        return cls(seconds, tuple(origins), validation, tuple(curve) if len(folders) == 1 else (), resolved)

    def fields(self) -> dict[str, Any]:
        """commit, hardware, seconds and, of a trained row, `resolved` of a line that this process measures.

        The hardware is that of the last training process; other machines are listed under "elsewhere".
        """
        measured, at = hardware(), source_commit()
        commits = list(dict.fromkeys(origin["commit"] for origin in self.origins))
        machines = [origin["hardware"] for origin in self.origins]
        machine = machines[-1] if machines else measured
        others = [each for each in (*machines[:-1], measured) if any(each[key] != machine[key] for key in MACHINE)]
        elsewhere = list(dict.fromkeys(map(describe_hardware, others)))
        return {
            "commit": at if commits in ([], [at]) else f"{at} (trained at {', '.join(commits)})",
            "hardware": machine | ({"elsewhere": elsewhere} if elsewhere else {}),
            "seconds": round(self.seconds, 1),
            **({"resolved": dict(self.resolved)} if self.resolved else {}),
        }


def train_noted(config: TrainConfig, log: EventLog, folder: Path) -> RankingModel:
    """Train or resume in folder/run, or load the finished model; folder/origins.jsonl records each training process."""
    metrics, origins = folder / "run" / "metrics.jsonl", folder / ORIGINS
    trained, known = _text(metrics), _text(origins)
    precision = choose_precision(config.precision, resolve_device(config.device)).value
    origin = {"commit": source_commit(), "hardware": hardware() | {"precision": precision}}
    # Written before training, so that a killed process is recorded too.
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(origins, known + json.dumps(origin) + "\n")
    model = train_model(config, log)
    if _text(metrics) == trained:  # the model was already finished
        replace_text(origins, known)
    return model


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""
