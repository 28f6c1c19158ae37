"""Causal linear attention, o_t = phi(q_t) Z_t with Z_t = Z_0 + sum_{s <= t} phi(k_s) v_s^T, and its backward.

All four results have the same form, and share a kernel. A program walks tokens in blocks and carries a state S in
registers. With a block's tokens as rows of A, B and C::

    Y = tril(A B^T) C + A S        then  S <- S + B^T C

    O : A, B, C = phi(Q), phi(K), V        S = Z      from the front
    dQ: A, B, C = dO, V, phi(K)            S = Z^T    from the front    dq = phi'(q) * dQ
    dK: A, B, C = V, dO, phi(Q)            S = R^T    from the back     dk = phi'(k) * dK
    dV: A, B, C = phi(K), phi(Q), dO       S = R      from the back

where Z is the state before a block and R the gradient of the state after it. From the back, tril becomes triu. Columns
of C, S and Y are independent, so several programs may share them. The state that enters a chunk of a long sequence
comes from the chunks' totals (`accumulate.py`) and a scan of them (`scan.py`). Tokens [T, H, D or E] of any strides,
states [B, H, D, E] float32. Sums are float32; operands of products have the tokens' dtype.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from vista_kernels.causal_tokens import CausalTokens
from vista_kernels.segments import IntArray, Segments
from vista_kernels.state_tokens import StateTokens
from vista_kernels.triton_backend import accelerator, blocks
from vista_kernels.triton_backend.accumulate import accumulate
from vista_kernels.triton_backend.item_sizes import ITEM_SIZES, ItemSizes
from vista_kernels.triton_backend.scan import scan
from vista_kernels.triton_backend.tile_access import (
    activated,
    activation_gradient,
    load_item,
    load_state,
    load_tokens,
    operand,
    product,
    row_operand,
    segment_range,
    store_state,
    store_tokens,
)
from vista_kernels.triton_backend.work_plan import NO_LIMIT, WorkPlan, plan_work


@triton.jit
def read_block(b_a, b_b, b_c, b_state, i, DTYPE: tl.constexpr, PRECISION: tl.constexpr, FROM_BACK: tl.constexpr):
    """Return tril(A B^T) C + A S [BLOCK_T, BLOCK_C] of a block of tokens; triu if FROM_BACK."""
    b_s = product(b_a, tl.trans(b_b), PRECISION)
    is_seen = i[:, None] <= i[None, :] if FROM_BACK else i[:, None] >= i[None, :]
    b_s, row_factor = row_operand(tl.where(is_seen, b_s, 0.0), DTYPE)
    b_y = product(b_s, b_c, PRECISION) * row_factor
    b_s, factor = operand(b_state, DTYPE)
    return b_y + product(b_a, b_s, PRECISION) * factor


@triton.jit
def causal_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    x_ptr,
    carry_ptr,
    entering_ptr,
    out_ptr,
    starts_ptr,
    lengths_ptr,
    items_ptr,
    num_heads,
    stride_at,
    stride_ah,
    stride_aa,
    stride_bt,
    stride_bh,
    stride_ba,
    stride_ct,
    stride_ch,
    stride_cc,
    stride_xt,
    stride_xh,
    stride_xc,
    A: tl.constexpr,
    C: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STRIDE_SA: tl.constexpr,
    STRIDE_SC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    ACTIVATION_A: tl.constexpr,
    ACTIVATION_B: tl.constexpr,
    ACTIVATION_C: tl.constexpr,
    ACTIVATION_X: tl.constexpr,
    HAS_CARRY: tl.constexpr,
    STORE_CARRY: tl.constexpr,
    FROM_BACK: tl.constexpr,
):
    """Y is multiplied by phi'(x), unless ACTIVATION_X is "identity"; x is not read then."""
    block, h, first_segment, last_segment, first_token, last_token, slot = load_item(items_ptr, num_heads, C, BLOCK_C)
    a_ptr += h * stride_ah
    b_ptr += h * stride_bh
    c_ptr += h * stride_ch
    x_ptr += h * stride_xh
    i, a, c = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_A), block * BLOCK_C + tl.arange(0, BLOCK_C)
    for segment in range(first_segment, last_segment):
        begin, end = segment_range(starts_ptr, lengths_ptr, segment, first_token, last_token)
        carry = carry_ptr + (segment * num_heads + h) * (A * C)
        if slot >= 0:
            entering = entering_ptr + (slot * num_heads + h) * (A * C)
            b_state = load_state(entering, a, c, A, C, BLOCK_A, BLOCK_C, STRIDE_SA, STRIDE_SC)
        elif HAS_CARRY:
            b_state = load_state(carry, a, c, A, C, BLOCK_A, BLOCK_C, STRIDE_SA, STRIDE_SC)
        else:
            b_state = tl.zeros([BLOCK_A, BLOCK_C], tl.float32)
        num_steps = (end - begin + BLOCK_T - 1) // BLOCK_T
        for step in range(num_steps):
            first = begin + (num_steps - 1 - step if FROM_BACK else step) * BLOCK_T
            m_t = i < tl.minimum(end - first, BLOCK_T).to(tl.int32)
            b_a = load_tokens(a_ptr + first * stride_at, i, m_t, a, stride_at, stride_aa, A, BLOCK_A)
            b_b = load_tokens(b_ptr + first * stride_bt, i, m_t, a, stride_bt, stride_ba, A, BLOCK_A)
            b_c = load_tokens(c_ptr + first * stride_ct, i, m_t, c, stride_ct, stride_cc, C, BLOCK_C)
            b_a, b_b = activated(b_a, ACTIVATION_A, DTYPE), activated(b_b, ACTIVATION_B, DTYPE)
            b_c = activated(b_c, ACTIVATION_C, DTYPE)
            b_y = read_block(b_a, b_b, b_c, b_state, i, DTYPE, PRECISION, FROM_BACK)
            if ACTIVATION_X != "identity":
                b_x = load_tokens(x_ptr + first * stride_xt, i, m_t, c, stride_xt, stride_xc, C, BLOCK_C)
                b_y *= activation_gradient(b_x.to(tl.float32), ACTIVATION_X)
            store_tokens(out_ptr + (first * num_heads + h) * C, b_y, i, m_t, c, num_heads * C, C, BLOCK_C)
            b_state = product(tl.trans(b_b), b_c, PRECISION, b_state)
        if STORE_CARRY:
            if slot < 0:
                store_state(carry, b_state, a, c, A, C, BLOCK_A, BLOCK_C, STRIDE_SA, STRIDE_SC)


