"""A killed `vista items add` leaves a model that scorers open, and its repetition adds the items."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

import vista.files
from tests.faults import preload
from tests.faults.harness import Trial, promise
from tests.faults.nursery import Nursery, Say
from tests.faults.operations import ADDED, add_items, add_items_before, ranked
from vista.errors import CheckpointError

KINDS = preload.WRITES | preload.SYNCS | preload.NAMES
LAST = 20
"""Every other kill strikes one of the last calls, which exchange the names and remove the old model."""


def prepare(say: Say, folder: str) -> None:
    add_items_before(Path(folder))


def add(say: Say, folder: str, number: int, exchanges: bool) -> int:
    """Add the items; the process is killed before its `number`-th call. Returns the number of calls.

    Args:
        exchanges: whether the file system can exchange two names.
    """
    logging.disable(logging.CRITICAL)
    if not exchanges:
        setattr(vista.files, "_exchanged", lambda one, other: False)  # noqa: B010
    preload.watch(str(Path(folder).resolve()))
    preload.kill_at(KINDS, number, 9)
    add_items(Path(folder))
    return preload.calls_since(number)


def scores(say: Say, folder: str) -> list[float] | None:
    """What a scorer that is opened now answers; None if there is no model."""
    try:
        return ranked(Path(folder))
    except CheckpointError:
        assert not Path(folder, "featured", "model").exists()
        return None


@dataclass(frozen=True)
class Base:
    """before/ and after/ in one folder, and what the addition in between takes."""

    folder: Path
    calls: dict[bool, int]
    """By whether names can be exchanged: number of calls."""
    old: list[float]
    new: list[float]


@pytest.fixture(scope="module")
def base(traced: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder, calls = tmp_path_factory.mktemp("items"), {}
    traced.call(prepare, folder / "before")
    for exchanges in (True, False):
        shutil.rmtree(folder / "after", ignore_errors=True)
        shutil.copytree(folder / "before", folder / "after")
        calls[exchanges] = traced.call(add, folder / "after", preload.FOREVER, exchanges)
    old, new = (traced.call(scores, folder / name) for name in ("before", "after"))
    assert len(set(old[: len(ADDED)])) == 1 and len(set(new[: len(ADDED)])) == len(ADDED)
    return Base(folder, calls, old, new)


def contents(model: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in model.iterdir()}


@promise(
    "An addition of items is atomic",
    fault="kill -9 of `vista items add` at a system call",
    full=500,
    short=4,
    shares={"the new model": 0.1, "the old model": 0.3, "no model until the repetition": 0.005},
)
def test_killed_items_add(trial: Trial, traced: Nursery, base: Base) -> None:
    exchanges, made = trial.number % 2 == 0, trial.folder / "made"
    shutil.copytree(base.folder / "before", made)
    calls = base.calls[exchanges]
    number = trial.random.choice([trial.random.randint(1, calls), calls - trial.random.randrange(LAST)])
    child = traced.start(add, made, number, exchanges).end()
    assert child.exit_code == -9, child.raised
    seen = traced.call(scores, made)
    assert seen in ([base.old, base.new] if exchanges else [base.old, base.new, None])
    trial.count("the new model" if seen == base.new else "the old model" if seen else "no model until the repetition")
    traced.call(add, made, preload.FOREVER, exchanges)
    assert traced.call(scores, made) == base.new
    model = made / "featured" / "model"
    assert contents(model) == contents(base.folder / "after" / "featured" / "model")
    assert sorted(path.name for path in model.parent.iterdir()) == ["log", "model", "new.parquet", "store"]
