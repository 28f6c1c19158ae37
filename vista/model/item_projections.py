"""What scoring reads of every item: computed once per model, and mapped by all processes that serve it.

An item's vector and its projections in the first layer of stage 2 depend on neither user nor time, so `save_pretrained`
writes them alongside the weights. Letters: V items of the vocabulary, N rows, M model dim, M' width of retrieval
vectors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Float32s
from vista.config.model_config import RankingConfig
from vista.errors import CheckpointError
from vista.examples.item_spaces import Pooled
from vista.model.saved_model import SavedModel, SharedTables

if TYPE_CHECKING:
    from vista.model.serving_model import ServingModel
    from vista.model.vista_model import VistaModel

RETRIEVAL_FILE, CANDIDATE_FILE = "item_retrieval_vectors.npy", "item_projections.npy"
NORM_EPS = 1e-5
"""Of all layer norms (`vista.model.layers.norm`)."""
_ROWS_AT_ONCE = 8192
_ROWS_COMPARED = 64


@dataclass(frozen=True, slots=True)
class ItemProjections:
    """Tables of 1 + V rows, in the order of the model's item table; row 0 belongs to the unknown item. float32."""

    retrieval: Float32s | None
    """[1+V, M'] vectors that the retrieval head's user vectors are multiplied with (`RankingModel.retrieval_items`; 0
    for the unknown item, so that it is orthogonal to every user); None without that head."""
    candidate: Float32s | None
    """[1+V, 5M] vector, then query, gate, key and value of the first layer of stage 2; None without labeled tasks, or
    if requests compute them."""

    @classmethod
    def of(cls, model: VistaModel, *, with_candidate: bool = True) -> ItemProjections:
        """Computed in memory. `with_candidate`: whether to compute `candidate`."""
        blocks = ((retrieval, candidate if with_candidate else None) for retrieval, candidate in _blocks(model))
        return cls(*(None if parts[0] is None else np.concatenate(parts) for parts in zip(*blocks, strict=True)))

    def with_statistics_of(self, model: ServingModel) -> ItemProjections:
        """The same tables with the item statistics of a model that differs in these alone."""
        columns = model.statistics_columns
        if self.retrieval is None or columns.start == columns.stop:
            return self
        retrieval = self.retrieval.copy()
        retrieval[1:, columns] = model.temperature * model.weights["item_statistics"][1:]
        return replace(self, retrieval=retrieval)

    @classmethod
    def load(cls, saved: SavedModel, tables: SharedTables, *, with_candidate: bool = True) -> ItemProjections:
        """Map the tables of a saved model.

        Args:
            tables: of the model; gets them, and gives those that other models hold.
            with_candidate: whether to read `candidate`.

        Raises:
            CheckpointError: if they are missing or damaged, or belong to other weights.
        """
        folder, described = saved.folder, saved.description
        names = (
            RETRIEVAL_FILE if described.schema.has_retrieval else None,
            CANDIDATE_FILE if described.schema.tasks and with_candidate else None,
        )
        described.check_files(folder, *(name for name in names if name is not None))

        def table_of(name: str | None) -> Float32s | None:
            if name is None:
                return None
            return tables.take_files(described.files, (name,), lambda: _mapped(folder / name))

        projections = cls(*map(table_of, names))
        if not projections._belong_to(saved):
            raise CheckpointError(
                f"{folder}: its item projections do not belong to its weights; export the model again"
            )
        return projections

    def _belong_to(self, saved: SavedModel) -> bool:
        """Whether rows from all over the tables are what the weights give, as far as these tell without a model: the
        vectors of items that have features or share rows are taken from `candidate`."""
        count, config, weights = len(saved.items) + 1, saved.description.config, saved.weights
        rows = np.linspace(0, count - 1, min(count, _ROWS_COMPARED)).astype(np.int64)
        vectors = None
        if config.embedding_rows == 0 and not saved.description.schema.item_features:
            vectors = weights["item_table"][rows]
        dim, made = config.dim, self.candidate
        if made is not None:
            if made.shape != (count, 5 * dim):
                return False
            vectors = made[rows, :dim] if vectors is None else vectors
            layer = "target_attention.layers.0."
            normed = (vectors - vectors.mean(1, keepdims=True)) / np.sqrt(vectors.var(1, keepdims=True) + NORM_EPS)
            projected = (normed * weights[f"{layer}norm.weight"]) @ weights[f"{layer}projections.weight"].T
            if not np.allclose(made[rows], np.concatenate([vectors, projected], 1), rtol=1e-3, atol=1e-4):
                return False
        if self.retrieval is None:
            return True
        if self.retrieval.shape != (count, retrieval_dim(config, weights)):
            return False
        if vectors is None:
            return True
        unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return np.allclose(self.retrieval[rows, :dim], unit, rtol=1e-3, atol=1e-4)


def retrieval_dim(config: RankingConfig, weights: Mapping[str, NDArray[Any]]) -> int:
    """M' of a model with these weights."""
    if (term := weights.get("statistics.weight.bias")) is None:
        return config.dim
    return config.dim + config.space_dim + len(term) - (len(Pooled) if config.space_dim else 0)


def save_item_projections(model: VistaModel, folder: Path) -> None:
    """Write the tables, some rows at a time. They are not filled through a memory map, because the system ends a
    process that writes to one on a full disk."""
    with ExitStack() as files:
        tables: list[IO[bytes] | None] = []
        for name, width in zip((RETRIEVAL_FILE, CANDIDATE_FILE), _widths(model), strict=True):
            if width is None:
                tables.append(None)
                continue
            file = files.enter_context(open(folder / name, "wb"))
            tables.append(file)
            header = {"descr": "<f4", "fortran_order": False, "shape": (len(model.items) + 1, width)}
            np.lib.format.write_array_header_1_0(file, header)
        for parts in _blocks(model):
            for table, part in zip(tables, parts, strict=True):
                if table is not None and part is not None:
                    table.write(np.ascontiguousarray(part, "<f4").data)


def _widths(model: VistaModel) -> list[int | None]:
    """Columns of the two tables; None for a table that the model does not need."""
    return [None if part is None else part.shape[1] for part in model.project_items(np.zeros(0, np.int64))]


def _blocks(model: VistaModel) -> Iterator[tuple[Float32s | None, Float32s | None]]:
    """All rows of both tables, in order, some at a time, as `project_items` gives them."""
    count = len(model.items) + 1
    for first in range(0, count, _ROWS_AT_ONCE):
        yield model.project_items(np.arange(first, min(first + _ROWS_AT_ONCE, count)))


def _mapped(path: Path) -> Float32s:
    try:
        # Copy-on-write, because torch wants writable memory. Nothing is written.
        table = np.lib.format.open_memmap(path, "c")
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be mapped ({error}); export the model again") from error
    if table.dtype != np.float32 or table.ndim != 2:
        raise CheckpointError(f"{path}: cannot be mapped ({table.dtype} {table.shape}); export the model again")
    return np.asarray(table)
