"""Logs of data sets whose items also have features made of their texts."""

from __future__ import annotations

import shutil
from pathlib import Path

from scripts.experiments.sets import SETS, prepare_set, source_folder
from vista.cli.item_commands import run_items_embed, run_items_tokenize
from vista.config import ItemsEmbedConfig, ItemsTokenizeConfig, ItemTableConfig, PrepareConfig
from vista.log.ingest.prepare import prepare


def prepare_with_texts(name: str, folder: Path, out: Path, texts: str) -> None:
    """Make the log of a set, as `prepare_set`, with one more feature of items.

    Args:
        name: of the set, which `vista items embed` knows as a kind.
        texts: vectors | codes, as in `TableRow`.

    Raises:
        ConfigError, DataError: if a file is missing or has other columns.
        MissingDependencyError: if the extra `text` or `tokens` is not installed.
    """
    partial, item = out.with_name(f"{out.name}.partial"), SETS[name].item
    for leftover in (partial, source_folder(partial)):
        shutil.rmtree(leftover, ignore_errors=True)
    prepare_set(name, folder, partial)
    file = source_folder(partial) / "vectors.parquet"
    source = ItemTableConfig(paths=[str(folder)], item=item)
    run_items_embed(ItemsEmbedConfig(kind=name, items=source, out=str(file), progress=False))
    if texts == "codes":
        codes = file.with_name("codes.parquet")
        run_items_tokenize(ItemsTokenizeConfig(vectors=str(file), item=item, out=str(codes)))
        file = codes
    new = ItemTableConfig(paths=[str(file)], item=item)
    prepare(PrepareConfig(out=str(partial), append=True, items=new, progress=False))
    shutil.rmtree(source_folder(out), ignore_errors=True)
    source_folder(partial).rename(source_folder(out))
    partial.rename(out)
