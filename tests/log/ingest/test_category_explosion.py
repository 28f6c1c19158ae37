"""A category of 10^7 distinct values is refused within bounded memory, and one of 2 * 10^6 is read where it may be."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from vista.log.event_log import EventLog

pytestmark = pytest.mark.research
MANY = 10_000_000
MAX_GIB = 4
"""Memory of `vista prepare` and of its parser, at their highest: ten times the text, since Polars reads in parallel."""
PREPARE = """
import json, resource, sys
from vista.config import ItemTableConfig, PrepareConfig, SourceConfig
from vista.errors import DataError
from vista.log.ingest.prepare import prepare
given = json.loads(sys.argv[1])
events, items = SourceConfig(**given["events"]), given["items"] and ItemTableConfig(**given["items"])
message = ""
try:
    prepare(PrepareConfig(out=given["out"], events=events, items=items, progress=False))
except DataError as error:
    message = str(error)
peaks = [resource.getrusage(who).ru_maxrss / 2**20 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
print(json.dumps([message, max(peaks)]))
"""


def prepared(folder: Path, events: dict[str, Any], items: dict[str, Any] | None = None) -> tuple[str, float]:
    """Prepare a log in a process of its own; returns the error, and the peak memory in GiB."""
    words = {
        "out": str(folder / "log"),
        "events": {"timestamp": "timestamp", "time_unit": "s"} | events,
        "items": items,
    }
    done = subprocess.run(
        [sys.executable, "-c", PREPARE, json.dumps(words)], capture_output=True, text=True, check=True
    )
    message, peak = json.loads(done.stdout.splitlines()[-1])
    return message, peak


def events_file(folder: Path, num_events: int, **columns: pl.Series) -> str:
    rows = np.arange(num_events)
    file = folder / "events.parquet"
    pl.DataFrame({"user": rows % 1000, "item": rows % 1000, "timestamp": rows} | columns).write_parquet(file)
    return str(file)


def texts(count: int) -> pl.Series:
    return pl.select(value=pl.format("https://shop.example/page/{}", pl.int_range(count)))["value"]


def test_events_are_refused(tmp_path: Path) -> None:
    file = events_file(tmp_path, MANY, url=texts(MANY))
    message, peak = prepared(tmp_path, {"paths": [file], "categories": ["url"]})
    assert "column 'url' the log would have about " in message and "raise events.max_values" in message
    assert peak < MAX_GIB and not (tmp_path / "log").exists()


def test_items_are_refused(tmp_path: Path) -> None:
    file, each = events_file(tmp_path, 1000), MANY // 1000
    lists = pl.DataFrame({"item": np.repeat(np.arange(1000), each), "page": texts(MANY)}).group_by("item").all()
    lists.write_parquet(tmp_path / "items.parquet")
    message, peak = prepared(tmp_path, {"paths": [file]}, {"paths": [str(tmp_path / "items.parquet")]})
    assert "column 'page' the log would have about " in message and "raise items.max_values" in message
    assert peak < MAX_GIB and not (tmp_path / "log").exists()


def test_two_million_values_are_read_where_they_may_be(tmp_path: Path) -> None:
    count = 2_000_000
    source = {"paths": [events_file(tmp_path, count, url=texts(count))], "categories": ["url"], "max_values": count}
    message, _ = prepared(tmp_path, source)
    log = EventLog.open(tmp_path / "log")
    values = log.event_features["url"]
    assert message == "" and values is not None and len(values) == count == log.num_events
