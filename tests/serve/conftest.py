"""Services that several tests share. Tests must not stop them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Served
from tests.serve.running_service import RunningService, running
from vista.cli.index_command import run_index
from vista.config import IndexConfig
from vista.refresh import refresh


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
