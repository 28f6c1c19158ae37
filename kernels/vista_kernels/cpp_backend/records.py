"""Decodes records of a summary store with the library (`records.h`).

Letters: B records, K summary rows of d values, N events of all tails, E counted keys of all records in a field, F
values per counted key.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista_kernels.cpp_backend.library import _address, load


class _Layout(ctypes.Structure):
    _fields_ = [
        ("header", c_void_p),
        *((name, c_int32) for name in ("codec", "tokens", "dim", "num_user", "num_tail", "num_fields")),
        *((name, c_void_p) for name in ("user_columns", "tail_columns", "key_bytes", "most_keys")),
        ("values", c_int32),
    ]


class _Arrays(ctypes.Structure):
    _fields_ = [
        ("summary", c_void_p),
        *((name, POINTER(c_void_p)) for name in ("user", "keys", "codes")),
        *((name, c_void_p) for name in ("items", "times", "actions")),
        ("tail", POINTER(c_void_p)),
    ]


@dataclass(frozen=True, slots=True)
class DecodedRecords:
    """What B records hold."""

    summary: NDArray[np.float32]
    """[B, K, d]."""
    user: list[NDArray[Any]]
    """[B] per feature: int32 codes, -1 if missing, or float32 numbers."""
    keys: list[NDArray[np.int32]]
    """[E] per field of counters."""
    codes: list[NDArray[np.uint8]]
    """[E, F] per field of counters."""
    num_keys: NDArray[np.int64]
    """[B, fields]."""
    items: NDArray[np.int32]
    """[N]."""
    times: NDArray[np.int64]
    """[N]."""
    actions: NDArray[np.uint8]
    """[N]."""
    tail: list[NDArray[Any]]
    """[N] per feature of events, as `user`."""
    num_events: NDArray[np.int64]
    """[B]."""


class RecordDecoder:
    """Decodes the records of one generation."""

    def __init__(
        self,
        header: bytes,
        *,
        codec: int,
        tokens: int,
        dim: int,
        user_columns: Sequence[int],
        tail_columns: Sequence[int],
        key_bytes: Sequence[int],
        most_keys: Sequence[int],
        values: int,
    ) -> None:
        """
        Args:
            header: 128 bytes with the fields that all records share.
            codec: number of the codec of rows.
            tokens, dim: K and d.
            user_columns, tail_columns: number of values of each category; 0 for a number.
            key_bytes, most_keys: bytes per counted key, and most keys per record, of each field of counters.
            values: F.

        Raises:
            LibraryError: there is no library.
        """
        library = load()
        self._check, self._decode = library.vista_check_records, library.vista_decode_records
        self._check.restype = self._decode.restype = c_int64
        self._check.argtypes = [POINTER(_Layout), *[c_void_p] * 2, c_int64, *[c_void_p] * 4]
        self._decode.argtypes = [POINTER(_Layout), *[c_void_p] * 2, c_int64, c_void_p, POINTER(_Arrays)]
        self._held = (
            np.frombuffer(header, np.uint8),
            np.array(user_columns, np.uint32),
            np.array(tail_columns, np.uint32),
            np.array(key_bytes, np.uint8),
            np.array(most_keys, np.uint16),
        )
        of_header, of_user, of_tail, of_keys, of_most = (_address(array) for array in self._held)
        self._shape, self._values = (tokens, dim), values
        self._user, self._tail, self._num_fields = list(user_columns), list(tail_columns), len(key_bytes)
        counts = len(user_columns), len(tail_columns), len(key_bytes)
        self._layout = _Layout(of_header, codec, tokens, dim, *counts, of_user, of_tail, of_keys, of_most, values)

    def decode(
        self, content: bytearray, starts: NDArray[np.int64], headers: NDArray[Any], checksums: bytes, key_hashes: bytes
    ) -> DecodedRecords | None:
        """Check and decode B records; None if one of them is not accepted.

        Args:
            content: the records end to end, with zeros for their checksums.
            starts: [B + 1] bytes; each record has at least 128.
            headers: [B] of 128 bytes each, with their checksums.
            checksums: XXH3 of each record in `content`, 8 bytes each, big-endian.
            key_hashes: the same of the users' keys.
        """
        count, fields = len(starts) - 1, self._num_fields
        if len(content) != starts[-1] or headers.nbytes != 128 * count or len(checksums) != 8 * count:
            raise ValueError("content, headers, checksums: their sizes do not match the records")
        if len(key_hashes) != 8 * count or np.count_nonzero(starts[1:] - starts[:-1] < 128):
            raise ValueError("starts, key_hashes: their sizes do not match the records")
        data = _address(np.frombuffer(content, np.uint8))
        at, layout = _address(starts), ctypes.byref(self._layout)
        sizes = np.empty((count, fields + 1), np.int64)
        of_sizes = _address(sizes)
        of_headers = _address(headers.view(np.uint8))  # describing the fields would take 10 µs
        if self._check(layout, data, at, count, of_headers, checksums, key_hashes, of_sizes) != count:
            return None
        *num_keys, num_events = sizes.sum(0).tolist()
        made = DecodedRecords(
            summary=np.empty((count, *self._shape), np.float32),
            user=[np.empty(count, np.int32 if size else np.float32) for size in self._user],
            keys=[np.empty(size, np.int32) for size in num_keys],
            codes=[np.empty((size, self._values), np.uint8) for size in num_keys],
            num_keys=sizes[:, :fields],
            items=np.empty(num_events, np.int32),
            times=np.empty(num_events, np.int64),
            actions=np.empty(num_events, np.uint8),
            tail=[np.empty(num_events, np.int32 if size else np.float32) for size in self._tail],
            num_events=sizes[:, fields].copy(),
        )
        arrays = _Arrays(
            _address(made.summary),
            _pointers(made.user),
            _pointers(made.keys),
            _pointers(made.codes),
            *(_address(part) for part in (made.items, made.times, made.actions)),
            _pointers(made.tail),
        )
        if self._decode(layout, data, at, count, of_sizes, ctypes.byref(arrays)) != count:
            return None
        return made


def _pointers(arrays: Sequence[NDArray[Any]]) -> Any:
    return None if not arrays else (c_void_p * len(arrays))(*(_address(array) for array in arrays))
