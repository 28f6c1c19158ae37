"""Where a scorer's model and store come from, and how newer ones are detected."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from vista.config.choices import IndexKind, Precision
from vista.device import choose_precision, resolve_device
from vista.errors import (
    CheckpointError,
    ConfigError,
    ItemIndexError,
    ItemIndexMismatchError,
    SummarizerMismatchError,
    VistaError,
)
from vista.files import checked_path
from vista.model.item_index import ItemIndex
from vista.model.item_index_manifest import MANIFEST_FILE
from vista.model.item_projections import ItemProjections
from vista.model.model_description import CONFIG_FILE, ModelDescription
from vista.model.vista_model import VistaModel
from vista.scorer.serving_snapshot import ServingSnapshot
from vista.store.format.tail_column import TailColumn
from vista.store.format.user_column import UserColumn
from vista.store.sharded_reader import open_store

logger = logging.getLogger(__name__)
WARNED_SHARE = 0.1
"""Of the items of an index: if more were added to the model later, requests become slower."""


@dataclass(frozen=True, slots=True)
class ServingSource:
    """A model and a store, to be opened together."""

    model: str | Path | VistaModel
    store: str | Path
    device: str
    key: bytes | None
    precision: Precision
    index: str | Path | None = None

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
        index = None if self.index is None else self._opened_index(items)
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
            precision = choose_precision(self.precision, model.device)
            return ServingSnapshot(model, items, opened, precision, identity, index)
        except BaseException:
            opened.close()
            raise

    def _opened_index(self, items: ItemProjections) -> ItemIndex:
        assert self.index is not None
        if items.retrieval is None:
            raise ConfigError(f"index={self.index}: this model has no retrieval head; open the scorer without an index")
        index = ItemIndex.load(self.index)
        index.require(items.retrieval, str(self.index))
        num_later = len(items.retrieval) - 1 - index.num_items
        if num_later > WARNED_SHARE * index.num_items and index.manifest.kind is not IndexKind.flat:
            logger.warning(
                "%s lacks %d items that were added to the model later, so each request compares all of them; run "
                "`vista index` again",
                self.index,
                num_later,
            )
        return index

    def open_newer(self, snapshot: ServingSnapshot, task: str) -> ServingSnapshot | None:
        """Open all again if the folder holds another model, whose summaries are published and whose index is there, or
        if the index was replaced; None otherwise.

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
        except (SummarizerMismatchError, ItemIndexMismatchError) as error:
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
        """Identifies the export in the folder and the index, either of which may be replaced; () if there is none."""
        if isinstance(self.model, VistaModel):
            return ()
        files = [checked_path(self.model, CheckpointError) / CONFIG_FILE]
        if self.index is not None:
            files.append(checked_path(self.index, ItemIndexError) / MANIFEST_FILE)
        try:
            found = [file.stat() for file in files]
        except OSError:
            return ()  # such as between the two renames of an export, where names cannot be exchanged
        return tuple(number for status in found for number in (status.st_dev, status.st_ino, status.st_mtime_ns))
