"""What features of requests add to candidates. N requests or pairs, M model dim, R rows of the encoder."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vista.model import inference
from vista.model.features import EncodedRows
from vista.model.inference import ROW_TILE
from vista.model.vista_model import VistaModel

MAX_PREPARED_ROWS = 1 << 14
"""At M = 256, a table of so many rows takes 84 MB."""


class RequestProjections:
    """Computes what features of requests add to the rows of `ItemProjections.candidate`.

    Encoder and projection are linear, so each value is projected once per model, and a request only adds up rows.
    """

    def __init__(self, model: VistaModel) -> None:
        """
        Args:
            model: reads features of requests; its weights no longer change.
        """
        assert model.request_encoder is not None
        self._model = model
        values, dense = model.request_encoder.values, model.request_encoder.dense
        rows = values if dense is None else torch.cat([values, dense])
        self._dense_rows = np.arange(len(values), len(rows))
        self._table = self._projected(rows) if len(rows) <= MAX_PREPARED_ROWS else None
        """[R, 5M] of each value, then of each dense input; None if the encoder has too many."""

    @torch.inference_mode()
    def of(self, features: EncodedRows | None, count: int) -> Tensor:
        """[N, 5M] float32. The bits of a row do not depend on the others.

        Args:
            features: None if all are missing.
            count: N.
        """
        if features is None:
            assert self._model.request_features is not None
            features = self._model.request_features.missing(count)
        if self._table is None:
            tiles = np.arange(-(-count // ROW_TILE) * ROW_TILE) % max(count, 1)  # repeated rows fill the last one
            vectors = inference.request_feature_vectors(self._model, features.select(tiles), len(tiles))
            assert vectors is not None
            return self._projected(vectors)[:count]
        row = np.concatenate([features.entry, np.broadcast_to(self._dense_rows, features.dense.shape)], 1)
        weight = np.concatenate([np.ones(features.entry.shape, np.float32), features.dense], 1)
        row_, weight_ = torch.from_numpy(row).to(self._table.device), torch.from_numpy(weight).to(self._table.device)
        return F.embedding_bag(row_, self._table, mode="sum", per_sample_weights=weight_)

    def _projected(self, vectors: Tensor) -> Tensor:
        """[N, 5M] vectors [N, M], and their projections in the first layer of stage 2."""
        return torch.cat([vectors, self._model.target_attention.request_projection(vectors)], -1)
