"""Logs that grow, and models whose states can be updated."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import ROUNDING, draw_space
from tests.counters.counter_histories import category
from tests.refresh.kafka_clusters import Kafka, MockKafka, Tansu
from tests.refresh.streams import TOPIC, watch_of
from vista.config import DataConfig, ModelConfig, SourceColumns, WatchConfig
from vista.config.checks import Codec
from vista.log.event_log import EventLog
from vista.log.histories import RowFeatures
from vista.log.vocabulary import Vocabulary
from vista.model.features import RowFeatureReader, Schema
from vista.model.vista_model import VistaModel
from vista.refresh import RefreshOptions, refresh
from vista.store import StoreReader
from vista.store.folder_generation import SharedEnvironment
from vista.store.layout import environment_path

HOUR = 3_600_000
START = 1_700_000_000_000
NUM_ITEMS = 30


READER = RowFeatureReader.of(
    RowFeatures({"surface": np.zeros(9, np.int32), "dwell": np.linspace(-1, 1, 9, dtype=np.float32)}),
    {"surface": Vocabulary.from_ids(["web", "app"]), "dwell": None},
)
"""How models read features of events. The log has more surfaces, and in another order."""


def model(
    seed: int = 0, num_tail_features: int | None = None, residual_task: str | None = None, **config: Any
) -> VistaModel:
    """An untrained model with every parameter moved away from its initial value.

    With `num_tail_features`, it reads features of events, and so many of them in stage 2. If it counts categories, its
    items have the feature `genre`: 4 values, and none for every fifth item.
    """
    torch.manual_seed(seed)
    options = {"dim": 16, "num_heads": 2, "num_seeds": 3, "tail_len": 5, "conv_width": 3, "dropout": 0.0} | config
    genres, table = (
        category("genre", np.arange(NUM_ITEMS) % 5 - 1) if "genre" in str(config.get("counter_keys")) else ([], None)
    )
    built = VistaModel(
        ModelConfig(**options),
        Schema(
            ["click", "like"],
            True,
            (1.0, 5.0),
            [],
            item_features=genres,
            event_features=[] if num_tail_features is None else READER.columns,
            num_tail_features=num_tail_features or 0,
            residual_task=residual_task,
        ),
        Vocabulary.from_ids(np.arange(NUM_ITEMS) * 10),
        DataConfig(),
    )
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    draw_space(built)
    built.event_features = None if num_tail_features is None else READER
    built.set_item_features(table)
    return built.eval()


def events(counts: dict[int, int], start: int = START, seed: int = 0, spread: int = 400 * HOUR) -> dict[str, Any]:
    """A frame of `counts[user]` events per user, at distinct times after `start`."""
    rng = np.random.default_rng([seed, start])
    user = np.repeat(np.array(list(counts), np.int64), list(counts.values()))
    dwell, surface = rng.normal(size=len(user)).astype(np.float32), np.array(["tv", "app", "", "web"])
    time = [start + np.sort(rng.choice(spread, n, replace=False)) for n in counts.values()]
    return {
        "user": user,
        "item": 10 * rng.integers(0, NUM_ITEMS + 2, len(user)),  # the last two are unknown to the model
        "timestamp": np.concatenate([np.zeros(0, np.int64), *time]),
        "action": np.where(np.arange(len(user)) == 0, "click", rng.choice(["click", "like"], len(user))),
        "rating": rng.integers(1, 6, len(user)).astype(np.float32),
        "surface": surface[rng.integers(0, 4, len(user))],
        "dwell": np.where(rng.random(len(user)) < 0.2, np.nan, dwell),
    }


def append(path: Path, frame: dict[str, Any]) -> EventLog:
    """Make a log from a frame, or append the frame to it as a segment."""
    return EventLog.from_frame(
        frame | {"surface": [name or None for name in frame["surface"].tolist()]},
        path,
        time_unit="ms",
        columns=SourceColumns(action="action", rating="rating"),
        categories=["surface"],
        numbers=["dwell"],
        append=any(path.glob("segment-*")),
    )


def later(path: Path, counts: dict[int, int], hours: int = 500, seed: int = 0) -> EventLog:
    """Append events that begin some hours after the first ones."""
    return append(path, events(counts, START + hours * HOUR, seed))


def full(model: VistaModel, log: EventLog, path: Path, **options: Any) -> Path:
    """A full refresh that stores exact summaries; options as of `RefreshOptions`."""
    refresh(model, log, path, options=RefreshOptions(**{"codec": Codec.float32, **options}))
    return path


def stored(
    folder: Path, counts: dict[int, int], of: VistaModel | None = None, **options: Any
) -> tuple[VistaModel, EventLog, Path]:
    """A model (by default `model()`), a log of `counts[user]` events per user, and the store of a full refresh."""
    made, log = of or model(), append(folder / "log", events(counts))
    return made, log, full(made, log, folder / "store", **options)


def fail_at(patch: pytest.MonkeyPatch, owner: type, name: str, number: int, error: BaseException) -> None:
    """Let the call with this number, from 1, of a method raise an error instead."""
    method, numbers = getattr(owner, name), count(1)

    def call(*arguments: Any, **options: Any) -> Any:
        if next(numbers) == number:
            raise error
        return method(*arguments, **options)

    patch.setattr(owner, name, call)


def contents(store: Path, generation: int = 1) -> dict[bytes, bytes]:
    """All keys and values of a generation's summaries, with its manifest and cursor."""
    with SharedEnvironment.acquire(environment_path(store, generation)) as shared:
        return shared.read(lambda transaction: {bytes(key): bytes(value) for key, value in transaction.cursor()})


