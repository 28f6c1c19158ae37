"""How the counters of a generation's users are stored: what is counted, and how many bytes a key has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vista.counters.counter_codes import CODE_BITS, CounterSpec
from vista.json_fields import TABLE, check_fields, list_of, whole

MAX_KEY_BYTES = 4


@dataclass(frozen=True, slots=True)
class CounterLayout:
    """What the counters sections of all records of one generation share."""

    spec: CounterSpec
    key_bytes: tuple[int, ...]
    """Bytes per key of each field in a record."""

    def __post_init__(self) -> None:
        if len(self.key_bytes) != len(self.spec.fields) or not all(1 <= n <= MAX_KEY_BYTES for n in self.key_bytes):
            raise ValueError(
                f"key_bytes: expected 1 to {MAX_KEY_BYTES} for each of {', '.join(self.spec.fields)}, got "
                f"{self.key_bytes}"
            )

    @classmethod
    def of(cls, spec: CounterSpec, largest_keys: Sequence[int]) -> CounterLayout:
        """The smallest layout that holds the keys 1 to `largest_keys[f]` of each field f."""
        return cls(spec, tuple(max(1, -(-largest.bit_length() // 8)) for largest in largest_keys))

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes of one key in a record."""
        return -(-CODE_BITS * self.spec.num_columns // 8)

    def to_dict(self) -> dict[str, Any]:
        """The layout as JSON values, for manifests."""
        return {"spec": self.spec.to_dict(), "key_bytes": list(self.key_bytes)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> CounterLayout:
        """The inverse of `to_dict`.

        Raises:
            ValueError: a field is missing, unknown, or invalid; the message names it.
        """
        check_fields(fields, {"spec": TABLE, "key_bytes": list_of(whole(1, MAX_KEY_BYTES))})
        return cls(CounterSpec.from_dict(fields["spec"]), tuple(fields["key_bytes"]))
