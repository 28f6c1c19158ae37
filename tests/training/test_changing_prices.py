"""A changing price is read as of the event in histories and as of the request in impressions, and never from later."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.conftest import DAY, START, small_config
from vista.config import SourceColumns, TrainConfig
from vista.config.checks import Split
from vista.examples.batch import Batch
from vista.log.event_log import EventLog
from vista.model.features import EncodedRows, FeatureSpec
from vista.training.trainer import Trainer

Columns = dict[str, NDArray[Any]]
NUM_USERS, NUM_EVENTS, NUM_ITEMS = 8, 30, 12
VALIDATION, TEST = START + 60 * DAY, START + 90 * DAY
MIDDLE = START + 15 * DAY
"""A time within the training part."""


def drawn_prices(rng: np.random.Generator, count: int) -> NDArray[np.float64]:
    """A price for each row that no other row has, in quarters, so that a price tells which row it is from."""
    return 1 + rng.permutation(count) / 4


@pytest.fixture(scope="module")
def events() -> Columns:
    """One event per day and user until the validation begins, and later ones."""
    rng = np.random.default_rng(0)
    user, day = np.divmod(np.arange(NUM_USERS * NUM_EVENTS), NUM_EVENTS)
    time = START + day * DAY + user + (day >= 25) * 70 * DAY
    item = rng.integers(0, NUM_ITEMS, len(user))
    return {"user": user, "item": item, "timestamp": time, "price": drawn_prices(rng, len(user))}


@pytest.fixture(scope="module")
def shown() -> Columns:
    """Three items per user and request, at 20 times before the validation begins and 4 times in it."""
    rng = np.random.default_rng(1)
    day = np.append(np.arange(20) + 2.5, 61 + np.arange(4))
    user, place = np.divmod(np.arange(NUM_USERS * len(day) * 3), len(day) * 3)
    time = START + (day[place // 3] * DAY).astype(np.int64) + user
    item = np.concatenate([rng.permutation(NUM_ITEMS)[:3] for _ in range(len(user) // 3)])
    price = drawn_prices(rng, len(user))
    click = (price < np.median(price)).astype(np.int64)
    return {"user": user, "item": item, "timestamp": time, "price": price, "click": click}


def log_of(events: Columns, shown: Columns, path: Path) -> EventLog:
    return EventLog.from_frame(
        events,
        path,
        time_unit="ms",
        columns=SourceColumns(labels=["click"]),
        impressions=shown,
        numbers=["price"],
        request_numbers=["price"],
    )


@pytest.fixture(scope="module")
def log(events: Columns, shown: Columns, tmp_path_factory: pytest.TempPathFactory) -> EventLog:
    return log_of(events, shown, tmp_path_factory.mktemp("prices") / "log")


def config_of(log: EventLog, run_dir: Path, **changes: Any) -> TrainConfig:
    split = {"data__split": Split.time, "data__validation_from": str(VALIDATION), "data__test_from": str(TEST)}
    return small_config(log, run_dir, **split, optim__epochs=3, optim__learning_rate=2e-2, **changes)


def batches_of(made: Trainer) -> list[Batch]:
    return [made.source.batch(0, index) for index in range(made.source.num_batches(0))]


def read_prices(features: EncodedRows | None, columns: list[FeatureSpec]) -> NDArray[np.float64]:
    """The prices from which a model's inputs were standardized."""
    (price,) = columns
    assert features is not None
    return np.round((features.dense[..., 0].double().numpy() * price.scale + price.mean) * 4) / 4


def tensors_of(part: Any) -> list[torch.Tensor]:
    if is_dataclass(part):
        return [tensor for field in fields(part) for tensor in tensors_of(getattr(part, field.name))]
    return [part] if isinstance(part, torch.Tensor) else []


