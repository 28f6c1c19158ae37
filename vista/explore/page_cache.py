"""What sessions of the page share: open scorers, which follow their stores, open logs, and slow results.

Call functions that return a scorer inside `SCORERS.lending()`, and use the scorer only inside that block.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import streamlit as st

from vista.explore.benefit import EmptySummaryScorer, SummaryBenefit, summary_benefit
from vista.explore.rankings import OverlapOfUsers, compare_users
from vista.explore.workspace import Places, ScorerPool, UserSearch, Workspace, log_version, open_page_scorer
from vista.log.event_log import EventLog
from vista.scorer import Scorer

FOLLOW_S = 10.0
"""How often scorers look for a new generation or model."""
SCORERS = ScorerPool(limit=12)


def workspace_of(places: Places) -> Workspace:
    """The workspace; its parts stay open between reruns, and what could not be opened is tried again."""
    return Workspace.open(places, scorer_for, open_log)


def scorer_for(places: Places, *, task: str | None = None, generation: int | None = None) -> Scorer:
    """The scorer of the model; errors as of `open_page_scorer`."""
    return _scorer(str(places.model), places.store, places.key_file, task, generation)


def other_scorer(places: Places, *, task: str | None = None) -> Scorer:
    """The scorer to compare with: of `other_model`, or of the same model with `other_store`."""
    model = places.model if places.other_model is None else places.other_model
    return _scorer(str(model), places.other_store or places.store, places.key_file, task, None)


def open_log(path: Path) -> EventLog:
    """The log with all its segments; errors as of `EventLog.open`."""
    return _log(str(path), log_version(path))


def user_search(workspace: Workspace) -> UserSearch:
    """The users of the workspace; without a log, they are read from the store once per generation."""
    scorer, log = workspace.scorer, workspace.log
    version: tuple[Any, ...] = () if log is None else log_version(log.path)
    served = None if scorer is None else (str(scorer.store.path), *served_version(scorer))
    return _search(served if log is None else str(log.path), version, scorer, log)


def overlap_of_users(key: tuple[Any, ...], a: Scorer, b: Scorer, users: list[int | str], top_k: int) -> OverlapOfUsers:
    """How alike two scorers rank for some users; `key` names the scorers."""
    served = served_version(a), served_version(b)
    return _overlap(key, served, tuple(users), top_k, a, b)


def measured_benefit(places: Places, store: str, log: EventLog) -> SummaryBenefit:
    """Quality with and without summaries from a store; errors as of `summary_benefit`."""
    served = served_version(_scorer(str(places.model), store, places.key_file, None, None))
    return _benefit(str(places.model), store, places.key_file, served, (str(log.path), *log_version(log.path)), log)


def served_version(scorer: Scorer) -> tuple[Any, ...]:
    """A key for cached results, which changes with the model and the records in service."""
    with scorer.in_service() as snapshot:
        manifest = snapshot.store.manifest
        return snapshot.checksum, manifest.generation, manifest.refreshed_at


def _scorer(model: str, store: str, key_file: str | None, task: str | None, generation: int | None) -> Scorer:
    def opened() -> Scorer:
        scorer = open_page_scorer(model, store, key_file, task=task, generation=generation)
        if generation is None:
            scorer.follow(FOLLOW_S)
        return scorer

    return SCORERS.borrow((model, store, key_file, task, generation), opened)


@st.cache_resource(show_spinner=False, max_entries=2)
def _log(path: str, version: tuple[str, ...]) -> EventLog:
    return EventLog.open(path)


@st.cache_resource(show_spinner=False, max_entries=2)
def _search(place: Any, version: tuple[Any, ...], _scorer: Scorer | None, _log: EventLog | None) -> UserSearch:
    return UserSearch.of(_log, _scorer)


@st.cache_data(show_spinner=False, max_entries=50)
def _overlap(key: Any, served: Any, users: tuple[int | str, ...], top_k: int, _a: Scorer, _b: Scorer) -> OverlapOfUsers:
    return compare_users(_a, _b, list(users), top_k=top_k)


@st.cache_data(show_spinner=False, max_entries=10)
def _benefit(
    model: str, store: str, key_file: str | None, served: Any, version: tuple[str, ...], _log: EventLog
) -> SummaryBenefit:
    with (
        open_page_scorer(model, store, key_file) as scorer,
        open_page_scorer(model, store, key_file, EmptySummaryScorer) as empty,
    ):
        return summary_benefit(scorer, empty, _log)
