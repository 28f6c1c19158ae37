"""What scoring reads of every item: computed once per model, and mapped by all processes that serve it.

An item's vector and its projections in the first layer of stage 2 depend on neither user nor time, so `save_pretrained`
writes them alongside the weights. Letters: V items of the vocabulary, N rows, M model dim, M' width of retrieval
vectors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vista.errors import CheckpointError
from vista.model.saved_model import ModelDescription, SharedTables

if TYPE_CHECKING:
    from vista.model.vista_model import VistaModel

RETRIEVAL_FILE, CANDIDATE_FILE = "item_retrieval_vectors.npy", "item_projections.npy"
_ROWS_AT_ONCE = 8192
_ROWS_COMPARED = 64


@dataclass(frozen=True, slots=True)
class ItemProjections:
    """Tables of 1 + V rows, in the order of the model's item table; row 0 belongs to the unknown item. float32."""

    retrieval: Tensor | None
    """[1+V, M'] vectors that the retrieval head's user vectors are multiplied with (`RankingModel.retrieval_items`; 0
    for the unknown item, so that it is orthogonal to every user); None without that head."""
    candidate: Tensor | None
    """[1+V, 5M] vector, then query, gate, key and value of the first layer of stage 2; None without labeled tasks, or
    if requests compute them."""

    @classmethod
    def of(cls, model: VistaModel, *, with_candidate: bool = True) -> ItemProjections:
        """Computed in memory, on the model's device.

        Args:
            with_candidate: whether to compute `candidate`.
        """
        retrieval, candidate = _widths(model)
        tables = [
            None if width is None else torch.empty(len(model.items) + 1, width, device=model.device)
            for width in (retrieval, candidate if with_candidate else None)
        ]
        for first, parts in _blocks(model):
            for table, part in zip(tables, parts, strict=True):
                if table is not None and part is not None:
                    table[first : first + len(part)] = part
        return cls(*tables)

    def with_statistics_of(self, model: VistaModel) -> ItemProjections:
        """The same tables with the item statistics of a model that differs in these alone."""
        columns = model.statistics_columns
        if self.retrieval is None or columns.start == columns.stop:
            return self
        retrieval = self.retrieval.clone()
        retrieval[1:, columns] = model.temperature * model.item_statistics[1:]
        return replace(self, retrieval=retrieval)

    @classmethod
    def load(
        cls,
        folder: Path,
        model: VistaModel,
        tables: SharedTables,
        *,
        with_candidate: bool = True,
    ) -> ItemProjections:
        """Map the tables of a folder of `save_pretrained`; copy them to the model's device if that is not the CPU.

        Args:
            tables: of the model; gets them, and gives those that other models hold.
            with_candidate: whether to read `candidate`.

        Raises:
            CheckpointError: if they are missing or damaged, or belong to other weights.
        """
        retrieval, candidate = _widths(model)
        paths = [
            None if width is None else folder / name
            for name, width in ((RETRIEVAL_FILE, retrieval), (CANDIDATE_FILE, candidate if with_candidate else None))
        ]
        saved = ModelDescription.read(folder)
        saved.check_files(folder, *(path.name for path in paths if path is not None))

        def table_of(path: Path | None) -> Tensor | None:
            if path is None:
                return None
            return tables.take_files(saved.files, (path.name,), lambda: _mapped(path).to(model.device))

        projections = cls(*map(table_of, paths))
        projections._require(model, folder)
        return projections

    def _require(self, model: VistaModel, folder: Path) -> None:
        """Compare rows from all over the tables with what the weights give."""
        count = len(model.items) + 1
        rows = torch.linspace(0, count - 1, min(count, _ROWS_COMPARED), dtype=torch.float64).long().to(model.device)
        for table, part in zip((self.retrieval, self.candidate), model.project_items(rows), strict=True):
            if table is None or part is None:
                continue
            if table.shape != (count, part.shape[1]) or not torch.allclose(table[rows], part, rtol=1e-3, atol=1e-4):
                raise CheckpointError(
                    f"{folder}: its item projections do not belong to its weights; export the model again"
                )


def save_item_projections(model: VistaModel, folder: Path) -> None:
    """Write the tables, some rows at a time.

    They are not filled through a memory map, because the system ends a process that writes to one on a full disk.
    """
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
        for _, parts in _blocks(model):
            for table, part in zip(tables, parts, strict=True):
                if table is not None and part is not None:
                    table.write(part.cpu().contiguous().numpy().astype("<f4", copy=False).data)


def _widths(model: VistaModel) -> list[int | None]:
    """Columns of the two tables; None for a table that the model does not need."""
    no_rows = torch.zeros(0, dtype=torch.int64, device=model.device)
    return [None if part is None else part.shape[1] for part in model.project_items(no_rows)]


def _blocks(model: VistaModel) -> Iterator[tuple[int, tuple[Tensor | None, Tensor | None]]]:
    """All rows of both tables, in order, some at a time: (first row, what `project_items` gives)."""
    count = len(model.items) + 1
    for first in range(0, count, _ROWS_AT_ONCE):
        yield first, model.project_items(torch.arange(first, min(first + _ROWS_AT_ONCE, count), device=model.device))


def _mapped(path: Path) -> Tensor:
    try:
        # Copy-on-write, because torch wants writable memory. Nothing is written.
        return torch.from_numpy(np.lib.format.open_memmap(path, "c"))
    except (OSError, ValueError, TypeError) as error:  # TypeError: a dtype that torch lacks
        raise CheckpointError(f"{path}: cannot be mapped ({error}); export the model again") from error
