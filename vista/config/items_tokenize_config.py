"""Configuration of the command `vista items tokenize`."""

from __future__ import annotations

from dataclasses import dataclass

from vista.config.checks import check_types, require, require_counts


@dataclass(kw_only=True, slots=True)
class ItemsTokenizeConfig:
    """Semantic ids: residual k-means codes of the vectors of items."""

    vectors: str | None = None
    """Parquet file with a column of item ids and a column of vectors. Set either this or `model`."""
    column: str = "text"
    """Column of vectors in that file: lists of numbers, all of one length."""
    item: str = "item"
    """Column of item ids in that file, and in the new one."""
    model: str | None = None
    """Folder of an exported model, whose item vectors get codes. Set either this or `vectors`."""
    codebooks: str | None = None
    """File of codebooks from an earlier run. Old items keep their codes, and the codes of new items have the same
    meaning. levels, codes, and seed are then those of the earlier run. null learns new codebooks and writes them
    alongside `out`, such as codes.codebooks.safetensors for codes.parquet."""
    levels: int = 3
    """Number of levels, which is how many codes an item has. Each level encodes what the levels before it leave."""
    codes: int = 256
    """Number of different codes per level."""
    seed: int = 0
    """Seed of k-means."""
    name: str = "codes"
    """Name of the new column of codes."""
    out: str = "codes.parquet"
    """Parquet file to write, with the item ids and the codes; replaced if it exists."""

    def __post_init__(self) -> None:
        check_types(self)
        require(self.name not in ("", self.item), "name", "must be a name other than that of the column of ids")
        require_counts(self, "", ("levels",), most=16)
        require_counts(self, "", ("codes",), least=2, most=1 << 16)
        require_counts(self, "", ("seed",), least=0, most=2**31 - 1)
