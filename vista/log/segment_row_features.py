"""The features of events or impressions that one segment has. NumPy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.errors import LogFormatError
from vista.log.row_features import ColumnValues
from vista.log.segment_files import SegmentFiles
from vista.log.segment_manifest import REMEDY
from vista.log.vocabulary import Vocabulary

CODE_TYPES = (np.int8, np.int16, np.int32)
"""Types in which codes are stored."""


@dataclass(frozen=True, slots=True)
class SegmentRowFeatures:
    """Features of the N rows of a segment's table.

    columns: by name, [N] float32 numbers, or codes of one of `CODE_TYPES`; new_values: with the same names, the values
    that the segment adds to a category, whose codes continue those of earlier segments; None for a number.
    """

    columns: Mapping[str, NDArray[Any]]
    new_values: ColumnValues

    @classmethod
    def read(
        cls, folder: Path, files: SegmentFiles, prefix: str, columns: Sequence[Mapping[str, str]], num_rows: int
    ) -> SegmentRowFeatures:
        """The features of a table.

        Args:
            folder: the segment, for errors.
            prefix: where the files are, such as "event_features/".
            columns: the names and kinds in the manifest.
            num_rows: of the table.

        Raises:
            LogFormatError: if a file is missing, or does not match the table or the manifest.
        """
        values: dict[str, Vocabulary | None] = {}
        read: dict[str, NDArray[Any]] = {}
        for number, column in enumerate(columns):
            name, place = column["name"], f"{prefix}{number}"
            if column["kind"] == "number":
                values[name], read[name] = None, files.array(f"{place}.numbers.npy", np.float32)
            else:
                values[name] = files.vocabulary(f"{place}.values", "str")
                read[name] = files.array(f"{place}.codes.npy", files.type_of(f"{place}.codes.npy", CODE_TYPES))
            if len(read[name]) != num_rows:
                raise LogFormatError(
                    f"{folder / prefix}: column {number} ({name!r}) has {len(read[name])} rows, but its table has "
                    f"{num_rows}; {REMEDY}"
                )
        if len(read) < len(columns):
            raise LogFormatError(f"{folder}: column names of {prefix[:-1]} must be unique; {REMEDY}")
        return cls(read, values)


def code_type(num_values: int) -> type[np.signedinteger[Any]]:
    """The smallest type for the codes of `num_values` values, and for -1."""
    return next(dtype for dtype in CODE_TYPES if num_values <= np.iinfo(dtype).max + 1)
