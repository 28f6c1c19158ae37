"""How long each stage of an ingest takes."""

from __future__ import annotations

import time


class StageTimes(dict[str, float]):
    """Seconds per stage; `lap` adds the time since the previous lap."""

    def __init__(self) -> None:
        super().__init__(dict.fromkeys(("open", "read", "vocabularies", "sort", "write", "sync"), 0.0))
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Add the seconds since the previous lap, or since the start, to `stage`."""
        now = time.perf_counter()
        self[stage] += now - self._last
        self._last = now
