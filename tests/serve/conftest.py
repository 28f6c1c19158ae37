"""Services that several tests share. Tests must not stop them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import Served
from tests.serve.running_service import RunningService, running


@pytest.fixture(scope="session")
def service(served: Served) -> Iterator[RunningService]:
    """A service of one task, with the defaults."""
    with running(f"model={served.model_dir}", f"store={served.store}") as opened:
        yield opened


@pytest.fixture(scope="session")
def strict(served: Served) -> Iterator[RunningService]:
    """A service that refuses what it does not know, and that keeps one request at a time."""
    words = ("on_missing=raise", "max_waiting=1", "max_users=600", "max_body_bytes=100000", "max_candidates=30000")
    with running(f"model={served.model_dir}", f"store={served.store}", *words) as opened:
        yield opened
