"""Services that several tests share, which tests must not stop, and models that differ from another one in a part."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.conftest import ITEMS, START, USERS, Served
from tests.serve.running_service import RunningService, running
from vista.cli.item_commands import run_index
from vista.config import IndexConfig
from vista.model.vista_model import VistaModel
from vista.refresh import refresh

NOW = START + 200 * 86_400_000
ASKED = {"users": USERS, "candidates": ITEMS, "now": NOW}
TOLERANCE = 2e-5
"""Between calls with other users, for a model whose K is below 16 (docs/guides/serve.md)."""


@pytest.fixture
def folders(served: Served, tmp_path: Path) -> tuple[Path, Path]:
    """A model's folder and its store, which a test may change."""
    model, store = tmp_path / "model", tmp_path / "store"
    served.model.save_pretrained(model)
    refresh(served.model, served.log, store)
    return model, store


@pytest.fixture(scope="session")
def index(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of the items of `served`."""
    folder = tmp_path_factory.mktemp("index") / "served.index"
    run_index(IndexConfig(model=str(served.model_dir), out=str(folder)))
    return folder


@pytest.fixture(scope="session")
def service(served: Served, index: Path) -> Iterator[RunningService]:
    """A service of one task, with an index and the defaults."""
    with running(f"model={served.model_dir}", f"store={served.store}", f"index={index}") as opened:
        yield opened


@pytest.fixture(scope="session")
def strict(served: Served) -> Iterator[RunningService]:
    """A service without an index, which refuses what it does not know, and keeps one request at a time."""
    words = ("on_missing=raise", "max_waiting=1", "max_users=600", "max_body_bytes=100000", "max_candidates=30000")
    with running(f"model={served.model_dir}", f"store={served.store}", *words) as opened:
        yield opened


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
