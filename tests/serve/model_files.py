"""Models that differ from another one in a part, and files of several models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml

from vista.model.vista_model import VistaModel


def models_file(folder: Path, models: dict[str, tuple[Path, Path]], **more: Any) -> str:
    """Write a file of models, given as (model, store) by name, and other keys; returns its path."""
    named = {name: {"model": str(model), "store": str(store)} for name, (model, store) in models.items()}
    path = folder / "models.yaml"
    path.write_text(yaml.safe_dump({"models": named, **more}, sort_keys=False))
    return str(path)


def save_other_stage_2(model: Path, folder: Path, seed: int = 0) -> Path:
    """Save a model that differs only in stage 2, as after training with `init_freeze=summarizer`; one store serves
    both."""
    other = VistaModel.from_pretrained(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in other.target_attention.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    other.save_pretrained(folder)
    return folder


def retrained(model: VistaModel) -> VistaModel:
    """The same model with other weights in stage 1, which cannot read the summaries of the first."""
    other = VistaModel(model.config, model.schema, model.items, model.data)
    other.take_catalog(model)
    return other.eval()
