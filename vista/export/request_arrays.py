"""The inputs of a graph for users whose records vista has read. B users, C candidates, T events, E keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int
from vista.export.serving_graph import COUNTER_CODES, COUNTER_KEYS, REQUEST, TAIL, USER, counted_names, graph_inputs
from vista.log.histories import NO_TIMESTAMP
from vista.model.vista_model import VistaModel
from vista.store.record import StoredBatch
from vista.store.record_spec import Tail

Arrays = dict[str, NDArray[Any]]


def request_arrays(
    model: VistaModel,
    stored: StoredBatch,
    tail: Tail,
    is_new: NDArray[np.bool_],
    now: Int | None,
    candidates: Int,
    request: Mapping[str, NDArray[Any]],
) -> Arrays:
    """Arrays by name, as `graph_inputs` lists them.

    Args:
        stored: records of B users.
        tail: stored tails, with new events merged into them.
        is_new: bool [T] its events that the records do not cover.
        now: int64 [B] ms, or None if unknown.
        candidates: int64 [B, C] model rows.
        request: features of the request by name, [B, C] with the model's codes.
    """
    num_users = len(stored.found)
    given: Arrays = {
        "candidates": candidates,
        "found": stored.found,
        "summary": stored.summary,
        "tail_lengths": np.diff(tail.offsets),
        "tail_items": _padded(tail.items, tail.offsets),
        "tail_actions": _padded(tail.actions, tail.offsets),
        "tail_times": _padded(tail.times, tail.offsets),
        "tail_is_new": _padded(is_new, tail.offsets),
        "now": np.full(num_users, NO_TIMESTAMP) if now is None else now,
        "event_count": stored.event_count,
        "last_event_ts": stored.last_event_ts,
    }
    most = max((int(np.diff(counters.offsets).max(initial=0)) for counters in stored.counters), default=0)
    for counters, field in zip(stored.counters, counted_names(model), strict=True):
        keys, codes = counters.padded(most)
        given |= {f"{COUNTER_KEYS}{field}": np.maximum(keys, 0), f"{COUNTER_CODES}{field}": codes}
    for prefix, columns in (
        (TAIL, {name: _padded(values, tail.offsets) for name, values in tail.features.items()}),
        (USER, stored.features),
        (REQUEST, request),
    ):
        given |= {f"{prefix}.{name}": values for name, values in columns.items()}
    inputs = graph_inputs(model)
    return {one.name: np.ascontiguousarray(given[one.name].astype(one.dtype)) for one in inputs}


def _padded(values: NDArray[Any], offsets: Int) -> NDArray[Any]:
    """Packed values [N] of B users as [B, T], with zeros after each user's own; T is the longest length."""
    lengths = np.diff(offsets)
    filled = np.arange(lengths.max(initial=0)) < lengths[:, None]
    padded = np.zeros(filled.shape, values.dtype)
    padded[filled] = values
    return padded
