"""The data sets of the experiments: how each becomes a log, how it is split, and which categories its items have.

The sets are read from the folder that VISTA_DATA_DIR names.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from vista.cli.item_commands import run_items_embed, run_items_tokenize
from vista.config import (
    ImpressionsConfig,
    ItemsEmbedConfig,
    ItemsTokenizeConfig,
    ItemTableConfig,
    PrepareConfig,
    SimulateConfig,
    SourceConfig,
)
from vista.config.composition import compose_config
from vista.errors import ConfigError
from vista.log.histories import DAY_MS
from vista.log.ingest.prepare import prepare
from vista.log.ingest.public.public_sets import ANSWER_DAYS, BEFORE_ANSWER_MS
from vista.simulation.simulate import ITEMS_FILE, simulate


@dataclass(frozen=True, slots=True)
class DataSet:
    """A folder of the shared data."""

    words: tuple[str, ...] = ()
    """Arguments of `vista train` for its split; leave-last-out without any."""
    prepare: tuple[str, ...] = ()
    """Arguments of `vista prepare` for its files and filter; empty for a set that vista recognizes."""
    item: str = "item"
    """Column of item ids in its table of items."""
    folder: str = ""
    """Folder under VISTA_DATA_DIR, if it has another name than the set."""
    liked: bool = False
    """Whether its ratings become answers (`prepare_ratings`)."""


SETS = {
    "ml-1m": DataSet(),
    "ml-1m-half": DataSet(),
    "ml-100k": DataSet(),
    "ml-latest-small": DataSet(),
    # Baskets of a year. The order inside a basket is shuffled, so the question is asked at a time, for all users.
    "complete-journey": DataSet(
        words=("data.split=time", "data.validation_from=2017-10-01", "data.test_from=2017-11-01"), item="product_id"
    ),
    # Developer activity: which package a maintainer touches next, of 13 collections, from 2002 to 2026.
    "dev-packages": DataSet(words=("data.split=share",), prepare=("set=dev-packages",)),
    **{
        name: DataSet(words=(f"experiment={name}",), prepare=(f"set={name}",))
        for name in ("amazon-reviews-2023", "kuairand", "yambda")
    },
    # Labels of impressions, at the times of `vista.log.ingest.public.public_sets`.
    "assist17": DataSet(words=("experiment=assist17",), prepare=("set=assist17",)),
    "bought-again": DataSet(
        words=("experiment=bought-again",), prepare=("set=bought-again",), folder="complete-journey"
    ),
    **{
        f"{name}-liked": DataSet(words=("experiment=assist17", "model.num_counters=64"), folder=name, liked=True)
        for name in ("ml-1m-half", "ml-latest-small")
    },
}
"""Name of the folder -> data set."""


def set_folder(name: str, given: Path | None = None) -> Path:
    """The folder of a data set: the given one, else `name` under VISTA_DATA_DIR.

    Raises:
        ConfigError: if the folder does not exist.
    """
    root = os.environ.get("VISTA_DATA_DIR")
    folder = given or (Path(root) / (SETS[name].folder or name) if root else None)
    if folder is None or not folder.exists():
        raise ConfigError(
            f"--data: {'missing' if folder is None else f'{folder} does not exist'}; give the folder of {name}, or set "
            "VISTA_DATA_DIR to the folder of all data sets (docs/guides/public-data-sets.md says where to get them)"
        )
    return folder


def source_folder(log: Path) -> Path:
    """Folder next to a log with the simulation that it comes from."""
    return log.with_name(f"{log.name}-source")


def prepare_set(name: str, folder: Path, out: Path) -> None:
    """Make the log of a set.

    Args:
        name: key of SETS.
        folder: the files of the set.
        out: folder of the log.

    Raises:
        ConfigError, DataError: if a file is missing or has other columns.
    """
    if SETS[name].liked:
        prepare_ratings(folder, out)
        return
    config = compose_config(PrepareConfig, SETS[name].prepare or ["events.kind=auto"])
    source = folder / "events.parquet" if config.events.kind == "table" else folder
    events = replace(config.events, paths=[str(source)])
    prepare(replace(config, out=str(out), events=events))


LIKED = 4
"""Ratings of this or more have the label `liked`."""


def prepare_ratings(folder: Path, out: Path) -> None:
    """Make the log of a MovieLens set whose ratings are answers: was the movie rated 4 or more?

    As for assist17, each rating is an event, whose action is the rating, so that tails have it, and one second before,
    an impression with the label `liked`; the j-th of a user's n ratings gets the time (j + 0.5) / n of 300 days. So all
    users have the same share of ratings before any time, as most of them rate for a day only.

    Args:
        folder: with events.npz, whose ratings are in the order of time.
    """
    with np.load(folder / "events.npz") as file:
        rated = pl.DataFrame({name: file[name] for name in ("user", "item", "rating")})
    place = (pl.int_range(pl.len()) + 0.5) / pl.len()
    time = (place * (ANSWER_DAYS * DAY_MS)).cast(pl.Int64).over("user")
    events = rated.with_columns(timestamp=time, action=pl.col("rating").cast(pl.String))
    asked = pl.col("timestamp") - BEFORE_ANSWER_MS, (pl.col("rating") >= LIKED).cast(pl.Int8).alias("liked")
    source = source_folder(out)
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    events.write_parquet(source / "events.parquet")
    events.select("user", "item", *asked).write_parquet(source / "impressions.parquet")
    times: dict[str, Any] = {"timestamp": "timestamp", "time_unit": "ms"}
    read = SourceConfig(paths=[str(source / "events.parquet")], action="action", **times)
    shown = ImpressionsConfig(paths=[str(source / "impressions.parquet")], labels=["liked"], **times)
    prepare(PrepareConfig(out=str(out), events=read, impressions=shown))


def prepare_with_texts(name: str, folder: Path, out: Path, texts: str) -> None:
    """Make the log of a set, as `prepare_set`, with one more feature of items.

    Args:
        name: of the set, which `vista items embed` knows as a kind.
        texts: vectors | codes, as in `TableRow`.

    Raises:
        ConfigError, DataError: if a file is missing or has other columns.
        MissingDependencyError: if the extra `text` or `faiss` is not installed.
    """
    partial, item = out.with_name(f"{out.name}.partial"), SETS[name].item
    for leftover in (partial, source_folder(partial)):
        shutil.rmtree(leftover, ignore_errors=True)
    prepare_set(name, folder, partial)
    source_folder(partial).mkdir(parents=True, exist_ok=True)
    file = source_folder(partial) / "vectors.parquet"
    source = ItemTableConfig(paths=[str(folder)], item=item)
    run_items_embed(ItemsEmbedConfig(kind=name, items=source, out=str(file)))
    if texts == "codes":
        codes = file.with_name("codes.parquet")
        run_items_tokenize(ItemsTokenizeConfig(vectors=str(file), item=item, out=str(codes)))
        file = codes
    new = ItemTableConfig(paths=[str(file)], item=item)
    prepare(PrepareConfig(out=str(partial), append=True, items=new))
    shutil.rmtree(source_folder(out), ignore_errors=True)
    source_folder(partial).rename(source_folder(out))
    partial.rename(out)


def prepare_simulation(config: SimulateConfig, out: Path) -> None:
    """Draw a simulation into `config.out`, and make its log, `out`."""
    source = simulate(config).out
    events = SourceConfig(kind="simulated", paths=[str(source)])
    impressions = ImpressionsConfig(kind="simulated", paths=[str(source)])
    topics = ItemTableConfig(paths=[str(source / ITEMS_FILE)], categories=["topic"])
    prepare(PrepareConfig(out=str(out), events=events, impressions=impressions, items=topics))
