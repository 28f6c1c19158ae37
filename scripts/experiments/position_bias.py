"""Corrections for position bias in the simulation, measured by labels without the bias and by online play.

    python -m scripts.experiments.position_bias --out /tmp/positions --seeds 1 2 3

World `positions` shows popular items at the top, where users look more often; in its test part, they look at all items.
Seeds are those of the world and of training; that of play stays 1. What the product lacks is patched in here.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partialmethod
from pathlib import Path
from unittest.mock import patch

import numpy as np
import polars as pl
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn.functional import softplus

import vista.model.losses
from scripts.experiments.results import paired_cell
from vista.config import (
    EvaluateConfig,
    RefreshOptions,
    SimulateConfig,
    SimulateOnlineConfig,
    SourceColumns,
    TrainConfig,
)
from vista.config.checks import OnlinePolicy, WorldName
from vista.config.composition import compose_config
from vista.config.log_config import POSITION, PROPENSITY
from vista.evaluation.evaluate import evaluate
from vista.evaluation.online import simulate_online
from vista.log.event_log import EventLog
from vista.model.vista_model import VistaModel
from vista.refresh import refresh
from vista.scorer import Scorer
from vista.simulation.simulate import EVENTS_FILE, IMPRESSIONS_FILE, generate, write
from vista.simulation.streams import split_times
from vista.training.trainer import train

SHOWN_AT = "shown_at"
"""The position as a feature of requests, which serving always sets to the first one."""
LEAST_PROPENSITY = 0.1
"""Inverse propensities are clipped here."""
WORDS = (
    "experiment=simulation",
    "model.dim=32",
    "model.num_seeds=0",
    "data.tokens_per_batch=1500",
    "optim.warmup_steps=20",
    "optim.epochs=2",
    "optim.next_weight=0",
    "optim.window_weight=0",
    "num_threads=1",
    "verify_log=false",
)


def make_log(source: Path, path: Path, numbers: list[str]) -> EventLog:
    """That of a simulation's files, with some numbers of its impressions: positions, and perhaps true propensities."""
    if path.exists():
        return EventLog.open(path)
    shown = pl.read_parquet(source / IMPRESSIONS_FILE)
    return EventLog.from_frame(
        pl.read_parquet(source / EVENTS_FILE),
        path,
        time_unit="ms",
        columns=SourceColumns(action="action", labels=["click"]),
        impressions=shown.with_columns(pl.col(POSITION).cast(pl.String).alias(SHOWN_AT)),
        request_numbers=numbers,
        request_categories=[SHOWN_AT],
    )


# What the product lacks.


def inverse_propensity(logits: Tensor, label: Tensor, mask: Tensor, examined: Tensor | None = None) -> Tensor:
    """In place of `task_losses`: the label divided by the propensity, so that its mean is that of an item looked at."""
    assert examined is not None
    logits, own = logits.float(), label / examined.clamp(min=LEAST_PROPENSITY)
    loss, known = ((softplus(logits) - own * logits) * mask).flatten(0, -2), mask.flatten(0, -2)
    return torch.sum(loss, 0) / known.sum(0).clamp(min=1)


def dividing() -> AbstractContextManager[object]:
    return patch.object(vista.model.losses, "task_losses", inverse_propensity)


@contextmanager
def asking_for_the_top() -> Iterator[None]:
    """Requests of online play say that the item is shown at the first position."""
    with patch.object(Scorer, "score", partialmethod(Scorer.score, request={SHOWN_AT: "1"})):
        yield


@dataclass(frozen=True)
class Method:
    words: list[str]
    has_propensity: bool = False
    training: Callable[[], AbstractContextManager[object]] = nullcontext
    serving: Callable[[], AbstractContextManager[object]] = nullcontext
    ignore: list[str] = field(default_factory=lambda: ["model.ignore=[request_features]"])


