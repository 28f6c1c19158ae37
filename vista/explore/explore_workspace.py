"""What the page has open: the model with its store, the log, and what to compare with; or why it is not open."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar, cast

from vista.config.choices import OnMissing, Precision
from vista.errors import VistaError
from vista.explore.item_names import ItemNames
from vista.explore.places import Places
from vista.log.event_log import EventLog
from vista.log.segment import find_segments
from vista.scorer import Scorer
from vista.scorer.serving_source import ServingSource
from vista.store.format.authentication import read_key
from vista.store.stored_batch import StoredBatch

Opened = TypeVar("Opened")


@dataclass(frozen=True, slots=True)
class Workspace:
    """Parts that are open; the others are None, and `problems` says why."""

    places: Places
    scorer: Scorer | None
    log: EventLog | None
    names: ItemNames
    problems: dict[str, str] = field(default_factory=dict)
    """By part ("model", "log", "names"): what is wrong, and what to do."""

    @classmethod
    def open(
        cls,
        places: Places,
        open_scorer: Callable[[Places], Scorer] | None = None,
        open_log: Callable[[Path], EventLog] | None = None,
    ) -> Workspace:
        """Open what can be opened.

        Args:
            places: where it is.
            open_scorer: opens the model and its store; the page passes a function that keeps them open.
            open_log: likewise for the log.
        """
        problems: dict[str, str] = {}

        def attempt(part: str, opener: Callable[[], Opened]) -> Opened | None:
            try:
                return opener()
            except VistaError as error:
                problems[part] = str(error)
                return None

        scorer = attempt("model", lambda: (open_scorer or scorer_of)(places))
        log, path = None, places.data
        if path is None:
            problems["log"] = "There is no event log, so histories are not shown. Name a log with data=..."
        else:
            log = attempt("log", lambda: (open_log or EventLog.open)(path))
        names = attempt("names", lambda: ItemNames.of(log)) or ItemNames.by_id(log)
        return cls(places, scorer, log, names, problems)


def scorer_of(places: Places) -> Scorer:
    """The model with its store; errors as of `Scorer.open`."""
    return open_page_scorer(str(places.model), places.store, places.key_file)


def open_page_scorer(
    model: str, store: str, key_file: str | None, *, task: str | None = None, generation: int | None = None
) -> Scorer:
    """A scorer on the CPU.

    Args:
        model: folder of the model.
        store: folder or URL of its store.
        key_file: of the authentication key, as in `ExploreConfig`.
        task: that rankings use; None for the model's first one.
        generation: of the store; None follows the published one.

    Raises:
        StoreError, CheckpointError, ConfigError: as in `Scorer.open` and `read_key`.
    """
    source = ServingSource(model, store, "cpu", read_key(key_file), Precision.float32, generation=generation)
    return Scorer(source, OnMissing.empty, task, None)


def record_of(scorer: Scorer, user: int | str) -> StoredBatch:
    """The record of one user, as a batch of one; errors as of `StoreReader.get_many`."""
    return scorer.store.get_many(cast(list[str], [user]))


def log_version(path: Path) -> tuple[str, ...]:
    """Names of the log's segments, which change when events are appended.

    Raises:
        LogFormatError: there is no log.
    """
    return tuple(folder.name for folder in find_segments(path))
