"""The GPU part of bench_attention.py: QLA's share of the copy bandwidth, and its baselines.

All cases use bfloat16 and head size 64, from 65,536 packed tokens. A share compares the bytes per second that QLA must
move (4 streams of tokens forward, 7 backward) with those of a large copy on the same device. Baselines get the same
users of equal length: SDPA (FlashAttention), HSTU's attention in blocks, torch.compile of the formula and of our torch
backend, and FLA's chunk_linear_attn (causal, without activations) if FLA is installed.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from scripts.benchmarks.attention_workloads import HEAD_DIM, AttentionTokens, check
from scripts.benchmarks.baseline_attention import BLOCK_SCORES, Attention, fastest_block, hstu, plain_quasi_linear, sdpa
from scripts.benchmarks.benchmark_recorder import BenchmarkRecorder
from scripts.benchmarks.rooflines import LARGEST_COPY_BYTES, copying
from scripts.benchmarks.timing import interleaved
from vista_kernels import quasi_linear_attention


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


QUICK = AttentionSizesOnGpu(dims=(64,), batches=((64, 1024),), baseline_batches=((64, 1024),))


def bench(recorder: BenchmarkRecorder, device: torch.device, sizes: AttentionSizesOnGpu) -> None:
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
            recorder.add(
                f"QLA {name}, {users} x {length:,} events, d={dim}, bfloat16, against {baseline}",
                1e3 * ours.median_s,
                "ms",
                baseline=1e3 * each.median_s,
                bar="ratio > 1",
                spread=1e3 * ours.spread_s,
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
