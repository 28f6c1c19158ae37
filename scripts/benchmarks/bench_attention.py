"""Benchmark attention against the machine's rooflines and against baselines, with head size 64.

    python -m scripts.benchmarks.bench_attention

On a CPU (`--device cpu`, or `auto` if torch sees no GPU):

- quasi-linear attention (QLA), forward and backward, over its roofline (rooflines.py). If the roofline is below 1 ms,
  there is no bar and the case is the microseconds beyond the roofline;
- QLA and SDPA at 16,384 events, each in its faster dtype;
- a training step of the bidirectional summarizer (3 layers, 32 seeds, 16,384 events per batch) with QLA, with SDPA and
  with HSTU's attention, each in its faster dtype;
- many short users (0 to 50 events), over their own roofline;
- time per event at 10^6 events over that at 10^4.

Outputs are fresh tensors, in memory that the process keeps (`vista.device.keep_freed_memory`), as in vista's commands.

On a GPU, all cases use bfloat16, from 65,536 packed tokens. A share compares the bytes per second that QLA must move (4
streams of tokens forward, 7 backward) with those of a large copy on the same device. Baselines get the same users of
equal length: SDPA (FlashAttention), HSTU's attention in blocks, torch.compile of the formula and of our torch backend,
and FLA's chunk_linear_attn (causal, without activations) if FLA is installed.

All contestants of a case, including its roofline, run in alternation in this process. Results that must be equal are
compared before they are timed.

Baselines take users of equal length: q [B, Q, H, D], k and v [B, T, H, D] -> [B, Q, H, D]. SDPA is torch's softmax
attention, unmasked. HSTU's attention is pointwise: o = silu(q kᵀ) v / T; its relative bias, which would only slow it
down, is left out. torch has no kernel for it and the plain formula writes T² numbers, so we compute it in blocks of
queries. All blocks share one buffer of scores, and the backward recomputes the scores.

Letters: B users, Q queries, T keys, H heads, D head dim, N = B·H.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from scripts.benchmarks.benchmark import BenchmarkRecorder, Timing, benchmark_parser, interleaved, recording
from scripts.benchmarks.rooflines import (
    LARGEST_COPY_BYTES,
    Roofline,
    backward_roofline,
    copying,
    forward_roofline,
    short_users_roofline,
)
from vista.config import ModelConfig
from vista.config.checks import Mixing
from vista.device import keep_freed_memory, resolve_device, set_threads
from vista.model import summarizer
from vista.model.features import Schema
from vista.model.summarizer import Stage1Config, Summarizer
from vista_kernels import accumulate_state, quasi_linear_attention, read_state

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
BLOCK_SCORES = (1 << 16, 1 << 18, 1 << 20, 1 << 22)
"""Scores that a block of HSTU's attention may hold; `fastest_block` chooses one of them."""
PILOT_QUERIES, PILOT_ITEMS = 1024, 8
HEAD_DIM, NUM_SEEDS, NUM_LAYERS = 64, 32, 3
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}
"""Largest error that counts as equal, relative to the largest value."""
DIMS = (64, 256)
DTYPES = (torch.float32, torch.bfloat16)
LEAST_ROOFLINE_S = 1e-3


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention."""
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def hstu(q: Tensor, k: Tensor, v: Tensor, *, block_scores: int) -> Tensor:
    """HSTU's attention in blocks of at most block_scores scores, but at least one row of T."""
    B, _, H, _ = q.shape
    rows = (x.transpose(1, 2).flatten(0, 1).contiguous() for x in (q, k, v))
    out: Tensor = _BlockedHSTU.apply(*rows, block_scores)  # type: ignore[no-untyped-call]
    return out.view(B, H, *out.shape[1:]).transpose(1, 2)


def plain_hstu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """HSTU's attention by its formula, with all T² scores at once."""
    scores = F.silu(torch.einsum("bqhd,bthd->bhqt", q, k)) / k.shape[1]
    return torch.einsum("bhqt,bthd->bqhd", scores, v)


