"""What a run writes beside its checkpoints: train.log, metrics.jsonl, TensorBoard events; and how Ctrl-C is taken."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import shutil
import signal
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from vista.errors import MissingDependencyError
from vista.files import replace_text

logger = logging.getLogger(__name__)


class MetricsWriter:
    """metrics.jsonl of a run, one JSON object a line, and TensorBoard events on wish.

    Rows of training hold {step, epoch, loss, …}, rows of validation {step, epoch, validation: {…}, epoch_seconds};
    undefined numbers are null.
    """

    def __init__(self, run_dir: Path, *, tensorboard: bool) -> None:
        """Raises MissingDependencyError if TensorBoard is asked for and not installed."""
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
        """Drop what a run resumed at `step` (0: a new one) will write again.

        Args:
            step: steps done.
            validated: steps whose validation is part of the resumed state.
        """
        kept = []
        resumed = self.path.exists() and step > 0
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines() if resumed else []:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                break  # a line that a crash cut off; nothing follows it
            if not isinstance(row, dict) or "step" not in row:
                break  # none of ours, nor what follows
            if row["step"] in validated if "validation" in row else row["step"] <= step:
                kept.append(line + "\n")
        replace_text(self.path, "".join(kept))
        if self._make_writer is not None:
            if step == 0:
                shutil.rmtree(self._events, ignore_errors=True)
            self._writer = self._make_writer(str(self._events), purge_step=step + 1 if step else None)

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; it holds `step`."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_defined(row), allow_nan=False) + "\n")
        if self._writer is not None:
            for name, value in {**row, **row.get("validation", {})}.items():
                if isinstance(value, (int, float)) and name != "step":
                    self._writer.add_scalar(name, value, row["step"])


def _defined(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _defined(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Copy vista's log records to a file of the run."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger("vista")
    level = root.level
    root.addHandler(handler)
    if level == logging.NOTSET:
        root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.setLevel(level)
        root.removeHandler(handler)
        handler.close()


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[list[bool]]:
    """Ctrl-C sets a mark, so that the step in hand ends and a checkpoint is written; a second one stops at once.

    Outside the main thread interrupts are not ours to handle, and the mark is never set.
    """
    mark: list[bool] = []

    def note(signum: int, frame: Any) -> None:
        if mark:
            raise KeyboardInterrupt
        mark.append(True)
        logger.warning("interrupt: finishing this step and writing a checkpoint (again: stop at once)")

    try:
        previous = signal.signal(signal.SIGINT, note)
    except ValueError:
        previous = None
    try:
        yield mark
    finally:
        if previous is not None:
            signal.signal(signal.SIGINT, previous)
