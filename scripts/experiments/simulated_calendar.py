"""Logs of simulations, without or with features of the time of events and requests."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from vista.config import ItemTableConfig, PrepareConfig, SimulateConfig, SourceConfig
from vista.log.ingest.prepare import prepare
from vista.simulation.simulate import EVENTS_FILE, IMPRESSIONS_FILE, ITEMS_FILE, simulate

CALENDAR = {
    "season": pl.col("timestamp").cast(pl.Datetime("ms")).dt.ordinal_day() // 28,
    "weekday": pl.col("timestamp").cast(pl.Datetime("ms")).dt.weekday(),
}
"""Features of a time (UTC): one of 14 seasons of four weeks, the last of one or two days, and the day of the week."""


def prepare_simulation(config: SimulateConfig, out: Path, *, calendar: bool) -> None:
    """Draw a simulation into `config.out`, and make its log.

    Args:
        config: the simulation.
        out: the log.
        calendar: whether events and requests have the features `CALENDAR`.
    """
    source = simulate(config).out
    if calendar:
        for name in (EVENTS_FILE, IMPRESSIONS_FILE):
            pl.read_parquet(source / name).with_columns(**CALENDAR).write_parquet(source / name)
    read = SourceConfig(kind="simulated", paths=[str(source)], categories=list(CALENDAR) if calendar else [])
    topics = ItemTableConfig(paths=[str(source / ITEMS_FILE)], categories=["topic"])
    prepare(PrepareConfig(out=str(out), events=read, impressions=read, items=topics, progress=False))
