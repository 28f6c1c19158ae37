"""Writing of the features of a segment's events or impressions."""

from __future__ import annotations

from types import MappingProxyType

import numpy as np

from vista.arrays import ArrayWriter
from vista.log.row_features import ColumnValues, RowFeatures
from vista.log.segment_row_features import code_type
from vista.log.segment_writer import SegmentWriter


class RowFeatureWriter:
    """Writes the features of a table's rows from blocks, in the order of the table.

    Args:
        segment: the segment with the table.
        prefix: folder of the files, EVENT_FEATURES or REQUEST_FEATURES.
        num_rows: total number of rows of all blocks.
        values: the columns to write, with all values that the log has together with this segment.
        before: the values that the log has without this segment: a category of `values` must begin with these.
    """

    def __init__(
        self,
        segment: SegmentWriter,
        prefix: str,
        num_rows: int,
        values: ColumnValues,
        before: ColumnValues = MappingProxyType({}),
    ) -> None:
        self.columns: list[dict[str, str]] = []
        """What the manifest says about the columns."""
        self._writers: dict[str, ArrayWriter] = {}
        if values:
            (segment.folder / prefix).mkdir()
        for number, (name, known) in enumerate(values.items()):
            self.columns.append({"name": name, "kind": "number" if known is None else "category"})
            if known is None:
                self._writers[name] = segment.array(f"{prefix}{number}.numbers.npy", np.float32, (num_rows,))
                continue
            old = before.get(name)
            segment.save_vocabulary(f"{prefix}{number}.values", known.part(0 if old is None else len(old)))
            self._writers[name] = segment.array(f"{prefix}{number}.codes.npy", code_type(len(known)), (num_rows,))

    def append(self, block: RowFeatures) -> None:
        """Add the next rows."""
        for name, writer in self._writers.items():
            writer.append(block.columns[name])

    def close(self) -> None:
        """Finish the files."""
        for writer in self._writers.values():
            writer.close()
