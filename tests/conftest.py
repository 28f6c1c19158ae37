"""Small logs and small trained models with their stores, made once per session. Tests must not change them."""

from __future__ import annotations

import atexit
import dataclasses
import fcntl
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# All machines compute the same: the choices of one processor profile, with instructions that each of them has. Where
# VISTA_PROCESSOR is set, as by `make test-processors`, the processor uses all that it has. Libraries read these
# variables when they are loaded.
if "VISTA_PROCESSOR" not in os.environ:
    os.environ["VISTA_PROCESSOR"] = "float32"
    os.environ.setdefault("ATEN_CPU_CAPABILITY", "avx2")
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")
    os.environ.setdefault("MKL_ENABLE_INSTRUCTIONS", "AVX2")

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from numpy.typing import NDArray
from torch import Tensor

# Triton reads this when it is first imported, which any module below may do. Without a GPU, the tests of its kernels
# run in its interpreter, and would fail if it was imported without this.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import vista
from tests.faults.nursery import Nursery, shared_nursery
from tests.required_program import missing
from vista.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    PrepareConfig,
    SimulateConfig,
    SourceColumns,
    SourceConfig,
    TrainConfig,
)
from vista.config.checks import Architecture, Split, to_dict
from vista.config.model_config import CONFIGS, RankingConfig
from vista.examples.item_spaces import COARSE, GRID
from vista.examples.transitions import TransitionTable
from vista.log.event_log import EventLog
from vista.model.baselines.sequence_models import SequenceModel
from vista.model.ranking_model import RankingModel
from vista.model.saved_model import FileEntry, checksum_of
from vista.model.vista_model import VistaModel
from vista.scorer import Scorer, Tail
from vista_kernels.processor import VARIABLE, processor

ROUNDING = 2e-5
"""Tolerance of summaries and scores in float32 that are computed in another order, as in a batch of another size.

Bound: about 300 roundings, of 6e-8 each, of values near 1. The models of these tests have sums of 16 to 64 products, of
which no more than a dozen follow each other.
"""

# Processes of pytest-xdist have a width of 80 columns; without it, text is as in a pipe, unless a test sets a width.
os.environ.pop("COLUMNS", None)