def plain_quasi_linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Our attention by its formula, normalized by length: o = silu(q) silu(silu(k)ᵀ v / T)."""
    state = torch.einsum("bthd,bthe->bhde", F.silu(k), v) / k.shape[1]
    return torch.einsum("bqhd,bhde->bqhe", F.silu(q), F.silu(state))


def fastest_block(
    num_users: int,
    num_keys: int,
    num_heads: int,
    head_dim: int,
    like: Tensor,
    *,
    block_scores: Sequence[int] = BLOCK_SCORES,
) -> int:
    """The block_scores with the fastest forward and backward of HSTU, by a short measurement on a part of the work.

    Args:
        like: a tensor of the dtype and device to use.
        block_scores: the sizes to try.
    """
    users = min(num_users, max(1, PILOT_ITEMS // num_heads))
    shape = (users, num_keys, num_heads, head_dim)
    k, v = (torch.randn(shape).to(like).requires_grad_() for _ in range(2))
    q = k.detach()[:, :PILOT_QUERIES].clone().requires_grad_()

    def step(scores: int) -> object:
        return torch.autograd.grad(hstu(q, k, v, block_scores=scores).sum(), (q, k, v))

    wait = torch.cuda.synchronize if like.is_cuda else None
    calls = {str(scores): partial(step, scores) for scores in block_scores}
    timing = interleaved(calls, rounds=3, warmup=1, max_seconds=10, synchronize=wait)
    return int(min(timing, key=lambda scores: timing[scores].median_s))


@contextmanager
def attention_replaced(attention: Attention) -> Iterator[None]:
    """Make every bidirectional `Summarizer` attend with `attention`, also for the seeds of the last layer.

    There our model writes a state that the seeds read. A baseline has no state, so the keys and values take its place.
    """

    def quasi_linear_attention(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, **_: Any) -> Tensor:
        return attention(*(_by_user(x, offsets) for x in (q, k, v))).flatten(0, 1)

    def accumulate_state(k: Tensor, v: Tensor, offsets: Tensor, **_: Any) -> tuple[tuple[Tensor, Tensor], None]:
        return (_by_user(k, offsets), _by_user(v, offsets)), None

    def read_state(q: Tensor, z: tuple[Tensor, Tensor], n: None, offsets: Tensor, **_: Any) -> Tensor:
        return attention(_by_user(q, offsets), *z).flatten(0, 1)

    with patch.multiple(
        summarizer,
        quasi_linear_attention=quasi_linear_attention,
        accumulate_state=accumulate_state,
        read_state=read_state,
    ):
        yield


def _by_user(x: Tensor, offsets: Tensor) -> Tensor:
    """[B·T, H, D] -> [B, T, H, D], a view."""
    lengths = offsets.diff()
    if len(lengths) == 0 or not bool((lengths == lengths[0]).all()):
        raise ValueError(f"offsets: baselines take users of equal length, got {lengths.tolist()}")
    return x.view(len(lengths), -1, *x.shape[1:])


class _BlockedHSTU(torch.autograd.Function):
    """q [N, Q, D], k and v [N, T, D] contiguous -> [N, Q, D].

    The sums of dk and dv over blocks use the tokens' dtype, which is fastest but not most precise in bfloat16.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, block_scores: int) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(q, k, v)
        ctx.block_scores = block_scores
        out = torch.empty_like(q)
        (scores,) = _buffers(1, q, k, block_scores)
        for items, rows in _blocks(q, k, block_scores):
            block = _product(scores, q[items, rows], k[items].transpose(1, 2))
            torch.ops.aten.silu.out(block, out=block)
            torch.bmm(block, v[items], out=out[items, rows])
        return out.div_(k.shape[1])

    @staticmethod
    def backward(ctx, grad_out: Tensor):  # type: ignore[no-untyped-def]
        q, k, v = ctx.saved_tensors
        grad_out = grad_out.contiguous() / k.shape[1]
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        first, second, third = _buffers(3, q, k, ctx.block_scores)
        for items, rows in _blocks(q, k, ctx.block_scores):
            queries, grad = q[items, rows], grad_out[items, rows]
            scores = _product(first, queries, k[items].transpose(1, 2))
            attended = second[: scores.numel()].view(scores.shape)
            torch.ops.aten.silu.out(scores, out=attended)
            grad_v[items].baddbmm_(attended.transpose(1, 2), grad)
            grad_scores = _product(third, grad, v[items].transpose(1, 2))
            torch.ops.aten.silu_backward.grad_input(grad_scores, scores, grad_input=attended)
            torch.bmm(attended, k[items], out=grad_q[items, rows])
            grad_k[items].baddbmm_(attended.transpose(1, 2), queries)
        return grad_q, grad_k, grad_v, None


