"""The rows of a run's metrics.jsonl."""

from __future__ import annotations

import json
from typing import Any


def rows_of(text: str) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, until a line that a crash cut off, or that `MetricsWriter` has not written."""
    rows = []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(row, dict) or not all(isinstance(row.get(name), int) for name in ("step", "epoch")):
            break
        rows.append(row)
    return rows