def causal_attention(tokens: CausalTokens, carry: Tensor, out: Tensor, *, sizes: ItemSizes = ITEM_SIZES) -> None:
    """Write o_t = phi(q_t) Z_t, and turn carry [B, H, D, E] from the state before a sequence into that after it."""
    q, k, v, offsets, activation = tokens
    blocks.check_tokens(q=q, k=k, v=v)
    work = _plan(q, offsets, sizes)
    entering = _enter_chunks(work, k, v, carry, activation, descending=False, sizes=sizes)
    active = (activation, activation, "identity", "identity")
    on_device = blocks.to_device(work.arrays, q.device)
    _run(work, on_device, (q, k, v, None), active, carry, entering, out, store_carry=True)


def causal_attention_backward(
    grad_out: Tensor,
    tokens: CausalTokens,
    initial_z: Tensor | None,
    grad_carry: Tensor,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    *,
    sizes: ItemSizes = ITEM_SIZES,
) -> None:
    """Write dq, dk and dv, and turn grad_carry from the gradient of the last states into that of the first."""
    q, k, v, offsets, activation = tokens
    blocks.check_tokens(q=q, k=k, v=v, grad_out=grad_out)
    work = _plan(q, offsets, sizes)
    on_device = blocks.to_device(work.arrays, q.device)
    carry = None if initial_z is None else initial_z.clone(memory_format=torch.contiguous_format)
    entering = _enter_chunks(work, k, v, carry, activation, descending=False, sizes=sizes)
    last = ("identity", "identity", activation, activation)
    _run(work, on_device, (grad_out, v, k, q), last, carry, entering, grad_q, transposed=True)
    entering = _enter_chunks(work, q, grad_out, grad_carry, activation, descending=True, sizes=sizes)
    _run(work, on_device, (v, grad_out, q, k), last, grad_carry, entering, grad_k, transposed=True, from_back=True)
    # Last, because it moves the carries of whole sequences.
    first = (activation, activation, "identity", "identity")
    _run(work, on_device, (k, q, grad_out, None), first, grad_carry, entering, grad_v, from_back=True, store_carry=True)


