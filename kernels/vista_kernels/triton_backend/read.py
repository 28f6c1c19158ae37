"""Reading states with queries, and its backward.

    A_b = phi2(Z_b c_b)  [D, E]        o_t = phi1(q_t) A_b
    dq_t = phi1'(q_t) * (dO_t A_b^T)   dZ_b = phi2'(Z_b c_b) c_b * sum_t phi1(q_t)^T dO_t

Tokens [N, H, D or E] of any strides, states [B, H, D, E] and scales c [B, H] float32 and contiguous. A program takes
one item of `work_plan.py` and one head, and holds the state in registers. Backward is one pass that writes dq and sums
dZ. Sums are float32; operands of products are rounded to the tokens' dtype.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vista_kernels.state_queries import StateQueries
from vista_kernels.triton_backend import accelerator, blocks, state_sums
from vista_kernels.triton_backend.item_sizes import ITEM_SIZES, ItemSizes
from vista_kernels.triton_backend.tile_access import (
    activate,
    activated,
    activation_gradient,
    load_item,
    load_state,
    load_tokens,
    operand,
    product,
    rounded,
    segment_range,
    store_state,
    store_tokens,
)
from vista_kernels.triton_backend.work_plan import plan_work


@triton.jit
def load_scaled_state(
    z_ptr,
    scale_ptr,
    row,
    d,
    e,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):
    """Return Z c [BLOCK_D, BLOCK_E] of one segment and head, and c."""
    b_z = load_state(z_ptr + row * (D * E), d, e, D, E, BLOCK_D, BLOCK_E, E, 1)
    if HAS_SCALE:
        b_c = tl.load(scale_ptr + row)
        return b_z * b_c, b_c
    else:
        return b_z, 1.0


@triton.jit
def read_fwd_kernel(
    q_ptr,
    z_ptr,
    scale_ptr,
    out_ptr,
    starts_ptr,
    lengths_ptr,
    items_ptr,
    num_heads,
    stride_qt,
    stride_qh,
    stride_qd,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STATE_ACTIVATION: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):
    block, h, first_segment, last_segment, first_token, last_token, _slot = load_item(items_ptr, num_heads, E, BLOCK_E)
    q_ptr += h * stride_qh
    i, d, e = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D), block * BLOCK_E + tl.arange(0, BLOCK_E)
    for segment in range(first_segment, last_segment):
        begin, end = segment_range(starts_ptr, lengths_ptr, segment, first_token, last_token)
        b_z, _ = load_scaled_state(z_ptr, scale_ptr, segment * num_heads + h, d, e, D, E, BLOCK_D, BLOCK_E, HAS_SCALE)
        b_a, factor = operand(activate(b_z, STATE_ACTIVATION), DTYPE)
        for first in range(begin, end, BLOCK_T):
            m_t = i < tl.minimum(end - first, BLOCK_T).to(tl.int32)
            b_q = load_tokens(q_ptr + first * stride_qt, i, m_t, d, stride_qt, stride_qd, D, BLOCK_D)
            b_out = product(activated(b_q, ACTIVATION, DTYPE), b_a, PRECISION) * factor
            store_tokens(out_ptr + (first * num_heads + h) * E, b_out, i, m_t, e, num_heads * E, E, BLOCK_E)


@triton.jit
def read_bwd_kernel(
    grad_out_ptr,
    q_ptr,
    z_ptr,
    scale_ptr,
    grad_q_ptr,
    grad_z_ptr,
    part_ptr,
    starts_ptr,
    lengths_ptr,
    items_ptr,
    num_heads,
    stride_ot,
    stride_oh,
    stride_oe,
    stride_qt,
    stride_qh,
    stride_qd,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STATE_ACTIVATION: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):
    # Here blocks split the rows of A: a column of dq needs all of E, just as a column of o needs all of D in forward.
    block, h, first_segment, last_segment, first_token, last_token, slot = load_item(items_ptr, num_heads, D, BLOCK_D)
    grad_out_ptr += h * stride_oh
    q_ptr += h * stride_qh
    i, d, e = tl.arange(0, BLOCK_T), block * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    for segment in range(first_segment, last_segment):
        begin, end = segment_range(starts_ptr, lengths_ptr, segment, first_token, last_token)
        row = segment * num_heads + h
        b_z, _ = load_scaled_state(z_ptr, scale_ptr, row, d, e, D, E, BLOCK_D, BLOCK_E, HAS_SCALE)
        b_a, factor = operand(activate(b_z, STATE_ACTIVATION), DTYPE)
        b_da = tl.zeros([BLOCK_D, BLOCK_E], tl.float32)
        for first in range(begin, end, BLOCK_T):
            m_t = i < tl.minimum(end - first, BLOCK_T).to(tl.int32)
            b_do = load_tokens(grad_out_ptr + first * stride_ot, i, m_t, e, stride_ot, stride_oe, E, BLOCK_E)
            b_q = load_tokens(q_ptr + first * stride_qt, i, m_t, d, stride_qt, stride_qd, D, BLOCK_D).to(tl.float32)
            b_phi = rounded(activate(b_q, ACTIVATION), DTYPE)
            b_da = product(tl.trans(b_phi), b_do, PRECISION, b_da)
            b_dq = product(b_do, tl.trans(b_a), PRECISION) * activation_gradient(b_q, ACTIVATION)
            store_tokens(grad_q_ptr + (first * num_heads + h) * D, b_dq * factor, i, m_t, d, num_heads * D, D, BLOCK_D)
        if slot >= 0:
            store_state(part_ptr + (slot * num_heads + h) * (D * E), b_da, d, e, D, E, BLOCK_D, BLOCK_E, E, 1)
        else:
            # Z is read again: holding it through the loop would cost as many registers as the sum itself.
            b_z, b_c = load_scaled_state(z_ptr, scale_ptr, row, d, e, D, E, BLOCK_D, BLOCK_E, HAS_SCALE)
            b_dz = b_da * activation_gradient(b_z, STATE_ACTIVATION) * b_c
            b_dz = tl.where(end > begin, b_dz, 0.0)  # a state that nobody reads has no gradient, even if it is NaN
            store_state(grad_z_ptr + row * (D * E), b_dz, d, e, D, E, BLOCK_D, BLOCK_E, E, 1)


def read(queries: StateQueries, out: Tensor, *, sizes: ItemSizes = ITEM_SIZES) -> None:
    """Write o = phi1(q) phi2(z * c) of the segments' queries."""
    q, z, n, segments, settings = queries
    device = accelerator.accelerator_of(q)
    blocks.check_tokens(q=q, out=out)
    num_heads, width, value_width = z.shape[1:]
    work = plan_work(segments, num_heads=num_heads, num_processors=device.num_processors, sizes=sizes)
    chosen = blocks.choose("read_fwd", device, q.dtype, width, value_width, work.mean_length)
    starts, lengths, items, _ = blocks.to_device(work.arrays, q.device)
    z, scale = z.contiguous(), settings.scale(n.contiguous())
    blocks.launch(
        read_fwd_kernel,
        len(items) * num_heads * -(-value_width // chosen.part),
        q,
        z,
        z if scale is None else scale,
        out,
        starts,
        lengths,
        items,
        num_heads,
        *q.stride(),
        D=width,
        E=value_width,
        BLOCK_D=chosen.whole,
        BLOCK_E=chosen.part,
        **chosen.constants,
        ACTIVATION=settings.activation,
        STATE_ACTIVATION=settings.state_activation,
        HAS_SCALE=scale is not None,
        **chosen.options,
    )


def read_backward(
    grad_out: Tensor,
    queries: StateQueries,
    grad_q: Tensor,
    grad_z: Tensor,
    *,
    sizes: ItemSizes = ITEM_SIZES,
) -> None:
    """Write dq, and dz = phi2'(z * c) * c * sum phi1(q)^T dO."""
    q, z, n, segments, settings = queries
    device = accelerator.accelerator_of(q)
    blocks.check_tokens(q=q, grad_out=grad_out)
    num_heads, width, value_width = z.shape[1:]
    work = plan_work(segments, num_heads=num_heads, num_processors=device.num_processors, sizes=sizes)
    chosen = blocks.choose("read_bwd", device, q.dtype, value_width, width, work.mean_length)
    starts, lengths, items, ranges = blocks.to_device(work.arrays, q.device)
    part, _ = state_sums.new_parts(work, z)
    z, scale = z.contiguous(), settings.scale(n.contiguous())
    blocks.launch(
        read_bwd_kernel,
        len(items) * num_heads * -(-width // chosen.part),
        grad_out,
        q,
        z,
        z if scale is None else scale,
        grad_q,
        grad_z,
        part,
        starts,
        lengths,
        items,
        num_heads,
        *grad_out.stride(),
        *q.stride(),
        D=width,
        E=value_width,
        BLOCK_D=chosen.part,
        BLOCK_E=chosen.whole,
        **chosen.constants,
        ACTIVATION=settings.activation,
        STATE_ACTIVATION=settings.state_activation,
        HAS_SCALE=scale is not None,
        **chosen.options,
    )
    state_sums.write_state_gradient(part, ranges, grad_z, z, scale, settings.state_activation)
