"""The command `vista items add`."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vista.config import ItemsAddConfig
from vista.errors import CheckpointError, ConfigError, DataError
from vista.log.ingest.new_items import columns_of_model, read_new_items
from vista.log.item_features import ItemFeatures, VectorColumn
from vista.model.added_items import with_items
from vista.model.feature_spec import FeatureSpec
from vista.model.model_description import CONFIG_FILE
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

    def __str__(self) -> str:
        known = f"; {self.num_known:,} were known already" if self.num_known else ""
        return f"{self.model}: {self.num_added:,} items added, {self.num_items:,} in all{known}"


def run_items_add(config: ItemsAddConfig) -> ItemsAdded:
    """`vista items add`: extend a model in place, atomically. Its stores stay valid; scorers follow with `reload`.

    Raises:
        CheckpointError: the folder holds no readable model, or cannot be written, or another process extends it.
        ConfigError: the model was trained without features of items.
        DataError: the table is invalid.
    """
    folder = Path(config.model)
    with _locked(folder):
        model = VistaModel.from_pretrained(folder)
        columns = {column.name: column.kind for column in model.schema.item_features}
        if not columns:
            raise ConfigError(
                f"model={folder}: was trained without features of items, so it cannot rank an item that it was not "
                "trained on; add features with `vista prepare items.paths=[…]`, and train again"
            )
        items, features, num_known = read_new_items(columns_of_model(config.items, columns), model.items)
        if features is not None:
            _check_vectors(features, model.schema.item_features)
            model = with_items(model, items.ids(range(len(items))).tolist(), features)
            card = folder / CARD_FILE
            model.save_pretrained(folder, card=card.read_text(encoding="utf-8") if card.is_file() else None)
    return ItemsAdded(str(folder), len(items), num_known, len(model.items))


def _check_vectors(features: ItemFeatures, columns: Sequence[FeatureSpec]) -> None:
    sizes = {column.name: column.size for column in columns}
    for name, column in features.columns.items():
        if isinstance(column, VectorColumn) and column.vectors.shape[1] != sizes[name]:
            raise DataError(
                f"items: column {name!r} has vectors of {column.vectors.shape[1]} numbers, but the model's have "
                f"{sizes[name]}; compute them as those of the log"
            )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes from extending the model. The lock ends with the process."""
    try:
        handle = os.open(folder / CONFIG_FILE, os.O_RDONLY)
    except OSError:
        yield  # reading the model says what is wrong
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise CheckpointError(f"{folder}: another process extends this model; wait until it is done") from None
    finally:
        os.close(handle)
