"""One column of the features that the tails of a generation hold for each event."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.json_fields import check_fields, either, one_of, text, whole

MAX_VALUES = 2**31 - 2
"""Codes and their stored form, which is one larger, are int32 in memory."""


@dataclass(frozen=True, slots=True)
class TailColumn:
    """A category, whose values the model numbers, or a number.

    The first is stored as 0 for a missing value, else the value's code plus 1; the second as float32, NaN if missing.
    """

    name: str
    size: int | None
    """Number of distinct values of a category; None for a number."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """How a value is stored: the smallest unsigned type that holds `size`, or float32."""
        if self.size is None:
            return np.dtype("<f4")
        return np.min_scalar_type(self.size).newbyteorder("<")

    def stored(self, values: Any) -> NDArray[Any]:
        """[N] values as they are stored, from codes or numbers [N] as in `Tail.features`."""
        column = np.asarray(values)
        return np.ascontiguousarray(column if self.size is None else column + 1, dtype=self.dtype)

    def read(self, stored: NDArray[Any]) -> NDArray[Any]:
        """The inverse of `stored`; int32 or float32 [N]."""
        return stored.astype(np.float32) if self.size is None else stored.astype(np.int32) - np.int32(1)

    def to_dict(self) -> dict[str, Any]:
        """The column as JSON values, for manifests."""
        return {"name": self.name, "size": self.size}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> TailColumn:
        """The inverse of `to_dict`.

        Raises:
            ValueError: a field is missing, unknown, or invalid; the message names it.
        """
        check_fields(fields, {"name": text(), "size": either(whole(1, MAX_VALUES), one_of(None))})
        return cls(fields["name"], fields["size"])
