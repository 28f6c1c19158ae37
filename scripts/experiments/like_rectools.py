"""Our SASRec with RecTools' choices, so that a cross-check compares the two harnesses instead of the two models.

- Parameters with two or more dimensions start by Xavier's normal rule, the biases of attention at 0.
- Positions count from the newest input.
- Dropout is on the attention weights, not on the output of attention.
- A user's first event is only an input, not a label.

It supports only next items, on whole histories; crosscheck_rectools.py cuts the log beforehand.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vista.config import DataConfig, ModelConfig
from vista.log.vocabulary import Vocabulary
from vista.model.baselines.history_model import PaddedTile
from vista.model.baselines.sequence_models import EmbeddedSequences, SASRec, SASRecBlock
from vista.model.features import Schema
from vista.model.layers import module_list, split_heads
from vista.model.ranking_model import UNKNOWN_ITEM


class LikeRecTools(SASRec):
    """SASRec as RecTools initializes and trains it."""

    def __init__(self, config: ModelConfig, schema: Schema, items: Vocabulary, data: DataConfig) -> None:
        super().__init__(config, schema, items, data)
        self.blocks = module_list([_Block(config) for _ in range(config.num_layers)])
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_normal_(parameter)
        with torch.no_grad():
            self.item_table[UNKNOWN_ITEM] = 0.0

    def _labeled(self, tile: PaddedTile) -> Tensor:
        labeled = tile.valid.clone()
        labeled[:, 0] = False
        return labeled

    def _encode(self, events: EmbeddedSequences, tile: PaddedTile) -> tuple[Tensor, None]:
        index = tile.index[:, : self.config.history_limit]
        n, length = index.shape
        start = self.start.expand(n, 1, -1)
        if length == 0:
            return start, None
        inputs = tile.valid.sum(1, keepdim=True) - int(self.training)  # in training the newest event is only a label
        place = (inputs - 1 - torch.arange(length)).clamp(0, self.config.history_limit - 1)
        x = self.dropout(events.vectors[index] * self.config.dim**0.5 + self.position[place])
        states, _ = self.states(x, events.time[index])
        return torch.cat([start.to(states.dtype), states], 1), None


class _Block(SASRecBlock):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        for linear in (self.query, self.key_value, self.out):
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [n, L, M] -> [n, L, M]."""
        h = self.attention_norm(x)
        key, value = self.key_value(x).chunk(2, -1)
        query, key, value = (split_heads(each, self.num_heads).transpose(1, 2) for each in (self.query(h), key, value))
        future = torch.full((x.shape[1], x.shape[1]), -torch.inf).triu_(1)
        weight = torch.softmax(query @ key.transpose(2, 3) * query.shape[3] ** -0.5 + future, -1)
        mixed = (self.dropout(weight) @ value).transpose(1, 2).flatten(2)
        h = self.network_norm(h + self.out(mixed))
        update: Tensor = self.dropout(self.down(self.dropout(F.relu(self.up(h)))))
        out: Tensor = h + update
        return out
