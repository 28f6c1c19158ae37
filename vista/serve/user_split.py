"""Which model answers a user: the same one on every machine, in every process, and after every restart."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import accumulate

_DIGITS = 13
"""Hexadecimal digits of a hash that are used: 52 bits, which any language can hold exactly in a double."""


class UserSplit:
    """Assigns users to variants by a hash of the experiment and the user's id.

    Saved analyses rely on which user gets which variant, so the hash function never changes: the first 13 hexadecimal
    digits of the SHA-256 of "EXPERIMENT:USER", divided by 16^13, give a number in [0, 1). The variants divide this
    interval in their order. If a bound between two variants moves, users move between these two only.

    Args:
        shares: by variant; they sum to 1.
        experiment: salt; different experiments assign users independently.
    """

    def __init__(self, shares: Mapping[str, float], experiment: str) -> None:
        self.shares = dict(shares)
        bounds = accumulate(shares.values())
        self._bounds = [
            (variant, bound) for (variant, share), bound in zip(shares.items(), bounds, strict=True) if share
        ]
        self._prefix = f"{experiment}:"

    def variant(self, user: int | str) -> str:
        """The variant of a user. An integer and its text are the same user."""
        digest = hashlib.sha256(f"{self._prefix}{user}".encode("utf-8", "surrogatepass")).hexdigest()
        point = int(digest[:_DIGITS], 16) / 16**_DIGITS
        return next((variant for variant, bound in self._bounds if point < bound), self._bounds[-1][0])
