"""The oracle: every operator as a plain loop over events, in float64 by default.

It shares no code with the fast paths, not even the activations. Autograd differentiates it. Arguments and shapes are
those of the public functions of the same names, in a tuple where there are many; results have `dtype`.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from vista_kernels.candidate_tokens import CandidateTokens
from vista_kernels.qla_tokens import QlaTokens


def accumulate_state(
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    *,
    weight: Tensor | None = None,
    initial_z: Tensor | None = None,
    initial_n: Tensor | None = None,
    activation: str = "silu",
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Return (Z [B, H, D, E], n [B, H]): Z = initial_z + sum_s w_s phi(k_s) v_s^T and n = initial_n + sum_s w_s."""
    k, v = k.to(dtype), v.to(dtype)
    states, counts = [], []
    for b, (start, stop) in enumerate(_segments(offsets)):
        z = k.new_zeros((k.shape[1], k.shape[2], v.shape[2])) if initial_z is None else initial_z[b].to(dtype)
        n = k.new_zeros(k.shape[1]) if initial_n is None else initial_n[b].to(dtype)
        for t in range(start, stop):
            w = k.new_ones(k.shape[1]) if weight is None else weight[t].to(dtype).expand(k.shape[1])
            z = z + w[:, None, None] * _phi(activation, k[t])[:, :, None] * v[t][:, None, :]
            n = n + w
        states.append(z)
        counts.append(n)
    return _stack(states, k, (k.shape[1], k.shape[2], v.shape[2])), _stack(counts, k, (k.shape[1],))


