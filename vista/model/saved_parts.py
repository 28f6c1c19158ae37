"""The files of a saved model: weights, vocabulary, features."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vista.errors import CheckpointError, LogFormatError
from vista.log.vocabulary import Vocabulary
from vista.model.allocation_limit import AllocationLimit
from vista.model.drawn_table import tables_from_file
from vista.model.finite_weights import finite_weights
from vista.model.item_feature_table import FEATURES_FILE, ItemFeatureTable
from vista.model.model_description import ModelDescription, unreadable_model
from vista.model.row_feature_reader import RowFeatureReader
from vista.model.shared_tables import SharedTables

if TYPE_CHECKING:
    from vista.model.ranking_model import RankingModel

Model = TypeVar("Model", bound="RankingModel")
WEIGHTS_FILE = "model.safetensors"
ROW_FEATURES = "event_features", "request_features", "user_features"
"""Attributes of a model with readers of features, and fields of its schema with their columns."""
_SPARE_VALUES = 1 << 22
"""What building a small model may allocate in addition, such as temporary tensors: 16 MiB."""


@dataclass(frozen=True, slots=True)
class SavedParts:
    """What the files of a model hold besides its description."""

    weights: dict[str, Tensor]
    """By name, float32, mapped from the file."""
    items: Vocabulary
    features: ItemFeatureTable | None
    readers: dict[str, RowFeatureReader | None]
    """By the names of ROW_FEATURES."""

    @classmethod
    def read(cls, folder: Path, saved: ModelDescription, tables: SharedTables | None) -> SavedParts:
        """Read the files that a description names.

        Args:
            tables: gets the large ones, and gives those that other models hold; None reads all.

        Raises:
            CheckpointError: if one is missing or damaged, or a weight is not finite.
        """
        try:
            items_files, features_files = ("items.*",), (FEATURES_FILE, "item_values_*")
            saved.check_files(folder, WEIGHTS_FILE, *items_files, FEATURES_FILE, "*_values_*")
            weights = _read_weights(folder / WEIGHTS_FILE, tables)
            columns = saved.schema.item_features
            if tables is None:
                items = Vocabulary.load(folder, "items")
                features = ItemFeatureTable.load(folder, columns) if columns else None
            else:
                items = tables.take_files(saved.files, items_files, lambda: Vocabulary.load(folder, "items"))
                features = None
                if columns:
                    features = tables.take_files(
                        saved.files, features_files, lambda: ItemFeatureTable.load(folder, columns)
                    )
            readers = {
                name: RowFeatureReader.load(folder, name.removesuffix("_features"), getattr(saved.schema, name))
                for name in ROW_FEATURES
            }
        except (OSError, ValueError, SafetensorError, LogFormatError) as error:
            raise unreadable_model(folder, error) from error
        return cls(weights, items, features, readers)


def _read_weights(file: Path, tables: SharedTables | None) -> dict[str, Tensor]:
    """The weights of a file by name, float32; errors as of `finite_weights`."""
    weights = {name: weight.float() for name, weight in finite_weights(file).items()}
    if tables is None:
        return weights
    return tables.take_tensors(weights, lambda: {name: weight.float() for name, weight in load_file(file).items()})


def opened_model(kind: type[Model], folder: Path, tables: SharedTables | None = None) -> Model:
    """Read a folder of `RankingModel.save_pretrained`.

    Args:
        tables: as of `SavedParts.read`; only for models that do not change.

    Raises:
        CheckpointError: as `RankingModel.from_pretrained`.
    """
    saved = ModelDescription.read(folder)
    if saved.config.architecture is not kind.architecture:
        raise CheckpointError(
            f"{folder}: holds a model of architecture {saved.config.architecture.value}, but {kind.__name__} needs "
            f"{kind.architecture.value}; name a model that was trained with "
            f"model.architecture={kind.architecture.value}"
        )
    parts = SavedParts.read(folder, saved, tables)
    num_values = sum(weight.numel() for weight in parts.weights.values())
    too_large = CheckpointError(
        f"{folder}/{WEIGHTS_FILE} does not fit its config.json, which asks for far more than its {num_values} "
        "values; export the model again"
    )
    try:
        # The drawn weights are replaced at once, so the caller's random state must not advance.
        limit = AllocationLimit(4 * num_values + _SPARE_VALUES, too_large)
        with torch.random.fork_rng(devices=[]), limit, tables_from_file():
            model = kind(saved.config, saved.schema, parts.items, saved.data)
        model.take_weights(parts.weights)
        model.set_item_features(parts.features)
        for name, reader in parts.readers.items():
            setattr(model, name, reader)
        if saved.num_trained_items > len(parts.items):
            raise RuntimeError(f"it knows {len(parts.items)} items, but was trained on {saved.num_trained_items}")
        model.num_trained_items = saved.num_trained_items
    except RuntimeError as error:
        raise CheckpointError(
            f"{folder}/{WEIGHTS_FILE} does not fit its config.json: {error}; copy the model again, or export it again"
        ) from error
    return model
