"""The attention benchmark's baselines are correct, and the model timed with a baseline really uses it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from scripts.benchmarks import attention_on_gpu
from scripts.benchmarks.attention_on_gpu import AttentionSizesOnGpu
from scripts.benchmarks.attention_workloads import NUM_LAYERS, AttentionStep, AttentionTokens, assert_equal, check
from scripts.benchmarks.baseline_attention import (
    Attention,
    attention_replaced,
    fastest_block,
    hstu,
    plain_hstu,
    plain_quasi_linear,
    sdpa,
)
from scripts.benchmarks.benchmark_recorder import BenchmarkRecorder
from vista.model import summarizer

pytestmark = pytest.mark.research
# Per block: several whole items, one item, two rows of one item, and one row that exceeds the block.
BLOCKS = (1000, 7 * 11, 2 * 11, 1)


def random(*lengths: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, T, 3, 4, generator=generator, dtype=dtype).requires_grad_() for T in lengths]


@pytest.mark.parametrize("block_scores", BLOCKS)
def test_hstu_in_blocks_is_hstu(block_scores: int) -> None:
    tokens = random(7, 11, 11)
    blocked = partial(hstu, block_scores=block_scores)
    ours, plain = blocked(*tokens), plain_hstu(*tokens)
    torch.testing.assert_close(ours, plain)
    grad = torch.randn_like(plain)
    for mine, true in zip(*(torch.autograd.grad(out, tokens, grad) for out in (ours, plain)), strict=True):
        torch.testing.assert_close(mine, true)


@pytest.mark.parametrize("block_scores", BLOCKS)
def test_gradients_of_hstu_in_blocks(block_scores: int) -> None:
    assert torch.autograd.gradcheck(partial(hstu, block_scores=block_scores), random(3, 5, 5))


def test_hstu_never_holds_all_scores() -> None:
    sizes = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = function(*args, **(kwargs or {}))
            sizes.extend([result.numel()] if isinstance(result, torch.Tensor) else [])
            return result

    q, k, v = (torch.randn(1, 512, 1, 4) for _ in range(3))
    with torch.no_grad(), Watch():
        hstu(q, k, v, block_scores=4096)
    assert max(sizes) == 4096


def test_the_fastest_block_is_one_of_those_tried() -> None:
    like = torch.empty(0, dtype=torch.bfloat16)
    assert fastest_block(2, 32, 2, 4, like, block_scores=(64, 128)) in (64, 128)


@pytest.mark.parametrize("attention", [sdpa, partial(hstu, block_scores=500)], ids=["SDPA", "HSTU"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_with_a_baseline_uses_only_that(
    attention: Attention, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = AttentionStep(2, 40, 64)
    step.model.eval()
    ours = step.summarize(dtype, None)
    calls: list[tuple[int, int]] = []

    def counted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        calls.append((q.shape[1], k.shape[1]))
        assert q.dtype == k.dtype == v.dtype == dtype
        return attention(q, k, v)

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("our attention was called")

    for name in ("quasi_linear_attention", "accumulate_state", "read_state"):
        monkeypatch.setattr(summarizer, name, forbidden)
    baseline = step.summarize(dtype, counted)
    # Events and seeds per layer; in the last layer only the seeds read.
    assert calls == [(72, 72)] * (NUM_LAYERS - 1) + [(32, 72)]
    assert baseline.shape == ours.shape and not torch.allclose(baseline, ours, atol=0.1)
    with pytest.raises(AssertionError, match="our attention was called"):
        step.run(dtype, None)
    step.run(dtype, counted)
    assert step.tokens.grad is not None and float(step.tokens.grad.abs().max()) > 0


def test_the_replacement_is_exact_and_undone() -> None:
    """Our attention in place of a baseline gives the model's own output; afterwards nothing stays replaced."""
    step = AttentionStep(3, 20, 64)
    step.model.eval()
    ours = step.summarize(torch.float32, None)
    torch.testing.assert_close(step.summarize(torch.float32, plain_quasi_linear), ours, atol=1e-4, rtol=1e-4)
    with pytest.raises(ZeroDivisionError), attention_replaced(sdpa):
        raise ZeroDivisionError
    assert torch.equal(step.summarize(torch.float32, None), ours)


def test_baselines_refuse_ragged_users() -> None:
    step = AttentionStep(2, 20, 64)
    step.offsets = torch.tensor([0, 10, 40])
    with pytest.raises(ValueError, match=r"users of equal length, got \[42, 62\]"):
        step.summarize(torch.float32, sdpa)


def test_results_are_checked() -> None:
    tokens = AttentionTokens([30, 30], 128, torch.float32)
    check(tokens)
    out = tokens.forward()
    with pytest.raises(AssertionError, match="o: error"):
        assert_equal("o", out + 1e-3 * out.abs().max(), out)


def test_the_gpu_part_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cases run in a small size on the CPU, without synchronization and compilation."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    recorder = BenchmarkRecorder("attention", out=tmp_path / "out.jsonl")
    sizes = AttentionSizesOnGpu(
        dims=(128,),
        batches=((2, 40), (1, 80)),
        baseline_batches=((2, 40),),
        block_scores=(1 << 12,),
        copy_bytes=1 << 16,
    )
    attention_on_gpu.bench(recorder, torch.device("cpu"), sizes)
    cases = {row["case"] for row in recorder.rows}
    assert "QLA backward, 1 x 80 events, d=128, bfloat16: share of the copy bandwidth" in cases
    assert "QLA forward and backward, 2 x 40 events, d=128, bfloat16, against HSTU in blocks" in cases
    assert len(cases) == len(recorder.rows) and all(row["met"] is not None for row in recorder.rows)