EXAMINED = ["optim.examined_tasks=[click]"]
METHODS = {
    "labels as they are": Method([]),
    "known propensities": Method(EXAMINED, has_propensity=True),
    "estimated from position": Method(EXAMINED),
    "inverse propensity": Method(EXAMINED, has_propensity=True, training=dividing),
    "position as a feature": Method([], serving=asking_for_the_top, ignore=[]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--users", type=int, default=200)
    parser.add_argument("--events", type=int, default=800, help="per user")
    parser.add_argument("--items", type=int, default=1600)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {}

    def tell(name: str, seed: int, **values: float) -> None:
        found.setdefault(name, []).append(values)
        print(json.dumps({"method": name, "seed": seed} | {key: round(value, 5) for key, value in values.items()}))

    for seed in asked.seeds:
        folder = asked.out / f"seed-{seed}"
        config = SimulateConfig(
            out=str(folder / "world"),
            world=WorldName.positions,
            num_users=asked.users,
            events_per_user=asked.events,
            impressions_per_user=200,
            num_items=asked.items,
            seed=seed,
        )
        world = generate(config)
        write(world, folder / "world")
        numbers = [POSITION], [POSITION, PROPENSITY]
        logs = [make_log(folder / "world", folder / "-".join(own), own) for own in numbers]
        validation, test = split_times(config)
        is_test = world.impression_timestamp >= test
        labels, chance = world.label[is_test, 0], world.probability[is_test, 0]
        tell("oracle", seed, auc=float(roc_auc_score(labels, chance)), ratio=float(chance.sum() / labels.sum()))
        for name, method in METHODS.items():
            log, run = logs[method.has_propensity], folder / name.replace(" ", "-")
            own = [f"run_dir={run}", f"data.path={log.path}", f"data.validation_from={validation}", f"seed={seed}"]
            with method.training():
                words = [*WORDS, *own, f"data.test_from={test}", *method.ignore, *method.words]
                train(compose_config(TrainConfig, words), log)
            model, store = str(run / "best"), folder / "store"
            refresh(VistaModel.from_pretrained(model), log, store, until=test, options=RefreshOptions(verify_log=False))
            given = {"data": str(log.path), "model": model, "store": str(store), "num_threads": 1, "verify_log": False}
            report = evaluate(EvaluateConfig(**given))  # type: ignore[arg-type]
            shutil.rmtree(store)
            assert report.impressions is not None and report.probabilities is not None
            predicted, label = report.probabilities[:, 0], report.impressions.label[:, 0]
            ratio = float(predicted.sum() / label.sum())
            with method.serving():
                tell(name, seed, auc=report.metrics["auc/click"], ratio=ratio, **play(asked, folder, seed, model))
        for policy in (OnlinePolicy.oracle, OnlinePolicy.popular, OnlinePolicy.random):
            tell(f"policy {policy.value}", seed, **play(asked, folder, seed, model, policy))
    _print(found)


def play(
    asked: argparse.Namespace, folder: Path, seed: int, model: str, policy: OnlinePolicy = OnlinePolicy.model
) -> dict[str, float]:
    """Means over the rounds of online play."""
    config = SimulateOnlineConfig(
        source=str(folder / "world"),
        model=model,
        policy=[policy],
        rounds=asked.rounds,
        out=str(folder / "online.jsonl"),
        num_threads=1,
    )
    rounds = simulate_online(config).rounds
    names = ("clicks", "regret", "coverage", "diversity")
    return {name: float(np.mean([getattr(one, name) for one in rounds])) for name in names}


def _print(found: dict[str, list[dict[str, float]]]) -> None:
    """Means over seeds with their standard errors, and paired differences from two methods."""
    for reference in ("labels as they are", "known propensities"):
        print(f"compared with {reference}:")
        for name, rows in found.items():
            cells = []
            for key in rows[0]:
                values, others = (np.array([row.get(key, np.nan) for row in of]) for of in (rows, found[reference]))
                cells.append(paired_cell(key, values, others))
            print(f"{name:24s} " + "  ".join(cells))


if __name__ == "__main__":
    main()
