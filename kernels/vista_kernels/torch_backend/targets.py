"""The self term of target tokens in quasi-linear attention: o_t += (phi(q_t) . phi(k_t)) v_t."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vista_kernels.qla_tokens import QlaTokens
from vista_kernels.segments import IntArray
from vista_kernels.state_layout import state_dtype
from vista_kernels.torch_backend.activations import activate_gradient_
from vista_kernels.torch_backend.window import WINDOW_ELEMENTS
from vista_kernels.torch_backend.workspace import activated


def add_targets(tokens: QlaTokens, rows: IntArray, out: Tensor, *, window_elements: int = WINDOW_ELEMENTS) -> None:
    """Add the own term of the tokens `rows` to out."""
    activation = tokens.activation
    for part in _portions(rows, tokens, window_elements):
        query, keys, value = _gather(part, *tokens[:3])
        query, keys = activated("phi_q", activation, query), activated("phi_k", activation, keys)
        out[part] += ((query * keys).sum(2, keepdim=True) * value).to(out.dtype)


def add_targets_backward(
    grad_out: Tensor,
    tokens: QlaTokens,
    rows: IntArray,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    *,
    window_elements: int = WINDOW_ELEMENTS,
) -> None:
    """Add dq of that term to the rows `rows` of grad_q, and write its dk and dv to theirs."""
    activation = tokens.activation
    for part in _portions(rows, tokens, window_elements):
        query, keys, value, grad = _gather(part, *tokens[:3], grad_out)
        active_query, active_keys = activated("phi_q", activation, query), activated("phi_k", activation, keys)
        agreement = (grad * value).sum(2, keepdim=True)
        grad_query, grad_keys = agreement * active_keys, agreement * active_query
        activate_gradient_(activation, query, grad_query)
        activate_gradient_(activation, keys, grad_keys)
        grad_q[part] += grad_query.to(grad_q.dtype)
        grad_k[part] = grad_keys.to(grad_k.dtype)
        grad_v[part] = ((active_query * active_keys).sum(2, keepdim=True) * grad).to(grad_v.dtype)


def _portions(rows: IntArray, tokens: QlaTokens, window_elements: int) -> Iterator[Tensor]:
    """Yield the token numbers, as many at a time as keep their tensors in the cache."""
    _, heads, width = tokens.q.shape
    step = max(256, window_elements // max(1, heads * max(width, tokens.v.shape[2])))
    for first in range(0, len(rows), step):
        yield torch.from_numpy(rows[first : first + step]).to(tokens.q.device)


def _gather(rows: Tensor, *tokens: Tensor) -> list[Tensor]:
    return [x.index_select(0, rows).to(state_dtype(x.dtype)) for x in tokens]
