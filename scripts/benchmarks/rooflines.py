"""Rooflines: the least time that work can take on this machine, from its bytes, products and activations.

    roofline = forward_roofline(16_384, 4, 64, torch.bfloat16)
    timing = interleaved({"ours": attend} | roofline.calls())
    print(timing["ours"].median_s / roofline.seconds(timing))

A roofline is the larger of the bytes' time and the matrix products' time, plus the activations' time. It is timed in
alternation with the work it bounds, on the same threads. Bytes move at the speed of a copy of the same size, in memory
that was touched before. Products run at the operator's own shapes, in the fastest form that a short measurement finds:
chunks of tokens, one or several heads at a time, either operand transposed. Activations run in the cache. Work in a
lower dtype may compute in float32, but not the reverse, which would give other results (`product_dtypes`).

Letters: T tokens, H heads, D head dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Literal

import torch

from scripts.benchmarks.benchmark import Timing, interleaved
from vista_kernels.processor import can_pack

CPU = torch.device("cpu")
LARGEST_COPY_BYTES = 1 << 28
"""Larger copies are measured at this size, far beyond the caches, and scaled."""
ACTIVATION_BYTES_PER_THREAD = 128 * 1024
CHUNKS = (256, 1024, 4096, 16_384)
"""Numbers of tokens to try per product."""
LARGEST_BATCH_ELEMENTS = 1 << 22
"""Batched products with larger operands leave the cache and are not tried."""
STATE_ITEM_BYTES = 4
"""States are float32."""


@dataclass(frozen=True, slots=True)
class RooflineWork:
    """A call, how many such calls the work equals (maybe a fraction), and a readable description."""

    call: Callable[[], object]
    times: float
    form: str

    def scaled(self, factor: float) -> RooflineWork:
        """`factor` times this work."""
        return replace(self, times=self.times * factor)


@dataclass(frozen=True, slots=True)
class Roofline:
    """The work that no implementation can avoid."""

    copy: RooflineWork
    products: tuple[RooflineWork, ...] = ()
    activations: tuple[RooflineWork, ...] = ()

    def calls(self) -> dict[str, Callable[[], object]]:
        """Contestants for `interleaved`; `seconds` reads their timing."""
        return {f"roofline {index}": work.call for index, work in enumerate(self._works())}

    def seconds(self, timing: Mapping[str, Timing]) -> float:
        """The larger of the times of bytes and products, plus that of activations."""
        copy, products, activations = self.parts(timing)
        return max(copy, products) + activations

    def parts(self, timing: Mapping[str, Timing]) -> tuple[float, float, float]:
        """Seconds of the bytes, the products and the activations."""
        seconds = [timing[f"roofline {index}"].median_s * work.times for index, work in enumerate(self._works())]
        first = 1 + len(self.products)
        return seconds[0], sum(seconds[1:first]), sum(seconds[first:])

    def describe(self, timing: Mapping[str, Timing]) -> str:
        """The parts in milliseconds, and the products' forms."""
        copy, products, activations = (f"{1e3 * part:.3g}" for part in self.parts(timing))
        forms = ", ".join(work.form for work in self.products)
        return f"roofline in ms: bytes {copy}, products {products} ({forms}), activations {activations}"

    def _works(self) -> tuple[RooflineWork, ...]:
        return self.copy, *self.products, *self.activations


def forward_roofline(num_tokens: int, num_heads: int, head_dim: int, dtype: torch.dtype) -> Roofline:
    """Roofline of quasi-linear attention over one sequence: q, k, v read, o written; Z = φ(k)ᵀ v, o = φ(q) A."""
    shape = (num_tokens, num_heads, head_dim, product_dtypes(dtype))
    elements = num_tokens * num_heads * head_dim
    return Roofline(
        copying(4 * elements * dtype.itemsize),
        (token_product("sum", *shape), token_product("map", *shape)),
        (activation("silu", 2 * elements),),
    )


def backward_roofline(num_tokens: int, num_heads: int, head_dim: int, dtype: torch.dtype) -> Roofline:
    """Roofline of its backward: q, k, v, dO read, dq, dk, dv written; dA = φ(q)ᵀ dO; maps for dφ(q), dφ(k), dv."""
    shape = (num_tokens, num_heads, head_dim, product_dtypes(dtype))
    elements = num_tokens * num_heads * head_dim
    return Roofline(
        copying(7 * elements * dtype.itemsize),
        (token_product("sum", *shape), token_product("map", *shape).scaled(3)),
        (activation("silu", 2 * elements), activation("silu_backward", 2 * elements)),
    )


def short_users_roofline(
    num_tokens: int, num_users: int, head_dim: int, dtype: torch.dtype, *, state_passes: Literal[0, 2]
) -> Roofline:
    """Roofline of the forward over many short users, one head: each forms, activates and multiplies a state of D².

    Args:
        state_passes: 0 if states never leave the cache; 2 if one operator writes them and another reads them.
    """
    mean = max(1, round(num_tokens / num_users))
    elements, state = num_tokens * head_dim, num_users * head_dim * head_dim
    several = {"chunks": (mean,), "batches": (1, 64, 256, 1024)}
    shape = (num_tokens, 1, head_dim, product_dtypes(dtype))
    return Roofline(
        copying(4 * elements * dtype.itemsize + state_passes * state * STATE_ITEM_BYTES),
        (token_product("sum", *shape, **several), token_product("map", *shape, **several)),
        (activation("silu", 2 * elements + state),),
    )


def product_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """Dtypes in which an operator on tokens of `dtype` may multiply without losing precision."""
    return (torch.float32,) if dtype == torch.float32 else (torch.float32, dtype)


