"""The counters of a few users as tensors, and which candidates they hold.

Letters: B users, S slots per user, C candidates, F values per key, V items, M' width of retrieval vectors, n pairs of
user and candidate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vista.model.inference import ROW_TILE
from vista.model.ranking_model import RankingModel
from vista.scorer.request_counters import RequestCounters

NO_KEY = 1 << 40
"""Fills slots without an item; larger than all model rows, so that keys ascend."""


@dataclass(frozen=True, slots=True)
class CounterSlots:
    """Counters of B users, padded to S slots each, at least one tile of `ROW_TILE`."""

    key: Tensor
    """int64 [B, S] model rows, ascending; NO_KEY in empty slots."""
    codes: Tensor
    """uint8 [B, S, F]; 0 in empty slots."""
    num_events: Tensor
    """int64 [B]."""

    @classmethod
    def of(cls, counters: RequestCounters, device: torch.device) -> CounterSlots:
        """The counters of a request."""
        key, codes = (torch.from_numpy(part) for part in counters.codes.padded())
        missing = -key.shape[1] % ROW_TILE if key.shape[1] else ROW_TILE
        key = F.pad(key.masked_fill(key < 0, NO_KEY), (0, missing), value=NO_KEY)
        codes = F.pad(codes, (0, 0, 0, missing))
        return cls(key.to(device), codes.to(device), torch.from_numpy(counters.num_events).to(device))

    @torch.inference_mode()
    def logits(self, model: RankingModel, items: Tensor, users: Tensor) -> Tensor:
        """Scores float32 [B, S] of the slots' items for the task `next`; undefined in empty slots.

        Args:
            model: scores counted items.
            items: [1 + V, M'] retrieval vectors.
            users: [B, M'] user vectors.
        """
        assert model.counted is not None
        row = self.key.masked_fill(self.key == NO_KEY, 0)
        vectors = items.index_select(0, row.flatten()).view(*row.shape, -1)
        # One product per user, because the bits of a joint product depend on the number of users.
        products = [torch.mv(own, user) for own, user in zip(vectors, users, strict=True)]
        score = torch.stack(products) / model.config.temperature
        logits: Tensor = model.counted(self.codes, score, model.item_popularity[row], self.num_events, users)
        return logits

    def of_items(self, rows: Tensor) -> Tensor:
        """Codes uint8 [C, F] of candidates int64 [C] for the first user; 0 if they are not counted."""
        _, column, slot = self.find(slice(0, 1), rows, slice(0, len(rows)))
        codes = self.codes.new_zeros(len(rows), self.codes.shape[-1])
        codes[column] = self.codes[0, slot]
        return codes

    def find(self, users: slice, rows: Tensor | None, columns: slice) -> tuple[Tensor, Tensor, Tensor]:
        """The counted candidates in a rectangle of users and columns: user and column within it, and slot, int64 [n].

        Args:
            users: some of the B users.
            rows: int64 model rows of the candidates, [C] or [B, C]; None for the rows 0 to V.
            columns: some of the candidates.
        """
        key = self.key[users]
        if rows is None:
            user, slot = ((key >= columns.start) & (key < columns.stop)).nonzero(as_tuple=True)
            return user, key[user, slot] - columns.start, slot
        row = (rows[columns].expand(len(key), -1) if rows.ndim == 1 else rows[users, columns]).to(key.device)
        place = torch.searchsorted(key, row.contiguous()).clamp(max=key.shape[1] - 1)
        user, column = (key.gather(1, place) == row).nonzero(as_tuple=True)
        return user, column, place[user, column]
