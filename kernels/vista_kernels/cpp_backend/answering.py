"""Requests of one user in one call of the library: from the stored record to the scores (`answering.h`).

Letters as in `library.py`; G fields of counters with F values per key.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_char_p, c_double, c_int32, c_int64, c_void_p
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vista_kernels.cpp_backend.library import (
    Floats,
    Ints,
    ItemReads,
    LibraryError,
    PairFeatureRows,
    ScoredPairs,
    ScoringModel,
    _address,
    _Request,
)
from vista_kernels.cpp_backend.records import RecordDecoder, _pointers

Doubles = NDArray[np.float64]


class _Answering(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("model", "layout")),
        ("tables", POINTER(_Request)),
        ("num_rows", c_int64),
        ("times", c_void_p),
        ("weights", c_void_p),
        *(
            (name, c_int32)
            for name in ("num_actions", "num_gaps", "num_pooled", "num_fields", "columns", "num_days", "has_time")
        ),
        *((name, c_void_p) for name in ("levels", "resolution", "factor", "half_lives")),
        *((name, c_double) for name in ("event_resolution", "event_factor")),
        ("keys", POINTER(c_void_p)),
    ]


@dataclass(frozen=True, slots=True)
class CounterScale:
    """How counters are decayed, and which keys candidates have."""

    levels: Doubles
    """[64, F] value of each code."""
    resolution: Doubles
    """[F], and the next, by which values are encoded: round(factor * log(1 + value / resolution))."""
    factor: Doubles
    half_lives: Ints
    """[days] ms of the columns after the first."""
    has_time: bool
    """The last column is an age in seconds."""
    of_events: tuple[float, float]
    """Resolution and factor of the number of events."""
    keys: Sequence[NDArray[np.int32]]
    """[G - 1] of [V]: keys of the rows in the fields after the first, in which a row is its key."""


class RecordScoring:
    """Scores candidates of one user from the stored record: what `ScoringModel.score` gives for what the record holds.
    It is thread-safe."""

    def __init__(
        self,
        model: ScoringModel,
        decoder: RecordDecoder,
        *,
        vectors: Floats,
        candidates: Floats | None,
        retrieval: Floats | None,
        reads: ItemReads,
        followers: tuple[NDArray[np.int32], Floats] | None,
        times: Floats | None,
        weights: Floats | None,
        num_gaps: int,
        num_pooled: int,
        counters: CounterScale | None,
    ) -> None:
        """
        Args:
            decoder: of the generation's records, whose rows have the model's width.
            vectors, candidates, retrieval, reads: tables of one number of rows, as of `EventRows` and `ScoringRequest`.
            followers: items and weights, as of `RecentItems`.
            times: [num_gaps, 5M] what the time since the newest event adds to candidates.
            weights: [V, actions] of events in sums over `reads.space`, by their action; None weighs all by 1.
            num_gaps: 0 if the model reads no times.
            num_pooled: newest events of the second pooled vector.
            counters: None if the model reads none.

        Raises:
            LibraryError: the library was built from other sources.
            ValueError: a table has a wrong shape, dtype or layout.
        """
        library = model._library
        library.vista_answering_layout.restype = c_int64
        if library.vista_answering_layout() != ctypes.sizeof(_Answering):
            raise LibraryError("the C++ library was built from other sources")
        self._call, self._width = library.vista_answer, model.tasks
        self._call.argtypes = [
            *(POINTER(_Answering), c_char_p, c_int64, c_char_p, c_char_p, c_int64, c_int32, c_void_p, c_int64),
            *(POINTER(_Request), c_void_p, c_int32, c_void_p, c_void_p, c_int32),
        ]
        given = _Request(users=1)
        tables = {"vectors": vectors, "candidates": candidates, "retrieval": retrieval}
        tables |= {"space": reads.space, "statistics": reads.statistics, "rates": reads.rates}
        for name, table in tables.items():
            if table is not None:
                if len(table) != len(vectors):
                    raise ValueError(f"{name}: must have {len(vectors)} rows, got {len(table)}")
                setattr(given, name, model._table(table, name))
        if weights is not None and len(weights) != len(vectors):
            raise ValueError(f"weights: must have {len(vectors)} rows, got {len(weights)}")
        if followers is not None:
            given.follower_items = _address(followers[0])
            given.follower_weights = model._table(followers[1], "followers")
        scale = (
            None if counters is None else (counters.levels, counters.resolution, counters.factor, counters.half_lives)
        )
        keys = () if counters is None else tuple(np.ascontiguousarray(one, np.int32) for one in counters.keys)
        addresses = [None] * 4 if scale is None else [_address(part) for part in scale]
        self._answering = _Answering(
            model._handle,
            ctypes.addressof(decoder._layout),
            ctypes.pointer(given),
            len(vectors),
            _address(times),
            _address(weights),
            0 if weights is None else weights.shape[1],
            num_gaps,
            num_pooled,
            0 if counters is None else 1 + len(keys),
            0 if counters is None else counters.levels.shape[1],
            0 if counters is None else len(counters.half_lives),
            counters is not None and counters.has_time,
            *addresses,
            *((1.0, 1.0) if counters is None else counters.of_events),
            _pointers(keys),
        )
        self._model = model
        self._held = decoder, tables, followers, times, weights, scale, keys
        self._reference = ctypes.byref(self._answering)

    def score(
        self,
        record: bytes,
        checksum: bytes,
        key_hash: bytes,
        now: int | None,
        rows: Ints,
        features: PairFeatureRows | None,
        adapter: Floats | None,
        *,
        logits: bool,
        scores: bool,
        threads: int,
    ) -> ScoredPairs | None:
        """Probabilities of all tasks, and scores of the retrieval head; None if the record is not accepted, or an index
        lies outside its table.

        Args:
            record: as stored.
            checksum: XXH3 of the record with zeros for its checksum, big-endian; key_hash: of the user's key.
            now: ms; None if unknown.
            rows: int64 [C], contiguous.
            features: of the one user, as of `ScoringRequest`; scores do not read them.
            adapter: as of `ScoringRequest`.
        """
        count = len(rows)
        made = ScoredPairs(
            np.empty((count, self._width), np.float32) if logits else None,
            np.empty(count, np.float32) if scores else None,
            None,
        )
        asked = None
        if features is not None and logits:
            asked = _Request()
            self._model._give_features(asked, features, 1)
        status = self._call(
            self._reference,
            record,
            len(record),
            checksum,
            key_hash,
            now or 0,
            now is not None,
            _address(rows),
            count,
            asked,
            _address(adapter),
            1,
            _address(made.logits),
            _address(made.scores),
            threads,
        )
        return None if status else made
