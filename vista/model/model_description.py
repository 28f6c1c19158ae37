"""config.json of a saved model: what to build before the weights are loaded."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vista.config import DataConfig, ModelConfig
from vista.config.conversion import from_dict, to_dict
from vista.errors import CheckpointError
from vista.model.schema import Schema

FORMAT_VERSION = 3


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """Sizes of a model, what it was trained on, and how the training data were split."""

    config: ModelConfig
    schema: Schema
    data: DataConfig

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "format_version": FORMAT_VERSION,
            "model": to_dict(self.config),
            "schema": asdict(self.schema),
            "data": to_dict(self.data),
        }

    @classmethod
    def read(cls, folder: Path) -> ModelDescription:
        """Read config.json from a folder of `save_pretrained`.

        Raises:
            CheckpointError: if the folder has no config.json, or one that is damaged or of another format.
        """
        if not (folder / "config.json").exists() and (folder / "best" / "config.json").exists():
            raise CheckpointError(f"{folder}: is a run folder; its model is {folder / 'best'}")
        try:
            description = json.loads((folder / "config.json").read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise unreadable_model(folder, error) from error
        version = description.get("format_version") if isinstance(description, dict) else None
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{folder}: format {version}, but this version of vista reads {FORMAT_VERSION}; export the model again"
            )
        try:
            schema = Schema(**description["schema"])
            if schema.rating_range is not None:
                low, high = schema.rating_range
                schema = replace(schema, rating_range=(low, high))
            config = from_dict(ModelConfig, description["model"])
            data = from_dict(DataConfig, description["data"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{folder}/config.json: {error!r}; export the model again") from error
        return cls(config, schema, data)


def unreadable_model(folder: Path, error: Exception) -> CheckpointError:
    """The error for a folder whose files are missing or damaged."""
    return CheckpointError(
        f"{folder}: no readable model ({error}); train one with `vista train run_dir=…`, which writes <run_dir>/best"
    )