def copying(num_bytes: int, device: torch.device = CPU) -> RooflineWork:
    """Moving num_bytes, reads and writes together: a copy of half as many."""
    half = max(1, num_bytes // 2)
    size = min(half, LARGEST_COPY_BYTES)
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    return RooflineWork(lambda: target.copy_(source), half / size, "copy")


def activation(kind: Literal["silu", "silu_backward"], num_elements: int) -> RooflineWork:
    """silu, or its derivative times a gradient, of num_elements in the cache, in the faster of float32 and bfloat16."""
    return _fastest_activation(kind).scaled(num_elements)


@cache
def token_product(
    kind: Literal["sum", "map"],
    num_tokens: int,
    num_heads: int,
    head_dim: int,
    dtypes: tuple[torch.dtype, ...],
    *,
    chunks: tuple[int, ...] = CHUNKS,
    batches: tuple[int, ...] = (),
) -> RooflineWork:
    """A product with D-wide tokens: "sum" over all of them, [D, T] @ [T, D], or "map" of each, [T, D] @ [D, D].

    Args:
        dtypes: dtypes to try.
        chunks: numbers of tokens per product to try; those above num_tokens are skipped.
        batches: numbers of products per batched call to try; by default one head, all heads, and four chunks of all
            heads.
    """
    batches = batches or tuple({1, num_heads, 4 * num_heads})
    tried = []
    for tokens in [chunk for chunk in chunks if chunk <= num_tokens] or [num_tokens]:
        m, k = (head_dim, tokens) if kind == "sum" else (tokens, head_dim)
        tried += products(m, head_dim, k, count=num_heads * num_tokens / tokens, dtypes=dtypes, batches=batches)
    return fastest(tried)


def products(
    m: int,
    n: int,
    k: int,
    *,
    count: float = 1,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    batches: Sequence[int] = (1,),
) -> list[RooflineWork]:
    """Forms of `count` products [m, k] @ [k, n]: dtypes, products per call, and which operands are transposed."""
    works = []
    for dtype, batch, left_T, right_T in itertools.product(dtypes, batches, (False, True), (False, True)):
        if batch > max(1, count) or (batch > 1 and batch * (m * k + k * n) > LARGEST_BATCH_ELEMENTS):
            continue
        left, right = _operand(batch, m, k, dtype, left_T), _operand(batch, k, n, dtype, right_T)
        out = torch.empty(batch, m, n, dtype=dtype)
        call = (
            partial(torch.mm, left[0], right[0], out=out[0]) if batch == 1 else partial(torch.bmm, left, right, out=out)
        )
        form = f"{batch} x [{m}, {k}]{'T' * left_T} @ [{k}, {n}]{'T' * right_T} {str(dtype).split('.')[1]}"
        works.append(RooflineWork(call, count / batch, form))
    return works


def packed_products(m: int, n: int, k: int, *, count: float = 1, dtypes: Sequence[torch.dtype]) -> list[RooflineWork]:
    """Products [m, k] @ [k, n] with weights that are packed beforehand (`vista.model.layers`)."""
    works = []
    for dtype in filter(can_pack, dtypes):
        x, weight = (torch.randn(size, k).to(dtype) for size in (m, n))
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        call = partial(torch.ops.mkldnn._linear_pointwise, x, packed, None, "none", [], "")
        works.append(RooflineWork(call, count, f"1 x [{m}, {k}] @ packed [{k}, {n}] {str(dtype).split('.')[1]}"))
    return works


def matmul_roofline(
    m: int, n: int, k: int, *, count: int = 1, dtypes: Sequence[torch.dtype] = (torch.float32,), weights: bool = False
) -> float:
    """Seconds of `count` products [m, k] @ [k, n]: a lower bound for 2·m·n·k·count operations on this machine.

    Args:
        weights: whether the right matrix is constant.
    """
    works = products(m, n, k, count=count, dtypes=dtypes, batches=tuple({1, count}))
    work = fastest([*works, *(packed_products(m, n, k, count=count, dtypes=dtypes) if weights else [])])
    return work.times * interleaved({"product": work.call})["product"].median_s


def fastest(works: Sequence[RooflineWork]) -> RooflineWork:
    """The form that takes the least time for the whole work, by a short measurement."""
    calls = {str(index): work.call for index, work in enumerate(works)}
    timing = interleaved(calls, rounds=3, warmup=1, min_sample_s=0.001, max_seconds=5)
    return works[min(range(len(works)), key=lambda index: timing[str(index)].median_s * works[index].times)]


def _operand(batch: int, rows: int, columns: int, dtype: torch.dtype, transposed: bool) -> torch.Tensor:
    """A random [batch, rows, columns], stored column by column if `transposed`."""
    if transposed:
        return torch.randn(batch, columns, rows).to(dtype).transpose(1, 2)
    return torch.randn(batch, rows, columns).to(dtype)


@cache
def _fastest_activation(kind: Literal["silu", "silu_backward"]) -> RooflineWork:
    """The activation of one element."""
    works = []
    for dtype in (torch.float32, torch.bfloat16):
        numel = ACTIVATION_BYTES_PER_THREAD * torch.get_num_threads() // dtype.itemsize
        x, out = torch.randn(numel).to(dtype), torch.empty(numel, dtype=dtype)
        if kind == "silu":
            call: Callable[[], object] = partial(torch.ops.aten.silu.out, x, out=out)
        else:
            call = partial(torch.ops.aten.silu_backward.grad_input, torch.ones_like(x), x, grad_input=out)
        works.append(RooflineWork(call, 1 / numel, f"{kind} {dtype}"))
    return fastest(works)
