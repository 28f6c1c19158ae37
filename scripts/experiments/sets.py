"""The data sets of the experiments: how each becomes a log, how it is split, and which categories its items have.

The sets are read from the folder that VISTA_DATA_DIR names.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

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
from vista.log.ingest.prepare import prepare
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


SETS = {
    "ml-1m": DataSet(),
    "ml-1m-half": DataSet(),
    "ml-100k": DataSet(),
    "ml-latest-small": DataSet(),
    # Baskets of a year. The order inside a basket is shuffled, so the question is asked at a time, for all users.
    "complete-journey": DataSet(
        words=("data=time", "data.validation_from=2017-10-01", "data.test_from=2017-11-01"), item="product_id"
    ),
    # Developer activity: which package a maintainer touches next, of 13 collections, from 2002 to 2026.
    "dev-packages": DataSet(words=("data=share",), prepare=("set=dev-packages",)),
    **{
        name: DataSet(words=(f"experiment={name}",), prepare=(f"set={name}",))
        for name in ("amazon-reviews-2023", "kuairand", "yambda", "microvideo", "kuaivideo", "t-ecd")
    },
}
"""Name of the folder -> data set."""


def set_folder(name: str, given: Path | None = None) -> Path:
    """The folder of a data set: the given one, else `name` under VISTA_DATA_DIR.

    Raises:
        ConfigError: if the folder does not exist.
    """
    root = os.environ.get("VISTA_DATA_DIR")
    folder = given or (Path(root) / name if root else None)
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
    config = compose_config(PrepareConfig, SETS[name].prepare or ["events.kind=auto"])
    source = folder / "events.parquet" if config.events.kind == "table" else folder
    events = replace(config.events, paths=[str(source)])
    prepare(replace(config, out=str(out), events=events))


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