def _plan(q: Tensor, offsets: IntArray, sizes: ItemSizes) -> WorkPlan:
    """Cut sequences into items: into chunks only if there are too few of them, because chunks are read twice."""
    return plan_work(
        Segments.from_offsets(offsets),
        num_heads=q.shape[1],
        num_processors=accelerator.accelerator_of(q).num_processors,
        sizes=replace(sizes, max_item=NO_LIMIT),
    )


def _enter_chunks(
    work: WorkPlan, k: Tensor, v: Tensor, carry: Tensor | None, activation: str, *, descending: bool, sizes: ItemSizes
) -> Tensor | None:
    """Return the states [slots, H, D, E] that enter the chunks (None if there are no chunks).

    The carries of the sequences in chunks are moved past them; those of whole sequences stay. `descending` visits
    chunks from the last one, for the gradient of states.
    """
    if not work.num_slots:
        return None
    first_token, last_token = work.items[: work.num_slots, 2], work.items[: work.num_slots, 3]
    shape = (work.num_slots, k.shape[1], k.shape[2], v.shape[2])
    totals = k.new_empty(shape, dtype=torch.float32)
    counts = totals.new_zeros(shape[:2])  # not used
    chunks = Segments(first_token, last_token - first_token)
    accumulate(StateTokens(k, v, chunks, None, activation), totals, counts, sizes=sizes)
    (sequences,) = blocks.to_device([work.sums[:, 0]], k.device)
    initial = None if carry is None else carry.index_select(0, sequences).flatten(2)
    ends = np.append(work.sums[:, 1], work.num_slots)
    entering, last = scan(
        totals.flatten(2), None, ends, initial, descending=descending, decay_after=False, store="entering", sizes=sizes
    )
    if carry is not None:
        carry.index_copy_(0, sequences, last.view(-1, *carry.shape[1:]))
    return entering


def _run(
    work: WorkPlan,
    on_device: list[Tensor],
    tokens: tuple[Tensor, Tensor, Tensor, Tensor | None],
    active: tuple[str, str, str, str],
    carry: Tensor | None,
    entering: Tensor | None,
    out: Tensor,
    *,
    transposed: bool = False,
    from_back: bool = False,
    store_carry: bool = False,
) -> None:
    """Launch the kernel for a, b, c, x and their activations; the state is S, or S^T if `transposed`.

    `on_device` holds the plan's arrays, which all launches of a plan share.
    """
    a, b, c, x = tokens
    x = a if x is None else x
    num_heads, width, part_width = a.shape[1], a.shape[2], c.shape[2]
    device = accelerator.accelerator_of(a)
    chosen = blocks.choose("causal", device, a.dtype, width, part_width, work.mean_length)
    starts, lengths, items, _ = on_device
    states = [state for state in (carry, entering) if state is not None]
    state = states[0] if states else a.new_empty(1, dtype=torch.float32)  # not read, but its type is compiled in
    blocks.launch(
        causal_kernel,
        len(items) * num_heads * -(-part_width // chosen.part),
        a,
        b,
        c,
        x,
        state if carry is None else carry,
        state if entering is None else entering,
        out,
        starts,
        lengths,
        items,
        num_heads,
        *a.stride(),
        *b.stride(),
        *c.stride(),
        *x.stride(),
        A=width,
        C=part_width,
        BLOCK_A=chosen.whole,
        BLOCK_C=chosen.part,
        STRIDE_SA=1 if transposed else part_width,
        STRIDE_SC=width if transposed else 1,
        ACTIVATION_A=active[0],
        ACTIVATION_B=active[1],
        ACTIVATION_C=active[2],
        ACTIVATION_X=active[3],
        HAS_CARRY=carry is not None,
        STORE_CARRY=store_carry,
        FROM_BACK=from_back,
        **chosen.constants,
        **chosen.options,
    )
