"""`vista simulate`: lifelong logs with impressions whose true label probabilities are known.

`simulate` writes a folder of Parquet files that `prepare` reads as source kind `simulated`:

    events.parquet       user, item, timestamp, action            users in order, each by time
    impressions.parquet  user, item, timestamp, click, like, long_view (0, 1 or null), click_probability,
                         like_probability, long_view_probability, decisive_age       users in order, each by time
    items.parquet        item, topic, quality                      the ground truth that models are not given
    simulation.json      the config, and the moments that split the log in time

Ids are int64, counted from 1; timestamps int64 ms, strictly rising within a user's events; actions are the strings of
`ACTIONS`. An impression has seen the user's events strictly before its timestamp, and is no event itself: clicks are
not fed back into the history. **Masks**: like and long_view are known only where the impression was clicked, and null
elsewhere; their probabilities, of a like or a long view given a click, are there for every impression. `decisive_age`
is the number of the user's events between the newest event of the candidate's topic and the impression, -1 where
the user has none.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vista.config import SimulateConfig
from vista.errors import ConfigError, DataError
from vista.simulation.world import ACTIONS, TASKS, Catalogue, Chunk, make_catalogue, make_chunk, period

if TYPE_CHECKING:
    import polars as pl

    from vista.simulation.oracle import Reference

EVENTS_FILE, IMPRESSIONS_FILE, ITEMS_FILE, MANIFEST_FILE = (
    "events.parquet",
    "impressions.parquet",
    "items.parquet",
    "simulation.json",
)
CHUNK_EVENTS = 250_000
"""Events that are drawn at once; part of what a seed means."""
LENGTH_SPREAD = 0.35
"""Standard deviation of the logarithm of the histories' lengths."""
VALIDATION_SHARE, TEST_SHARE = 0.70, 0.85
"""Shares of the period after which validation and test labels begin."""


@dataclass(frozen=True, slots=True)
class SimulatedLog:
    """Events and impressions of all users, packed, users in order; items are rows (id - 1) of the catalogue."""

    config: SimulateConfig
    catalogue: Catalogue
    offsets: NDArray[np.int64]
    """[num_users+1] of the events."""
    item: NDArray[np.int32]
    timestamp: NDArray[np.int64]
    action: NDArray[np.uint8]
    impression_user: NDArray[np.int64]
    """[N] rows (id - 1) of users."""
    impression_item: NDArray[np.int32]
    impression_timestamp: NDArray[np.int64]
    impression_position: NDArray[np.int64]
    """[N] events of the user strictly before the impression."""
    label: NDArray[np.int8]
    """[N, tasks] 0, 1, or -1 where unknown; tasks are `TASKS`."""
    probability: NDArray[np.float32]
    """[N, tasks]"""
    decisive_age: NDArray[np.int64]

    @property
    def num_events(self) -> int:
        return len(self.item)


@dataclass(frozen=True, slots=True)
class SimulationReport:
    """What was written, and how long it took."""

    out: Path
    num_users: int
    num_events: int
    num_impressions: int
    validation_from: int
    """Suggested split, int64 ms: labels from here on are validation labels …"""
    test_from: int
    """… and from here on test labels."""
    generate_s: float
    write_s: float
    reference: tuple[Reference, ...] = ()
    """The best possible figures, where the config asks for them."""

    def __str__(self) -> str:
        rate = self.num_events / max(self.generate_s, 1e-9)
        text = (
            f"{self.out}: {self.num_users} users, {self.num_events} events, {self.num_impressions} impressions; "
            f"generated in {self.generate_s:.2f} s ({rate / 1e6:.2f}M events/s), written in {self.write_s:.2f} s "
            f"(together {self.num_events / max(self.generate_s + self.write_s, 1e-9) / 1e6:.2f}M events/s)"
        )
        if not self.reference:
            return text
        from vista.simulation.oracle import format_reference

        return f"{text}\n{format_reference(self.reference)}"


def split_times(config: SimulateConfig) -> tuple[int, int]:
    """Moments (int64 ms) from which labels are validation and test labels: 70 % and 85 % of the period."""
    start, end = period(config)
    return start + int(VALIDATION_SHARE * (end - start)), start + int(TEST_SHARE * (end - start))


