"""What a run measures while it trains: metrics.jsonl."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from vista.files import replace_text
from vista.runs.run_files import rows_of
from vista.training.run_folder import open_to_append


class MetricsWriter:
    """metrics.jsonl of a run, one JSON object per line.

    Rows of training hold {step, epoch, loss, …}, rows of validation {step, epoch, validation: {…}, is_best, …}. The
    last validation with is_best was exported. Undefined numbers are null.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.path = run_dir / "metrics.jsonl"

    def rewind(self, step: int, validated: Collection[int]) -> list[dict[str, Any]]:
        """Drop the rows that a resumed run will write again.

        Args:
            step: steps done; 0 for a new run.
            validated: steps whose validation is part of the resumed state.

        Returns:
            The rows that stay.

        Raises:
            ConfigError: as for `open_to_append`.
        """
        rows = self.rows()
        kept = [
            row
            for row in rows
            if step > 0 and (row["step"] in validated if "validation" in row else row["step"] <= step)
        ]
        replace_text(self.path, "".join(map(_line, kept)))
        return kept

    def rows(self) -> list[dict[str, Any]]:
        """All rows. What follows a line that a crash cut off, or that is not a row, is left out.

        Raises:
            ConfigError: as for `open_to_append`.
        """
        with open_to_append(self.path) as file:
            file.seek(0)
            return rows_of(file.read())

    def write(self, row: dict[str, Any]) -> None:
        """Append one row, which holds `step` and `epoch`."""
        with open_to_append(self.path) as file:
            file.write(_line(_defined(row)))


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def _defined(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _defined(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
