"""How a refresh runs, from Python and from the command line."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, fields

from vista.config.checks import check_types, require, require_counts
from vista.config.choices import Codec, Precision, StateDtype

INCREMENTAL_OPTIONS = ("tokens_per_batch", "users_per_batch", "verify_log", "progress")
"""The options that an incremental refresh can choose."""
SET_BY_FULL_REFRESH = "was set by the store's full refresh; leave it out"


@dataclass(kw_only=True, slots=True)
class RefreshOptions:
    """What a refresh writes and how it batches its work. Choices may be given as words, such as codec="float32"."""

    codec: Codec = Codec.int8
    """How the values of a summary are stored: float32, float16, or as quantized rows of 8 bits (int8) or 4 bits
    (int4)."""
    state: StateDtype | None = None
    """How states are stored for incremental refreshes: float32, float16, or none. null stores them as float32 in a
    folder if the model and `until` permit, and not at all on a server, whose memory they would fill."""
    precision: Precision = Precision.float32
    """Precision of matrix products. bfloat16 is faster on devices that support it, and changes summaries by about
    0.3 %. auto uses bfloat16 where the device multiplies it fast."""
    shared_with_group: bool = False
    """Let the group of the store's folder read the store (folders 2750, files 0640), not only this account."""
    tokens_per_batch: int = 65_536
    """Number of events that are read and summarized at once. A longer history forms a batch of its own."""
    users_per_batch: int = 512
    """Number of users per durable transaction."""
    verify_log: bool = True
    """Check first that no byte of the log's files has changed since it was written: of all files, or of the new
    segments in an incremental refresh."""
    progress: bool = False
    """Show a progress bar."""

    def __post_init__(self) -> None:
        check_types(self)
        require_counts(self, "", ("tokens_per_batch", "users_per_batch"))

    def require_only(self, names: Container[str], reason: str, *, prefix: str = "options.") -> None:
        """Raise ConfigError with `reason` if an option outside of `names` differs from its default."""
        for option in fields(RefreshOptions):
            changed = getattr(self, option.name) != option.default
            require(option.name in names or not changed, f"{prefix}{option.name}", reason)
