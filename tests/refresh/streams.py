"""A watch of a topic, and what its log and store must hold."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from vista.config import SourceConfig, WatchConfig
from vista.config.checks import Codec
from vista.config.log_config import StreamConfig
from vista.log.event_log import EventLog
from vista.log.segment_files import DEAD_LETTERS_FILE, stream_offsets
from vista.refresh import RefreshOptions, refresh
from vista.refresh.watch import Watch, WatchReport

TOPIC = "shop.events"


def watch_of(folder: Path, source: str, grow: SimpleNamespace) -> WatchConfig:
    """The settings of a watch of a topic, after making its log, model, and store in a folder."""
    log = grow.append(folder / "log", grow.events({1: 7, 2: 7}))
    model = grow.model()
    model.save_pretrained(folder / "model")
    refresh(model, log, folder / "store", options=RefreshOptions(codec=Codec.float32))
    return config_of(folder, source)


def config_of(folder: Path, source: str) -> WatchConfig:
    """The settings alone."""
    columns = {"timestamp": "timestamp", "time_unit": "ms", "action": "action", "rating": "rating"}
    return WatchConfig(
        data=str(folder / "log"),
        model=str(folder / "model"),
        store=str(folder / "store"),
        source=source,
        stream=StreamConfig(max_s=20.0),
        events=SourceConfig(**columns, categories=["surface"], numbers=["dwell"]),
        device="cpu",
        num_threads=1,
        once=True,
    )


def look(config: WatchConfig) -> WatchReport:
    """One look of a new watch, as after a restart."""
    watching = Watch(config)
    try:
        return watching.look()
    finally:
        watching.close()


def contents(log: EventLog) -> list[tuple[Any, ...]]:
    """All events as (user, item, time, action, rating, surface, dwell), sorted."""
    histories = log.gather(np.arange(log.num_users))
    users = np.repeat(log.users.ids(np.arange(log.num_users)), histories.lengths)
    surfaces, dwells = log.event_features["surface"], histories.features.columns["dwell"]
    assert surfaces is not None
    assert histories.rating is not None
    names = [*surfaces.ids(np.arange(len(surfaces))), ""]  # code -1: missing
    columns = (
        users,
        log.items.ids(histories.item),
        histories.timestamp,
        [log.actions[code] for code in histories.action],
        histories.rating,
        [names[code] for code in histories.features.columns["surface"]],
        [str(dwell) for dwell in dwells],
    )
    return sorted(zip(*(list(column) for column in columns), strict=True))


def expect(config: WatchConfig, grow: SimpleNamespace, folder: Path, *frames: dict[str, Any]) -> None:
    """Log and store are as if the log had been made from these frames, after the first one of the fixture."""
    actual = EventLog.open(config.data)
    for frame in (grow.events({1: 7, 2: 7}), *frames):
        log = grow.append(folder / "expected-log", frame)
    assert contents(actual) == contents(log)
    refresh(grow.model(), actual, folder / "expected", options=RefreshOptions(codec=Codec.float32))
    grow.assert_same(Path(config.store), folder / "expected", atol=5e-5)


def dead_letters(config: WatchConfig) -> list[dict[str, Any]]:
    files = sorted(Path(config.data).glob(f"*/{DEAD_LETTERS_FILE}"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def offsets(config: WatchConfig) -> list[int]:
    """The offsets that the log holds, by partition."""
    found = stream_offsets(segment.manifest for segment in EventLog.open(config.data).segments)
    return [found[partition].next for partition in sorted(found)]
