"""The codes of a category in all parts of a table, and the rows of their values in the log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vista.installation import require_module
from vista.log.ingest.category_encoder import VALUE, too_many_values
from vista.log.ingest.parts import Part
from vista.log.segment_row_features import code_type
from vista.log.vocabulary import Vocabulary

if TYPE_CHECKING:
    import polars as pl
else:
    pl = require_module("polars", "data")


@dataclass(frozen=True, slots=True)
class PartCodes:
    """The codes of all parts, end to end.

    offsets: by the file of a part, where its codes begin; row_of_code: the row of each code in the values of the log,
    and at the end -1, for rows without a value.
    """

    offsets: Mapping[Path, int]
    row_of_code: NDArray[np.signedinteger[Any]]

    @classmethod
    def of(cls, table: str, parts: Sequence[Part], name: str, known: Vocabulary) -> tuple[PartCodes, Vocabulary]:
        """The codes of a column, and the values of the log with those of the parts: new ones are added part by part.

        Args:
            table: events | impressions, for the error.
            known: the values of the log without those of the parts.

        Raises:
            DataError: if there are too many.
        """
        column, end = f"category:{name}", 0
        offsets, rows_of_parts = {}, []
        for part in parts:
            values = pl.read_ipc(part.values[column])[VALUE]
            offsets[part.file], end = end, end + len(values)
            used = pl.arange(len(values), eager=True)
            if part.num_bad or part.is_filtered:  # other rows had values too
                used = part.good().select(pl.col(column).drop_nulls().unique()).collect(engine="streaming").to_series()
            limit = part.source.max_values
            if len(used) <= limit:
                texts = values.gather(used).fill_null("").to_list()
                known = known.extended([text for text in texts if text])
            if max(len(used), len(known)) > limit:
                raise too_many_values(part.source, table, name, f"{max(len(used), len(known)):,}")
            rows = np.full(len(values), -1, np.int32)
            rows[used.to_numpy()] = known.rows(texts)  # -1 for "", which is missing
            rows_of_parts.append(rows)
        rows_of_parts.append(np.array([-1], np.int32))
        return cls(offsets, np.concatenate(rows_of_parts).astype(code_type(len(known)))), known

    def of_part(self, name: str, part: Part) -> pl.Expr:
        """The codes of the rows of a part, and the last one where they have no value."""
        last = len(self.row_of_code) - 1
        codes = (pl.col(f"category:{name}") + self.offsets[part.file]).fill_null(last)
        # A narrow column is joined and sorted faster.
        return codes.cast(pl.UInt8 if last < 1 << 8 else pl.UInt16 if last < 1 << 16 else pl.UInt32)
