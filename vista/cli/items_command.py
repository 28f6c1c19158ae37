"""The command `vista items add`."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vista.config import ItemsAddConfig
from vista.errors import CheckpointError, ConfigError, shown
from vista.files import checked_path, recover_folder
from vista.log.ingest.new_items import read_items, with_columns
from vista.log.item_features import CategoryColumn, ItemFeatures
from vista.log.vocabulary import Vocabulary
from vista.model.added_items import with_items
from vista.model.counted_fields import check_categories
from vista.model.vista_model import VistaModel
from vista.progress_bar import elapsed_time

CARD_FILE = "README.md"


@dataclass(frozen=True, slots=True)
class ItemsAdded:
    """What `vista items add` did."""

    model: str
    num_added: int
    num_known: int
    """Items of the table that the model knew already."""
    num_differing: int
    """Known items whose features differ from those in the model. The model keeps its own."""
    num_items: int
    """Items that the model ranks now."""
    unseen: dict[str, str]
    """By name of a category column: values that are missing to the model, because training did not see them."""

    def __str__(self) -> str:
        known = f"; {self.num_known:,} were known already" if self.num_known else ""
        lines = [f"{self.model}: {self.num_added:,} items added, {self.num_items:,} in all{known}"]
        if self.num_differing:
            lines.append(
                f"{self.num_differing:,} of the known items have other features in the table than in the model, which "
                "keeps its own; if the table is the newer one, append it to the log and retrain"
            )
        lines += [f"{name}: not seen in training, treated as missing: {what}" for name, what in self.unseen.items()]
        return "\n".join(lines)


def run_items_add(config: ItemsAddConfig) -> ItemsAdded:
    """`vista items add`: extend a model in place, atomically. Its stores stay valid; scorers follow with `reload`.

    Raises:
        CheckpointError: the folder holds no readable model, or cannot be written, or another process extends it.
        ConfigError: the model was trained without features of items.
        DataError: the table is invalid.
    """
    folder = Path(config.model)
    unseen: dict[str, str] = {}
    with _locked(checked_path(folder, CheckpointError)):
        recover_folder(folder)
        model = VistaModel.from_pretrained(folder)
        columns = {column.name: column.kind for column in model.schema.item_features}
        if not columns:
            raise ConfigError(
                f"model={folder}: was trained without item features, so it cannot rank new items; add features to the "
                "log with `vista prepare append=true items.paths=[…]`, then retrain"
            )
        dims = {column.name: column.size for column in model.schema.item_features if column.kind == "vector"}
        with elapsed_time("read items"):
            items, features = read_items(with_columns(config.items, columns), model.items.kind, dims)
        ids = items.ids(np.arange(len(items)))
        rows = model.items.rows(ids.tolist())
        known, new = np.flatnonzero(rows >= 0), np.flatnonzero(rows < 0)
        differing = 0
        if features is not None and model.feature_table is not None:
            given = features.select(known)
            differing = int(model.feature_table.differs(1 + rows[known], given, model.schema.item_features).sum())
        if features is not None and len(new):
            features = features.select(new)
            paths = ", ".join(config.items.paths)
            check_categories(model.config, features, Vocabulary.from_ids(ids[new]), paths)
            unseen = _unseen_values(features, model)
            card = folder / CARD_FILE
            with elapsed_time("extend the model"):
                model = with_items(model, ids[new].tolist(), features)
                model.save_pretrained(folder, card=card.read_text(encoding="utf-8") if card.is_file() else None)
    return ItemsAdded(str(folder), len(new), len(known), differing, len(model.items), unseen)


def _unseen_values(features: ItemFeatures, model: VistaModel) -> dict[str, str]:
    """By name of a category column: how many of its values training did not see, with an example."""
    assert model.feature_table is not None
    known, unseen = model.feature_table.values, {}
    for name, column in features.columns.items():
        if isinstance(column, CategoryColumn) and len(column.codes):
            used = column.with_used_values().values
            values = used.ids(np.arange(len(used)))
            new = values[known[name].rows(values.tolist()) < 0]
            if len(new):
                unseen[name] = f"{len(new):,} of {len(values):,} values, such as {shown(new[0])}"
    return unseen


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes from extending the model. The lock ends with the process.

    It is on the parent folder, because an export replaces the model's own folder.
    """
    with ExitStack() as stack:
        try:
            handle = os.open(folder.parent, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"{folder}: another process is extending this model; wait until it finishes"
            ) from None
        except OSError as error:
            raise CheckpointError(
                f"{folder}: cannot be locked ({error}); check the path and its permissions"
            ) from error
        yield
