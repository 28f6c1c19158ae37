"""Where a scorer's model and store come from, and whether there are newer ones."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from vista.config.choices import Precision
from vista.device import choose_precision, resolve_device
from vista.errors import CheckpointError, SummarizerMismatchError
from vista.model.item_projections import ItemProjections
from vista.model.vista_model import VistaModel
from vista.scorer.serving_snapshot import ServingSnapshot
from vista.store.shards import open_store

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServingSource:
    """Where a scorer's model and store come from."""

    model: str | Path | VistaModel
    store: str | Path
    device: str
    key: bytes | None
    precision: Precision

    def open(self) -> ServingSnapshot:
        """Open both."""
        identity = self._identity()
        if isinstance(self.model, VistaModel):
            model, items = self.model.eval(), ItemProjections.of(self.model)
        else:
            model = VistaModel.from_pretrained(self.model, resolve_device(self.device))
            items = ItemProjections.load(Path(self.model), model)
        opened = open_store(
            self.store, summarizer_id=model.summarizer_id(), key=self.key, tail_len=model.config.tail_len
        )
        try:
            return ServingSnapshot(model, items, opened, choose_precision(self.precision, model.device), identity)
        except BaseException:
            opened.close()
            raise

    def open_newer(self, served: ServingSnapshot, task: str) -> ServingSnapshot | None:
        """Both anew, if another model lies in the folder and its summaries are published; None otherwise.

        Raises:
            StoreError, CheckpointError: they cannot be served, or not for `task`.
        """
        if self._identity() in (served.identity, ()):
            return None
        try:
            self._require_summaries()
            opened = self.open()
        except SummarizerMismatchError as error:
            logger.warning("%s holds a new model, but the old one is served on: %s", self.model, error)
            return None
        if task not in opened.tasks:
            opened.store.close()
            raise CheckpointError(
                f"{self.model} holds a new model without the task {task!r}; open a scorer for another"
            )
        return opened

    def _require_summaries(self) -> None:
        """
        Raises:
            SummarizerMismatchError: the store has no generation of the model in the folder, whose weights are not read.
        """
        try:
            claimed = bytes.fromhex(json.loads((Path(str(self.model)) / "config.json").read_text())["summarizer_id"])
        except (OSError, ValueError, KeyError, TypeError):
            return  # What opens the model says what is wrong with it.
        open_store(self.store, summarizer_id=claimed, key=self.key).close()

    def _identity(self) -> tuple[int, ...]:
        """Tells one export from another, which takes its folder's place."""
        if isinstance(self.model, VistaModel):
            return ()
        try:
            found = (Path(self.model) / "config.json").stat()
        except OSError:
            return ()  # Between the two renames of an export, say.
        return found.st_dev, found.st_ino, found.st_mtime_ns
