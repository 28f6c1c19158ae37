"""What users do in the next events, on real logs with long histories and returns: in all, returns, and new items.

Rows are chosen by their validation metrics; trials are not measured on test at all.
"""

from __future__ import annotations

from scripts.experiments.tables.table import Table
from scripts.experiments.tables.table_row import K0, TableRow

BASELINE_MINUTES = {
    "popularity": 0.1,
    "own frequency": 0.1,
    "own frequency, last 200 events": 0.1,
    "own frequency, decay 90 days": 0.1,
    "own frequency, decay 200 events": 0.1,
    "transitions": 0.1,
    "transitions and own frequency": 0.5,
    "item neighbors": 0.5,
    "EASE": 1,
    "TIFU-KNN": 3,
    "counter trees": 3,
}
STRONGEST = ("own frequency, decay 200 events", "item neighbors", "counter trees")
"""The best baselines for returns, for new items, and in all."""


def _baselines(*names: str) -> dict[str, TableRow]:
    return {name: TableRow(BASELINE_MINUTES[name], untrained=name) for name in names}


def _returns(data: str) -> Table:
    """What can be reached without a network."""
    pairs = tuple(("counter trees", name) for name in BASELINE_MINUTES if name != "counter trees")
    return Table("", data, _baselines(*BASELINE_MINUTES), windows=True, pairs=pairs)


def _windows(data: str, minutes: float) -> Table:
    """`minutes` is the estimated time of the row `vista-next`."""
    rows = {
        # Trained on next items only.
        "vista-next": TableRow(minutes),
        "tail-only-next": TableRow(0.5 * minutes, K0),
        "sasrec-next": TableRow(minutes, ("model=sasrec",)),
        "hstu-next": TableRow(1.5 * minutes, ("model=hstu",)),
        **_baselines(*STRONGEST),
    }
    pairs = tuple(("vista-next", other) for other in ("tail-only-next", "hstu-next", *STRONGEST))
    return Table("", data, rows, costs=True, windows=True, pairs=pairs)


TABLES = {
    "returns-cj": _returns("complete-journey"),
    "returns-dev": _returns("dev-packages"),
    "window-cj": _windows("complete-journey", 10),
    "window-dev": _windows("dev-packages", 6),
}
