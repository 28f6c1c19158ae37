"""The mean token: the first summary token as a mean over the history's events, in the space of item vectors.

A user's next items are often like the items of the whole history. Seeds can learn to read such a mean, but through
keys, queries, a gate, and a feed-forward block, which takes many training steps. So one key per head is constant, and
the state of layer 1 then holds the sum of the values of all events:

    phi(k_0) = 1,  Z[0] = sum_i v_i,  token = W Z[0] / n

Before training, W Z[0] / n is the mean of the normalized events that the summary covers. Training changes W and the
values. With decay, older events weigh less, and with tail_in_summary=false, the mean lacks the tail. The sum is a part
of the state like any other: it can be appended to, decayed, and forgotten. Letters: T packed events,
N histories, H heads, D head dim, M model dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vista.config import ModelConfig
from vista.config.choices import Activation

_KEY_OF_1 = {Activation.silu: 1.2784645427610738, Activation.relu: 1.0, Activation.identity: 1.0}
"""The key k with phi(k) = 1."""


class MeanToken(nn.Module):
    """Reads the mean of the values of layer 1. At first it undoes their projection, so that it is a mean of events."""

    def __init__(self, key_value: nn.Linear, config: ModelConfig) -> None:
        """
        Args:
            key_value: projection of layer 1 to keys and values, in this order. Its values become a rotation.
            config: of the model.
        """
        super().__init__()
        self._key = _KEY_OF_1[config.activation]
        self.output = nn.Linear(config.dim, config.dim, bias=False)
        values = key_value.weight.data[config.dim :]
        nn.init.orthogonal_(values)
        self.output.weight.data.copy_(values.t())

    def keys(self, key: Tensor) -> Tensor:
        """Keys [T, H, D] with a constant in the place of their first entry."""
        return torch.cat([torch.full_like(key[..., :1], self._key), key[..., 1:]], -1)

    def forward(self, z: Tensor, n: Tensor) -> Tensor:
        """Means [N, M]; 0 for an empty history.

        Args:
            z: [N, H, D, D] states of layer 1.
            n: [N, H] weight sums.
        """
        total = z[:, :, 0]
        # The weights of decayed events may sum to almost 0, and then so do their weighted values.
        mean = torch.where(n.unsqueeze(-1) > 0, total / n.clamp(min=torch.finfo(n.dtype).tiny).unsqueeze(-1), 0.0)
        token: Tensor = self.output(mean.flatten(1))
        return token