def scan_states(
    z: Tensor,
    n: Tensor,
    log_decay: Tensor,
    offsets: Tensor,
    *,
    initial_z: Tensor | None = None,
    initial_n: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Return (Z [N, H, D, E], n [N, H]) with Z_i = exp(log_decay_i) Z_{i-1} + z_i in each sequence."""
    z, n, decay = z.to(dtype), n.to(dtype), log_decay.to(dtype).exp()
    states, counts = [], []
    for b, (start, stop) in enumerate(_segments(offsets)):
        state = z.new_zeros(z.shape[1:]) if initial_z is None else initial_z[b].to(dtype)
        count = n.new_zeros(n.shape[1:]) if initial_n is None else initial_n[b].to(dtype)
        for i in range(start, stop):
            state = decay[i][:, None, None] * state + z[i]
            count = decay[i] * count + n[i]
            states.append(state)
            counts.append(count)
    return _stack(states, z, tuple(z.shape[1:])), _stack(counts, n, tuple(n.shape[1:]))


def read_state(
    q: Tensor,
    z: Tensor,
    n: Tensor,
    offsets: Tensor,
    *,
    normalization: str = "none",
    alpha: float = 1.0,
    activation: str = "silu",
    state_activation: str = "silu",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Return o [N, H, E] with o = phi1(q) phi2(Z c), c = 1 or 1 / max(n, 1)^alpha."""
    q, z, n = q.to(dtype), z.to(dtype), n.to(dtype)
    outputs = []
    for b, (start, stop) in enumerate(_segments(offsets)):
        c = _scale(n[b], normalization, alpha)
        state = _phi(state_activation, z[b] * c[:, None, None])
        for t in range(start, stop):
            outputs.append(_read(_phi(activation, q[t]), state))
    return _stack(outputs, q, (q.shape[1], z.shape[3]))


def quasi_linear_attention(tokens: QlaTokens, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return o [T, H, E]; the last num_targets[b] tokens of a sequence read the others and themselves, never write."""
    q, k, v, offsets, num_targets, weight, normalization, alpha, activation, state_activation = tokens
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    outputs = []
    for b, (start, stop) in enumerate(_segments(offsets)):
        first_target = stop - (0 if num_targets is None else int(num_targets[b]))
        z = k.new_zeros((k.shape[1], k.shape[2], v.shape[2]))
        n = k.new_zeros(k.shape[1])
        for s in range(start, first_target):
            w = k.new_ones(k.shape[1]) if weight is None else weight[s].to(dtype).expand(k.shape[1])
            z = z + w[:, None, None] * _phi(activation, k[s])[:, :, None] * v[s][:, None, :]
            n = n + w
        state = _phi(state_activation, z * _scale(n, normalization, alpha)[:, None, None])
        for t in range(start, stop):
            query = _phi(activation, q[t])
            out = _read(query, state)
            if t >= first_target:
                out = out + (query * _phi(activation, k[t])).sum(1, keepdim=True) * v[t]
            outputs.append(out)
    return _stack(outputs, v, (v.shape[1], v.shape[2]))


def causal_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    *,
    initial_z: Tensor | None = None,
    activation: str = "silu",
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Return (o [T, H, E], final Z [B, H, D, E]): o_t = phi(q_t) (initial_z + sum_{s <= t} phi(k_s) v_s^T)."""
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    outputs, states = [], []
    for b, (start, stop) in enumerate(_segments(offsets)):
        z = k.new_zeros((k.shape[1], k.shape[2], v.shape[2])) if initial_z is None else initial_z[b].to(dtype)
        for t in range(start, stop):
            z = z + _phi(activation, k[t])[:, :, None] * v[t][:, None, :]
            outputs.append(_read(_phi(activation, q[t]), z))
        states.append(z)
    return _stack(outputs, v, (v.shape[1], v.shape[2])), _stack(states, v, (k.shape[1], k.shape[2], v.shape[2]))


def candidate_attention(tokens: CandidateTokens, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return o [B, H, Q, E]: the softmax of each candidate over the context and itself."""
    q, k, v, own_k, own_v, bias, own_bias, context_mask, scale = tokens
    batch, heads, num_queries, width = q.shape
    q, k, v, own_k, own_v = (x.to(dtype) for x in (q, k, v, own_k, own_v))
    if scale is None:
        scale = width**-0.5 if width else 1.0
    bias = q.new_zeros(()) if bias is None else bias.to(dtype)
    bias = bias.expand(batch, heads, num_queries, k.shape[2])
    own_bias = q.new_zeros(heads) if own_bias is None else own_bias.to(dtype)
    own_bias = (own_bias[:, None] if own_bias.dim() == 1 else own_bias).expand(batch, heads, num_queries)
    outputs = []
    for b in range(batch):
        for h in range(heads):
            keys, values = k[b, h], v[b, h]
            for i in range(num_queries):
                scores = (keys * q[b, h, i]).sum(1) * scale + bias[b, h, i]
                if context_mask is not None:
                    scores = torch.where(context_mask[b], scores, torch.full_like(scores, -torch.inf))
                own = (own_k[b, h, i] * q[b, h, i]).sum() * scale + own_bias[b, h, i]
                largest = torch.cat([scores, own[None]]).max().detach()
                shares, own = (scores - largest).exp(), (own - largest).exp()
                mixed = (shares[:, None] * values).sum(0) + own * own_v[b, h, i]
                outputs.append(mixed / (shares.sum() + own))
    return _stack(outputs, v, (v.shape[3],)).view(batch, heads, num_queries, v.shape[3])


def _segments(offsets: Tensor) -> list[tuple[int, int]]:
    bounds = offsets.tolist()
    return list(pairwise(bounds))


def _phi(name: str, x: Tensor) -> Tensor:
    if name == "silu":
        return x * torch.sigmoid(x)
    if name == "relu":
        return torch.where(x > 0, x, torch.zeros_like(x))
    return x


def _scale(n: Tensor, normalization: str, alpha: float) -> Tensor:
    return torch.maximum(n, torch.ones_like(n)) ** (-alpha if normalization == "length" else 0.0)


def _read(query: Tensor, state: Tensor) -> Tensor:
    """[H, D] times [H, D, E] -> [H, E]."""
    return (query[:, :, None] * state).sum(1)


def _stack(rows: list[Tensor], like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.stack(rows) if rows else like.new_zeros((0, *shape))
