"""The features whose values share one hashed table."""

from __future__ import annotations

from enum import IntEnum


class EmbeddingFeature(IntEnum):
    """The feature whose values are hashed."""

    item = 1
    action = 2
    gap = 3
