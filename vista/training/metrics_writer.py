"""What a run measures while it trains: metrics.jsonl and TensorBoard events."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from vista.errors import MissingDependencyError
from vista.files import replace_text
from vista.training.run_folder import open_to_append


class MetricsWriter:
    """metrics.jsonl of a run, one JSON object per line, and optional TensorBoard events.

    Rows of training hold {step, epoch, loss, …}, rows of validation {step, epoch, validation: {…}, is_best, …}. The
    last validation with is_best was exported. Undefined numbers are null.
    """

    def __init__(self, run_dir: Path, *, tensorboard: bool) -> None:
        """Raises MissingDependencyError if TensorBoard is requested but not installed."""
        self.path = run_dir / "metrics.jsonl"
        self._events = run_dir / "tensorboard"
        self._writer: Any = None
        self._make_writer: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise MissingDependencyError(
                    "tensorboard=true needs the extra: pip install 'vista-recsys[tensorboard]'"
                ) from error
            self._make_writer = SummaryWriter

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def rewind(self, step: int, validated: Collection[int]) -> None:
        """Drop the rows that a resumed run will write again.

        Args:
            step: steps done; 0 for a new run.
            validated: steps whose validation is part of the resumed state.

        Raises:
            ConfigError: as for `open_to_append`.
        """
        with open_to_append(self.path) as file:
            file.seek(0)
            lines = file.read().splitlines() if step > 0 else []
        kept = []
        for line in lines:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                break  # a line that a crash cut off; nothing follows it
            if not isinstance(row, dict) or "step" not in row:
                break  # not written by this class, nor is what follows
            if row["step"] in validated if "validation" in row else row["step"] <= step:
                kept.append(line + "\n")
        replace_text(self.path, "".join(kept))
        if self._make_writer is not None:
            if step == 0:
                shutil.rmtree(self._events, ignore_errors=True)
            self._writer = self._make_writer(str(self._events), purge_step=step + 1 if step else None)

    def write(self, row: dict[str, Any]) -> None:
        """Append one row, which holds `step`."""
        with open_to_append(self.path) as file:
            file.write(json.dumps(_defined(row), allow_nan=False) + "\n")
        if self._writer is not None:
            for name, value in {**row, **row.get("validation", {})}.items():
                if isinstance(value, (int, float)) and name != "step":
                    self._writer.add_scalar(name, value, row["step"])


def _defined(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _defined(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
