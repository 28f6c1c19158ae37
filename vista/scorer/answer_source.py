"""The generation and the model that an answer of a scorer was computed from."""

from __future__ import annotations

import threading
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AnswerSource:
    """The generation of the store and the model that gave an answer."""

    generation: int
    """Number of the store's generation; of a sharded store, the oldest one of its shards. An incremental refresh
    changes records without a new number."""
    model_checksum: str | None
    """`checksum` of the model's config.json, 16 hex digits; None for a model that was not read from a folder."""


class LatestSource(threading.local):
    """The source of each thread's latest answer."""

    source: AnswerSource | None = None
