"""`vista simulate`: logs of long histories, with impressions whose true label probabilities are known.

`simulate` writes a folder of Parquet files that `prepare` reads as source kind `simulated`:

    events.parquet       user, item, timestamp, action            users in order, each by time
    impressions.parquet  user, item, timestamp, click, like, long_view (0, 1 or null), click_probability,
                         like_probability, long_view_probability, decisive_age       users in order, each by time
    items.parquet        item, topic, quality                      the ground truth, hidden from models
    simulation.json      the config, and the times at which validation and test labels begin

Ids are int64 and start at 1. Timestamps are int64 ms and strictly increase within a user's events. Actions are the
strings of `ACTIONS`. The probabilities of an impression depend on the user's events strictly before its timestamp. An
impression is not an event: clicks are not fed back into the history. Like and long_view are known only if the
impression was clicked, and null otherwise; their probabilities, given a click, are there for every impression. Only the
world `share` has them; the other worlds have clicks alone.
`decisive_age` is the number of the user's events since the newest event of the candidate's topic, or -1 if the user has
no such event.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vista.arrays import offsets_of
from vista.config import SimulateConfig
from vista.errors import ConfigError, DataError
from vista.files import checked_path, create_file, make_folders, replace_text, sync
from vista.installation import require_module
from vista.progress_bar import progress_bar
from vista.simulation.catalog import Catalog, make_catalog
from vista.simulation.event_stream import ACTIONS
from vista.simulation.oracle import OracleMetrics, oracle_metrics
from vista.simulation.period import split_times
from vista.simulation.simulated_log import SimulatedChunk, SimulatedLog
from vista.simulation.simulation_report import SimulationReport
from vista.simulation.world_table import WORLDS

if TYPE_CHECKING:
    import polars as pl

EVENTS_FILE, IMPRESSIONS_FILE, ITEMS_FILE, MANIFEST_FILE = (
    "events.parquet",
    "impressions.parquet",
    "items.parquet",
    "simulation.json",
)
CHUNK_EVENTS = 250_000
"""Events that are drawn at once."""
LENGTH_SPREAD = 0.35
"""Standard deviation of the logarithm of a history's length."""


def generate(config: SimulateConfig, *, chunk_events: int = CHUNK_EVENTS) -> SimulatedLog:
    """Draw a log in memory. The same arguments give the same bytes (with one version of NumPy).

    Args:
        config: what to draw.
        chunk_events: events that are drawn at once, approximately. Changing it changes what a seed gives.
    """
    root = np.random.SeedSequence(config.seed)
    catalog_seed, length_seed, chunk_seed = root.spawn(3)
    catalog = make_catalog(config, catalog_seed)
    lengths = _draw_lengths(config, np.random.Generator(np.random.SFC64(length_seed)))
    users = list(_user_chunks(lengths, chunk_events))
    seeds = chunk_seed.spawn(len(users))

    def draw(index: int) -> SimulatedChunk:
        return WORLDS[config.world].make_chunk(config, catalog, lengths[users[index]], seeds[index])

    if config.num_threads > 1:
        with ThreadPoolExecutor(config.num_threads) as pool:
            drawn = pool.map(draw, range(len(users)))
            chunks = list(progress_bar(drawn, desc="simulate", unit="chunk", total=len(users)))
    else:
        chunks = [draw(index) for index in progress_bar(range(len(users)), desc="simulate", unit="chunk")]
    joined = {
        field.name: np.concatenate([getattr(chunk, field.name) for chunk in chunks])
        for field in dataclasses.fields(SimulatedChunk)
    }
    return SimulatedLog(
        config=config,
        catalog=catalog,
        offsets=offsets_of(lengths),
        impression_user=np.repeat(np.arange(config.num_users), config.impressions_per_user),
        **joined,
    )


def _draw_lengths(config: SimulateConfig, rng: np.random.Generator) -> NDArray[np.int64]:
    """Lengths of the histories, [num_users], at least 1: log-normal, between about 1/3 and 3 times the median."""
    weight = np.clip(np.exp(LENGTH_SPREAD * rng.standard_normal(config.num_users)), 1 / 3, 3)
    ends = np.rint(np.cumsum(weight) / weight.sum() * config.num_users * config.events_per_user)
    return np.asarray(np.maximum(np.diff(ends, prepend=0), 1), dtype=np.int64)