def test_training_reads_the_price_of_each_row(log: EventLog, events: Columns, shown: Columns, tmp_path: Path) -> None:
    """And each row that training may see is read."""
    made = Trainer(config_of(log, tmp_path), log)
    items = log.items.ids(np.arange(NUM_ITEMS))
    paid = {
        (item, time): price
        for item, time, price in zip(events["item"], events["timestamp"], events["price"], strict=True)
    }
    row_of = {price: row for row, price in enumerate(shown["price"].tolist())}
    num_events, rows = 0, []
    for batch in batches_of(made):
        prices = read_prices(batch.events.features, made.model.schema.event_features)
        item = items[batch.rows[batch.events.item].numpy() - 1].tolist()
        for key, price in zip(zip(item, batch.events.clock.tolist(), strict=True), prices, strict=True):
            assert price == paid[key]
            num_events += 1
        seen = batch.impressions
        assert seen.features is not None
        is_described = seen.features.entry[..., 0] > 0  # all but the tenth whose features training leaves out
        known = seen.mask.any(-1) & is_described
        prices = read_prices(seen.features, made.model.schema.request_features)[known.numpy()]
        item = items[batch.rows[seen.item[known]].numpy() - 1]
        own = [row_of[price] for price in prices.tolist()]
        assert item.tolist() == shown["item"][own].tolist()
        assert seen.label[known][:, 0].tolist() == shown["click"][own].tolist()
        rows += own
    assert num_events >= (events["timestamp"] < VALIDATION).sum()
    visible = (shown["timestamp"] < VALIDATION).sum()
    assert 0.7 * visible < len(rows) and len(set(rows)) == len(rows) and shown["timestamp"][rows].max() < VALIDATION


def test_training_does_not_read_prices_from_the_validation_on(
    log: EventLog, events: Columns, shown: Columns, tmp_path: Path
) -> None:
    later = [one | {"price": np.where(one["timestamp"] < VALIDATION, one["price"], 9999)} for one in (events, shown)]
    other = log_of(later[0], later[1], tmp_path / "log")
    first, second = (Trainer(config_of(log, tmp_path), one) for one in (log, other))
    assert first.model.schema == second.model.schema
    for one, changed in zip(batches_of(first), batches_of(second), strict=True):
        assert len(tensors_of(one)) > 20
        for tensor, again in zip(tensors_of(one), tensors_of(changed), strict=True):
            assert torch.equal(tensor, again)


def test_a_row_does_not_read_later_prices_of_its_item(
    log: EventLog, events: Columns, shown: Columns, tmp_path: Path
) -> None:
    """Later rows of the training part exchange their prices, which keeps the distribution."""
    exchanged = []
    for one in (events, shown):
        price, later = one["price"].copy(), (one["timestamp"] >= MIDDLE) & (one["timestamp"] < VALIDATION)
        assert 50 < later.sum() < len(later) - 50
        price[later] = np.roll(price[later], 1)
        exchanged.append(one | {"price": price})
    other = log_of(exchanged[0], exchanged[1], tmp_path / "log")
    first, second = (Trainer(config_of(log, tmp_path), one) for one in (log, other))
    time_of = dict(zip(shown["price"].tolist(), shown["timestamp"].tolist(), strict=True))
    for one, changed in zip(batches_of(first), batches_of(second), strict=True):
        before, after = (
            read_prices(batch.events.features, made.model.schema.event_features)
            for batch, made in ((one, first), (changed, second))
        )
        assert torch.equal(one.events.clock, changed.events.clock)
        assert ((before == after) == (one.events.clock < MIDDLE).numpy()).all()
        assert one.impressions.features is not None
        known = (one.impressions.mask.any(-1) & (one.impressions.features.entry[..., 0] > 0)).numpy()
        before, after = (
            read_prices(batch.impressions.features, made.model.schema.request_features)[known]
            for batch, made in ((one, first), (changed, second))
        )
        assert ((before == after) == [time_of[price] < MIDDLE for price in before.tolist()]).all()
