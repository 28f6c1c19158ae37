"""Features of a log's users, as a model reads them."""

from __future__ import annotations

import numpy as np

from vista.arrays import Float32s, Int
from vista.examples.batch_source import EncodeRows
from vista.log.event_log import EventLog
from vista.log.row_features import RowFeatures
from vista.model.row_feature_reader import EncodedRows, RowFeatureReader


class LogUsers:
    """All users of a log, with the codes of a model."""

    def __init__(self, reader: RowFeatureReader | None, log: EventLog) -> None:
        """
        Args:
            reader: of the model; None if it reads no features of users.
        """
        self._reader = reader
        self._rows = RowFeatures({})
        if reader is not None:
            known = log.user_features
            self._rows = reader.recoded(known.rows, reader.codes_of(known.values), log.num_users)

    def features(self, users: Int) -> RowFeatures:
        """Features of users int64 [B] (rows of the log); no columns for a model that reads none."""
        return self._rows.select(users)

    def encoding(self) -> EncodeRows | None:
        """What training reads of users and, in a last row, of an unknown user; None for a model that reads none."""
        if self._reader is None:
            return None
        reader, missing = self._reader, self._reader.missing(1)

        def encode(users: Int) -> tuple[Int, Float32s]:
            known = reader.encode(self._rows.select(users), len(users))
            return np.concatenate([known.entry, missing.entry]), np.concatenate([known.dense, missing.dense])

        return encode

    def encoded(self, users: Int) -> EncodedRows | None:
        """What the model's encoder reads of users int64 [B]; None for a model that reads none."""
        return None if self._reader is None else self._reader.encode(self._rows.select(users), len(users))
