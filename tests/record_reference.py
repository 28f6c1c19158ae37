"""The record's format as a program: a plain NumPy decoder, which shares but the header's fields with the fast path."""

from __future__ import annotations

from typing import Any

import numpy as np

from vista.store.format.record import HEADER


def decode_record_reference(record: bytes) -> dict[str, Any]:
    """Plain NumPy decoder of one record, sharing nothing with the fast path: the format's executable description.

    Returns:
        Every header field by name, `summary` [K, d] float32, and `items`, `times`, `actions` of the tail. Checksum and
        lengths are not checked.
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
    for name, dtype in (("items", "<i4"), ("times", "<i8"), ("actions", "u1")):
        fields[name] = np.frombuffer(record, dtype, length, position)
        position += np.dtype(dtype).itemsize * length
    return fields
