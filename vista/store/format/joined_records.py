"""A batch of records or states copied end to end, so that NumPy handles the same part of all of them at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

CHECKSUM_BYTES = 8
"""At the end of the header."""


class JoinedRecords:
    """Records, or states, copied end to end, with zeros for their checksums, which end their headers."""

    def __init__(
        self, values: Sequence[bytes | memoryview], lengths: NDArray[np.int64], header: np.dtype[np.void]
    ) -> None:
        self.content = bytearray().join(values)
        self.stops = np.cumsum(lengths)
        self.starts = self.stops - lengths
        self.one_length = len(lengths) > 0 and bool((lengths == lengths[0]).all())
        """Whether all records have the same length: the usual case, in which fields are columns of a matrix."""
        size = header.itemsize
        self.headers = self.cut(0, size).reshape(-1).copy().view(header)
        """[B], with the checksums as stored."""
        if self.one_length:
            self._table()[:, size - CHECKSUM_BYTES : size] = 0
        else:
            places = self.starts[:, None] + np.arange(size - CHECKSUM_BYTES, size)
            np.frombuffer(self.content, np.uint8)[places] = 0

    def views(self) -> list[memoryview]:
        """Of each record."""
        view = memoryview(self.content)
        return [view[start:stop] for start, stop in zip(self.starts.tolist(), self.stops.tolist(), strict=True)]

    def cut(self, first: NDArray[np.int64] | int, last: NDArray[np.int64] | int) -> NDArray[np.uint8]:
        """Bytes first to last of each record, which may differ by record [B].

        Returns:
            [B, bytes], a view, if the records are of one length and the bytes are at one place; otherwise flat.
        """
        if self.one_length:
            begin, end = _common(first), _common(last)
            if begin is not None and end is not None:
                return self._table()[:, begin:end]
        view = memoryview(self.content)
        bounds = zip((self.starts + first).tolist(), (self.starts + last).tolist(), strict=True)
        return np.frombuffer(bytearray().join([view[start:stop] for start, stop in bounds]), np.uint8)

    def _table(self) -> NDArray[np.uint8]:
        return np.frombuffer(self.content, np.uint8).reshape(len(self.starts), -1)


def _common(places: NDArray[np.int64] | int) -> int | None:
    """The value that all places have; None if they differ."""
    if isinstance(places, int):
        return places
    return int(places[0]) if (places == places[0]).all() else None
