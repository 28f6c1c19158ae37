"""An adapter, LoRA of as many numbers, and a new stage 2 on another surface of the simulation.

    python -m scripts.experiments.adapters --out /tmp/adapters --seeds 1 2 3

A base model learns clicks of world `share`. On the new surface, a quarter of the users click with probability
sigmoid(0.8 logit p - 1 + 0.8 quality): less, and more by quality. Everything starts from the same base and store, and
reads the same labels of the surface. Seeds are those of this training; the base has one seed.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from vista.config import AdaptConfig, EvaluateConfig, RefreshOptions, SimulateConfig, SourceColumns, TrainConfig
from vista.config.composition import compose_config
from vista.evaluation.evaluate import evaluate
from vista.evaluation.metrics import mean_and_error
from vista.log.event_log import EventLog
from vista.model.layers import with_bias
from vista.model.serving_model import Adapter, ServingModel
from vista.model.vista_model import VistaModel
from vista.refresh import refresh
from vista.scorer import Scorer
from vista.simulation.simulate import generate
from vista.simulation.streams import split_times
from vista.training.adapter import adapt
from vista.training.trainer import train

SURFACE_SHARE = 4
"""One of so many users is on the new surface."""
NUM_ADAPTERS = 100
"""In one process, to measure their memory and time."""
LEARNING_RATE = 0.02  # of the adapter and of LoRA
WORDS = "experiment=simulation data.tokens_per_batch=2000 optim.warmup_steps=20 optim.next_weight=0 verify_log=false"
METRICS = ("auc/click", "gauc/click", "ne/click")


def make_logs(config: SimulateConfig, folder: Path) -> tuple[EventLog, EventLog]:
    """The log of the base, and that of the surface: the same events with other impressions."""
    paths = folder / "log", folder / "surface"
    if paths[1].exists():
        return EventLog.open(paths[0]), EventLog.open(paths[1])
    world = generate(config)
    events = {
        "user": np.repeat(np.arange(config.num_users), np.diff(world.offsets)),
        "item": world.item.astype(np.int64),
        "timestamp": world.timestamp,
    }
    shown = {
        "user": world.impression_user,
        "item": world.impression_item.astype(np.int64),
        "timestamp": world.impression_timestamp,
        "click": world.label[:, 0].astype(np.int64),
    }
    p = world.probability[:, 0].astype(np.float64)
    logit = 0.8 * np.log(p / (1 - p)) - 1 + 0.8 * world.catalog.quality[world.impression_item]
    clicked = np.random.default_rng([config.seed, 1]).random(len(p)) < 1 / (1 + np.exp(-logit))
    there = world.impression_user % SURFACE_SHARE == 0
    other = {name: column[there] for name, column in (shown | {"click": clicked.astype(np.int64)}).items()}
    columns = SourceColumns(labels=["click"])
    base, surface = (
        EventLog.from_frame(events, path, time_unit="ms", columns=columns, impressions=own)
        for path, own in zip(paths, (shown, other), strict=True)
    )
    return base, surface


# LoRA: updates of rank 1 of two matrices, and the bias of the task. It is trained as the adapter.


def adapted_matrices(model: VistaModel) -> list[nn.Linear]:
    """The output projection of the last layer of stage 2, and the hidden layer of the head that reads the candidate."""
    assert model.candidate_head is not None
    found = model.target_attention.layers[-1].get_submodule("out"), model.candidate_head.network[2]
    return list(found)  # type: ignore[arg-type]


def num_lora(model: ServingModel | VistaModel) -> int:
    vista = model if isinstance(model, VistaModel) else model.vista_model
    return sum(sum(linear.weight.shape) for linear in adapted_matrices(vista)) + len(model.schema.tasks)


def lora_weights(model: VistaModel, values: Tensor) -> list[Tensor]:
    """Those of the matrices. One factor starts as a fixed random vector, the other at 0."""
    random, weights, place = torch.Generator().manual_seed(0), [], 0
    for linear in adapted_matrices(model):
        rows, columns = linear.weight.shape
        into, out_of = torch.split(values[place : place + rows + columns], [rows, columns])
        start = torch.randn(columns, generator=random) * columns**-0.5
        weights.append(linear.weight.detach() + torch.outer(into, start + out_of))
        place += rows + columns
    return weights


def with_lora(model: VistaModel, values: Tensor) -> VistaModel:
    """In place of `VistaModel.with_adapter`: a copy of all modules, with other weights in the adapted ones."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    other = copy.deepcopy(model, shared)
    for linear, weight in zip(adapted_matrices(other), lora_weights(model, values), strict=True):
        linear._parameters["weight"] = weight  # type: ignore[assignment]
    assert model.task_head is not None
    other._modules["task_head"] = with_bias(model.task_head, values[-len(model.schema.tasks) :])
    return other


@contextmanager
def training_lora() -> Iterator[None]:
    with (
        patch.object(VistaModel, "with_adapter", with_lora),
        patch.object(ServingModel, "num_adapted", property(num_lora)),
    ):
        yield


def merged(base: Path, file: Path, folder: Path) -> Path:
    """The base with LoRA's updates in its weights, saved into a folder."""
    model = VistaModel.from_pretrained(base)
    served = ServingModel.of(model, model.empty_summary().cpu().numpy())
    with training_lora():
        values = torch.from_numpy(Adapter.read(file, served).values)
    with torch.no_grad():
        for linear, weight in zip(adapted_matrices(model), lora_weights(model, values), strict=True):
            linear.weight.copy_(weight)
        assert model.task_head is not None
        model.task_head.bias.add_(values[-len(model.schema.tasks) :])
    model.save_pretrained(folder)
    return folder


