"""What an operation that makes or publishes a generation reports."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vista.store.remote.store_url import StoreUrl


@dataclass(frozen=True, slots=True)
class PublishReport:
    """Result of a compaction, rollback, copy, export or import."""

    path: Path | StoreUrl
    generation: int
    num_records: int
    size_bytes: int
    """Of the generation's files; on a server, of its records, about."""
    published: bool = True
    num_resumed: int = 0
    """Records of a copy that an earlier, interrupted run had copied."""

    def __str__(self) -> str:
        resumed = f" ({self.num_resumed:,} of them by an earlier run)" if self.num_resumed else ""
        state = "is published" if self.published else "is complete and verified, but not published yet"
        return (
            f"generation {self.generation} of {self.path} {state}: {self.num_records:,} records{resumed}, "
            f"{self.size_bytes:,} bytes"
        )
