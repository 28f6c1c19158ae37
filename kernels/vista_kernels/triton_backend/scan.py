"""The scan of rows: a decaying carry passes from row to row of every sequence (see `Backend.scan_rows`).

    s_i = x_i + a_i c, then c = s_i;      with DECAY_AFTER  s_i = x_i + c, then c = a_i s_i

Rows x [N, H, F] of any strides, decays a [N, H], carries c [P, H, F], all float32. A program takes one sequence (or
chunk of one), one head and BLOCK_F elements, row after row. So sums run in the order of the formula, a decay of 0
forgets exactly, and nothing overflows. If sequences are too few to fill the device, long ones are cut into chunks:
first the chunks' totals and products of decays, then a scan of those, then each chunk from the carry that enters it.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from vista_kernels.segments import IntArray, Segments, cut_segments
from vista_kernels.triton_backend import accelerator, blocks
from vista_kernels.triton_backend.item_sizes import ITEM_SIZES, ItemSizes

MAX_UNCUT = 128
"""Longer sequences are cut into chunks, of at most this many rows, if there are few sequences."""
BLOCK_F = 128


@triton.jit
def scan_rows_kernel(
    x_ptr,
    decay_ptr,
    initial_ptr,
    out_ptr,
    last_ptr,
    product_ptr,
    starts_ptr,
    lengths_ptr,
    num_heads,
    stride_xn,
    stride_xh,
    stride_xf,
    stride_an,
    stride_ah,
    F: tl.constexpr,
    BLOCK_F: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    DESCENDING: tl.constexpr,
    DECAY_AFTER: tl.constexpr,
    STORE: tl.constexpr,
):
    """STORE is "rows" (s_i), "entering" (the carry before each row) or "totals" (no rows, but decays' product)."""
    program = tl.program_id(0)
    num_blocks: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    block = program % num_blocks
    h = (program // num_blocks % num_heads).to(tl.int64)
    chunk = (program // num_blocks // num_heads).to(tl.int64)
    length = tl.load(lengths_ptr + chunk)
    i = tl.load(starts_ptr + chunk)
    step: tl.constexpr = -1 if DESCENDING else 1
    if DESCENDING:
        i += length - 1
    f = (block * BLOCK_F + tl.arange(0, BLOCK_F)).to(tl.int64)
    m_f = f < F
    carry_row = (chunk * num_heads + h) * F
    x_ptr += h * stride_xh
    decay_ptr += h * stride_ah
    b_c = tl.zeros([BLOCK_F], tl.float32)
    if HAS_INITIAL:
        b_c = tl.load(initial_ptr + carry_row + f, mask=m_f, other=0.0)
    product = tl.full([], 1.0, tl.float32)
    # Every row is loaded one step ahead, because the carry makes the steps wait for each other.
    b_x = tl.load(x_ptr + i * stride_xn + f * stride_xf, mask=f < tl.where(length > 0, F, 0), other=0.0)
    for done in range(length):
        following = i + step
        m_next = f < tl.where(done + 1 < length, F, 0)
        b_next = tl.load(x_ptr + following * stride_xn + f * stride_xf, mask=m_next, other=0.0)
        row = (i * num_heads + h) * F
        if STORE == "entering":
            tl.store(out_ptr + row + f, b_c, mask=m_f)
        if HAS_DECAY:
            decay = tl.load(decay_ptr + i * stride_an)
            product *= decay
            if not DECAY_AFTER:
                b_c *= decay
        b_c += b_x
        if STORE == "rows":
            tl.store(out_ptr + row + f, b_c, mask=m_f)
        if HAS_DECAY and DECAY_AFTER:
            b_c *= decay
        i = following
        b_x = b_next
    tl.store(last_ptr + carry_row + f, b_c, mask=m_f)
    if STORE == "totals" and HAS_DECAY:
        if block == 0:
            tl.store(product_ptr + chunk * num_heads + h, product)


def scan_rows(
    x: Tensor,
    decay: Tensor | None,
    offsets: IntArray,
    initial: Tensor | None,
    *,
    descending: bool = False,
    decay_after: bool = False,
    max_uncut: int = MAX_UNCUT,
    sizes: ItemSizes = ITEM_SIZES,
) -> tuple[Tensor, Tensor]:
    """Scan the rows of every sequence, as `Backend.scan_rows` says."""
    flags = {"descending": descending, "decay_after": decay_after}
    return scan(x, decay, offsets, initial, **flags, store="rows", max_uncut=max_uncut, sizes=sizes)


def scan(
    x: Tensor,
    decay: Tensor | None,
    offsets: IntArray,
    initial: Tensor | None,
    *,
    descending: bool,
    decay_after: bool,
    store: str,
    max_uncut: int = MAX_UNCUT,
    sizes: ItemSizes = ITEM_SIZES,
) -> tuple[Tensor, Tensor]:
    """Scan rows [N, H, F]; return the results ("rows") or the carries before them ("entering"), and the last carries.

    Args:
        max_uncut: rows of the longest sequence that is never cut into chunks.

    Raises:
        ValueError: if x is not float32.
    """
    device = accelerator.accelerator_of(x)
    if x.dtype != torch.float32:
        raise ValueError(f"states are {x.dtype}: backend 'triton' scans float32; use backend='torch'")
    segments = Segments.from_offsets(offsets)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    flags = {"DESCENDING": descending, "DECAY_AFTER": decay_after}
    longest = int(segments.lengths.max(initial=0))
    programs = len(segments) * x.shape[1] * -(-x.shape[2] // BLOCK_F)
    if longest <= max_uncut or programs >= sizes.programs_per_processor * device.num_processors:
        last, _ = _scan_chunks(x, decay, segments, initial, out, STORE=store, **flags)
        return out, last
    chunk_offsets, chunks = cut_segments(offsets, min(max_uncut, max(16, math.isqrt(longest))))
    totals, products = _scan_chunks(x, decay, chunks, None, out, STORE="totals", **flags)
    # The carry that leaves a chunk is its total + its product of decays * the one that enters, before or after alike.
    product = None if decay is None else products
    entering, last = scan(
        totals,
        product,
        chunk_offsets,
        initial,
        descending=descending,
        decay_after=False,
        store="entering",
        max_uncut=max_uncut,
        sizes=sizes,
    )
    _scan_chunks(x, decay, chunks, entering, out, STORE=store, **flags)
    return out, last


def _scan_chunks(
    x: Tensor, decay: Tensor | None, chunks: Segments, initial: Tensor | None, out: Tensor, **flags: object
) -> tuple[Tensor, Tensor]:
    """Scan each chunk on its own; return the last carries [P, H, F] and the products of decays [P, H]."""
    num_heads, num_elements = x.shape[1:]
    last = x.new_empty((len(chunks), num_heads, num_elements))
    product = x.new_empty((len(chunks), num_heads))
    starts, lengths = blocks.to_device([chunks.starts, chunks.lengths], x.device)
    block_f = min(BLOCK_F, max(16, triton.next_power_of_2(num_elements)))
    blocks.launch(
        scan_rows_kernel,
        len(chunks) * num_heads * -(-num_elements // block_f),
        x,
        x if decay is None else decay,
        x if initial is None else initial.contiguous(),
        out,
        last,
        product,
        starts,
        lengths,
        num_heads,
        *x.stride(),
        *((0, 0) if decay is None else decay.stride()),
        F=num_elements,
        BLOCK_F=block_f,
        HAS_DECAY=decay is not None,
        HAS_INITIAL=initial is not None,
        **flags,
        num_warps=1,
    )
    return last, product
