"""What scoring reads of every item, computed once a model and mapped by all processes that serve it.

An item's vector and its projections in stage 2's first layer depend on neither user nor time, so `save_pretrained`
writes them beside the weights. Letters: V items of the vocabulary, M model dim.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vista.errors import CheckpointError

if TYPE_CHECKING:
    from vista.model.vista_model import VistaModel

logger = logging.getLogger(__name__)
UNIT_FILE, CANDIDATE_FILE = "item_unit_vectors.npy", "item_projections.npy"
_ROWS_AT_ONCE = 8192
_ROWS_COMPARED = 64


@dataclass(frozen=True, slots=True)
class ItemProjections:
    """Tables of 1 + V rows, as the model's item table; row 0 is the unknown item's. float32."""

    unit: Tensor | None
    """[1+V, M] unit vectors, which the retrieval head's users are multiplied with (0 for the unknown item: at right
    angles to every user); None without that head."""
    candidate: Tensor | None
    """[1+V, 5M] vector, then query, gate, key and value of stage 2's first layer; None without labelled tasks."""

    @classmethod
    def of(cls, model: VistaModel) -> ItemProjections:
        """Computed in memory, on the model's device."""
        tables = [
            torch.empty(len(model.items) + 1, width, device=model.device) if width else None for width in _widths(model)
        ]
        _fill(tables, model)
        return cls(*tables)

    @classmethod
    def load(cls, folder: Path, model: VistaModel) -> ItemProjections:
        """Map those of a folder of `save_pretrained`; on another device than the CPU they are copied there.

        A folder that an older vista wrote has none: they are computed, in memory of this process, and a warning is
        logged.

        Raises:
            CheckpointError: they are damaged, or of other weights.
        """
        names = [
            name if width else None for name, width in zip((UNIT_FILE, CANDIDATE_FILE), _widths(model), strict=True)
        ]
        if any(name and not (folder / name).exists() for name in names):
            logger.warning("%s: has no item projections; computed in memory. Export the model anew", folder)
            return cls.of(model)
        tables = [None if name is None else _mapped(folder / name).to(model.device) for name in names]
        found = cls(*tables)
        found._require(model, folder)
        return found

    def _require(self, model: VistaModel, folder: Path) -> None:
        """Compare rows from all over the tables with what the weights give."""
        count = len(model.items) + 1
        rows = torch.linspace(0, count - 1, min(count, _ROWS_COMPARED), dtype=torch.float64).long().to(model.device)
        for table, part in zip((self.unit, self.candidate), _projected(model, rows), strict=True):
            if table is None or part is None:
                continue
            if table.shape != (count, part.shape[1]) or not torch.allclose(table[rows], part, rtol=1e-3, atol=1e-4):
                raise CheckpointError(f"{folder}: its item projections are of other weights; export the model anew")


def save_item_projections(model: VistaModel, folder: Path) -> None:
    """Write the tables, a portion of rows at a time."""
    shapes = [(len(model.items) + 1, width) for width in _widths(model)]
    files = [
        np.lib.format.open_memmap(folder / name, "w+", np.float32, shape) if shape[1] else None
        for name, shape in zip((UNIT_FILE, CANDIDATE_FILE), shapes, strict=True)
    ]
    _fill([None if file is None else torch.from_numpy(file) for file in files], model)
    for file in files:
        if file is not None:
            file.flush()


def _widths(model: VistaModel) -> tuple[int, int]:
    """Columns of the two tables; 0 for one that the model has no use for."""
    dim = model.config.dim
    return dim if model.has_retrieval else 0, 5 * dim if model.schema.tasks else 0


def _fill(tables: Sequence[Tensor | None], model: VistaModel) -> None:
    """Write what belongs there into either table, on whatever device, a portion of rows at a time."""
    count = len(model.items) + 1
    for first in range(0, count, _ROWS_AT_ONCE):
        rows = torch.arange(first, min(first + _ROWS_AT_ONCE, count), device=model.device)
        for table, part in zip(tables, _projected(model, rows), strict=True):
            if table is not None and part is not None:
                table[first : first + len(rows)] = part


@torch.inference_mode()
def _projected(model: VistaModel, rows: Tensor) -> tuple[Tensor | None, Tensor | None]:
    vectors = model.item_vectors(rows).float()
    unit = F.normalize(vectors, dim=-1) if model.has_retrieval else None
    if not model.schema.tasks:
        return unit, None
    return unit, torch.cat([vectors, model.target_attention.layers[0].project(vectors)], -1)


def _mapped(path: Path) -> Tensor:
    try:
        # Copy on write: torch wants memory that could be written; none of it is.
        return torch.from_numpy(np.lib.format.open_memmap(path, "c"))
    except (OSError, ValueError, TypeError) as error:  # TypeError: of a type that torch has not
        raise CheckpointError(f"{path}: cannot be mapped ({error}); export the model anew") from error
