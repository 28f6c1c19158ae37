"""Settings of a grid."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

from vista.config.composition import SweptKey
from vista.errors import ConfigError

MAX_SETTINGS = 10_000


class GridSettings:
    """All combinations of the values."""

    def __init__(self, swept: Sequence[SweptKey]) -> None:
        """
        Raises:
            ConfigError: a key has an interval, or there are more than MAX_SETTINGS combinations.
        """
        for one in swept:
            if one.interval is not None:
                raise ConfigError(f"{one.key}: an interval needs sampler=tpe; set that, or list the values")
        if (combinations := math.prod(len(one.values) for one in swept)) > MAX_SETTINGS:
            raise ConfigError(
                f"train: the values make {combinations:,} settings, but at most {MAX_SETTINGS:,} are trained"
            )
        self._swept = swept

    def __len__(self) -> int:
        return math.prod(len(one.values) for one in self._swept)

    def __iter__(self) -> Iterator[dict[str, str]]:
        keys = [one.key for one in self._swept]
        for values in itertools.product(*(one.values for one in self._swept)):
            yield dict(zip(keys, values, strict=True))

    def tell(self, badness: float | None) -> None:
        """Do nothing: the settings of a grid do not depend on results."""