def _blocks(q: Tensor, k: Tensor, block_scores: int) -> Iterator[tuple[slice, slice]]:
    """Items and query rows of each block: several whole items, or some queries of one item."""
    N, Q, _ = q.shape
    rows = max(1, block_scores // k.shape[1])
    items = max(1, rows // Q)
    for item in range(0, N, items):
        for row in range(0, Q, rows):
            yield slice(item, item + items), slice(row, row + rows)


def _buffers(count: int, q: Tensor, k: Tensor, block_scores: int) -> list[Tensor]:
    """`count` buffers for the scores of a block."""
    size = min(max(block_scores, k.shape[1]), q.shape[0] * q.shape[1] * k.shape[1])
    return [q.new_empty(size) for _ in range(count)]


def _product(buffer: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a @ b, written to the buffer."""
    shape = (a.shape[0], a.shape[1], b.shape[2])
    return torch.bmm(a, b, out=buffer[: shape[0] * shape[1] * shape[2]].view(shape))


class AttentionTokens:
    """Random q, k, v [T, H, D] of packed users that require gradients, and a gradient of the output."""

    def __init__(
        self, lengths: Sequence[int], dim: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        torch.manual_seed(0)
        self.offsets = torch.tensor([0, *lengths]).cumsum(0)
        shape = (sum(lengths), dim // HEAD_DIM, HEAD_DIM)
        self.q, self.k, self.v = (torch.randn(shape).to(device, dtype).requires_grad_() for _ in range(3))
        self.grad = torch.randn(shape).to(device, dtype)

    def attend(self) -> Tensor:
        """QLA, normalized by length."""
        return quasi_linear_attention(self.q, self.k, self.v, self.offsets, normalization="length")

    @torch.no_grad()
    def forward(self) -> Tensor:
        """QLA without gradients."""
        return self.attend()

    def backward(self) -> Callable[[], tuple[Tensor, ...]]:
        """A call that runs only QLA's backward."""
        out = self.attend()
        return lambda: torch.autograd.grad(out, (self.q, self.k, self.v), self.grad, retain_graph=True)

    @torch.no_grad()
    def write_and_read(self, queries: Tensor, query_offsets: Tensor) -> Tensor:
        """The separable path: accumulate a state from k and v, then read it by queries."""
        z, n = accumulate_state(self.k, self.v, self.offsets)
        return read_state(queries, z, n, query_offsets, normalization="length")

    def by_user(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """q, k and v [B, T, H, D] of users of equal length, as new leaves."""
        shape = (len(self.offsets) - 1, -1, *self.q.shape[1:])
        return [x.detach().to(dtype).view(shape).requires_grad_() for x in (self.q, self.k, self.v)]


class AttentionStep:
    """A training step of the bidirectional summarizer on users of equal length."""

    def __init__(self, num_users: int, length: int, dim: int) -> None:
        torch.manual_seed(0)
        config = ModelConfig(
            dim=dim,
            num_heads=dim // HEAD_DIM,
            num_seeds=NUM_SEEDS,
            num_layers=NUM_LAYERS,
            mixing=Mixing.bidirectional,
            conv_width=1,
        )
        self.model = Summarizer(Stage1Config.of(config, Schema([], False, None, [])), config.dropout)
        self.tokens = torch.randn(num_users * length, dim, requires_grad=True)
        self.offsets = torch.arange(num_users + 1) * length
        self.weight = torch.randn(num_users, NUM_SEEDS, dim)  # the plain sum of a layer norm has no gradient

    def summarize(self, dtype: torch.dtype, attention: Attention | None) -> Tensor:
        """Summaries [B, S, M], in bfloat16 under autocast, as in the trainer; None stands for our attention."""
        replaced = nullcontext() if attention is None else attention_replaced(attention)
        with replaced, torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return self.model.summarize_set(self.tokens, self.offsets)

    def run(self, dtype: torch.dtype, attention: Attention | None) -> None:
        """Forward and backward, with dropout."""
        self.model.zero_grad(set_to_none=True)
        self.tokens.grad = None
        loss = (self.summarize(dtype, attention).float() * self.weight).sum()
        torch.autograd.backward(loss)


def check(tokens: AttentionTokens) -> None:
    """Compare QLA of users of equal length, and its gradients, with the formula in float64 on the same tokens."""
    exact = tokens.by_user(torch.float64)
    expected = plain_quasi_linear(*exact)
    grads = torch.autograd.grad(expected, exact, tokens.grad.double().view(expected.shape))
    ours = [tokens.forward(), *tokens.backward()()]
    for name, mine, true in zip(("o", "dq", "dk", "dv"), ours, [expected, *grads], strict=True):
        assert_equal(name, mine, true)


def assert_equal(name: str, ours: Tensor, expected: Tensor) -> None:
    """Require equality up to the rounding of the dtype of `ours`."""
    error = (ours.detach().double() - expected.detach().double().reshape(ours.shape)).abs().max()
    limit = TOLERANCE[ours.dtype] * float(expected.detach().abs().max())
    assert float(error) <= limit, f"{name}: error {float(error)} over {limit}"


@dataclass(frozen=True, slots=True)
class AttentionSizes:
    """Numbers of events and users of the cases."""

    lengths: tuple[int, ...] = (1024, 4096, 16_384, 65_536)
    sdpa: tuple[int, str] = (16_384, "ratio >= 50")
    """Events of the comparison with SDPA, and its bar."""
    steps: tuple[tuple[int, str], ...] = ((1024, "ratio > 1"), (4096, "ratio >= 5"), (16_384, "ratio >= 20"))
    """Events per user of a training step, and its bar."""
    step_tokens: int = 16_384
    num_users: int = 100_000
    growth: tuple[int, int] = (10_000, 1_000_000)
    rounds: int = 15


QUICK = AttentionSizes(
    lengths=(1024,),
    sdpa=(1024, "ratio > 1"),
    steps=((256, "ratio > 1"),),
    step_tokens=512,
    num_users=2000,
    growth=(1_000, 10_000),
    rounds=3,
)


def over_roofline(
    recorder: BenchmarkRecorder, case: str, call: Callable[[], object], roofline: Roofline, bar: float, rounds: int
) -> None:
    """Record a call's time against its roofline, or the time beyond it if the roofline is below LEAST_ROOFLINE_S."""
    timing = interleaved({"ours": call} | roofline.calls(), rounds=rounds)
    ours, least = timing["ours"], roofline.seconds(timing)
    print(f"        {case}: {1e3 * ours.median_s:.3g} ms; {roofline.describe(timing)}", flush=True)
    if least < LEAST_ROOFLINE_S:
        recorder.add(case, 1e6 * (ours.median_s - least), "µs beyond the roofline", spread=1e6 * ours.spread_s)
        return
    recorder.add(
        case,
        1e3 * ours.median_s,
        "ms",
        baseline=1e3 * least,
        bar=f"value <= {bar:g} * baseline",
        spread=1e3 * ours.spread_s,
    )


def bench_rooflines(recorder: BenchmarkRecorder, sizes: AttentionSizes) -> None:
    """QLA forward and backward of one sequence over their rooflines."""
    for length in sizes.lengths:
        for dim in DIMS:
            for dtype in DTYPES:
                tokens = AttentionTokens([length], dim, dtype)
                check(tokens)
                shape = (length, dim // HEAD_DIM, HEAD_DIM, dtype)
                name = f"{length:,} events, d={dim}, {name_of(dtype)}"
                over_roofline(
                    recorder, f"QLA forward, {name}", tokens.forward, forward_roofline(*shape), 2, sizes.rounds
                )
                roofline = backward_roofline(*shape)
                over_roofline(recorder, f"QLA backward, {name}", tokens.backward(), roofline, 2.5, sizes.rounds)


def bench_sdpa(recorder: BenchmarkRecorder, sizes: AttentionSizes) -> None:
    """QLA forward against SDPA, each in its faster dtype."""
    length, bar = sizes.sdpa
    for dim in DIMS:
        calls: dict[str, Callable[[], object]] = {}
        for dtype in DTYPES:
            tokens = AttentionTokens([length], dim, dtype)
            calls[f"QLA {name_of(dtype)}"] = tokens.forward
            # [1, H, T, D], SDPA's fastest layout.
            q, k, v = (x.detach().transpose(1, 2).contiguous() for x in tokens.by_user())
            calls[f"SDPA {name_of(dtype)}"] = partial(F.scaled_dot_product_attention, q, k, v)
        timing = interleaved(calls, rounds=min(sizes.rounds, 5), warmup=1)
        against_baselines(recorder, f"QLA forward, {length:,} events, d={dim}", timing, bar)


def against_baselines(recorder: BenchmarkRecorder, case: str, timing: Mapping[str, Timing], bar: str) -> None:
    """Record our faster dtype against each baseline's. Contestants are named "<who> <dtype>", ours "QLA <dtype>"."""
    print(
        f"        {case}, ms: " + ", ".join(f"{name} {1e3 * t.median_s:.4g}" for name, t in timing.items()), flush=True
    )
    ours = fastest_of(timing, "QLA")
    for baseline in dict.fromkeys(name.split()[0] for name in timing if not name.startswith("QLA ")):
        recorder.add_time(f"{case}, against {baseline}", ours, "ms", baseline=fastest_of(timing, baseline), bar=bar)


def fastest_of(timing: Mapping[str, Timing], who: str) -> Timing:
    """The faster dtype of one contestant."""
    return min((each for name, each in timing.items() if name.split()[0] == who), key=lambda each: each.median_s)


def bench_steps(recorder: BenchmarkRecorder, sizes: AttentionSizes) -> None:
    """The training step with our attention against the step with each baseline's attention."""
    for dim in DIMS:
        for length, bar in sizes.steps:
            users, heads = sizes.step_tokens // length, dim // HEAD_DIM
            step = AttentionStep(users, length, dim)
            calls: dict[str, Callable[[], object]] = {}
            for dtype in DTYPES:
                block = fastest_block(users, length, heads, HEAD_DIM, torch.empty(0, dtype=dtype))
                print(f"        HSTU, {length:,} events, {name_of(dtype)}: blocks of {block:,} scores", flush=True)
                blocked = partial(hstu, block_scores=block)
                check_baselines(step, dtype, blocked)
                for name, attention in {"QLA": None, "SDPA": sdpa, "HSTU": blocked}.items():
                    calls[f"{name} {name_of(dtype)}"] = partial(step.run, dtype, attention)
            timing = interleaved(calls, rounds=min(sizes.rounds, 7), warmup=1, max_seconds=45)
            against_baselines(recorder, f"training step, {users} x {length:,} events, d={dim}", timing, bar)


@torch.no_grad()
def check_baselines(step: AttentionStep, dtype: torch.dtype, blocked: Attention) -> None:
    """Require that HSTU in blocks equals HSTU, and that the model with a baseline's attention differs from ours."""
    q, k, v = (torch.randn(2, 300, 2, HEAD_DIM).to(dtype) for _ in range(3))
    assert_equal("HSTU", blocked(q, k, v), plain_hstu(q.double(), k.double(), v.double()))
    step.model.eval()
    ours, *others = (step.summarize(dtype, attention) for attention in (None, sdpa, blocked))
    step.model.train()
    for other in others:
        assert bool(other.isfinite().all()) and not torch.allclose(ours, other, atol=0.1)


def bench_short_users(recorder: BenchmarkRecorder, sizes: AttentionSizes) -> None:
    """Forward of users with 0 to 50 events, d=64, over a roofline that includes their states."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 51, (sizes.num_users,), generator=generator).tolist()
    for dtype in DTYPES:
        tokens = AttentionTokens(lengths, HEAD_DIM, dtype)
        read = partial(tokens.write_and_read, tokens.q.detach(), tokens.offsets)
        assert_equal("read of a state", read(), tokens.forward())
        shape = (sum(lengths), len(lengths), HEAD_DIM, dtype)
        name = f"{sizes.num_users:,} users of 0 to 50 events, d={HEAD_DIM}, {name_of(dtype)}"
        rounds = min(sizes.rounds, 7)
        roofline = short_users_roofline(*shape, state_passes=0)
        over_roofline(recorder, f"QLA forward, {name}", tokens.forward, roofline, 2, rounds)
        roofline = short_users_roofline(*shape, state_passes=2)
        over_roofline(recorder, f"accumulate and read, {name}", read, roofline, 2, rounds)


def bench_growth(recorder: BenchmarkRecorder, sizes: AttentionSizes) -> None:
    """Time per event of one long user against a user of a hundredth of the length, d=64."""
    for dtype in DTYPES:
        calls: dict[str, Callable[[], object]] = {}
        seeds, seed_offsets = torch.randn(NUM_SEEDS, 1, HEAD_DIM).to(dtype), torch.tensor([0, NUM_SEEDS])
        for length in sizes.growth:
            tokens = AttentionTokens([length], HEAD_DIM, dtype)
            calls[f"QLA forward {length}"] = tokens.forward
            calls[f"accumulate and read by {NUM_SEEDS} {length}"] = partial(tokens.write_and_read, seeds, seed_offsets)
        timing = interleaved(calls, rounds=sizes.rounds)
        short, long = sizes.growth
        for name in ("QLA forward", f"accumulate and read by {NUM_SEEDS}"):
            each = {length: timing[f"{name} {length}"] for length in sizes.growth}
            recorder.add(
                f"{name}, d={HEAD_DIM}, {name_of(dtype)}: time per event at {long:,} over that at {short:,} events",
                each[long].median_s / each[short].median_s * short / long,
                "times",
                bar="value <= 1.25",
                spread=each[long].spread_s / each[short].median_s * short / long,
            )


def name_of(dtype: torch.dtype) -> str:
    """`float32` of torch.float32."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True)
class AttentionSizesOnGpu:
    """Sizes of the cases."""

    dims: tuple[int, ...] = (64, 128, 256)
    batches: tuple[tuple[int, int], ...] = ((64, 1024), (1, 65_536), (1, 1 << 20))
    """Users and events per user of the shares."""
    baseline_batches: tuple[tuple[int, int], ...] = ((64, 1024), (4, 16_384))
    """Users and events per user of the comparisons with baselines."""
    block_scores: tuple[int, ...] = BLOCK_SCORES
    """Sizes of HSTU's blocks to try."""
    copy_bytes: int = LARGEST_COPY_BYTES
    """Bytes that the copy reads, and writes."""


QUICK_ON_GPU = AttentionSizesOnGpu(dims=(64,), batches=((64, 1024),), baseline_batches=((64, 1024),))


def bench_on_gpu(recorder: BenchmarkRecorder, device: torch.device, sizes: AttentionSizesOnGpu) -> None:
    """Run all cases."""
    for dim in sizes.dims:
        for users, length in sizes.batches:
            bench_share(recorder, users, length, dim, device, sizes.copy_bytes)
        for users, length in sizes.baseline_batches:
            bench_baselines(recorder, users, length, dim, device, sizes.block_scores)


def bench_share(
    recorder: BenchmarkRecorder, users: int, length: int, dim: int, device: torch.device, copy_bytes: int
) -> None:
    """QLA forward and backward as a share of the copy bandwidth."""
    tokens = AttentionTokens([length] * users, dim, torch.bfloat16, device)
    check(tokens)
    check_repeats(tokens)
    copy = copying(2 * copy_bytes, device)
    calls: dict[str, Callable[[], object]] = {"forward": tokens.forward, "backward": tokens.backward()}
    timing = interleaved(calls | {"copy": copy.call}, synchronize=torch.cuda.synchronize)
    bandwidth = 2 * copy_bytes / (copy.times * timing["copy"].median_s)
    for name, streams, bar in (("forward", 4, 80), ("backward", 7, 70)):
        each = timing[name]
        share = 100 * streams * tokens.q.numel() * tokens.q.itemsize / each.median_s / bandwidth
        print(f"        {name}: {1e6 * each.median_s:.4g} µs; copy {bandwidth / 1e9:,.0f} GB/s", flush=True)
        recorder.add(
            f"QLA {name}, {users} x {length:,} events, d={dim}, bfloat16: share of the copy bandwidth",
            share,
            "%",
            bar=f"value >= {bar}",
            spread=share * each.spread_s / each.median_s,
        )


def bench_baselines(
    recorder: BenchmarkRecorder,
    users: int,
    length: int,
    dim: int,
    device: torch.device,
    block_scores: Sequence[int],
) -> None:
    """Compare the forward, and the forward with the backward, with each baseline."""
    tokens = AttentionTokens([length] * users, dim, torch.bfloat16, device)
    leaves = tokens.by_user()
    attentions = {"QLA": partial(packed, tokens.offsets, "auto")} | baselines(tokens, block_scores)

    @torch.no_grad()
    def forward(attention: Attention) -> Tensor:
        return attention(*leaves)

    def train(attention: Attention) -> tuple[Tensor, ...]:
        out = attention(*leaves)
        return torch.autograd.grad(out, leaves, tokens.grad.view(out.shape))

    for name, run in (("forward", forward), ("forward and backward", train)):
        calls = {who: partial(run, attention) for who, attention in attentions.items()}
        timing = interleaved(calls, warmup=3, synchronize=torch.cuda.synchronize)
        ours = timing.pop("QLA")
        for baseline, each in timing.items():
            recorder.add_time(
                f"QLA {name}, {users} x {length:,} events, d={dim}, bfloat16, against {baseline}",
                ours,
                "ms",
                baseline=each,
                bar="ratio > 1",
            )


def baselines(tokens: AttentionTokens, block_scores: Sequence[int]) -> dict[str, Attention]:
    """Name -> attention over [B, T, H, D], for the users of `tokens`."""
    users = len(tokens.offsets) - 1
    length, heads = len(tokens.q) // users, tokens.q.shape[1]
    block = fastest_block(users, length, heads, HEAD_DIM, tokens.q.detach(), block_scores=block_scores)
    attentions: dict[str, Attention] = {
        "SDPA": flash,
        "HSTU in blocks": partial(hstu, block_scores=block),
        "torch.compile of the formula": torch.compile(plain_quasi_linear),
        "torch.compile of our torch backend": torch.compile(partial(packed, tokens.offsets, "torch")),
    }
    if importlib.util.find_spec("fla") is None:
        print("        FLA is not installed: skipping its chunk_linear_attn", flush=True)
        return attentions
    chunked = importlib.import_module("fla.ops.linear_attn").chunk_linear_attn
    return attentions | {"FLA chunk_linear_attn": lambda q, k, v: chunked(q, k, v, normalize=False)[0]}


def packed(offsets: Tensor, backend: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """QLA on users of equal length, [B, T, H, D] -> [B, T, H, D]."""
    q_T, k_T, v_T = (x.flatten(0, 1) for x in (q, k, v))
    return quasi_linear_attention(q_T, k_T, v_T, offsets, normalization="length", backend=backend).view(q.shape)


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SDPA by FlashAttention; raises an error if that is not possible."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return sdpa(q, k, v)


def check_repeats(tokens: AttentionTokens) -> None:
    """Require that two runs give the same bits."""
    first, second = ((tokens.forward(), *tokens.backward()()) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = benchmark_parser("attention", __doc__)
    parser.add_argument("--device", default="auto", help="auto (a GPU if available), cpu, cuda or cuda:N")
    options = parser.parse_args(arguments)
    device = resolve_device(options.device)
    set_threads(0)
    keep_freed_memory()
    with recording("attention", __doc__, options) as recorder:
        if device.type == "cuda":
            bench_on_gpu(recorder, device, QUICK_ON_GPU if recorder.quick else AttentionSizesOnGpu())
        else:
            for bench in (bench_rooflines, bench_sdpa, bench_steps, bench_short_users, bench_growth):
                bench(recorder, QUICK if recorder.quick else AttentionSizes())
    return 0


if __name__ == "__main__":
    sys.exit(main())
