"""Adding the partial states of long segments in the order of their chunks: the second stage of the reductions.

    z_b (+)= f * sum_p part_p [D, E]      n_b += sum_p part_n_p      f = 1, or phi2'(z_b c_b) c_b in read's backward

Partial states are [num_slots, H, D * E] float32. A program adds one block of one segment's and head's state.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vista_kernels.triton_backend import blocks
from vista_kernels.triton_backend.tile_access import activation_gradient
from vista_kernels.triton_backend.work_plan import WorkPlan

BLOCK_F, BLOCK_P = 256, 16
"""Elements of a partial state, and partial states, that are read at once."""


@triton.jit
def sum_parts_kernel(
    part_ptr,
    part_n_ptr,
    out_ptr,
    n_ptr,
    z_ptr,
    scale_ptr,
    sums_ptr,
    num_heads,
    F: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ADD: tl.constexpr,
    HAS_COUNT: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    STATE_ACTIVATION: tl.constexpr,
):
    program = tl.program_id(0)
    num_blocks: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    block = program % num_blocks
    h = (program // num_blocks % num_heads).to(tl.int64)
    sums_ptr += (program // num_blocks // num_heads).to(tl.int64) * 3
    segment, first, count = tl.load(sums_ptr), tl.load(sums_ptr + 1), tl.load(sums_ptr + 2)
    f = block * BLOCK_F + tl.arange(0, BLOCK_F)
    m_f = f < F
    b_sum = tl.zeros([BLOCK_F], tl.float32)
    b_n = tl.zeros([BLOCK_P], tl.float32)
    for p in range(first, first + count, BLOCK_P):
        slot = p + tl.arange(0, BLOCK_P)
        m_p = slot < first + count
        row = slot * num_heads + h
        m = m_p[:, None] & m_f[None, :]
        b_sum += tl.sum(tl.load(part_ptr + row[:, None] * F + f[None, :], mask=m, other=0.0), 0)
        if HAS_COUNT:
            b_n += tl.load(part_n_ptr + row, mask=m_p, other=0.0)
    row = segment * num_heads + h
    if HAS_FACTOR:
        b_c = 1.0
        if HAS_SCALE:
            b_c = tl.load(scale_ptr + row)
        b_z = tl.load(z_ptr + row * F + f, mask=m_f, other=0.0)
        b_sum *= activation_gradient(b_z * b_c, STATE_ACTIVATION) * b_c
    if ADD:
        b_sum += tl.load(out_ptr + row * F + f, mask=m_f, other=0.0)
    tl.store(out_ptr + row * F + f, b_sum, mask=m_f)
    if HAS_COUNT:
        if block == 0:
            tl.store(n_ptr + row, tl.load(n_ptr + row) + tl.sum(b_n, 0))


def new_parts(work: WorkPlan, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return uninitialized workspace for a batch's partial states [slots, H, D, E] and weight sums [slots, H]."""
    num_heads = z.shape[1]
    part = torch.empty((work.num_slots, *z.shape[1:]), dtype=torch.float32, device=z.device)
    return part, torch.empty((work.num_slots, num_heads), dtype=torch.float32, device=z.device)


def add_parts(part: Tensor, part_n: Tensor, sums: Tensor, z: Tensor, n: Tensor, *, fresh: bool) -> None:
    """Write (or add, unless fresh) each long segment's sum of partial states to z; add its partial weight sums to n."""
    _launch(part, part_n, sums, z, n, z, None, ADD=not fresh, HAS_COUNT=True, HAS_FACTOR=False, STATE_ACTIVATION="")


def write_state_gradient(
    part: Tensor, sums: Tensor, grad_z: Tensor, z: Tensor, scale: Tensor | None, state_activation: str
) -> None:
    """Write dz = phi2'(z c) c * (sum of partial states) of each long segment."""
    flags = {"ADD": False, "HAS_COUNT": False, "HAS_FACTOR": True}
    _launch(part, part, sums, grad_z, grad_z, z, scale, STATE_ACTIVATION=state_activation, **flags)


def _launch(
    part: Tensor,
    part_n: Tensor,
    sums: Tensor,
    out: Tensor,
    n: Tensor,
    z: Tensor,
    scale: Tensor | None,
    **flags: object,
) -> None:
    num_heads, num_elements = out.shape[1], out.shape[2] * out.shape[3]
    blocks.launch(
        sum_parts_kernel,
        sums.shape[0] * num_heads * -(-num_elements // BLOCK_F),
        part,
        part_n,
        out,
        n,
        z,
        z if scale is None else scale,
        sums,
        num_heads,
        F=num_elements,
        BLOCK_F=BLOCK_F,
        BLOCK_P=BLOCK_P,
        HAS_SCALE=scale is not None,
        **flags,
        num_warps=4,
    )