def assert_same(path: str | Path, expected: Path, atol: float = ROUNDING) -> None:
    """Both stores hold the same users, tails with features, times, counts, digests, counters; summaries differ by up to
    `atol`."""
    with StoreReader.open(path) as store, StoreReader.open(expected) as other:
        users = list(other.keys())
        assert list(store.keys()) == users and len(store) == len(other)
        if not users:
            return
        batch, wanted = store.get_many(users), other.get_many(users)
        for name in ("event_count", "last_event_ts", "history_digest"):
            assert getattr(batch, name).tolist() == getattr(wanted, name).tolist(), name
        for name in ("items", "times", "actions", "offsets"):
            assert getattr(batch.tail, name).tolist() == getattr(wanted.tail, name).tolist(), name
        assert list(batch.tail.features) == list(wanted.tail.features)
        for name, column in batch.tail.features.items():
            np.testing.assert_array_equal(column, wanted.tail.features[name], name)
        for counters, others in zip(batch.counters, wanted.counters, strict=True):
            for name in ("key", "codes", "offsets", "clock"):
                np.testing.assert_array_equal(getattr(counters, name), getattr(others, name), name)
        np.testing.assert_allclose(batch.summary, wanted.summary, atol=atol)
        if store.manifest.pooled_dim and other.manifest.pooled_dim:  # both have states, and sums are exact
            np.testing.assert_array_equal(batch.summary[:, -1], wanted.summary[:, -1])
            (found, states), (others, wanted_states) = store.states(users), other.states(users)
            np.testing.assert_array_equal(found, others)
            np.testing.assert_array_equal(states.pooled, wanted_states.pooled)


@pytest.fixture(scope="session")
def grow() -> SimpleNamespace:
    """The functions above."""
    names = {"model": model, "events": events, "append": append, "later": later, "full": full, "stored": stored}
    return SimpleNamespace(**names, assert_same=assert_same, start=START, hour=HOUR)


@pytest.fixture(params=[MockKafka, pytest.param(Tansu, marks=pytest.mark.nightly)])
def kafka(request: pytest.FixtureRequest) -> Iterator[Kafka]:
    """Each Kafka cluster in turn."""
    if find_spec("confluent_kafka") is None and not os.environ.get("CI"):
        pytest.skip("the extra `kafka` is not installed")
    with request.param() as started:
        yield started


@pytest.fixture
def streamed(tmp_path: Path, grow: SimpleNamespace, kafka: Kafka) -> WatchConfig:
    """A watch of a topic with two partitions, with features of events."""
    return watch_of(tmp_path, kafka.create(TOPIC), grow)
