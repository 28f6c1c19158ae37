"""Configuration of the command `vista items add`."""

from __future__ import annotations

from dataclasses import dataclass, field

from vista.config.checks import check_types, require
from vista.config.item_table_config import ItemTableConfig


@dataclass(kw_only=True, slots=True)
class ItemsAddConfig:
    """Items that a trained model is to rank by their features, without training."""

    model: str = "runs/vista/best"
    """Folder of the exported model, which was trained with features of items. It is extended in place."""
    items: ItemTableConfig = field(default_factory=ItemTableConfig)
    """Table of items. The columns are those of the model. Items that the model knows already are left out."""

    def __post_init__(self) -> None:
        check_types(self)
        require(
            self.items.is_inferred,
            "items",
            "do not set categories, numbers, or vectors; the model's own columns are read",
        )
