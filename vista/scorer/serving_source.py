"""Where a scorer's model and store come from, and how newer ones are detected."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from vista.config.choices import Precision
from vista.device import choose_precision, resolve_device
from vista.errors import CheckpointError, SummarizerMismatchError, VistaError
from vista.files import checked_path
from vista.model.item_projections import ItemProjections
from vista.model.model_description import CONFIG_FILE, ModelDescription
from vista.model.vista_model import VistaModel
from vista.scorer.serving_snapshot import ServingSnapshot
from vista.store.format.tail_column import TailColumn
from vista.store.format.user_column import UserColumn
from vista.store.sharded_reader import open_store

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServingSource:
    """A model and a store, to be opened together."""

    model: str | Path | VistaModel
    store: str | Path
    device: str
    key: bytes | None
    precision: Precision

    def open(self) -> ServingSnapshot:
        """Open both. Opens them again if the model is replaced meanwhile, as by an export or `vista items add`.

        Raises:
            StoreError, CheckpointError: the model or the store is missing or damaged, or they do not match.
        """
        while True:
            identity = self._identity()
            try:
                opened = self._open(identity)
            except VistaError:
                if self._identity() == identity:
                    raise
            else:
                if self._identity() == identity:
                    return opened
                opened.store.close()

    def _open(self, identity: tuple[int, ...]) -> ServingSnapshot:
        if isinstance(self.model, VistaModel):
            model, items = self.model.eval(), ItemProjections.of(self.model)
        else:
            model = VistaModel.from_pretrained(self.model, resolve_device(self.device))
            items = ItemProjections.load(Path(self.model), model)
        users = model.user_features
        opened = open_store(
            self.store,
            summarizer_id=model.summarizer_id(),
            key=self.key,
            tail_len=model.config.tail_len,
            tail_columns=[TailColumn(*column) for column in model.schema.tail_sizes.items()],
            user_columns=[] if users is None else [UserColumn(*column) for column in users.digests()],
        )
        try:
            return ServingSnapshot(model, items, opened, choose_precision(self.precision, model.device), identity)
        except BaseException:
            opened.close()
            raise

    def open_newer(self, snapshot: ServingSnapshot, task: str) -> ServingSnapshot | None:
        """Open both again if the folder holds another model and its summaries are published; None otherwise.

        Args:
            snapshot: what is in service.
            task: a task that the new model must have.

        Raises:
            StoreError, CheckpointError: the new ones cannot be served, or the new model lacks `task`.
        """
        if self._identity() in (snapshot.identity, ()):
            return None
        try:
            self._require_summaries()
            opened = self.open()
        except SummarizerMismatchError as error:
            logger.warning("%s holds a new model, but the old one stays in service: %s", self.model, error)
            return None
        if task not in opened.tasks:
            opened.store.close()
            raise CheckpointError(
                f"{self.model} holds a new model without the task {task!r}; open a scorer for another task"
            )
        return opened

    def _require_summaries(self) -> None:
        """Check that the store has a generation of the model in the folder, without reading the model's weights.

        Raises:
            SummarizerMismatchError: the store has no such generation.
        """
        try:
            claimed = ModelDescription.read(Path(str(self.model))).summarizer_id
        except CheckpointError:
            return  # Opening the model reports what is wrong with it.
        if claimed is not None:
            open_store(self.store, summarizer_id=bytes.fromhex(claimed), key=self.key).close()

    def _identity(self) -> tuple[int, ...]:
        """Identifies the export in the folder, which another export may replace; () if there is none."""
        if isinstance(self.model, VistaModel):
            return ()
        try:
            status = (checked_path(self.model, CheckpointError) / CONFIG_FILE).stat()
        except OSError:
            return ()  # such as between the two renames of an export, where names cannot be exchanged
        return status.st_dev, status.st_ino, status.st_mtime_ns
