"""Writing tokens into states, and its backward.

    Z_b = sum_s w_s phi(k_s) v_s^T  [D, E]        n_b = sum_s w_s
    dk_s = phi'(k_s) * w_s (v_s dZ_b^T)           dv_s = w_s (phi(k_s) dZ_b)

Tokens [T, H, D or E] of any strides, states [B, H, D, E] and weight sums [B, H] float32 and contiguous. A program takes
one item of `work_plan.py` and one head, and holds the state in registers, so each direction reads keys and values once.
Sums are float32; operands of products are rounded to the tokens' dtype.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vista_kernels.state_tokens import StateTokens
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
    segment_range,
    store_state,
    store_tokens,
)
from vista_kernels.triton_backend.work_plan import plan_work


@triton.jit
def accumulate_fwd_kernel(
    k_ptr,
    v_ptr,
    w_ptr,
    z_ptr,
    n_ptr,
    part_ptr,
    part_n_ptr,
    starts_ptr,
    lengths_ptr,
    items_ptr,
    num_heads,
    stride_kt,
    stride_kh,
    stride_kd,
    stride_vt,
    stride_vh,
    stride_ve,
    stride_wt,
    stride_wh,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    ADD: tl.constexpr,
):
    block, h, first_segment, last_segment, first_token, last_token, slot = load_item(items_ptr, num_heads, E, BLOCK_E)
    k_ptr += h * stride_kh
    v_ptr += h * stride_vh
    w_ptr += h * stride_wh
    i, d, e = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D), block * BLOCK_E + tl.arange(0, BLOCK_E)
    for segment in range(first_segment, last_segment):
        begin, end = segment_range(starts_ptr, lengths_ptr, segment, first_token, last_token)
        b_z = tl.zeros([BLOCK_D, BLOCK_E], tl.float32)
        b_n = tl.zeros([BLOCK_T], tl.float32)
        for first in range(begin, end, BLOCK_T):
            m_t = i < tl.minimum(end - first, BLOCK_T).to(tl.int32)
            b_k = load_tokens(k_ptr + first * stride_kt, i, m_t, d, stride_kt, stride_kd, D, BLOCK_D)
            b_v = load_tokens(v_ptr + first * stride_vt, i, m_t, e, stride_vt, stride_ve, E, BLOCK_E)
            if HAS_WEIGHT:
                b_w = tl.load(w_ptr + first * stride_wt + i * stride_wt, mask=m_t, other=0.0).to(tl.float32)
                b_n += b_w
                b_phi, factor = operand(activate(b_k.to(tl.float32), ACTIVATION) * b_w[:, None], DTYPE)
                b_z += product(tl.trans(b_phi), b_v, PRECISION) * factor
            else:
                b_phi = activated(b_k, ACTIVATION, DTYPE)
                b_z = product(tl.trans(b_phi), b_v, PRECISION, b_z)
        total = tl.sum(b_n, 0) if HAS_WEIGHT else (end - begin).to(tl.float32)
        if slot >= 0:
            row = slot * num_heads + h
            store_state(part_ptr + row * (D * E), b_z, d, e, D, E, BLOCK_D, BLOCK_E, E, 1)
            if block == 0:
                tl.store(part_n_ptr + row, total)
        else:
            row = segment * num_heads + h
            if ADD:
                b_z += load_state(z_ptr + row * (D * E), d, e, D, E, BLOCK_D, BLOCK_E, E, 1)
            store_state(z_ptr + row * (D * E), b_z, d, e, D, E, BLOCK_D, BLOCK_E, E, 1)
            if block == 0:
                tl.store(n_ptr + row, tl.load(n_ptr + row) + total)


@triton.jit
def accumulate_bwd_kernel(
    grad_z_ptr,
    k_ptr,
    v_ptr,
    w_ptr,
    grad_k_ptr,
    grad_v_ptr,
    starts_ptr,
    lengths_ptr,
    items_ptr,
    num_heads,
    stride_kt,
    stride_kh,
    stride_kd,
    stride_vt,
    stride_vh,
    stride_ve,
    stride_wt,
    stride_wh,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):
    _block, h, first_segment, last_segment, first_token, last_token, _slot = load_item(items_ptr, num_heads, 1, 1)
    k_ptr += h * stride_kh
    v_ptr += h * stride_vh
    w_ptr += h * stride_wh
    i, d, e = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    for segment in range(first_segment, last_segment):
        begin, end = segment_range(starts_ptr, lengths_ptr, segment, first_token, last_token)
        state_ptr = grad_z_ptr + (segment * num_heads + h) * (D * E)
        b_state = load_state(state_ptr, d, e, D, E, BLOCK_D, BLOCK_E, E, 1)
        b_dz, factor = operand(b_state, DTYPE)
        for first in range(begin, end, BLOCK_T):
            m_t = i < tl.minimum(end - first, BLOCK_T).to(tl.int32)
            b_v = load_tokens(v_ptr + first * stride_vt, i, m_t, e, stride_vt, stride_ve, E, BLOCK_E)
            b_w = tl.full([BLOCK_T], 1.0, tl.float32)
            if HAS_WEIGHT:
                b_w = tl.load(w_ptr + first * stride_wt + i * stride_wt, mask=m_t, other=0.0).to(tl.float32)
            b_dv = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
            # If dZ does not fit the registers, its rows are read BLOCK_D at a time, again for every block of tokens.
            for first_d in tl.static_range(0, D, BLOCK_D):
                c = first_d + d
                if BLOCK_D < D:
                    b_state = load_state(state_ptr, c, e, D, E, BLOCK_D, BLOCK_E, E, 1)
                    b_dz, factor = operand(b_state, DTYPE)
                b_k = load_tokens(k_ptr + first * stride_kt, i, m_t, c, stride_kt, stride_kd, D, BLOCK_D)
                b_dv += product(activated(b_k, ACTIVATION, DTYPE), b_dz, PRECISION) * factor
                b_dk = product(b_v, tl.trans(b_dz), PRECISION) * (b_w[:, None] * factor)
                b_dk *= activation_gradient(b_k.to(tl.float32), ACTIVATION)
                store_tokens(grad_k_ptr + (first * num_heads + h) * D, b_dk, i, m_t, c, num_heads * D, D, BLOCK_D)
            b_dv *= b_w[:, None]
            store_tokens(grad_v_ptr + (first * num_heads + h) * E, b_dv, i, m_t, e, num_heads * E, E, BLOCK_E)


def accumulate(tokens: StateTokens, z: Tensor, n: Tensor, *, fresh: bool = True, sizes: ItemSizes = ITEM_SIZES) -> None:
    """Add sum_s w_s phi(k_s) v_s^T of each segment to z and sum_s w_s to n, in place; `fresh` takes z as zero."""
    k, v, segments, weight, activation = tokens
    device = accelerator.accelerator_of(k)
    blocks.check_tokens(k=k, v=v)
    num_heads, width, value_width = z.shape[1:]
    work = plan_work(segments, num_heads=num_heads, num_processors=device.num_processors, sizes=sizes)
    chosen = blocks.choose("accumulate_fwd", device, k.dtype, width, value_width, work.mean_length)
    starts, lengths, items, ranges = blocks.to_device(work.arrays, k.device)
    part, part_n = state_sums.new_parts(work, z)
    blocks.launch(
        accumulate_fwd_kernel,
        len(items) * num_heads * -(-value_width // chosen.part),
        k,
        v,
        k if weight is None else weight,
        z,
        n,
        part,
        part_n,
        starts,
        lengths,
        items,
        num_heads,
        *k.stride(),
        *v.stride(),
        *_weight_strides(weight),
        D=width,
        E=value_width,
        BLOCK_D=chosen.whole,
        BLOCK_E=chosen.part,
        **chosen.constants,
        ACTIVATION=activation,
        HAS_WEIGHT=weight is not None,
        ADD=not fresh,
        **chosen.options,
    )
    state_sums.add_parts(part, part_n, ranges, z, n, fresh=fresh)


def accumulate_backward(
    grad_z: Tensor,
    tokens: StateTokens,
    grad_k: Tensor,
    grad_v: Tensor,
    *,
    sizes: ItemSizes = ITEM_SIZES,
) -> None:
    """Write dk = phi'(k) * w v dZ^T and dv = w phi(k) dZ of the segments' tokens."""
    k, v, segments, weight, activation = tokens
    device = accelerator.accelerator_of(k)
    blocks.check_tokens(k=k, v=v)
    num_heads, width, value_width = grad_z.shape[1:]
    work = plan_work(segments, num_heads=num_heads, num_processors=device.num_processors, sizes=sizes)
    chosen = blocks.choose("accumulate_bwd", device, k.dtype, value_width, width, work.mean_length)
    starts, lengths, items, _ = blocks.to_device(work.arrays, k.device)
    blocks.launch(
        accumulate_bwd_kernel,
        len(items) * num_heads,
        grad_z.contiguous(),
        k,
        v,
        k if weight is None else weight,
        grad_k,
        grad_v,
        starts,
        lengths,
        items,
        num_heads,
        *k.stride(),
        *v.stride(),
        *_weight_strides(weight),
        D=width,
        E=value_width,
        BLOCK_D=chosen.part,
        BLOCK_E=chosen.whole,
        **chosen.constants,
        ACTIVATION=activation,
        HAS_WEIGHT=weight is not None,
        **chosen.options,
    )


def _weight_strides(weight: Tensor | None) -> tuple[int, int]:
    """Return the strides of weights [T] or [T, H] by token and head."""
    if weight is None:
        return 0, 0
    return weight.stride(0), weight.stride(1) if weight.dim() == 2 else 0