def _user_chunks(lengths: NDArray[np.int64], chunk_events: int) -> Iterator[slice]:
    """Ranges of consecutive users with about `chunk_events` events each; a longer history is a range by itself."""
    ends = np.cumsum(lengths)
    group = (ends - lengths) // chunk_events
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    for start, stop in zip(starts, np.append(starts[1:], len(lengths)), strict=True):
        yield slice(int(start), int(stop))


def simulate(config: SimulateConfig) -> SimulationReport:
    """Draw a log and write it to `config.out`, replacing an earlier simulation.

    Raises:
        DataError: if the folder cannot be written.
        ConfigError: if `config.reference` is set and there are too few test impressions to measure it.
    """
    out = checked_path(config.out, ConfigError)
    begin = time.perf_counter()
    log = generate(config)
    generate_s = time.perf_counter() - begin
    reference: tuple[OracleMetrics, ...] = ()
    if config.reference:
        try:
            reference = tuple(oracle_metrics(log, tasks=WORLDS[config.world].tasks))
        except ValueError as error:
            raise ConfigError(f"reference=true: {error}, or leave it out") from error
    begin = time.perf_counter()
    try:
        write(log, out)
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error}); choose another folder with out=...") from error
    write_s = time.perf_counter() - begin
    validation_from, test_from = split_times(config)
    return SimulationReport(
        out=out,
        num_users=config.num_users,
        num_events=log.num_events,
        num_impressions=len(log.impression_item),
        validation_from=validation_from,
        test_from=test_from,
        generate_s=generate_s,
        write_s=write_s,
        reference=reference,
    )


def write(log: SimulatedLog, out: Path) -> None:
    """Write the four files of a simulation durably, each of them atomically, the manifest last."""
    make_folders(out)
    (out / MANIFEST_FILE).unlink(missing_ok=True)
    for name, frame in (
        (EVENTS_FILE, _events_frame(log)),
        (IMPRESSIONS_FILE, _impressions_frame(log)),
        (ITEMS_FILE, _items_frame(log.catalog)),
    ):
        create_file(out / f"{name}.tmp", 0o666).close()
        frame.write_parquet(out / f"{name}.tmp", compression="zstd", compression_level=1)
        sync(out / f"{name}.tmp")
        os.replace(out / f"{name}.tmp", out / name)
    validation_from, test_from = split_times(log.config)
    manifest = {
        "config": dataclasses.asdict(log.config) | {"world": log.config.world.value},
        "validation_from": validation_from,
        "test_from": test_from,
        "tasks": list(WORLDS[log.config.world].tasks),
        "actions": list(ACTIONS),
    }
    replace_text(out / MANIFEST_FILE, json.dumps(manifest, indent=2) + "\n")


def _events_frame(log: SimulatedLog) -> pl.DataFrame:
    pl = require_module("polars", "data")

    users = np.repeat(np.arange(1, log.config.num_users + 1), np.diff(log.offsets))
    return pl.DataFrame(
        {
            "user": users,
            "item": log.item.astype(np.int64) + 1,
            "timestamp": log.timestamp,
            "action": pl.Series(np.array(ACTIONS, dtype=object), dtype=pl.String).gather(log.action),
        }
    )


def _impressions_frame(log: SimulatedLog) -> pl.DataFrame:
    pl = require_module("polars", "data")

    columns = {
        "user": pl.Series(log.impression_user + 1),
        "item": pl.Series(log.impression_item.astype(np.int64) + 1),
        "timestamp": pl.Series(log.impression_timestamp),
    }
    tasks = WORLDS[log.config.world].tasks
    for index, task in enumerate(tasks):
        known = pl.Series(log.label[:, index])
        columns[task] = known.set(known < 0, None)
    for index, task in enumerate(tasks):
        columns[f"{task}_probability"] = pl.Series(np.ascontiguousarray(log.probability[:, index]))
    columns["decisive_age"] = pl.Series(log.decisive_age)
    return pl.DataFrame(columns)


def _items_frame(catalog: Catalog) -> pl.DataFrame:
    pl = require_module("polars", "data")

    ids = np.arange(1, len(catalog.topic) + 1)
    return pl.DataFrame({"item": ids, "topic": catalog.topic.astype(np.int64), "quality": catalog.quality})
