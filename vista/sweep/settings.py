"""What chooses the settings of a sweep."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol


class Settings(Protocol):
    """What chooses the settings of a sweep, one after another."""

    def __len__(self) -> int:
        """Number of settings."""

    def __iter__(self) -> Iterator[dict[str, str]]:
        """Swept keys and their values, without the seed."""

    def tell(self, badness: float | None) -> None:
        """Report the setting that was yielded last: smaller is better, None if it failed."""
