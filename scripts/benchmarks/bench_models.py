"""Measure what a further model costs in a service: its memory, the time to swap it in, and its requests.

    python -m scripts.benchmarks.bench_models

The models have 10^6 items, d = 64, one labeled task, a retrieval head, and random weights. The second model shares with
the first one: nothing; the item table (another stage 2, as after training with `init_freeze=summarizer`); or all but
the task head. Each case runs in a process of its own, through the classes of `vista serve`. Requests compute the
projections of their candidates, which is the default with a file of models, unless a case says otherwise.

- memory: the proportional set size (PSS) that each model adds to the process, once all of its tables were read.
- swap: the CPU time to close a model and open another (`memory_bytes`), whose files are in the page cache.
- requests: 500 candidates with the projections of the export, and with those that each request computes.
"""

from __future__ import annotations

import gc
import logging
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from scripts.benchmarks.benchmark import benchmark_parser, interleaved, recording
from scripts.benchmarks.workloads import TASK, lifelong_log
from vista.config import DataConfig, ModelConfig, ServeConfig
from vista.device import set_threads
from vista.log.vocabulary import Vocabulary
from vista.model.features import Schema
from vista.model.vista_model import VistaModel
from vista.refresh import refresh
from vista.scorer import Scorer
from vista.serve.served_models import ServedModels
from vista.serve.service_metrics import ServiceMetrics

NUM_USERS, NUM_CANDIDATES, DIM = 32, 500, 64
NOW = 1_767_400_000_000
MB = 1e6
FIRST, OTHER_STAGE_2, OTHER_HEAD, UNRELATED, SMALL = "first", "other-stage-2", "other-head", "unrelated", "small"


def write_models(root: Path, num_items: int) -> None:
    """Write the models and their stores under a folder."""
    log = lifelong_log(root / "log", [200] * NUM_USERS, num_items=5000)
    base = None
    for name in (SMALL, UNRELATED, FIRST, OTHER_STAGE_2, OTHER_HEAD):
        items = Vocabulary.from_ids(np.arange(1, 1 + (10_000 if name == SMALL else num_items)))
        torch.manual_seed(2 if name == UNRELATED else 1)
        schema = Schema(list(log.actions), log.has_time, None, [TASK])
        model = VistaModel(ModelConfig(dim=DIM, num_seeds=16, counters=False), schema, items, DataConfig()).eval()
        if base is not None:
            model.load_state_dict(base)
            parts = [model.task_head] if name == OTHER_HEAD else [model.task_head, model.target_attention]
            with torch.no_grad():
                for weight in (weight for part in parts if part is not None for weight in part.parameters()):
                    weight.add_(0.01 * torch.randn(weight.shape))
        if name == FIRST:
            base = {key: weight.clone() for key, weight in model.state_dict().items()}
        model.save_pretrained(root / name)
        if name in (SMALL, UNRELATED, FIRST):
            print(f"{name}: {refresh(model, log, root / f'{name}-store')}", flush=True)


def models_of(root: Path, names: list[str], memory_bytes: int | None = None, **keys: Any) -> ServedModels:
    """Models by name; `keys` apply to all of them."""
    configs = {
        name: ServeConfig(
            model=str(root / name),
            store=str(root / (f"{name}-store" if (root / f"{name}-store").exists() else f"{FIRST}-store")),
            **keys,
        )
        for name in names
    }
    return ServedModels(configs, None, memory_bytes, ServiceMetrics())


def read_all(scorer: Scorer) -> None:
    """Read all tables of a model: stage 2 and the retrieval head score the whole catalog."""
    scorer.rank(1, top_k=1, now=NOW)
    scorer.catalog_scores([1], now=NOW)


def pss_bytes() -> int:
    """The proportional set size of this process."""
    gc.collect()
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def added_memory(root: Path, second: str, per_request: bool) -> tuple[float, float]:
    """MB that the first and the second model add to a process that has served another model before."""
    prepare()
    models = models_of(root, [FIRST, second], project_per_request=per_request)
    small = models_of(root, [SMALL])
    with small.use(SMALL) as service:
        read_all(service.scorer)
    sizes = [pss_bytes()]
    for name in (FIRST, second):
        with models.use(name) as service:
            read_all(service.scorer)
        sizes.append(pss_bytes())
    models.close()
    small.close()
    return (sizes[1] - sizes[0]) / MB, (sizes[2] - sizes[1]) / MB


def swap_times(root: Path, second: str, per_request: bool, rounds: int) -> list[float]:
    """Seconds of CPU time to open the second model, for which the first one is closed."""
    prepare()
    models = models_of(root, [FIRST, second], memory_bytes=1, project_per_request=per_request)
    times = []
    for _ in range(rounds):
        models.open(FIRST)
        began = time.process_time()
        models.open(second)
        times.append(time.process_time() - began)
        assert not models.is_open(FIRST)
    models.close()
    return times


def request_times(root: Path, rounds: int) -> dict[str, tuple[float, float]]:
    """Median and spread of a request, in seconds, with projections of the export and with computed ones."""
    prepare()
    scorers = {
        name: Scorer.open(root / FIRST, root / f"{FIRST}-store", project_per_request=name == "computed")
        for name in ("stored", "computed")
    }
    some = np.random.default_rng(0).choice(np.arange(1, 5001), (64, NUM_CANDIDATES))

    def call(scorer: Scorer) -> Callable[[], object]:
        return lambda: [scorer.score([1 + row % NUM_USERS], ids, now=NOW) for row, ids in enumerate(some)]

    timing = interleaved({name: call(scorer) for name, scorer in scorers.items()}, rounds=rounds)
    return {name: (one.median_s / len(some), one.spread_s / len(some)) for name, one in timing.items()}


def prepare() -> None:
    """Settings of a process that measures."""
    logging.disable(logging.WARNING)
    set_threads(1)


def in_process(call: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a call in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(call, *arguments).result()


def main() -> int:
    """Run the benchmark."""
    arguments = benchmark_parser("models", __doc__).parse_args()
    set_threads(1)
    num_items = 20_000 if arguments.quick else 1_000_000
    rounds = 3 if arguments.quick else 7
    swaps = 3
    with recording("models", __doc__, arguments) as recorder:
        root = recorder.folder
        write_models(root, num_items)
        cases = (
            ("nothing in common", UNRELATED, True, None),
            ("the same item table", OTHER_STAGE_2, True, "value <= 0.2 * baseline"),
            ("all but the task head in common", OTHER_HEAD, True, "value <= 0.2 * baseline"),
            ("the same item table, projections of the exports", OTHER_STAGE_2, False, None),
        )
        for what, second, per_request, bar in cases:
            first_mb, second_mb = in_process(added_memory, root, second, per_request)
            recorder.add(
                f"memory of a second model against the first: {what}", second_mb, "MB", baseline=first_mb, bar=bar
            )
        for what, second, per_request, _ in cases:
            times = in_process(swap_times, root, second, per_request, swaps)
            recorder.add(
                f"CPU time to close a model and open another: {what}",
                1e3 * median(times),
                "ms",
                spread=1e3 * np.ptp(times),
            )
        timing = in_process(request_times, root, rounds)
        recorder.add(
            f"a request of {NUM_CANDIDATES} candidates, projections per request against those of the export",
            1e3 * timing["computed"][0],
            "ms",
            baseline=1e3 * timing["stored"][0],
            spread=1e3 * timing["computed"][1],
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
