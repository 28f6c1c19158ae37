"""What every architecture has: an item table, an event encoder, losses, and files.

Item vectors are passed in, so that training touches only the rows of a batch. Letters: R item rows of a batch, M model
dim, V items of the vocabulary; N rows and P hash functions of a unified table.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vista.config import DataConfig, ModelConfig, OptimConfig
from vista.config.choices import Architecture
from vista.config.conversion import from_dict, to_dict
from vista.errors import CheckpointError, LogFormatError
from vista.examples.cuts import Batch
from vista.files import replaced_folder
from vista.log.vocabulary import Ids, Vocabulary
from vista.model.event_encoder import EventEncoder
from vista.model.unified_embedding import Feature, gather, hashed_rows

FORMAT_VERSION = 3
NEXT_TASK = "next"
"""Name of the retrieval head's scores among those of the labelled tasks."""
UNKNOWN_ITEM = 0
"""Model row of items that the vocabulary lacks; vocabulary row r is model row r + 1."""
CLASSES = {
    Architecture.vista: ("vista.model.vista_model", "VistaModel"),
    Architecture.sasrec: ("vista.model.baselines.sasrec", "SASRec"),
    Architecture.hstu: ("vista.model.baselines.hstu", "HSTU"),
    Architecture.din: ("vista.model.baselines.din", "DIN"),
    Architecture.sim: ("vista.model.baselines.sim", "SIM"),
    Architecture.twin: ("vista.model.baselines.twin", "TWIN"),
}
"""Module and class of each architecture; a module is imported only where its models are used."""


@dataclass(frozen=True, slots=True)
class Schema:
    """What the log that a model was trained on offers."""

    actions: list[str]
    has_time: bool
    rating_range: tuple[float, float] | None
    tasks: list[str]
    """Labelled tasks that were trained."""
    has_retrieval: bool = True
    """Whether the next item was trained."""


@dataclass(frozen=True, slots=True)
class Losses:
    """Scalars of one batch; `total` is what training minimises."""

    total: Tensor
    parts: dict[str, Tensor]


