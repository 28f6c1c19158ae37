"""Configuration of the command `vista index`."""

from __future__ import annotations

from dataclasses import dataclass

from vista.config.checks import check_types
from vista.config.choices import IndexKind


@dataclass(kw_only=True, slots=True)
class IndexConfig:
    """Nearest-neighbor index over a model's item vectors, from which `Scorer.retrieve` takes candidates."""

    model: str = "runs/vista/best"
    """Folder of the exported model, which was trained with a retrieval head."""
    out: str | None = None
    """Folder to write; an earlier index there is replaced. null takes the model's folder with .index appended, such as
    runs/vista/best.index."""
    kind: IndexKind | None = None
    """flat (exact), hnsw (a graph), or ivfpq (clusters of compressed vectors). null chooses flat up to 50,000 items,
    and ivfpq above."""

    def __post_init__(self) -> None:
        check_types(self)
