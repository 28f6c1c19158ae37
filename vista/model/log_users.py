"""Features of a log's users, as a model reads them."""

from __future__ import annotations

import numpy as np

from vista.arrays import Float32s, Int
from vista.examples.batch_source import EncodeRows
from vista.log.event_log import EventLog
from vista.log.histories import RowFeatures
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
        """Of all users, and of an unknown one in the last row."""
        if reader is not None:
            features = log.user_features
            known = reader.recoder(features.values)(features.rows, log.num_users).columns
            missing = RowFeatures.missing(reader.values, 1).columns
            self._rows = RowFeatures({name: np.concatenate([known[name], missing[name]]) for name in known})

    def features(self, users: Int) -> RowFeatures:
        """Features of users int64 [B] (rows of the log, or -1 for an unknown user); no columns for a model that reads
        none."""
        return self._rows.select(users)

    def encoded(self, users: Int) -> EncodedRows | None:
        """What the model's encoder reads of users, as in `features`; None for a model that reads none."""
        return None if self._reader is None else self._reader.encode(self._rows.select(users), len(users))

    def encoding(self) -> EncodeRows | None:
        """What training reads of users and, in a last row, of an unknown user; None for a model that reads none."""
        if self._reader is None:
            return None
        reader = self._reader

        def encode(users: Int) -> tuple[Int, Float32s]:
            with_unknown = np.append(users, -1)
            encoded = reader.encode(self._rows.select(with_unknown), len(with_unknown))
            return encoded.entry, encoded.dense

        return encode
