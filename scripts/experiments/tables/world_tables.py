"""Clicks in the worlds of the simulation that a mean of item vectors does not explain, one table per world."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from scripts.experiments.tables.table import Table
from scripts.experiments.tables.table_row import K0, ORACLE, TableRow

WORLDS = ("returns", "sequence", "conjunction", "seasons", "drift")
COUNTERS = ("model.counters=true",)
"""Without what counters turn on by default. Next items are trained at the anchors only, as always with counters."""
MANY_COUNTERS = (
    *(*COUNTERS, "model.counter_keys=1024", "model.counter_events=[250,1000,2500]"),
    "optim.next_weight=0",
)
TOPICS = ("model.use_item_features=true",)
COUNTED_TOPICS = ("model.counter_categories=[topic]", "model.counter_events=[32,250,1000,2500]")
DECAYS = ("model.decay=position", "model.decay_horizons=[32,200,1000,0]")
"""Three of four heads weigh recent events more, because tastes change."""
INTERESTS = ("model.item_start=factors", "model.num_interests=64")
REFERENCES = {
    "last 2,000 events": TableRow(1, untrained="last 2000"),
    "pooled": TableRow(1, untrained="pooled"),
}
"""What the last events and pooled vectors can reach at best (`vista.simulation.simulate`)."""


def _world(name: str, **size: Any) -> Table:
    """Half as many users as in the table `simulation`, and twice as many passes."""
    rows = {
        "vista": TableRow(12),
        "vista, decay": TableRow(12, DECAYS),
        "vista, counters": TableRow(13, COUNTERS),
        # All items that a user can return to, with time constants from which the mean gap of an item follows.
        "vista, 1,024 counted items": TableRow(25, MANY_COUNTERS),
        "vista, 1,024 counted items, 16 epochs": TableRow(32, (*MANY_COUNTERS, "optim.epochs=16")),
        # Candidates also read the state of stage 1, which associates what follows what.
        "vista, counters and state": TableRow(20, (*COUNTERS, "model.target_attention=quasi_linear")),
        # The true topic of each item, as a feature, and counted too.
        "vista, topics": TableRow(13, (*COUNTERS, *TOPICS)),
        "vista, topics counted": TableRow(15, (*COUNTERS, *TOPICS, *COUNTED_TOPICS)),
        "tail-only, topics counted": TableRow(9, (*K0, *COUNTERS, *TOPICS, *COUNTED_TOPICS)),
        # Items start from co-occurrences, and seeds from how many events belong to each cluster of items.
        "vista, interests": TableRow(9, INTERESTS),
        "vista, interests, 16 epochs": TableRow(17, (*INTERESTS, "optim.epochs=16")),
        "vista, counters and interests": TableRow(15, (*COUNTERS, *INTERESTS)),
        # Events and requests also have their season and weekday, which the gaps between events do not tell.
        "vista, interests and calendar": TableRow(10, INTERESTS, calendar=True),
        "vista, interests and calendar, 16 epochs": TableRow(20, (*INTERESTS, "optim.epochs=16"), calendar=True),
        "tail-only": TableRow(7, K0),
        "tail-only, counters": TableRow(8, (*K0, *COUNTERS)),
        "hstu": TableRow(20, ("model=hstu",)),
        "hstu-2,000": TableRow(60, ("model=hstu", "model.history_limit=2000")),
        **REFERENCES,
        **ORACLE,
    }
    simulation = {"world": name, "num_users": 600, "events_per_user": 4000, **size}
    # A day has five or six events, so nothing lies between a summary and the tail for longer than a few days.
    refreshed = ("data.refresh_days=9", "data.staleness_events=32")
    return Table("simulation", f"world-{name}", rows, ("optim.epochs=8", *refreshed), simulation, validation=True)


TABLES = {f"world-{name}": _world(name) for name in WORLDS}
# Twice as many years, so that training has labels with an earlier year at every time of the year. The split is at the
# same shares of the period.
_LONGER = _world("seasons", start="2022-01-01", days=1460)
_SPLIT = ("data.validation_from=2024-10-19", "data.test_from=2025-05-26")
TABLES["world-seasons-4-years"] = replace(_LONGER, words=(*_LONGER.words, *_SPLIT))
