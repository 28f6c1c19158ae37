"""The command `vista index`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vista.config import IndexConfig
from vista.config.choices import IndexKind
from vista.device import cpu_settings
from vista.errors import CheckpointError, ConfigError, ItemIndexError
from vista.files import checked_path
from vista.model.item_index import ItemIndex
from vista.model.item_index_manifest import ItemIndexManifest
from vista.model.item_projections import ItemProjections
from vista.model.ranking_model import UNKNOWN_ITEM
from vista.model.shared_tables import SharedTables
from vista.model.vista_model import VistaModel

INDEX_SUFFIX = ".index"
NUM_QUERIES, RECALLED = 100, 100
LEAST_RECALL = 0.9


@dataclass(frozen=True, slots=True)
class ItemsIndexed:
    """What `vista index` wrote."""

    out: str
    kind: IndexKind
    num_items: int
    size_bytes: int
    recall: float
    """Share of the nearest `RECALLED` items that the index finds, with vectors of items as queries."""
    seconds: float

    def __str__(self) -> str:
        text = (
            f"{self.out}: {self.kind.value} index of {self.num_items:,} items, {self.size_bytes / 1e6:.1f} MB, in "
            f"{self.seconds:.1f} s; recall@{RECALLED} {self.recall:.3f} with items as queries"
        )
        if self.recall < LEAST_RECALL:
            text += "\nthe recall is low; compare with kind=flat, which is exact"
        return text


def run_index(config: IndexConfig) -> ItemsIndexed:
    """`vista index`: write an index over a model's item vectors, atomically. Scorers follow with `reload`.

    Raises:
        CheckpointError: the folder holds no readable model.
        ConfigError: the model was trained without a retrieval head.
        ItemIndexError: the index cannot be written.
        MissingDependencyError: faiss is not installed, and the kind is not flat.
    """
    folder = checked_path(config.model, CheckpointError)
    out = checked_path(config.out or f"{folder}{INDEX_SUFFIX}", ItemIndexError)
    ItemIndexManifest.require_replaceable(out)
    with cpu_settings(1):
        model = VistaModel.from_pretrained(folder)
        table = ItemProjections.load(folder, model, SharedTables(model.device), with_candidate=False).retrieval
        if table is None:
            raise ConfigError(
                f"model={folder}: has no retrieval head, so it has no vectors to index; train it with "
                "optim.next_weight above 0"
            )
        began = time.perf_counter()
        vectors = table[UNKNOWN_ITEM + 1 :].numpy()
        # The popularity is about 1 / temperature times as large as what user vectors multiply it with.
        last_scale = 1.0 if model.popularity is None else model.config.softmax_temperature
        index = ItemIndex.build(vectors, config.kind, last_scale=last_scale)
        index.save(out)
        seconds = time.perf_counter() - began
        queries = vectors[np.linspace(0, len(vectors) - 1, min(NUM_QUERIES, len(vectors)), dtype=np.int64)]
        recall = index.recall(table, queries, RECALLED)
    size = sum(path.stat().st_size for path in Path(out).iterdir())
    return ItemsIndexed(str(out), index.manifest.kind, len(vectors), size, recall, seconds)
