"""What a model may read of a log, and what it is trained to predict."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from vista.config.checks import require
from vista.model.feature_spec import FeatureSpec

MAX_ACTIONS = 256
"""Codes of actions are uint8."""
MAX_TASKS = 64
MAX_NAME_BYTES = 500
FEATURE_KEYS = ("item_features", "event_features", "request_features", "user_features")
"""Fields of Schema that list columns of features."""


@dataclass(frozen=True, slots=True)
class Schema:
    """The fields and tasks of the log that a model was trained on."""

    actions: list[str]
    has_time: bool
    rating_range: tuple[float, float] | None
    """Smallest and largest rating; None if ratings are not used."""
    tasks: list[str]
    """Labeled tasks that were trained."""
    has_retrieval: bool = True
    """Whether the retrieval head was trained on next items."""
    item_features: list[FeatureSpec] = field(default_factory=list)
    """Columns of item features that are part of item vectors."""
    event_features: list[FeatureSpec] = field(default_factory=list)
    """Categories and numbers that are part of event embeddings in stage 1, and in baselines."""
    num_tail_features: int = 0
    """How many of `event_features`, counted from the first, stage 2 reads too, and the tails of records hold."""
    request_features: list[FeatureSpec] = field(default_factory=list)
    """Categories and numbers of requests, which labeled tasks read."""
    user_features: list[FeatureSpec] = field(default_factory=list)
    """Categories and numbers of users, which stage 2 and the retrieval head read."""

    def __post_init__(self) -> None:
        for key, most in (("actions", MAX_ACTIONS), ("tasks", MAX_TASKS)):
            names = getattr(self, key)
            require(
                type(names) is list and all(type(name) is str for name in names), f"schema.{key}", "must list texts"
            )
            require(len(names) <= most, f"schema.{key}", f"at most {most} are possible, got {len(names)}")
            require(
                all(len(name.encode("utf-8", "surrogatepass")) <= MAX_NAME_BYTES for name in names),
                f"schema.{key}",
                f"a name has at most {MAX_NAME_BYTES} bytes",
            )
        for key in FEATURE_KEYS:
            features = getattr(self, key)
            require(
                type(features) is list and all(type(feature) is FeatureSpec for feature in features),
                f"schema.{key}",
                "must list columns",
            )
            names = [feature.name for feature in features]
            require(len(set(names)) == len(names), f"schema.{key}", "column names must be unique")
        require(
            type(self.num_tail_features) is int and 0 <= self.num_tail_features <= len(self.event_features),
            "schema.num_tail_features",
            f"must lie in 0 … {len(self.event_features)}, got {self.num_tail_features!r}",
        )
        for key in ("has_time", "has_retrieval"):
            require(type(getattr(self, key)) is bool, f"schema.{key}", "must be true or false")
        if self.rating_range is not None:
            ratings = self.rating_range
            require(
                type(ratings) is tuple
                and len(ratings) == 2
                and all(type(rating) in (int, float) and math.isfinite(rating) for rating in ratings),
                "schema.rating_range",
                "must be two finite numbers",
            )

    @property
    def tail_features(self) -> list[FeatureSpec]:
        """The `event_features` that stage 2 reads too."""
        return self.event_features[: self.num_tail_features]

    @property
    def tail_sizes(self) -> dict[str, int | None]:
        """Their number of distinct values by name; None for a number."""
        return {column.name: column.size if column.kind == "category" else None for column in self.tail_features}
