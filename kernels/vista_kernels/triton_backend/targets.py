"""The self term of target tokens in quasi-linear attention: o_t += (phi(q_t) . phi(k_t)) v_t.

    dq_t += phi'(q_t) * (dO_t . v_t) phi(k_t)       dk_t = phi'(k_t) * (dO_t . v_t) phi(q_t)
    dv_t = (phi(q_t) . phi(k_t)) dO_t

A program takes BLOCK_T targets, listed by token number, and one head. All sums are float32.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from vista_kernels.qla_tokens import QlaTokens
from vista_kernels.segments import IntArray
from vista_kernels.triton_backend import blocks
from vista_kernels.triton_backend.tile_access import activate, activation_gradient, load_tokens, store_tokens

BLOCK_T = 16


@triton.jit
def targets_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    tokens_ptr,
    num_targets,
    num_heads,
    stride_qt,
    stride_qh,
    stride_qd,
    stride_kt,
    stride_kh,
    stride_kd,
    stride_vt,
    stride_vh,
    stride_ve,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    program = tl.program_id(0)
    h = (program % num_heads).to(tl.int64)
    i = (program // num_heads).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = i < num_targets
    t = tl.load(tokens_ptr + i, mask=m_t, other=0)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    b_q = load_tokens(q_ptr + h * stride_qh, t, m_t, d, stride_qt, stride_qd, D, BLOCK_D).to(tl.float32)
    b_k = load_tokens(k_ptr + h * stride_kh, t, m_t, d, stride_kt, stride_kd, D, BLOCK_D).to(tl.float32)
    b_v = load_tokens(v_ptr + h * stride_vh, t, m_t, e, stride_vt, stride_ve, E, BLOCK_E).to(tl.float32)
    b_out = load_tokens(out_ptr + h * E, t, m_t, e, num_heads * E, 1, E, BLOCK_E).to(tl.float32)
    agreement = tl.sum(activate(b_q, ACTIVATION) * activate(b_k, ACTIVATION), 1, keep_dims=True)
    store_tokens(out_ptr + h * E, b_out + agreement * b_v, t, m_t, e, num_heads * E, E, BLOCK_E)


@triton.jit
def targets_bwd_kernel(
    grad_out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    grad_q_ptr,
    grad_k_ptr,
    grad_v_ptr,
    tokens_ptr,
    num_targets,
    num_heads,
    stride_ot,
    stride_oh,
    stride_oe,
    stride_qt,
    stride_qh,
    stride_qd,
    stride_kt,
    stride_kh,
    stride_kd,
    stride_vt,
    stride_vh,
    stride_ve,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    program = tl.program_id(0)
    h = (program % num_heads).to(tl.int64)
    i = (program // num_heads).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = i < num_targets
    t = tl.load(tokens_ptr + i, mask=m_t, other=0)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    b_do = load_tokens(grad_out_ptr + h * stride_oh, t, m_t, e, stride_ot, stride_oe, E, BLOCK_E).to(tl.float32)
    b_q = load_tokens(q_ptr + h * stride_qh, t, m_t, d, stride_qt, stride_qd, D, BLOCK_D).to(tl.float32)
    b_k = load_tokens(k_ptr + h * stride_kh, t, m_t, d, stride_kt, stride_kd, D, BLOCK_D).to(tl.float32)
    b_v = load_tokens(v_ptr + h * stride_vh, t, m_t, e, stride_vt, stride_ve, E, BLOCK_E).to(tl.float32)
    b_dq = load_tokens(grad_q_ptr + h * D, t, m_t, d, num_heads * D, 1, D, BLOCK_D).to(tl.float32)
    b_phi_q, b_phi_k = activate(b_q, ACTIVATION), activate(b_k, ACTIVATION)
    agreement = tl.sum(b_phi_q * b_phi_k, 1, keep_dims=True)
    slope = tl.sum(b_do * b_v, 1, keep_dims=True)
    b_dq += slope * b_phi_k * activation_gradient(b_q, ACTIVATION)
    b_dk = slope * b_phi_q * activation_gradient(b_k, ACTIVATION)
    store_tokens(grad_q_ptr + h * D, b_dq, t, m_t, d, num_heads * D, D, BLOCK_D)
    store_tokens(grad_k_ptr + h * D, b_dk, t, m_t, d, num_heads * D, D, BLOCK_D)
    store_tokens(grad_v_ptr + h * E, agreement * b_do, t, m_t, e, num_heads * E, E, BLOCK_E)


def add_targets(tokens: QlaTokens, rows: IntArray, out: Tensor) -> None:
    """Add (phi(q_t) . phi(k_t)) v_t of the tokens `rows` to out."""
    _launch(targets_fwd_kernel, tokens, rows, tokens[:3], (out,))


def add_targets_backward(
    grad_out: Tensor, tokens: QlaTokens, rows: IntArray, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor
) -> None:
    """Add dq of that term to the rows `rows` of grad_q, and write its dk and dv to theirs."""
    _launch(targets_bwd_kernel, tokens, rows, (grad_out, *tokens[:3]), (grad_q, grad_k, grad_v))


def _launch(
    kernel: Any, tokens: QlaTokens, rows: IntArray, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]
) -> None:
    """Launch a kernel, which takes inputs of any strides and contiguous outputs."""
    q, k, v = tokens[:3]
    blocks.check_tokens(q=q, k=k, v=v)
    num_heads, width, value_width = q.shape[1], q.shape[2], v.shape[2]
    (rows_on_device,) = blocks.to_device([rows], q.device)
    blocks.launch(
        kernel,
        -(-len(rows) // BLOCK_T) * num_heads,
        *inputs,
        *outputs,
        rows_on_device,
        len(rows),
        num_heads,
        *(stride for x in inputs for stride in x.stride()),
        D=width,
        E=value_width,
        BLOCK_D=blocks.padded(width),
        BLOCK_E=blocks.padded(value_width),
        BLOCK_T=BLOCK_T,
        ACTIVATION=tokens.activation,
        num_warps=4,
    )
