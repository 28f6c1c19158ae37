"""The command `vista items embed`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from vista.arrays import Float32s
from vista.config import ItemsEmbedConfig
from vista.device import cpu_settings, resolve_device
from vista.files import writable_file
from vista.install_command import require_module
from vista.log.ingest.item_values import read_texts, write_values
from vista.log.ingest.source_parser import SourceParser
from vista.model.text_encoder import TextEncoder

if TYPE_CHECKING:
    import polars as pl
else:
    pl = require_module("polars", "data")


class Encoder(Protocol):
    """What makes vectors of texts, as `TextEncoder` does."""

    def encode(self, texts: Sequence[str], *, batch_size: int, progress: bool) -> Float32s: ...


@dataclass(frozen=True, slots=True)
class ItemsEmbedded:
    """What `vista items embed` wrote."""

    out: str
    name: str
    num_items: int
    num_missing: int
    """Items without a text."""
    num_texts: int
    """Distinct texts."""
    dim: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.out}: column {self.name} with vectors of {self.dim} numbers for {self.num_items:,} items, "
            f"{self.num_missing:,} of them without a text\n"
            f"{self.num_texts:,} distinct texts encoded in {self.seconds:.1f} s"
        )


def run_items_embed(config: ItemsEmbedConfig, encoder: Encoder | None = None) -> ItemsEmbedded:
    """`vista items embed`: write vectors of the texts of items, and null for items without a text.

    Args:
        encoder: None for the one of the extra `text`.

    Raises:
        ConfigError: if a file or column is not named, or `out` cannot be written.
        DataError: if a table is invalid.
        MissingDependencyError: if the extra is not installed.
    """
    out = Path(config.out)
    writable_file(out, "out")
    with SourceParser() as parser:
        ids, texts = read_texts(config, parser)
    with cpu_settings(config.num_threads):
        encoder = encoder or TextEncoder(resolve_device(config.device))
        start = time.perf_counter()
        distinct = texts.drop_nulls().unique().sort()
        vectors = encoder.encode(distinct.to_list(), batch_size=config.batch_size, progress=config.progress)
        seconds = time.perf_counter() - start
    of_texts = pl.DataFrame({"text": distinct, "vector": pl.Series(vectors).cast(pl.List(pl.Float32))})
    rows = pl.DataFrame({"text": texts}).join(of_texts, on="text", how="left", maintain_order="left")
    write_values(pl.DataFrame([ids, rows["vector"].alias(config.name)]), out)
    return ItemsEmbedded(
        out=str(out),
        name=config.name,
        num_items=len(ids),
        num_missing=texts.null_count(),
        num_texts=len(distinct),
        dim=vectors.shape[1],
        seconds=seconds,
    )