def cost(base: Path, store: Path, file: Path, folder: Path) -> dict[str, float]:
    """Memory of 100 adapters in one scorer, and ms of CPU time of a request without and with one of them."""
    folder.mkdir(exist_ok=True)
    names: list[str | None] = [f"surface-{number}" for number in range(NUM_ADAPTERS)]
    for name in names:
        shutil.copy(file, folder / f"{name}.adapter")
    with Scorer.open(base, store) as scorer:
        user, items = [next(iter(scorer.store.keys()))], scorer.served.items.ids(np.arange(500))
    with ExitStack() as stack:
        tracemalloc.start()
        plain = stack.enter_context(Scorer.open(base, store))
        before = tracemalloc.get_traced_memory()[0]
        stack.enter_context(Scorer.open(base, store))
        other = tracemalloc.get_traced_memory()[0]
        adapted = stack.enter_context(Scorer.open(base, store, adapter=folder))
        num_bytes = tracemalloc.get_traced_memory()[0] - other - (other - before)
        tracemalloc.stop()
        times: list[list[float]] = [[], []]
        for call in range(4 * NUM_ADAPTERS):
            for own, scorer, name in zip(times, (plain, adapted), (None, names[call % NUM_ADAPTERS]), strict=True):
                began = time.thread_time()
                scorer.score(user, items, adapter=name)
                own.append(time.thread_time() - began)
    without, with_one = (float(np.median(own)) * 1000 for own in times)
    return {"bytes_of_100": num_bytes, "ms_without": round(without, 3), "ms_with": round(with_one, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--users", type=int, default=1000)
    parser.add_argument("--events", type=int, default=400, help="per user")
    parser.add_argument("--epochs", type=int, nargs=3, default=(2, 3, 6), help="of base, adapter and LoRA, new stage 2")
    asked = parser.parse_args()
    config = SimulateConfig(num_users=asked.users, events_per_user=asked.events, num_items=2000, seed=1)
    log, surface = make_logs(config, asked.out)
    (validation, test), first = split_times(config), int(log.time_range()[0])  # type: ignore[index]
    words = [*WORDS.split(), "num_threads=1", f"data.validation_from={validation}", f"data.test_from={test}"]
    base, past, served = asked.out / "base" / "best", asked.out / "past", asked.out / "served"
    if not served.exists():
        run = [f"run_dir={base.parent}", f"data.path={log.path}", f"optim.epochs={asked.epochs[0]}"]
        run.append("optim.validate_every=0")  # exports the last epoch: epoch 0 reads no layer of stage 2
        model = train(compose_config(TrainConfig, [*words, *run]), log)
        for store, until in ((past, (first + validation) // 2), (served, test)):
            refresh(model, log, store, until=until, options=RefreshOptions(verify_log=False))
    found: dict[str, list[list[float]]] = {}

    def measure(
        name: str, seed: int | None, size: int, seconds: float, model: Path, adapter: str | None = None
    ) -> None:
        asked_for = EvaluateConfig(
            data=str(surface.path),
            model=str(model),
            store=str(served),
            adapter=adapter,
            top_k=[10],
            num_threads=1,
            verify_log=False,
        )
        metrics = evaluate(asked_for).metrics
        row = {metric: round(metrics[metric], 5) for metric in METRICS}
        found.setdefault(name, []).append([metrics[metric] for metric in METRICS])
        print(json.dumps({"method": name, "seed": seed, **row, "bytes": size, "seconds": seconds}), flush=True)

    measure("base", None, 0, 0.0, base)
    for seed in asked.seeds:
        folder = asked.out / f"seed-{seed}"
        own: dict[str, Any] = {"data": str(surface.path), "base": str(base), "store": str(past), "seed": seed}
        own |= {"num_threads": 1, "epochs": asked.epochs[1], "learning_rate": LEARNING_RATE, "verify_log": False}
        adapted = adapt(AdaptConfig(**own, out=str(folder / "plain.adapter")), surface)
        measure("adapter", seed, adapted.size_bytes, round(adapted.seconds, 1), base, adapter=adapted.out)
        with training_lora():
            lora = adapt(AdaptConfig(**own, out=str(folder / "lora.adapter")), surface)
        num_bytes = 4 * num_lora(VistaModel.from_pretrained(base))
        measure("LoRA", seed, num_bytes, round(lora.seconds, 1), merged(base, Path(lora.out), folder / "lora"))
        began, run_dir = time.perf_counter(), folder / "stage-2"
        run = [f"run_dir={run_dir}", f"data.path={surface.path}", f"optim.epochs={asked.epochs[2]}", f"seed={seed}"]
        train(compose_config(TrainConfig, [*words, *run, f"base={base}", f"store={past}"]), surface)
        num_bytes = sum(file.stat().st_size for file in (run_dir / "best").iterdir())
        measure("new stage 2", seed, num_bytes, round(time.perf_counter() - began, 1), run_dir / "best")
    print(json.dumps(cost(base, served, asked.out / f"seed-{asked.seeds[0]}" / "plain.adapter", asked.out / "copies")))
    for name, rows in found.items():
        cells = []
        for metric, values in zip(METRICS, np.array(rows).T, strict=True):
            mean, error = mean_and_error(values) if len(values) > 1 else (values[0], 0.0)
            cells.append(f"{metric} {mean:.4f} ± {error:.4f}")
        print(f"{name:12s} " + "  ".join(cells))


if __name__ == "__main__":
    main()
