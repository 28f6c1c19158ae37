"""How a refresh from Python runs; the command line has the same keys in `RefreshConfig`."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, fields

from vista.config.checks import check_types, require, require_counts
from vista.config.choices import Codec, Precision, StateDtype


@dataclass(kw_only=True, slots=True)
class RefreshOptions:
    """What a refresh writes and how it batches its work. Choices may be given as words, such as codec="float32"."""

    codec: Codec = Codec.int8
    """How summary rows are stored."""
    state: StateDtype = StateDtype.float32
    """How states are stored for incremental refreshes."""
    precision: Precision = Precision.float32
    """Precision of matrix products; `auto` is bfloat16 where the device multiplies it natively."""
    shared_with_group: bool = False
    """Let the group of the store's folder read the store."""
    tokens_per_batch: int = 65_536
    """Events summarized at once (a longer history forms a batch of its own)."""
    users_per_batch: int = 512
    """Users per durable transaction."""
    progress: bool = False
    """Show a progress bar."""

    def __post_init__(self) -> None:
        check_types(self)
        require_counts(self, "", ("tokens_per_batch", "users_per_batch"))

    def require_only(self, names: Container[str], reason: str) -> None:
        """Raise ConfigError with `reason` if an option outside of `names` differs from its default."""
        for option in fields(self):
            changed = getattr(self, option.name) != option.default
            require(option.name in names or not changed, f"options.{option.name}", reason)
