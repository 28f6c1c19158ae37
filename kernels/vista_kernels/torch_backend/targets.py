"""The self term of target tokens in quasi-linear attention: o_t += (phi(q_t) . phi(k_t)) v_t."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vista_kernels.segments import IntArray
from vista_kernels.state_layout import state_dtype
from vista_kernels.torch_backend.activations import activate_gradient_
from vista_kernels.torch_backend.window import WINDOW_ELEMENTS
from vista_kernels.torch_backend.workspace import activated


def add_targets(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens: IntArray,
    activation: str,
    out: Tensor,
    *,
    window_elements: int = WINDOW_ELEMENTS,
) -> None:
    """Add the targets' own term to the rows `tokens` of out."""
    for rows in _portions(tokens, q, v, window_elements):
        query, keys, value = _gather(rows, q, k, v)
        query, keys = activated("phi_q", activation, query), activated("phi_k", activation, keys)
        out[rows] += ((query * keys).sum(2, keepdim=True) * value).to(out.dtype)


def add_targets_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens: IntArray,
    activation: str,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    *,
    window_elements: int = WINDOW_ELEMENTS,
) -> None:
    """Add dq of that term to the rows `tokens` of grad_q, and write its dk and dv to theirs."""
    for rows in _portions(tokens, q, v, window_elements):
        query, keys, value, grad = _gather(rows, q, k, v, grad_out)
        active_query, active_keys = activated("phi_q", activation, query), activated("phi_k", activation, keys)
        agreement = (grad * value).sum(2, keepdim=True)
        grad_query, grad_keys = agreement * active_keys, agreement * active_query
        activate_gradient_(activation, query, grad_query)
        activate_gradient_(activation, keys, grad_keys)
        grad_q[rows] += grad_query.to(q.dtype)
        grad_k[rows] = grad_keys.to(k.dtype)
        grad_v[rows] = ((active_query * active_keys).sum(2, keepdim=True) * grad).to(v.dtype)


def _portions(tokens: IntArray, q: Tensor, v: Tensor, window_elements: int) -> Iterator[Tensor]:
    """Yield the token numbers, as many at a time as keep their tensors in the cache."""
    step = max(256, window_elements // max(1, q.shape[1] * max(q.shape[2], v.shape[2])))
    for first in range(0, len(tokens), step):
        yield torch.from_numpy(tokens[first : first + step]).to(q.device)


def _gather(rows: Tensor, *tokens: Tensor) -> list[Tensor]:
    return [x.index_select(0, rows).to(state_dtype(x.dtype)) for x in tokens]
