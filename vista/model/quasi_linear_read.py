"""Query tokens read the state of stage 1 by quasi-linear attention, as targets of the history (VISTA).

    A = phi(Z c)                          per layer of stage 1 and head; c = 1 or 1 / max(n, 1)^alpha
    o = phi(q) A + (phi(q) . phi(k)) v    q, k, v: projections of the query token

A depends on the history alone, so a record stores it alongside the summary tokens. Query tokens never write. So a query
token sees the history and itself, but not the other query tokens.

Letters: N histories, B rows, Q query tokens, L layers of stage 1, H heads, D head dim, M model dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from vista.config import ModelConfig
from vista.config.choices import Activation
from vista.model.layers import GatedOutput, linear_parts, norm, split_heads
from vista_kernels.read_settings import ReadSettings

NORM_EPS = 0.1
"""Added to the variance by the norm of o. phi(q) . phi(k) takes either sign, and where it is near 0, a norm with a tiny
constant would turn rounding errors into large ones (bfloat16: five times the error of the score)."""
_PHI: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.silu: F.silu,
    Activation.relu: F.relu,
    Activation.identity: lambda x: x,
}


def state_rows(config: ModelConfig, z: Tensor, n: Tensor) -> Tensor:
    """A as rows of a record: L * H matrices end to end, cut into L * D rows of M numbers.

    Args:
        z: [N, L, H, D, D] states.
        n: [N, H] weight sums.

    Returns:
        [N, L * D, M].
    """
    phi = config.activation
    scale = ReadSettings.of(config.normalization.value, config.normalization_alpha, phi.value, phi.value).scale(n)
    matrices = _PHI[phi](z if scale is None else z * scale[:, None, :, None, None])
    return matrices.reshape(len(n), config.num_state_rows, config.dim)


class QuasiLinearRead(nn.Module):
    """Reads the state of one layer of stage 1, with a gated output and a residual."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.phi = _PHI[config.activation]
        self.norm = norm(config.dim)
        self.projections = nn.Linear(config.dim, 4 * config.dim, bias=False)
        """To query, gate, key and value, in this order. Stage 1 has its own, which downstream training freezes."""
        self.output = GatedOutput(config.dim, config.num_heads, config.dropout, NORM_EPS)
        nn.init.zeros_(self.output.out.weight)  # Training starts without the read, which at first is noise.

    def forward(self, x: Tensor, matrices: Tensor) -> Tensor:
        """x [B, Q, M], and A of the B histories, [B, H, D, D] -> [B, Q, M]."""
        query, gate, key, value = linear_parts(self.norm(x), self.projections, 4)
        query, key, value = self._heads(self.phi(query)), self._heads(self.phi(key)), self._heads(value)
        heads = query @ matrices.to(query.dtype) + (query * key).sum(-1, keepdim=True) * value
        mixed: Tensor = self.output(x, heads.transpose(1, 2), gate)
        return mixed

    def _heads(self, x: Tensor) -> Tensor:
        return split_heads(x, self.num_heads).transpose(1, 2)
