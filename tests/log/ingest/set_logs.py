"""Logs of public data sets, prepared from a folder of their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.conftest import real_set
from tests.log.conftest import PARSER
from vista.config import ItemTableConfig, PrepareConfig, SourceConfig
from vista.log.event_log import EventLog
from vista.log.ingest.prepare import prepare


def load(folder: Path, kind: str = "auto", items: ItemTableConfig | None = None, **columns: list[str]) -> EventLog:
    """Prepare a folder, or a file, into a log next to it. `columns` are those of features of events."""
    out = folder.with_name(f"{folder.name}-log")
    events = SourceConfig(kind=kind, paths=[str(folder)], **columns)  # type: ignore[arg-type]
    prepare(PrepareConfig(out=str(out), events=events, items=items), parser=PARSER)
    return EventLog.open(out)


def load_real(name: str, out: Path) -> EventLog:
    """Prepare a set of VISTA_DATA_DIR."""
    events = SourceConfig(kind="auto", paths=[str(real_set(name))])
    prepare(PrepareConfig(out=str(out), events=events), parser=PARSER)
    return EventLog.open(out)


def events_of(log: EventLog) -> list[tuple[Any, ...]]:
    """User, item, milliseconds, and action of each event."""
    return [
        (user, item, time, log.actions[action])
        for user in log.users.ids(range(log.num_users)).tolist()
        for item, time, action in zip(
            log.items.ids(log[user].item).tolist(), log[user].timestamp.tolist(), log[user].action.tolist(), strict=True
        )
    ]
