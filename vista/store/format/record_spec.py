"""The layout of a record's header, and what all records of a generation share (docs/reference/file-formats.md)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from vista.config.choices import Codec
from vista.store.format.authentication import CODE_BYTES
from vista.store.format.codecs import row_bytes
from vista.store.format.counter_layout import CounterLayout
from vista.store.format.tail_column import TailColumn
from vista.store.format.user_column import UserColumn

MAX_RECORD_BYTES = 1 << 24
"""Largest record, header included. Larger ones are refused when written, and when read before anything is decoded."""

MAGIC = b"VSUM"
FORMAT_VERSION = 3
HEADER_BYTES = 128
CHECKSUM_OFFSET = 120
AUTHENTICATED = 1
"""Bit of the flags: the record ends with an authentication code."""
SHORT_TIMES = 2
"""Bit of the flags: the times of the tail are uint32, ms before `last_event_ts`. Only in records with counters."""

HEADER = np.dtype(
    [
        ("magic", "S4"),
        ("format_version", "<u2"),
        ("header_length", "<u2"),
        ("flags", "<u4"),
        ("codec", "<u2"),
        ("tokens", "<u2"),
        ("dim", "<u2"),
        ("scale_dtype", "<u2"),
        ("payload_length", "<u4"),
        ("generation", "<u8"),
        ("summarizer_id", "u1", (32,)),
        ("key_hash", "<u8"),
        ("created_at", "<i8"),
        ("last_event_ts", "<i8"),
        ("event_count", "<i8"),
        ("applied_segment", "<u8"),
        ("history_digest", "<u8"),
        ("tail_length", "<u4"),
        ("counters_length", "<u4"),
        ("checksum", "<u8"),
    ]
)
assert HEADER.itemsize == HEADER_BYTES


@dataclass(frozen=True, slots=True)
class RecordSpec:
    """What all records of one generation share."""

    summarizer_id: bytes
    """SHA-256, 32 bytes."""
    generation: int
    num_tokens: int
    """K; 0 if stage 1 is off."""
    dim: int
    codec: Codec
    created_at: int = 0
    """Start of the refresh in ms; a resumed refresh keeps it. Written, not checked."""
    applied_segment: int = 0
    """Newest segment of the log that the records cover. Written, not checked."""
    counters: CounterLayout | None = None
    """How counters are stored; None if records have no counters."""
    user_columns: tuple[UserColumn, ...] = ()
    """Features of the user."""
    tail_columns: tuple[TailColumn, ...] = ()
    """Features of the tail's events."""
    key: bytes | None = field(default=None, repr=False)
    """32 bytes: records end with a code that only holders of the key can make (`vista.store.format.authentication`)."""

    def __post_init__(self) -> None:
        if len(self.summarizer_id) != 32:
            raise ValueError(f"summarizer_id must be 32 bytes (SHA-256), got {len(self.summarizer_id)}")
        if not 0 <= self.num_tokens < 1 << 16 or not 1 <= self.dim < 1 << 16:
            raise ValueError(
                f"num_tokens must lie in [0, 65535] and dim in [1, 65535], got {self.num_tokens} and {self.dim}"
            )
        if HEADER_BYTES + self.rows_bytes + self.user_bytes + self.code_bytes > MAX_RECORD_BYTES:
            raise ValueError(
                f"{self.num_tokens} rows of {self.row_bytes} bytes do not fit a record of {MAX_RECORD_BYTES} bytes; "
                "use fewer tokens, a smaller dim or a smaller codec"
            )

    @property
    def row_bytes(self) -> int:
        """Bytes of one summary row."""
        return row_bytes(self.codec, self.dim)

    @property
    def rows_bytes(self) -> int:
        """R: bytes of all rows of one user."""
        return self.num_tokens * self.row_bytes

    @property
    def user_bytes(self) -> int:
        """Bytes of the features of one user."""
        return sum(column.dtype.itemsize for column in self.user_columns)

    @property
    def code_bytes(self) -> int:
        """Bytes of the authentication code: 16 with a key, 0 without."""
        return 0 if self.key is None else CODE_BYTES
