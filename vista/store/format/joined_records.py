"""A batch of records copied end to end, so that NumPy handles the same part of all of them at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vista.store.format.record_spec import CHECKSUM_OFFSET, HEADER, HEADER_BYTES


class JoinedRecords:
    """Records copied end to end, with zeros for their checksums, so that NumPy handles the whole batch at once."""

    def __init__(self, values: Sequence[bytes | memoryview], lengths: NDArray[np.int64]) -> None:
        self.content = bytearray().join(values)
        self.stops = np.cumsum(lengths)
        self.starts = self.stops - lengths
        self.one_length = len(lengths) > 0 and bool((lengths == lengths[0]).all())
        """Whether all records have the same length: the usual case, in which fields are columns of a matrix."""
        headers = self.cut(np.zeros_like(lengths), np.full_like(lengths, HEADER_BYTES)).reshape(-1).copy()
        self.headers = headers.view(HEADER)
        """[B], with the checksums as stored."""
        if self.one_length:
            self._table()[:, CHECKSUM_OFFSET:HEADER_BYTES] = 0
        else:
            places = self.starts[:, None] + np.arange(CHECKSUM_OFFSET, HEADER_BYTES)
            np.frombuffer(self.content, np.uint8)[places] = 0

    def views(self) -> list[memoryview]:
        """Of each record."""
        view = memoryview(self.content)
        return [view[start:stop] for start, stop in zip(self.starts.tolist(), self.stops.tolist(), strict=True)]

    def cut(self, first: NDArray[np.int64], last: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Bytes first[b] to last[b] of each record b: a view [B, bytes] if all have one length, otherwise flat."""
        if self.one_length:
            return self._table()[:, int(first[0]) : int(last[0])]
        view = memoryview(self.content)
        bounds = zip((self.starts + first).tolist(), (self.starts + last).tolist(), strict=True)
        return np.frombuffer(bytearray().join([view[start:stop] for start, stop in bounds]), np.uint8)

    def _table(self) -> NDArray[np.uint8]:
        return np.frombuffer(self.content, np.uint8).reshape(len(self.starts), -1)
