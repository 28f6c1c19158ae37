"""A workspace over the small model of the session's fixtures."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.conftest import Served
from vista.explore.workspace import Places, Workspace


@pytest.fixture(autouse=True, scope="module")
def close_scorers() -> Iterator[None]:
    """Close the scorers of pages that a module drew in this process; each has a thread."""
    yield
    cache = sys.modules.get("vista.explore.page_cache")
    if cache is not None:
        for each in cache.SCORERS._open.values():
            each.scorer.close()
        cache.SCORERS._open.clear()


def places_of(served: Served, **changes: object) -> Places:
    """The places of a served model, with some changed."""
    fields: dict[str, object] = {"model": served.model_dir, "store": str(served.store), "data": served.log.path}
    return Places(**(fields | changes))  # type: ignore[arg-type]


@contextmanager
def opened_workspace(served: Served) -> Iterator[Workspace]:
    """The workspace of a served model, without problems."""
    opened = Workspace.open(places_of(served))
    assert opened.scorer is not None and not opened.problems
    yield opened
    opened.scorer.close()


@pytest.fixture(scope="session")
def workspace(served: Served) -> Iterator[Workspace]:
    """The model of the next item, its store, and its log. Tests must not change them."""
    with opened_workspace(served) as opened:
        yield opened


@pytest.fixture(scope="session")
def task_workspace(served_tasks: Served) -> Iterator[Workspace]:
    """The model of three tasks, likewise."""
    with opened_workspace(served_tasks) as opened:
        yield opened
