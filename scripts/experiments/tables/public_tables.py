"""The protocols of public data sets as published (docs/guides/public-data-sets.md), from the files to the metrics.

Nobody has run these tables on the sets themselves, so the times are guesses.
"""

from __future__ import annotations

from scripts.experiments.tables.table import Table, TableRow
from vista.config.train_config import MAX_HORIZON_EVENTS

FEATURES = ("model.ignore=[user_features]",)
LAST_DAY = {"horizon_events": [MAX_HORIZON_EVENTS], "min_seen": 1, "min_after": 1, "top_k": [10, 50, 100]}
"""All events of the test, of every user who also has an event before it."""


def _next_items(data: str, minutes: float, more: dict[str, TableRow]) -> Table:
    rows = {
        "vista": TableRow(minutes),
        **more,
        **{name: TableRow(minutes, (f"model.kind={name}",)) for name in ("sasrec", "hstu", "fuxi_linear")},
        "popularity": TableRow(1, untrained="popularity"),
    }
    return Table("", data, rows)


def _kuairand() -> Table:
    """Ids and times alone, over the newest 1,024 events."""
    return _next_items("kuairand", 300, {"vista, whole history": TableRow(300, ("model.history_limit=0",))})


def _yambda() -> Table:
    """The last model, trained on all events before the gap."""
    rows = {name: TableRow(120, (f"model.kind={name}",)) for name in ("vista", "sasrec", "hstu")}
    words = ("data.validation_from=1970-10-27T22:13:20", "optim.validate_every=0")
    return Table("", "yambda", rows, words, asked=LAST_DAY, as_yambda=True)


TABLES = {
    "amazon-reviews-2023": _next_items("amazon-reviews-2023", 60, {"vista, features": TableRow(60, FEATURES)}),
    "kuairand": _kuairand(),
    "yambda": _yambda(),
}