class RankingModel(nn.Module):
    """Base of VISTA and its baselines: the trainer knows no more of a model than this."""

    def __init__(self, config: ModelConfig, schema: Schema, items: Vocabulary, data: DataConfig) -> None:
        super().__init__()
        self.config = config
        self.schema = schema
        self.items = items
        """The model's own item vocabulary."""
        self.data = data
        """How the training data were split: what evaluation may use."""
        unified, hashes = config.embedding_rows > 0, config.embedding_hashes
        shape = (1 + config.embedding_rows, config.dim // hashes) if unified else (1 + len(items), config.dim)
        table = nn.init.normal_(torch.empty(shape), std=0.02)
        table[UNKNOWN_ITEM] = 0.0
        self.item_table = nn.Parameter(table)
        """[1 + V, M], a row an item; or [1 + N, M / P], which all categorical features share. Row 0 is the unknown
        item's. `item_vectors` reads either."""
        self.encoder = EventEncoder(
            dim=config.dim,
            num_actions=len(schema.actions),
            use_action=config.use_action,
            use_time=config.use_time and schema.has_time,
            rating_range=schema.rating_range if config.use_rating else None,
            shared=self.item_table if unified else None,
        )

    def item_vectors(self, rows: Tensor) -> Tensor:
        """[..., M] vectors of model rows int64 [...]; 0 for the unknown item. The table's gradient is sparse."""
        config = self.config
        if not config.embedding_rows:
            return F.embedding(rows, self.item_table, sparse=True)
        found = hashed_rows(rows, Feature.item, config.embedding_hashes, config.embedding_rows)
        return gather(self.item_table, torch.where((rows == UNKNOWN_ITEM).unsqueeze(-1), UNKNOWN_ITEM, found))

    def catalogue_vectors(self) -> Tensor:
        """[V, M] vectors of the vocabulary's items, in the order of its rows (the unknown item is left out)."""
        return self.item_vectors(torch.arange(UNKNOWN_ITEM + 1, len(self.items) + 1, device=self.device))

    @staticmethod
    def shown_vectors(batch: Batch, item_vectors: Tensor) -> Tensor:
        """[T, M] vectors of the items of a batch's events, 0 for those that training shows as unknown."""
        vectors = item_vectors[batch.item]
        # A row of the table that stood for them would get a gradient, and no longer be 0.
        return vectors if batch.hidden is None else vectors.masked_fill(batch.hidden.unsqueeze(-1), 0.0)

    def losses(self, batch: Batch, item_vectors: Tensor, optim: OptimConfig) -> Losses:
        """All losses of one batch.

        Args:
            batch: from `vista.examples.cuts`.
            item_vectors: [R, M] of the items `batch.rows`.
        """
        raise NotImplementedError

    def read_item_table(self, data: DataConfig) -> None:
        """Read what an architecture wants to know of items beyond their ids, when training starts; most want nothing.

        Raises:
            DataError: if the file that `data` names does not have it.
        """

    # Files -----------------------------------------------------------------------------------------------------------

    def description(self) -> dict[str, Any]:
        """What config.json says of the model."""
        return {
            "format_version": FORMAT_VERSION,
            "model": to_dict(self.config),
            "schema": asdict(self.schema),
            "data": to_dict(self.data),
        }

    def save_pretrained(self, folder: str | Path, *, card: str | None = None) -> None:
        """Write config.json, model.safetensors, the item vocabulary and, if given, a card as README.md, atomically."""
        folder = Path(folder)
        with replaced_folder(folder) as partial:
            (partial / "config.json").write_text(json.dumps(self.description(), indent=2) + "\n")
            weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
            save_file(weights, partial / "model.safetensors")
            self.items.save(partial, "items")
            self.save_serving_tables(partial)
            if card is not None:
                (partial / "README.md").write_text(card, encoding="utf-8")

    def save_serving_tables(self, folder: Path) -> None:
        """Write what serving reads beside the weights; baselines have none of it."""

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: torch.device | str = "cpu") -> Self:
        """Read a folder of `save_pretrained`, in eval mode; nothing in it is ever executed.

        Raises:
            CheckpointError: if the folder is missing, truncated, of another format, or of another architecture.
        """
        folder = Path(folder)
        if not (folder / "config.json").exists() and (folder / "best" / "config.json").exists():
            raise CheckpointError(f"{folder}: is a run folder; its model is {folder / 'best'}")
        try:
            description = json.loads((folder / "config.json").read_text())
            weights = load_file(folder / "model.safetensors")
            items = Vocabulary.load(folder, "items")
        except (OSError, ValueError, RecursionError, SafetensorError, LogFormatError) as error:
            raise CheckpointError(
                f"{folder}: no readable model ({error}); train one with `vista train run_dir=…`, which writes "
                "<run_dir>/best"
            ) from error
        found = description.get("format_version") if isinstance(description, dict) else None
        if found != FORMAT_VERSION:
            raise CheckpointError(f"{folder}: format {found}, this vista reads {FORMAT_VERSION}; export the model anew")
        try:
            schema = Schema(**description["schema"])
            if schema.rating_range is not None:
                low, high = schema.rating_range
                schema = replace(schema, rating_range=(low, high))
            config = from_dict(ModelConfig, description["model"])
            data = from_dict(DataConfig, description["data"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{folder}/config.json: {error!r}; export the model anew") from error
        found_class = class_of(config.architecture)
        if not issubclass(found_class, cls):
            raise CheckpointError(
                f"{folder}: holds a {config.architecture.value} model, where a {cls.__name__} is needed"
            )
        with torch.random.fork_rng(devices=[]):  # what is drawn is replaced; the caller's numbers go on as they would
            model = found_class(config, schema, items, data)
        try:
            # Assigned, not copied: a row an item stays mapped pages of the file, which all processes share. (A unified
            # table is small, and its features hold on to the one that the model was made with.)
            weights = {name: weight.float() for name, weight in weights.items()}
            model.load_state_dict(weights, assign=config.embedding_rows == 0)
        except RuntimeError as error:
            raise CheckpointError(f"{folder}/model.safetensors does not fit its config.json: {error}") from error
        return model.to(device).eval()

    def item_rows(self, ids: Ids) -> NDArray[np.int64]:
        """Model rows of raw item ids, UNKNOWN_ITEM for those that the vocabulary lacks: int64 [N]."""
        return self.items.rows(ids) + 1

    def rows_of(self, items: Vocabulary) -> NDArray[np.int64]:
        """Model rows of all items of a log's vocabulary, in its order: int64 [len(items)]."""
        return self.item_rows(items.ids(np.arange(len(items))))

    @property
    def has_retrieval(self) -> bool:
        """Whether the retrieval head was trained."""
        return self.schema.has_retrieval

    @property
    def device(self) -> torch.device:
        return self.item_table.device


def class_of(architecture: Architecture) -> type[RankingModel]:
    """The class of an architecture's models."""
    module, name = CLASSES[architecture]
    found: type[RankingModel] = getattr(import_module(module), name)
    return found
