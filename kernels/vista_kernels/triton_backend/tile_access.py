"""What all kernels share: items and segments, loads and stores of tiles, activations, and operands of products.

A tile holds BLOCK_T tokens of one head, [BLOCK_T, BLOCK_C], or one state, [BLOCK_D, BLOCK_E]. A width that is not a
power of two, or is below 16, is padded. Padding is loaded as 0 and all activations map 0 to 0, so it adds nothing.
Token numbers are int64, so no address overflows. Names: `b_x` is a tile or a state in registers, `m_t` a mask of
tokens; i, d and e number a block's tokens and a state's rows and columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vista_kernels.triton_backend import accelerator

INTERPRETED = tl.constexpr(accelerator.INTERPRETED)
"""In Triton's interpreter, products of bfloat16 tiles are products of their bits, and casts to bfloat16 truncate."""


@triton.jit
def load_item(items_ptr, num_heads, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Return what a program works on: a block of BLOCK columns of WIDTH, a head, and the five numbers of an item.

    Programs count blocks first, then heads, then items. The numbers are first and last segment, first and last token,
    and slot (work_plan.py). A chunk of a long segment has token limits; a run of segments has none.
    """
    num_blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    block = program % num_blocks
    h = (program // num_blocks % num_heads).to(tl.int64)
    items_ptr += (program // num_blocks // num_heads).to(tl.int64) * 5
    first_token, last_token, slot = tl.load(items_ptr + 2), tl.load(items_ptr + 3), tl.load(items_ptr + 4)
    return block, h, tl.load(items_ptr), tl.load(items_ptr + 1), first_token, last_token, slot


@triton.jit
def segment_range(starts_ptr, lengths_ptr, segment, first_token, last_token):
    """Return the first and last (excluded) token of a segment within the token limits of an item (work_plan.py)."""
    begin = tl.load(starts_ptr + segment)
    end = tl.minimum(begin + tl.load(lengths_ptr + segment), last_token)
    return tl.maximum(begin, first_token), end


@triton.jit
def load_tokens(ptr, i, m_t, c, stride_t, stride_c, WIDTH: tl.constexpr, BLOCK_C: tl.constexpr):
    """Load columns c of rows i of one head's tokens, [BLOCK_T, BLOCK_C]; 0 where m_t is False."""
    m = m_t[:, None]
    if WIDTH % BLOCK_C != 0:
        m = m & (c < WIDTH)[None, :]
    return tl.load(ptr + i[:, None] * stride_t + c[None, :] * stride_c, mask=m, other=0.0)


@triton.jit
def store_tokens(ptr, tile, i, m_t, c, stride_t, WIDTH: tl.constexpr, BLOCK_C: tl.constexpr):
    """Store to columns c of rows i of one head's tokens; outputs are contiguous."""
    m = m_t[:, None]
    if WIDTH % BLOCK_C != 0:
        m = m & (c < WIDTH)[None, :]
    tl.store(ptr + i[:, None] * stride_t + c[None, :], rounded(tile, ptr.dtype.element_ty), mask=m)


@triton.jit
def load_state(
    ptr,
    d,
    e,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STRIDE_D: tl.constexpr,
    STRIDE_E: tl.constexpr,
):
    """Load rows d and columns e of a state [D, E], [BLOCK_D, BLOCK_E]."""
    places = d[:, None] * STRIDE_D + e[None, :] * STRIDE_E
    if D % BLOCK_D != 0 or E % BLOCK_E != 0:
        return tl.load(ptr + places, mask=(d < D)[:, None] & (e < E)[None, :], other=0.0)
    else:
        return tl.load(ptr + places)


@triton.jit
def store_state(
    ptr,
    tile,
    d,
    e,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STRIDE_D: tl.constexpr,
    STRIDE_E: tl.constexpr,
):
    """Store to rows d and columns e of a state [D, E]."""
    places = d[:, None] * STRIDE_D + e[None, :] * STRIDE_E
    if D % BLOCK_D != 0 or E % BLOCK_E != 0:
        tl.store(ptr + places, tile, mask=(d < D)[:, None] & (e < E)[None, :])
    else:
        tl.store(ptr + places, tile)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """Return phi(x) of a float32 x."""
    if ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    elif ACTIVATION == "relu":
        return tl.where(x < 0, 0.0, x)
    else:
        return x


@triton.jit
def activated(x, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr):
    """Return phi(x) of a tile of tokens, as an operand of products."""
    if ACTIVATION == "identity":
        return x
    else:
        return rounded(activate(x.to(tl.float32), ACTIVATION), DTYPE)


@triton.jit
def activation_gradient(x, ACTIVATION: tl.constexpr):
    """Return phi'(x) of a float32 x."""
    if ACTIVATION == "silu":
        s = tl.sigmoid(x)
        return s * (1 + x * (1 - s))
    elif ACTIVATION == "relu":
        return tl.where(x > 0, 1.0, 0.0)
    else:
        return tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def power_of_two_below(x):
    """Return the largest power of two up to x > 0, kept within 2^-95 .. 2^97 so that its inverse is exact too."""
    bits = x.to(tl.int32, bitcast=True) & 0x7F800000
    bits = tl.minimum(tl.maximum(bits, 0x10000000), 0x70000000)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """Round a float32 tile to the nearest numbers of a dtype."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def product(a, b, PRECISION: tl.constexpr, total=None):
    """Return the product of two tiles of one dtype, summed in float32, plus a total."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def operand(x, DTYPE: tl.constexpr):
    """Round a float32 tile to the dtype in which it is multiplied; return it and the factor to multiply the product by.

    float16 ends at 65504, and a state may sum 10^6 tokens. So a float16 tile is divided by a power of two, which rounds
    nothing and brings its largest value to between 128 and 256.
    """
    if tl.float16 == DTYPE:
        factor = power_of_two_below(tl.max(tl.max(tl.abs(x), 1), 0)) * 0.0078125
        return (x * (1 / factor)).to(DTYPE), factor
    else:
        return rounded(x, DTYPE), 1.0


@triton.jit
def row_operand(x, DTYPE: tl.constexpr):
    """Like `operand`, but with one factor per row [rows, 1], so that no row depends on another."""
    if tl.float16 == DTYPE:
        factor = power_of_two_below(tl.max(tl.abs(x), 1, keep_dims=True)) * 0.0078125
        return (x * (1 / factor)).to(DTYPE), factor
    else:
        return rounded(x, DTYPE), 1.0
