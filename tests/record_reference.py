"""The format of records as a program: a plain NumPy decoder that shares only the header's dtype with the fast path."""

from __future__ import annotations

from typing import Any

import numpy as np

from vista.config.checks import Codec
from vista.store.record import HEADER, CounterLayout


def decode_record_reference(
    record: bytes, counters: CounterLayout | None = None, features: dict[str, str] | None = None
) -> dict[str, Any]:
    """Decode one record; the checksum and lengths are not checked.

    Args:
        record: the stored value.
        counters: how the record's counters are stored.
        features: by name of a column of the tail's features, the dtype in the record.

    Returns:
        Every header field by name; `summary` [K, d] float32; `items`, `times`, `actions` of the tail, and its
        features, as stored; and `counters`, a dict from keys to lists of codes for each field.
    """
    header = np.frombuffer(record, dtype=HEADER, count=1)[0]
    fields: dict[str, Any] = {name: header[name].item() for name in HEADER.names or () if name != "summarizer_id"}
    fields["summarizer_id"] = header["summarizer_id"].tobytes()
    tokens, dim, length = fields["tokens"], fields["dim"], fields["tail_length"]
    position = fields["header_length"]
    summary = np.empty((tokens, dim), dtype=np.float32)
    for token in range(tokens):
        if fields["codec"] in (0, 2):
            dtype = "<f2" if fields["codec"] else "<f4"
            summary[token] = np.frombuffer(record, dtype, dim, position)
            position += np.dtype(dtype).itemsize * dim
        elif fields["codec"] == 3:
            pairs = np.frombuffer(record, np.uint8, (dim + 1) // 2, position)
            values = np.array([pairs[place // 2] >> 4 * (place % 2) & 15 for place in range(dim)])
            scale, bias = np.frombuffer(record, "<f2", 2, position + len(pairs)).astype(np.float64)
            summary[token] = values * scale + bias
            position += len(pairs) + 4
        else:
            values = np.frombuffer(record, np.uint8, dim, position)
            scale, bias = np.frombuffer(record, "<f4", 2, position + dim).astype(np.float64)
            summary[token] = values * scale + bias  # The float64 product is exact: one rounding, to float32.
            position += dim + 8
    fields["summary"] = summary
    fields["counters"] = []
    for key_bytes in counters.key_bytes if counters else ():
        size, position = int.from_bytes(record[position : position + 2], "little"), position + 2
        held = {}
        for _ in range(size):
            key, position = int.from_bytes(record[position : position + key_bytes], "little"), position + key_bytes
            bits = int.from_bytes(record[position : position + counters.code_bytes], "little")
            held[key] = [bits >> 6 * column & 63 for column in range(counters.spec.num_columns)]
            position += counters.code_bytes
        fields["counters"].append(held)
    short_times = fields["flags"] & 2
    columns = {"items": "<i4", "times": "<u4" if short_times else "<i8", "actions": "u1"} | (features or {})
    for name, dtype in columns.items():
        fields[name] = np.frombuffer(record, dtype, length, position)
        position += np.dtype(dtype).itemsize * length
    if short_times:
        fields["times"] = fields["last_event_ts"] - fields["times"].astype(np.int64)
    return fields


def error_bound(codec: Codec, rows: np.ndarray) -> np.ndarray:
    """Largest error for rows [..., d] that docs/reference/file-formats.md allows."""
    rows = rows.astype(np.float64)
    least, span = np.abs(rows.min(axis=-1, keepdims=True)), np.ptp(rows, axis=-1, keepdims=True)
    match codec:
        case Codec.float32:
            return np.zeros_like(rows)
        case Codec.float16:
            return np.abs(rows) * 2.0**-11 + 2.0**-25
        case Codec.int8:
            return span / 510 + np.abs(rows).max(axis=-1, keepdims=True) * 1e-6 + 1e-8
        case Codec.int4:
            return np.broadcast_to(span / 30 * 1.001 + least / 1900 + 2.0**-20, rows.shape)
