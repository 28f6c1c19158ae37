"""Where the segments of a packed batch lie. Plain NumPy: the host plans all work."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Segments:
    """B segments of a packed batch. Rows between two segments belong to neither."""

    starts: IntArray
    """[B] first row of each segment, rising."""
    lengths: IntArray
    """[B] number of rows of each segment."""

    @classmethod
    def from_offsets(cls, offsets: IntArray) -> Segments:
        """Return the segments that lie end to end between offsets [B+1]."""
        return cls(offsets[:-1], offsets[1:] - offsets[:-1])  # np.diff takes several microseconds longer

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, chosen: slice | IntArray) -> Segments:
        return Segments(self.starts[chosen], self.lengths[chosen])


def cut_segments(offsets: IntArray, size: int) -> tuple[IntArray, Segments]:
    """Cut segments [B] into chunks of at most `size` rows: return each segment's first chunk [B+1], and the chunks."""
    counts = -(-np.diff(offsets) // size)
    chunk_offsets = np.concatenate([[0], np.cumsum(counts)])
    within = np.arange(chunk_offsets[-1]) - np.repeat(chunk_offsets[:-1], counts)
    starts = np.repeat(offsets[:-1], counts) + within * size
    return chunk_offsets, Segments(starts, np.minimum(size, np.repeat(offsets[1:], counts) - starts))
