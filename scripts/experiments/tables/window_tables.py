"""What users do in the next events, on real logs with long histories and returns: in all, returns, and new items.

Rows are chosen by their validation metrics; trials are not measured on test at all.
"""

from __future__ import annotations

from scripts.experiments.tables.table import Table
from scripts.experiments.tables.table_row import K0, TableRow


def _windows(data: str, minutes: float) -> Table:
    """`minutes` is the estimated time of the row `vista-next`."""
    rows = {
        # Trained on next items only.
        "vista-next": TableRow(minutes),
        "tail-only-next": TableRow(0.5 * minutes, K0),
        "sasrec-next": TableRow(minutes, ("model=sasrec",)),
        "hstu-next": TableRow(1.5 * minutes, ("model=hstu",)),
    }
    pairs = (("vista-next", "tail-only-next"), ("vista-next", "hstu-next"))
    return Table("", data, rows, costs=True, windows=True, pairs=pairs)


TABLES = {
    "window-cj": _windows("complete-journey", 10),
    "window-dev": _windows("dev-packages", 6),
}
