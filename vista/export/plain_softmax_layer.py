"""The softmax layer of stage 2 in operators that can be exported, instead of vista_kernels.

Letters: B rows, Q query tokens, S seeds, L tail length, H heads, D head dim, M model dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vista.model.target_attention import TargetAttention
from vista.model.target_layers import MASKED, SoftmaxLayer


class PlainSoftmaxLayer(SoftmaxLayer):
    """A `SoftmaxLayer` whose queries attend to the context and to themselves in one softmax over both."""

    def attend_query(
        self, x: Tensor, own: Sequence[Tensor], key: Tensor, value: Tensor, bias: Tensor, context_mask: Tensor
    ) -> Tensor:
        query, gate, own_key, own_value = own
        query, own_key, own_value = self.heads(query), self.heads(own_key), self.heads(own_value)
        scale = self.head_dim**-0.5
        scores = query @ key.transpose(-1, -2) * scale + bias + torch.where(context_mask, 0.0, MASKED)[:, None, None]
        own_score = (query * own_key).sum(-1, keepdim=True) * scale + self.bias[:, :1, None]
        share = torch.cat([scores, own_score], -1).softmax(-1)
        heads = share[..., :-1] @ value + share[..., -1:] * own_value
        return self.mix(x, heads, gate)


def use_plain_layers(stage: TargetAttention) -> None:
    """Let the softmax layers of a copied stage 2 compute in plain operators, with the same weights."""
    for layer in stage.layers:
        if type(layer) is SoftmaxLayer:
            layer.__class__ = PlainSoftmaxLayer
