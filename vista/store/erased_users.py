"""The erased users of a store, for those who write it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class ErasedUsers(Protocol):
    """The erased users of a store."""

    def erased(self, keys: Sequence[bytes]) -> list[bool]:
        """Whether each user is erased at the time of the call."""

    def __len__(self) -> int: ...
