"""How large the items are that programs work on (see `work_plan.py`)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ItemSizes:
    """How large items are."""

    programs_per_processor: int = 8
    """Programs per processor of a large batch: they hide each other's latency and even out the load."""
    min_item: int = 64
    """Least tokens of an item. Between the bounds an item is as small as fills the device."""
    max_item: int = 4096
    """Most tokens of an item, roughly."""
    min_chunk: int = 512
    """Least tokens of a chunk of a long segment (half as many after rounding), since each chunk writes a state."""
    alignment: int = 64
    """Chunks are multiples of this, so that all their blocks but the last are full."""


ITEM_SIZES = ItemSizes()
