"""Logs for training: small ones that grow, with runs that start from an earlier model; and one with all features."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from tests.conftest import DAY, START, small_config, small_frame
from vista.config import SourceColumns, TrainConfig
from vista.config.checks import Architecture, InitFreeze, Split
from vista.log.event_log import EventLog
from vista.log.vocabulary import Vocabulary
from vista.model.ranking_model import RankingModel
from vista.model.vista_model import VistaModel
from vista.training.trainer import Trainer
from vista.training.warm_start import WarmStart

COLUMNS = SourceColumns(action="action", rating="rating")
Run: TypeAlias = tuple[TrainConfig, VistaModel]
"""A finished run: its configuration, and its model."""
NEW_ITEMS = [5, 1000, 2000]
"""Items that only the grown logs have; the first one is in the middle of the old ids."""


FROZEN = {"init_freeze": InitFreeze.summarizer}


def part(frame: dict[str, Any], kept: np.ndarray) -> dict[str, Any]:
    """The rows of a frame where `kept` is True."""
    return {name: np.asarray(column)[kept] for name, column in frame.items()}


def more_events() -> dict[str, Any]:
    """Later events of some users, and new users; a fifth is of new items."""
    frame, rng = small_frame(seed=1), np.random.default_rng(2)
    frame["user"] = frame["user"] + 8
    frame["timestamp"] = frame["timestamp"] + 500 * DAY
    is_new = rng.random(len(frame["user"])) < 0.2
    frame["item"] = np.where(is_new, rng.choice(NEW_ITEMS, len(is_new)), frame["item"])
    return frame


def features(items: np.ndarray) -> dict[str, Any]:
    """A table of items, the same for an item in every log. New items have new values, and larger numbers."""
    known = np.arange(0, 400, 10)
    table, place = feature_frame(known), {int(item): row for row, item in enumerate(known)}
    rows = [place.get(int(item), 3) for item in items]
    chosen = {name: [column[row] for row in rows] for name, column in table.items()}
    is_new = ~np.isin(items, known)
    chosen["item"] = items
    chosen["brand"] = ["brand 9" if new else brand for new, brand in zip(is_new, chosen["brand"], strict=True)]
    chosen["price"] = np.where(is_new, 1000.0, np.array(chosen["price"], np.float64))
    return chosen


def grow(path: Path, to: Path) -> EventLog:
    """A copy of a log with `more_events`, and features of their items."""
    shutil.copytree(path, to)
    frame = more_events()
    items = features(np.unique(frame["item"]))
    return EventLog.from_frame(frame, to, time_unit="ms", columns=COLUMNS, items=items, append=True)


def warm_config(config: TrainConfig, log: EventLog, run_dir: Path, **changes: Any) -> TrainConfig:
    """A run that starts from the run of `config`."""
    warm = replace(
        config,
        model=replace(config.model),
        data=replace(config.data, path=str(log.path)),
        optim=replace(config.optim, validate_every=1),
        init_from=str(Path(config.run_dir) / "best"),
        run_dir=str(run_dir),
    )
    for key, value in changes.items():
        group, _, name = key.rpartition("__")
        setattr(getattr(warm, group) if group else warm, name, value)
    return warm


def begun(config: TrainConfig, log: EventLog) -> tuple[WarmStart, Trainer]:
    """A warm start before its first step."""
    warm = WarmStart.open(config, log)
    return warm, Trainer(warm.config, log, warm)


def kept_ids(base: VistaModel) -> Any:
    """All item ids of a model."""
    return base.items.ids(np.arange(len(base.items)))


# One log with features of items, events, requests, and users, and the parts of a model that read them.

NUM_USERS, NUM_EVENTS, NUM_ITEMS = 40, 600, 30
HOUR = 3_600_000
MIDDLE, VALIDATION, TEST, END = (START + HOUR * hours for hours in (180, 360, 480, 700))
"""Times within the training part, of its end, of the end of the validation part, and after all events."""
NEW_ITEM = 900
"""An item that has features, and no event before the test."""
NEW_USER = NUM_USERS
"""A user with impressions and features, but without events, so a store has no record of that user."""
Frame = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """A part of a model that reads a kind of features."""

    columns: tuple[tuple[str, str], ...]
    """Names and kinds, in the order of the schema."""
    schema: str
    """The field of the schema, and what `model.ignore` calls it."""
    encoder: Callable[[RankingModel], Any]

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.columns]


PARTS = {
    "items": Part(
        (("brand", "category"), ("tags", "category"), ("price", "number"), ("text", "vector")),
        "item_features",
        lambda model: model.features,
    ),
    "events": Part(
        (("surface", "category"), ("dwell", "number")), "event_features", lambda model: model.encoder.features
    ),
    "impressions": Part(
        (("device", "category"), ("hour", "number")), "request_features", lambda model: model.request_encoder
    ),
    "users": Part((("region", "category"), ("age", "number")), "user_features", lambda model: model.user_encoder),
}


def feature_frame(items: np.ndarray) -> Frame:
    """A table of items: a category, several categories, a number, and a vector; some are missing."""
    rng = np.random.default_rng(1)
    count = len(items)
    return {
        "item": items,
        "brand": [None if value == 0 else f"brand {value}" for value in rng.integers(0, 5, count)],
        "tags": [[f"tag {tag}" for tag in rng.permutation(6)[: rng.integers(0, 4)]] for _ in items],
        "price": np.where(rng.random(count) < 0.2, np.nan, rng.lognormal(size=count)),
        "text": rng.normal(size=(count, 3)).astype(np.float32).tolist(),
    }


def frames() -> dict[str, Frame]:
    """Tables of the things that have features, by the names of PARTS. Mostly users in the north click, and mostly what
    is shown on a phone is liked. Impressions of one time have different devices."""
    rng = np.random.default_rng(0)
    users = np.arange(NUM_USERS)
    user = rng.permutation(np.repeat(users, NUM_EVENTS // NUM_USERS))
    item = rng.integers(0, NUM_ITEMS, NUM_EVENTS)
    item[-1] = NEW_ITEM
    time = START + HOUR * np.arange(NUM_EVENTS)
    surface = np.array(["", "app", "tv", "web"])[item % 4]  # which tells about the item
    events = {
        "user": user,
        "item": item,
        "timestamp": time,
        "surface": [name or None for name in surface.tolist()],
        "dwell": np.where(rng.random(NUM_EVENTS) < 0.2, np.nan, rng.lognormal(size=NUM_EVENTS)),
    }
    shown_to = np.append(np.repeat(user, 2), [NEW_USER] * 3)
    count = len(shown_to)
    device = rng.choice(["desktop", "phone", "tv", ""], count)
    impressions = {
        "user": shown_to,
        "item": rng.integers(0, NUM_ITEMS, count),
        "timestamp": np.append(np.repeat(time + 60_000, 2), [TEST + HOUR] * 3),
        "click": ((shown_to % 2 == 0) == (rng.random(count) < 0.9)).astype(int),
        "like": ((device == "phone") == (rng.random(count) < 0.9)).astype(int),
        "device": [name or None for name in device.tolist()],
        "hour": np.where(rng.random(count) < 0.2, np.nan, rng.integers(0, 24, count)),
    }
    everyone = np.append(users, NEW_USER)
    age = np.where(rng.random(len(everyone)) < 0.2, np.nan, rng.integers(18, 80, len(everyone)))
    return {
        "items": feature_frame(np.append(np.arange(NUM_ITEMS), NEW_ITEM)),
        "events": events,
        "impressions": impressions,
        "users": {"user": everyone, "region": np.where(everyone % 2 == 0, "north", "south"), "age": age},
    }


def log_of(tables: dict[str, Frame], path: Path, *, without: Sequence[str] = (), append: bool = False) -> EventLog:
    """A log of tables by the names of PARTS, without the features of some of them."""
    given = {name: dict(table) for name, table in tables.items()}
    for name in without:
        for column in PARTS[name].names:
            del given[name][column]
    kinds: dict[str, dict[str, list[str]]] = {}
    for name in ("events", "impressions"):
        features = [column for column in given.get(name, {}) if column not in ("user", "item", "timestamp", *LABELS)]
        texts = [column for column in features if isinstance(given[name][column], list)]
        kinds[name] = {"categories": texts, "numbers": [column for column in features if column not in texts]}
    return EventLog.from_frame(
        given["events"],
        path,
        time_unit="ms",
        columns=SourceColumns(labels=LABELS if "impressions" in given else []),
        items=None if "items" in without else given.get("items"),
        users=None if "users" in without else given.get("users"),
        impressions=given.get("impressions"),
        **kinds["events"],
        **{f"request_{kind}": names for kind, names in kinds["impressions"].items()},
        append=append,
    )


LABELS = ["click", "like"]


def feature_config(log: EventLog, run_dir: Path, **changes: Any) -> TrainConfig:
    """A run of one epoch that is split by time, without validations."""
    split = {
        "data__split": Split.time,
        "data__validation_from": str(VALIDATION),
        "data__test_from": str(TEST),
        "data__tokens_per_batch": 128,
        "optim__epochs": 1,
        "optim__validate_every": 0,
        "optim__learning_rate": 2e-2,
    }
    return small_config(log, run_dir, **(split | changes))


def of_architecture(architecture: Architecture, limit: int = 8) -> dict[str, Any]:
    """Changes of a configuration."""
    reads_all = architecture in (Architecture.vista, Architecture.sim, Architecture.twin)
    return {"model__architecture": architecture, "model__history_limit": 0 if reads_all else limit}


def ids(values: Vocabulary | None) -> list[Any]:
    """All values of a vocabulary, in the order of their codes."""
    assert values is not None
    found: list[Any] = values.ids(np.arange(len(values))).tolist()
    return found
