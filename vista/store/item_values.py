"""What a generation knows of items: how popular they are and how often they get each label, as of its time.

A model has these numbers too, as of the end of its training. A refresh writes newer ones next to the records, and
scorers read those instead (docs/reference/file-formats.md, "Keys").

Letters: V1 = 1 + V model rows, Z statistics, T tasks.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import xxhash

from vista.arrays import Float32s
from vista.errors import StoreError
from vista.files import check_fields, either, hexadecimal, list_of, one_of, text, whole
from vista.store.folder_files import REMEDY
from vista.store.manifest import CHECKSUM_DIGITS

_RULES = {
    "vocabulary": hexadecimal(64),
    "rows": whole(1, 2**31),
    "statistics": whole(0, 255),
    "tasks": list_of(text()),
    "as_of": either(whole(-(2**63), 2**63 - 1), one_of(None)),
}


@dataclass(frozen=True, slots=True)
class ItemValues:
    """Values of all items of a vocabulary."""

    vocabulary: str
    """SHA-256 of the vocabulary in hex (`Vocabulary.digest`)."""
    statistics: Float32s
    """[V1, Z] as of `vista.examples.item_statistics`."""
    rates: Float32s
    """[V1, T] as of `vista.examples.item_spaces.ItemRates`."""
    tasks: list[str]
    """Names of the labels of the log; empty if rates would show labels that the generation must not know."""
    as_of: int | None
    """Time of the newest event, ms; None for a log without times."""

    def to_bytes(self) -> bytes:
        """The XXH3-64 of what follows, in hex, a line of JSON, and the two tables in little endian."""
        about = {
            "vocabulary": self.vocabulary,
            "rows": len(self.statistics),
            "statistics": self.statistics.shape[1],
            "tasks": self.tasks,
            "as_of": self.as_of,
        }
        tables = (np.ascontiguousarray(table, "<f4").tobytes() for table in (self.statistics, self.rates))
        content = b"\n".join((json.dumps(about, sort_keys=True).encode(), b"".join(tables)))
        return xxhash.xxh3_64_hexdigest(content).encode() + b"\n" + content

    @classmethod
    def from_bytes(cls, value: bytes, where: object) -> ItemValues:
        """Parse and check the bytes of `to_bytes`; `where` names the store in errors. Raises StoreError if they are
        damaged, or of another version of vista."""
        checksum, content = value[:CHECKSUM_DIGITS], value[CHECKSUM_DIGITS + 1 :]
        line, _, tables = content.partition(b"\n")
        try:
            if checksum != xxhash.xxh3_64_hexdigest(content).encode():
                raise ValueError("wrong checksum")
            about = json.loads(line)
            check_fields(about, _RULES)
            widths = about["statistics"], len(about["tasks"])
            numbers = np.frombuffer(tables, "<f4")
            if len(numbers) != about["rows"] * sum(widths) or not np.isfinite(numbers).all():
                raise ValueError(f"expected {about['rows']} rows of {sum(widths)} finite numbers")
        except ValueError as error:
            raise StoreError(f"{where}: the values of items are damaged ({error}); {REMEDY}") from error
        statistics, rates = np.split(numbers, [about["rows"] * widths[0]])
        shape, of_rates = (about["rows"], widths[0]), (about["rows"], widths[1])
        return cls(
            about["vocabulary"], statistics.reshape(shape), rates.reshape(of_rates), about["tasks"], about["as_of"]
        )