def generate(config: SimulateConfig) -> SimulatedLog:
    """Draw a log in memory: the same config gives the same bytes (for one version of NumPy)."""
    root = np.random.SeedSequence(config.seed)
    catalogue_seed, length_seed, chunk_seed = root.spawn(3)
    catalogue = make_catalogue(config, catalogue_seed)
    lengths = _draw_lengths(config, np.random.Generator(np.random.SFC64(length_seed)))
    parts = list(_user_chunks(lengths))
    seeds = chunk_seed.spawn(len(parts))

    def draw(index: int) -> Chunk:
        return make_chunk(config, catalogue, lengths[parts[index]], seeds[index])

    if config.num_threads > 1:
        with ThreadPoolExecutor(config.num_threads) as pool:
            chunks = list(pool.map(draw, range(len(parts))))
    else:
        chunks = [draw(index) for index in range(len(parts))]
    joined = {
        field.name: np.concatenate([getattr(chunk, field.name) for chunk in chunks])
        for field in dataclasses.fields(Chunk)
    }
    return SimulatedLog(
        config=config,
        catalogue=catalogue,
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        impression_user=np.repeat(np.arange(config.num_users), config.impressions_per_user),
        **joined,
    )


def _draw_lengths(config: SimulateConfig, rng: np.random.Generator) -> NDArray[np.int64]:
    """Lengths [num_users] >= 1 of the histories, log-normal within a third and three times their mean."""
    weight = np.clip(np.exp(LENGTH_SPREAD * rng.standard_normal(config.num_users)), 1 / 3, 3)
    ends = np.rint(np.cumsum(weight) / weight.sum() * config.num_users * config.events_per_user)
    return np.asarray(np.maximum(np.diff(ends, prepend=0), 1), dtype=np.int64)


def _user_chunks(lengths: NDArray[np.int64]) -> Iterator[slice]:
    """Stretches of consecutive users with about CHUNK_EVENTS events each; a longer user makes one of its own."""
    ends = np.cumsum(lengths)
    group = (ends - lengths) // CHUNK_EVENTS
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    for start, stop in zip(starts, np.append(starts[1:], len(lengths)), strict=True):
        yield slice(int(start), int(stop))


def simulate(config: SimulateConfig) -> SimulationReport:
    """Draw a log and write it to `config.out`; a simulation that lies there is replaced.

    Raises:
        DataError: if the folder cannot be written.
        ConfigError: if `config.reference` is set and the test impressions are too few to measure anything.
    """
    begin = time.perf_counter()
    log = generate(config)
    generate_s = time.perf_counter() - begin
    reference: tuple[Reference, ...] = ()
    if config.reference:
        from vista.simulation.oracle import reference_metrics

        try:
            reference = tuple(reference_metrics(log, tasks=TASKS))
        except ValueError as error:
            raise ConfigError(f"reference=true: {error}; or leave it out") from error
    out = Path(config.out)
    begin = time.perf_counter()
    try:
        write(log, out)
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error}); choose another folder with out=…") from error
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
    """Write the four files of a simulation; each appears whole or not at all, the manifest last."""
    out.mkdir(parents=True, exist_ok=True)
    (out / MANIFEST_FILE).unlink(missing_ok=True)
    for name, frame in (
        (EVENTS_FILE, _events_frame(log)),
        (IMPRESSIONS_FILE, _impressions_frame(log)),
        (ITEMS_FILE, _items_frame(log.catalogue)),
    ):
        frame.write_parquet(out / f"{name}.tmp", compression="zstd", compression_level=1)
        os.replace(out / f"{name}.tmp", out / name)
    validation_from, test_from = split_times(log.config)
    manifest = {
        "config": dataclasses.asdict(log.config),
        "validation_from": validation_from,
        "test_from": test_from,
        "tasks": list(TASKS),
        "actions": list(ACTIONS),
    }
    (out / f"{MANIFEST_FILE}.tmp").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    os.replace(out / f"{MANIFEST_FILE}.tmp", out / MANIFEST_FILE)


def _events_frame(log: SimulatedLog) -> pl.DataFrame:
    from vista.log.polars_extra import pl

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
    from vista.log.polars_extra import pl

    columns = {
        "user": pl.Series(log.impression_user + 1),
        "item": pl.Series(log.impression_item.astype(np.int64) + 1),
        "timestamp": pl.Series(log.impression_timestamp),
    }
    for index, task in enumerate(TASKS):
        known = pl.Series(log.label[:, index])
        columns[task] = known.set(known < 0, None)
    for index, task in enumerate(TASKS):
        columns[f"{task}_probability"] = pl.Series(np.ascontiguousarray(log.probability[:, index]))
    columns["decisive_age"] = pl.Series(log.decisive_age)
    return pl.DataFrame(columns)


def _items_frame(catalogue: Catalogue) -> pl.DataFrame:
    from vista.log.polars_extra import pl

    ids = np.arange(1, len(catalogue.topic) + 1)
    return pl.DataFrame({"item": ids, "topic": catalogue.topic.astype(np.int64), "quality": catalogue.quality})
