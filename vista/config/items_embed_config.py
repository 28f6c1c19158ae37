"""Configuration of the command `vista items embed`."""

from __future__ import annotations

from dataclasses import dataclass, field

from vista.config.checks import MAX_THREADS, check_types, require, require_counts
from vista.config.item_table_config import ItemTableConfig


@dataclass(kw_only=True, slots=True)
class ItemsEmbedConfig:
    """Vectors of the texts of items, from a sentence encoder that needs no network."""

    kind: str = "table"
    """Format of the files: table (Parquet, CSV, or TSV with the columns named below), a public data set (ml-1m,
    ml-latest-small, ml-100k, complete-journey, ...), or auto, which recognizes the folder of a data set."""
    items: ItemTableConfig = field(default_factory=ItemTableConfig)
    """Table of items. Of a public data set only the paths are read."""
    columns: list[str] = field(default_factory=list)
    """Columns of text, which are joined in this order to one text per item. MovieLens and Complete Journey have
    defaults: title and genres, and department, product_category, and product_type."""
    name: str = "text"
    """Name of the new column of vectors."""
    out: str = "vectors.parquet"
    """Parquet file to write, with the item ids and the vectors; replaced if it exists."""
    batch_size: int = 64
    """Number of texts that are encoded at once."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N. auto uses a GPU if there is one."""
    num_threads: int = 0
    """Number of CPU threads. 0 leaves the choice to PyTorch."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        check_types(self)
        require(
            self.items.is_inferred,
            "items",
            "do not set categories, numbers, or vectors; name the columns of text with columns=[...]",
        )
        require(self.name not in ("", self.items.item), "name", "must be a name other than that of the column of ids")
        require_counts(self, "", ("batch_size",), most=1 << 16)
        require_counts(self, "", ("num_threads",), least=0, most=MAX_THREADS)
