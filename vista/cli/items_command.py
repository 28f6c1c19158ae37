"""The command `vista items add`."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from vista.config import ItemsAddConfig
from vista.errors import CheckpointError, ConfigError, shown
from vista.files import checked_path, recover_folder
from vista.log.ingest.new_items import read_new_items, with_columns
from vista.log.item_features import CategoryColumn, ItemFeatures
from vista.model.added_items import with_items
from vista.model.vista_model import VistaModel

CARD_FILE = "README.md"


@dataclass(frozen=True, slots=True)
class ItemsAdded:
    """What `vista items add` did."""

    model: str
    num_added: int
    num_known: int
    """Items of the table that the model knew already."""
    num_items: int
    """Items that the model ranks now."""
    unseen: dict[str, str]
    """By name of a category column: values that are missing to the model, because training did not see them."""

    def __str__(self) -> str:
        known = f"; {self.num_known:,} were known already" if self.num_known else ""
        lines = [f"{self.model}: {self.num_added:,} items added, {self.num_items:,} in all{known}"]
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
        items, features, num_known = read_new_items(with_columns(config.items, columns), model.items, dims)
        if features is not None:
            unseen = _unseen_values(features, model)
            model = with_items(model, items.ids(range(len(items))).tolist(), features)
            card = folder / CARD_FILE
            model.save_pretrained(folder, card=card.read_text(encoding="utf-8") if card.is_file() else None)
    return ItemsAdded(str(folder), len(items), num_known, len(model.items), unseen)


def _unseen_values(features: ItemFeatures, model: VistaModel) -> dict[str, str]:
    """By name of a category column: how many of its values training did not see, with an example."""
    assert model.feature_table is not None
    known, unseen = model.feature_table.values, {}
    for name, column in features.columns.items():
        if isinstance(column, CategoryColumn) and len(column.values):
            values = column.values.ids(range(len(column.values)))
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
