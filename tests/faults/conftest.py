"""A nursery whose children can be traced, and a small world."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import small_frame
from tests.faults.nursery import Nursery
from tests.faults.operations import COLUMNS, save_model
from tests.store.remote.valkey_server import ValkeyServer
from vista.log.event_log import EventLog
from vista.model.vista_model import VistaModel
from vista.refresh import refresh


def require_linux() -> None:
    """Skip the test on other systems, which lack /proc, prctl and mount namespaces."""
    if sys.platform != "linux":
        pytest.skip("fault injection requires Linux")


@pytest.fixture(scope="session")
def traced(nursery: Nursery) -> Nursery:
    """A nursery whose children can record their system calls, or get errors or SIGKILL from them (`preload`)."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler (cc): system calls cannot be intercepted")
    return nursery


@pytest.fixture(scope="module")
def valkey() -> Iterator[ValkeyServer]:
    """A server that appends to its log at once, so that a kill loses nothing. Tests empty it first."""
    require_linux()
    pytest.importorskip("redis", reason="the extra `redis` is not installed")
    with tempfile.TemporaryDirectory(prefix="valkey-") as folder:
        started = ValkeyServer(Path(folder), "--appendonly", "yes", "--appendfsync", "always")
        yield started
        started.kill()


@pytest.fixture(scope="session")
def model_dir(event_log: EventLog, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model."""
    folder = tmp_path_factory.mktemp("model") / "m"
    save_model(event_log, folder, counters=True)
    return folder


@pytest.fixture(scope="session")
def world(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """log/, model/ and store/ of a small world. Tests must not change them."""
    folder = tmp_path_factory.mktemp("world")
    log = EventLog.from_frame(small_frame(), folder / "log", **COLUMNS)
    shutil.copytree(model_dir, folder / "model")
    refresh(VistaModel.from_pretrained(folder / "model"), log, folder / "store")
    return folder