# No deadline: examples can be slow on a busy machine.
settings.register_profile("vista", settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("vista")

# What is imported and collected stays until the end, so the collector of garbage need not look at it each time.
gc.disable()
atexit.register(gc.unfreeze)  # Libraries report objects that are left at the end as leaks.

# Tests interrupt processes as Ctrl-C does, but a shell makes background jobs ignore that signal.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Exempt all objects from later collections of garbage, and turn these on."""
    gc.freeze()
    gc.enable()


DAY = 86_400_000
MAIN_MODULE = sys.modules["__main__"]
START = 1_600_000_000_000
"""Time of the first event of the small logs, ms."""
LENGTHS = [12, 1, 25, 2, 40, 3, 9, 7, 30, 18, 4, 22, 5, 16, 11, 28]
"""Events per user of the small logs; users with one or two events are too short for leave-last-out."""


def ratings_folder(folder: Path) -> Path:
    """A folder in ml-1m's format: 30 users with 40 ratings each."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    users, times = np.repeat(np.arange(1, 31), 40), 978_300_000 + np.tile(np.arange(40) * 60, 30)
    rows = zip(users, rng.integers(1, 60, 1200), rng.integers(1, 6, 1200), times, strict=True)
    (folder / "ratings.dat").write_text("".join(f"{user}::{item}::{stars}::{at}\n" for user, item, stars, at in rows))
    return folder


def real_set(name: str) -> Path:
    """Folder of a data set; the test is skipped if it is missing."""
    root = os.environ.get("VISTA_DATA_DIR")
    if not root:
        pytest.skip("VISTA_DATA_DIR is not set; it names the folder of the data sets")
    if not Path(root, name).is_dir():
        pytest.skip(f"VISTA_DATA_DIR={root} does not contain {name}")
    return Path(root, name)


@pytest.fixture
def rectools() -> Path:
    """RecTools' virtual environment, which `make test-rectools` makes."""
    if not (folder := os.environ.get("VISTA_RECTOOLS_VENV")):
        missing("VISTA_RECTOOLS_VENV names no virtual environment with RecTools")
    return Path(folder).absolute()


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Use one thread: sums of floats depend on it, and tests compare bits with those of other processes."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_settings(one_thread: None) -> Iterator[None]:
    """Begin each test with one thread and with denormal numbers, both of which an earlier test may have changed."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(False)
    yield
    sys.modules["__main__"] = MAIN_MODULE  # Streamlit puts pages there, and new processes would run them.


@pytest.fixture(scope="session")
def nursery() -> Nursery:
    """Forks processes that have imported vista, for tests that kill or interrupt them."""
    if sys.platform != "linux":
        pytest.skip("processes that end with the tests require Linux")
    return shared_nursery()


@pytest.fixture
def force_processor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Force a processor profile for the rest of a test; "" detects the processor."""

    def force(profile: str) -> None:
        monkeypatch.setenv(VARIABLE, profile)
        processor.cache_clear()

    yield force
    monkeypatch.undo()
    processor.cache_clear()


def small_frame(seed: int = 0) -> dict[str, Any]:
    """Users 100, 101, … with LENGTHS events over items 0, 10, …, 390; the events of a user all differ."""
    rng = np.random.default_rng(seed)
    lengths = np.array(LENGTHS)
    user = np.repeat(np.arange(len(lengths)), lengths)
    # Users step through the items at different speeds, so that a model can learn something.
    step = np.concatenate([np.arange(n) for n in lengths])
    item = (user * 7 + step * (1 + user % 3) + rng.integers(0, 3, len(user))) % 40
    gaps = rng.integers(60_000, 3 * DAY, len(user))
    time = START + np.concatenate([np.cumsum(gaps[user == u]) for u in range(len(lengths))])
    return {
        "user": 100 + user,
        "item": 10 * item,
        "timestamp": time,
        "action": rng.choice(["click", "like"], len(user)),
        "rating": rng.integers(1, 6, len(user)).astype(np.float32),
    }


NEXT_ONLY = OptimConfig(next_weight=1.0, window_weight=0.0)
"""Weights as training plans them where users do not return."""


def small_config(log: EventLog, run_dir: str | Path, **changes: Any) -> TrainConfig:
    """A training run of about a second. `changes` are keys with two underscores for a dot, such as optim__epochs=1."""
    config = TrainConfig(
        model=ModelConfig(
            dim=16,
            num_heads=2,
            num_seeds=3,
            num_layers=2,
            num_target_layers=2,
            tail_len=6,
            dropout=0.1,
            temperature=0.05,
            counter_keys=[],
            # Epoch 0 is often the best epoch of so small a run, and then there is nothing that attention does.
            pooled_dim=0,
        ),
        data=DataConfig(
            path=str(log.path),
            exclude_seen=True,
            tokens_per_batch=64,
            label_spacing=4,
            num_negatives=20,
        ),
        optim=OptimConfig(
            epochs=2,
            patience=0,
            warmup_steps=4,
            learning_rate=5e-3,
            table_rate=1.0,
            next_weight=1.0,
            window_weight=0.0,
        ),
        run_dir=str(run_dir),
        device="cpu",
        num_threads=1,
        checkpoint_every=1000,
    )
    if (architecture := changes.pop("model__architecture", None)) is not None:
        config.model = model_config(architecture, **(to_dict(config.model) | {"history_limit": 200}))
    for key, value in changes.items():
        group, _, name = key.rpartition("__")
        setattr(getattr(config, group) if group else config, name, value)
    return config


def model_config(kind: Architecture | str | None = None, /, **settings: Any) -> RankingConfig:
    """The configuration of a kind, or of the setting `architecture`. Settings that it does not have are left out."""
    schema = CONFIGS[Architecture(kind or settings.get("architecture", "vista"))]
    names = {each.name for each in dataclasses.fields(schema)} - {"architecture"}
    return schema(**{name: value for name, value in settings.items() if name in names})


def untrained(log: EventLog, seed: int = 0, **changes: Any) -> VistaModel:
    """A model with drawn weights; changes as in `small_config`."""
    from vista.model.vista_model import VistaModel
    from vista.training.log_schema import schema_of

    config = small_config(log, "unused", **changes)
    torch.manual_seed(seed)
    return VistaModel(config.model, schema_of(log, config), log.items, config.data).eval()


def draw_counter_weights(model: VistaModel | SequenceModel, seed: int = 0, *, statistics: bool = True) -> None:
    """Give the parts of a model that read counters, statistics, and pooled vectors the values of a trained model; they
    start at 0.

    What these parts read of items is drawn, too; without `statistics`, a model keeps the statistics and label rates of
    its training part.
    """
    generator = torch.Generator().manual_seed(seed)
    for part, std in ((model.counted, 0.3), (model.candidate_head, 0.2), (model.statistics, 0.3)):
        for weight in [] if part is None else part.parameters():
            weight.data.copy_(torch.randn(weight.shape, generator=generator) * std)
    drawn_values = {"item_statistics", "item_rates"} if statistics else set()
    for name in sorted(drawn_values & dict(model.named_buffers()).keys()):
        drawn = getattr(model, name)[1:]
        drawn.copy_(torch.randn(drawn.shape, generator=generator))
    draw_space(model, seed)
    if model.transitions is not None:
        draw_transitions(model.transitions, seed)


def draw_space(model: RankingModel, seed: int = 0) -> None:
    """Give all trained items drawn vectors of the item space, if the model has one."""
    if (width := model.config.space_dim) == 0:
        return
    count = model.num_trained_items
    drawn = torch.randn(count, width, generator=torch.Generator().manual_seed(seed)).double()
    unit = drawn / drawn.norm(dim=1, keepdim=True)
    if model.item_space_weights is None:
        model.item_space[1 : 1 + count] = ((unit / GRID).round() * GRID).float()
        return
    model.item_space[1 : 1 + count] = ((unit / COARSE).round() * COARSE).float()
    weights = 2 * torch.rand(model.item_space_weights.shape, generator=torch.Generator().manual_seed(seed)) - 1
    model.item_space_weights.copy_((weights / COARSE).round() * COARSE)


def event_vectors(model: RankingModel, rows: NDArray[Any], action: NDArray[Any]) -> NDArray[np.float64]:
    """What events of model rows add to pooled vectors, [n, r]."""
    vectors = model.item_space.double().numpy()[rows]
    weights = model.item_space_weights
    return vectors if weights is None else vectors * weights.double().numpy()[rows, action, None]


def pooled_of(model: VistaModel, rows: NDArray[Any], covered: int, seen: int) -> Tensor | None:
    """Pooled vectors [1, J, r] of a request after `seen` events of a history of model rows, whose record covers
    `covered` of them; None for a model without."""
    if model.config.space_dim == 0:
        return None
    first = max(seen - model.config.tail_len, 0)
    known = [*rows[:covered], *rows[max(covered, first) : seen]]
    sums = [model.item_space[np.array(chosen, np.int64)].double().sum(0) for chosen in (known, rows[first:seen])]
    return torch.nn.functional.normalize(torch.stack(sums), dim=-1)[None].float()


def candidate_inputs(model: VistaModel, pooled: Tensor | None, candidates: Tensor) -> Tensor | None:
    """What tasks read of the requests' pooled vectors [B, J, r] and candidates int64 [B, C]; None for a model without
    pooled vectors."""
    if pooled is None:
        return None
    cosines = torch.einsum("bjr,bcr->bcj", pooled.double(), model.item_space[candidates].double())
    return model.candidate_inputs(cosines.float(), candidates)


def draw_transitions(transitions: TransitionTable, seed: int = 0) -> None:
    """Give all items followers with weights, fewer than there is place for."""
    generator = torch.Generator().manual_seed(seed)
    num_rows, size = transitions.item.shape
    count = min(size, num_rows // 2)
    for row in range(1, num_rows):
        transitions.item[row, :count] = 1 + torch.randperm(num_rows - 1, generator=generator)[:count]
        transitions.weight[row, :count] = torch.rand(count, generator=generator)


def run_python(code: str, *arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter with one thread, from a checkout or with an installed package."""
    root = Path(vista.__file__).parents[1]
    path = os.pathsep.join([str(root), str(root / "kernels"), str(Path(__file__).parent)])
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that `make` fills. The workers of pytest-xdist share it: the first one that needs it makes it."""
    own = factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / name
    done = folder.with_suffix(".made")
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a worker that was ended
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


@dataclass(frozen=True)
class Served:
    """A model with three stores, which differ in the events they cover."""

    log: EventLog
    config: TrainConfig
    model: VistaModel
    model_dir: Path
    store: Path
    """until=all, int8."""
    exact_store: Path
    """until=all, float32."""
    test_store: Path
    """Events before the test labels, float32."""


def serve(log: EventLog, config: TrainConfig, folder: Path) -> Served:
    """Train a model and refresh its three stores, in `folder`, which `config.run_dir` lies in."""
    from vista.config.checks import Codec
    from vista.log.splits import split_until
    from vista.refresh import RefreshOptions, refresh
    from vista.training.trainer import train

    model = train(config, log)
    refresh(model, log, folder / "store")
    refresh(model, log, folder / "exact", options=RefreshOptions(codec=Codec.float32))
    refresh(
        model, log, folder / "test", until=split_until(config.data, "test"), options=RefreshOptions(codec=Codec.float32)
    )
    return served_in(log, config, folder)


def served_in(log: EventLog, config: TrainConfig, folder: Path) -> Served:
    """What `serve` has made in a folder."""
    best = Path(config.run_dir) / "best"
    folders = (folder / name for name in ("store", "exact", "test"))
    return Served(log, config, VistaModel.from_pretrained(best), best, *folders)


@pytest.fixture(scope="session")
def event_log(tmp_path_factory: pytest.TempPathFactory) -> EventLog:
    """A log with times, ratings, two actions and integer ids."""
    columns = SourceColumns(action="action", rating="rating")
    folder = made_once(
        tmp_path_factory,
        "event-log",
        lambda folder: EventLog.from_frame(small_frame(), folder / "log", time_unit="ms", columns=columns),
    )
    return EventLog.open(folder / "log")


@pytest.fixture(scope="session")
def order_log(tmp_path_factory: pytest.TempPathFactory) -> EventLog:
    """The same events with string ids, without times, actions and ratings."""
    frame = small_frame()
    named = {"user": [f"u{user}" for user in frame["user"]], "item": [f"i{item}" for item in frame["item"]]}
    return EventLog.from_frame(
        named, tmp_path_factory.mktemp("order-log") / "log", columns=SourceColumns(timestamp=None)
    )


@pytest.fixture(scope="session")
def impression_log(tmp_path_factory: pytest.TempPathFactory) -> EventLog:
    """A simulated log with impressions for three tasks."""
    from vista.log.ingest.prepare import prepare
    from vista.simulation.simulate import simulate

    def make(folder: Path) -> None:
        simulate(
            SimulateConfig(
                out=str(folder / "source"),
                num_users=12,
                events_per_user=60,
                num_items=40,
                num_topics=8,
                episode_events=20,
                session_events=5,
                impressions_per_user=40,
                days=200,
            )
        )
        source = SourceConfig(kind="simulated", paths=[str(folder / "source")])
        prepare(PrepareConfig(out=str(folder / "log"), events=source))

    return EventLog.open(made_once(tmp_path_factory, "impression-log", make) / "log")


@pytest.fixture(scope="session")
def served(event_log: EventLog, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """A model of the next item, split by leave-last-out."""

    def config(folder: Path) -> TrainConfig:
        return small_config(event_log, folder / "run")

    folder = made_once(tmp_path_factory, "served", lambda folder: serve(event_log, config(folder), folder))
    return served_in(event_log, config(folder), folder)


def tasks_config(log: EventLog, folder: Path, **changes: Any) -> TrainConfig:
    """A run of three labeled tasks and the next item, split by time; `changes` as in `small_config`."""
    times = np.sort(np.asarray(log.impressions.timestamp))  # type: ignore[union-attr]
    return small_config(
        log,
        folder / "run",
        data__split=Split.time,
        data__validation_from=str(times[int(0.6 * len(times))]),
        data__test_from=str(times[int(0.8 * len(times))]),
        data__tokens_per_batch=256,
        **changes,
    )


@pytest.fixture(scope="session")
def served_tasks(impression_log: EventLog, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """A model of `tasks_config` without pooled vectors."""
    log = impression_log
    folder = made_once(tmp_path_factory, "served-tasks", lambda folder: serve(log, tasks_config(log, folder), folder))
    return served_in(log, tasks_config(log, folder), folder)


@pytest.fixture(scope="session")
def scorer(served: Served) -> Iterator[Scorer]:
    """A scorer of `served` with the int8 store."""
    with Scorer.open(served.model_dir, served.store) as opened:
        yield opened


@pytest.fixture(scope="session")
def task_scorer(served_tasks: Served) -> Iterator[Scorer]:
    """A scorer of `served_tasks` with the int8 store."""
    with Scorer.open(served_tasks.model_dir, served_tasks.store) as opened:
        yield opened


def tail_of(events: list[tuple[int, list[tuple[int, int, int]]]]) -> Tail:
    """A tail from (user, [(item, time, action), …]), in the order of the request."""
    lengths = [len(rows) for _, rows in events]
    rows = [row for _, rows in events for row in rows]
    columns = np.array(rows, np.int64).reshape(-1, 3).T
    return Tail(columns[0], columns[1], columns[2].astype(np.uint8), np.concatenate([[0], np.cumsum(lengths)]))


USERS = [103, 100, 115, 108, 101]
ITEMS = [0, 390, 10, 200, 50, 60]
"""Users and items of the requests in the scorer's tests."""


@pytest.fixture
def no_warnings() -> Iterator[None]:
    """Turn warnings into errors, such as torch's about read-only arrays."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def sign_model(folder: Path, change: Callable[[dict[str, Any]], object] | None = None) -> None:
    """Change config.json of a saved model, and make all of its digests right again."""
    fields = json.loads((folder / "config.json").read_text())
    if change is not None:
        change(fields)
    for path in (*folder.glob("*.npy"), *folder.glob("*.safetensors")):
        fields["files"][path.name] = dataclasses.asdict(FileEntry.of(path))
    fields["checksum"] = checksum_of(fields)
    (folder / "config.json").write_text(json.dumps(fields))
