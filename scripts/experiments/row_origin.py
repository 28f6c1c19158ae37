"""Where a row's model comes from: seconds, commits and machines of the processes that trained it.

The model may be older than the call that measures it: equal configurations of several tables are one run, a stopped run
goes on, and more lines can be asked of a model that is there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.experiments.results import commit, describe_hardware, hardware
from vista.config import TrainConfig
from vista.device import choose_precision, resolve_device
from vista.files import replace_text
from vista.log.event_log import EventLog
from vista.model.ranking_model import RankingModel
from vista.training.trainer import train_model

MACHINE = ("cpu", "gpu", "cores", "threads")
"""What of a row's hardware its time depends on."""
ORIGINS = "origins.jsonl"


@dataclass(frozen=True, slots=True)
class RowOrigin:
    """What it took to make a row's model."""

    seconds: float
    """Of training and validation, in all processes of a run that was stopped and resumed; or of counting."""
    origins: tuple[Mapping[str, Any], ...] = ()
    """{commit, hardware} of these processes; none of a floor, or where they were older than this note."""
    validation: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the pass that was kept, the best one on validation."""

    @classmethod
    def read(cls, folder: Path) -> RowOrigin:
        """Of the run in folder/run."""
        rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        seconds = max((row.get("seconds", 0.0) for row in rows), default=0.0)
        found = [row["validation"] for row in rows if "validation" in row]
        validated = [{name: value for name, value in each.items() if value is not None} for each in found]
        kept: Mapping[str, float] = min(validated, key=_badness, default={})
        return cls(seconds, tuple(map(json.loads, _text(folder / ORIGINS).splitlines())), kept)

    def fields(self) -> dict[str, Any]:
        """commit, hardware and seconds of a line that this process measures.

        The machine is the one whose seconds these are; others that took part are named under "elsewhere".
        """
        measured, at = hardware(), commit()
        commits = list(dict.fromkeys(origin["commit"] for origin in self.origins))
        machines = [origin["hardware"] for origin in self.origins]
        machine = machines[-1] if machines else measured
        others = [each for each in (*machines[:-1], measured) if any(each[key] != machine[key] for key in MACHINE)]
        elsewhere = list(dict.fromkeys(map(describe_hardware, others)))
        return {
            "commit": at if commits in ([], [at]) else f"{at} (trained at {', '.join(commits)})",
            "hardware": machine | ({"elsewhere": elsewhere} if elsewhere else {}),
            "seconds": round(self.seconds, 1),
        }


def train_noted(config: TrainConfig, log: EventLog, folder: Path) -> RankingModel:
    """Train in folder/run, go on, or read what is done; folder/origins.jsonl notes who took part."""
    metrics, origins = folder / "run" / "metrics.jsonl", folder / ORIGINS
    trained, known = _text(metrics), _text(origins)
    precision = choose_precision(config.precision, resolve_device(config.device)).value
    origin = {"commit": commit(), "hardware": hardware() | {"precision": precision}}
    # Before training, so that one which is killed is named too.
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(origins, known + json.dumps(origin) + "\n")
    model = train_model(config, log)
    if _text(metrics) == trained:  # it had been trained to the end
        replace_text(origins, known)
    return model


def _badness(validation: Mapping[str, float]) -> float:
    """By what the trainer chooses: NE of the first task, or NDCG@10 where there is none."""
    entropies = [value for name, value in validation.items() if name.startswith("ne/")]
    return entropies[0] if entropies else -validation["ndcg@10"]


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""
