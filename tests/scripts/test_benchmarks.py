"""Benchmarks run with --quick and write rows, their baselines are right, and their tools measure what they claim.

Only what does not depend on the load of the machine, such as memory and differences, is compared with its bar."""

from __future__ import annotations

import gc
import json
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from scripts.benchmarks import bench_attention, bench_training
from scripts.benchmarks.bench_attention import (
    AttentionSizesOnGpu,
    AttentionStep,
    attention_replaced,
    hstu,
    plain_hstu,
    plain_quasi_linear,
    sdpa,
)
from scripts.benchmarks.bench_scorer import scorer_roofline
from scripts.benchmarks.benchmark import BenchmarkRecorder, interleaved, read_cases
from scripts.benchmarks.workloads import lifelong_log, untrained
from tests.benchmark_process import run_benchmark
from tests.required_program import require_compiler
from vista.config.checks import Precision
from vista.errors import DataError
from vista.log.splits import visible_counts
from vista.model.serving_model import pad_tail

pytestmark = pytest.mark.research


KEYS = ["bench", "case", "value", "unit", "baseline", "ratio", "bar", "met", "spread", "hardware", "commit"]


def test_a_case_is_one_line_with_ratio_and_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "docs" / "bench_x.jsonl"
    bench = BenchmarkRecorder("x", out=out)
    bench.add("epoch", 5.0, "s", baseline=20.0, bar="ratio >= 2", spread=0.5)
    bench.add("ingest", 2e6, "events/s", baseline=1e6, better="more", bar="ratio >= 5")
    bench.add("memory", 0.25, "GiB", bar="value < 1")
    bench.add("users", np.int64(100), "users/s")  # type: ignore[arg-type]
    rows = read_cases(out)
    assert [list(row) for row in rows] == [KEYS] * 4
    assert [row["ratio"] for row in rows] == [4.0, 2.0, None, None]
    assert [row["met"] for row in rows] == [True, False, True, None]
    assert rows == bench.rows
    assert out.stat().st_mode & 0o777 == 0o644 and [path.name for path in out.parent.iterdir()] == [out.name]
    capsys.readouterr()
    bench.print_summary()
    text = capsys.readouterr().out
    assert text.index("MISSED  x: ingest") < text.index("met  x: epoch: 5 ± 0.5 s, against 20, 4.00 times better")
    assert "bars: 2 met, 1 missed; 1 cases without a bar" in text and str(out) in text


@pytest.mark.parametrize(
    ("bar", "value", "baseline", "met"),
    [
        ("value <= 1.05 * baseline", 1.05, 1.0, True),
        ("value <= 1.05 * baseline", 1.06, 1.0, False),
        ("ratio > 1", 1.0, 1.0, False),
        ("ratio >= 1e0", 1.0, 1.0, True),
        ("value >= 0.27", 0.27, None, True),
        ("value < -1", -1.5, None, True),
    ],
)
def test_bars(tmp_path: Path, bar: str, value: float, baseline: float | None, met: bool) -> None:
    row = BenchmarkRecorder("x", out=tmp_path / "f").add("c", value, "s", baseline=baseline, bar=bar)
    assert row["met"] is met


def test_bad_cases_are_refused(tmp_path: Path) -> None:
    bench = BenchmarkRecorder("x", out=tmp_path / "f")
    with pytest.raises(ValueError, match="expected the form"):
        bench.add("c", 1.0, "s", bar="2x faster")
    with pytest.raises(ValueError, match="needs a baseline"):
        bench.add("c", 1.0, "s", bar="ratio >= 2")
    with pytest.raises(ValueError, match="needs a baseline"):
        bench.add("c", 1.0, "s", bar="value <= 2 * baseline")
    with pytest.raises(ValueError, match="x, c: spread is nan"):
        bench.add("c", 1.0, "s", spread=math.nan)
    assert not bench.out.exists()
    bench.out.write_text('{"bench": "x"}\n')
    with pytest.raises(DataError, match="line 1: is not a benchmark case"):
        bench.add("c", 1.0, "s")


def test_a_new_measurement_replaces_only_its_own_case_and_machine(tmp_path: Path) -> None:
    out = tmp_path / "bench_x.jsonl"
    bench = BenchmarkRecorder("x", out=out)
    bench.add("a", 1.0, "s")
    other = bench.add("b", 2.0, "s") | {"hardware": {"cpu": "Another CPU", "cores": 2}}
    with out.open("a") as file:
        file.write(json.dumps(other) + "\n")
    BenchmarkRecorder("x", out=out).add("b", 3.0, "s")
    BenchmarkRecorder("x", out=out, quick=True).add("b", 9.0, "s")
    assert [(row["case"], row["value"]) for row in read_cases(out)] == [
        ("a", 1.0),
        ("b", 3.0),
        ("b", 2.0),
        ("b (quick)", 9.0),
    ]


def test_contestants_alternate_in_reversing_order() -> None:
    seen: list[str] = []

    def contestant(name: str) -> Any:
        def call() -> None:
            seen.append(name)
            assert len(seen) <= 2 or not gc.isenabled()

        return call

    times = interleaved({"a": contestant("a"), "b": contestant("b")}, rounds=4, warmup=1, min_sample_s=0)
    assert "".join(seen) == "ab" + "abbaabba"  # one warm-up each, then four rounds
    assert gc.isenabled() and [len(timing.samples_s) for timing in times.values()] == [4, 4]


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


def test_the_replacement_is_exact_and_undone() -> None:
    """Our attention in place of a baseline gives the model's own output; afterwards nothing stays replaced."""
    step = AttentionStep(3, 20, 64)
    step.model.eval()
    ours = step.summarize(torch.float32, None)

    def as_the_model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The formula without normalization, as bidirectional models have it."""
        return plain_quasi_linear(q, k, v * v.shape[1])

    torch.testing.assert_close(step.summarize(torch.float32, as_the_model), ours, atol=1e-4, rtol=1e-4)
    with pytest.raises(ZeroDivisionError), attention_replaced(sdpa):
        raise ZeroDivisionError
    assert torch.equal(step.summarize(torch.float32, None), ours)


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
    bench_attention.bench_on_gpu(recorder, torch.device("cpu"), sizes)
    cases = {row["case"] for row in recorder.rows}
    assert "QLA backward, 1 x 80 events, d=128, bfloat16: share of the copy bandwidth" in cases
    assert "QLA forward and backward, 2 x 40 events, d=128, bfloat16, against HSTU in blocks" in cases
    assert len(cases) == len(recorder.rows) and all(row["met"] is not None for row in recorder.rows)


SHORT = ("store", "summarizer", "training_features")
"""Benchmarks that `make test-research` runs; `make nightly` runs all."""


CASES = {
    "attention": ["QLA backward, 1,024 events, d=256, bfloat16", "training step, 2 x 256 events, d=256, against HSTU"],
    "export": [
        "onnx: CPU time of 1 user x 500 candidates, against the scorer",
        "aotinductor: largest difference of next",
    ],
    "index": ["20,000 items, ivfpq: recall@100", "20,000 items, hnsw: CPU time of a query, against a scan of 32"],
    "ingest": ["ingest of 20,000 events, ratings.dat", "ids and times only: events per CPU second"],
    "lengths": ["200 events: vista", "1,000 events: twin"],
    "neighbors": ["first example of serve.md, busy cores", "vista train, two epochs, busy", "vista score, three"],
    "scorer": [
        "a user of 20,000 events against one of 200",
        "32 users x 100 candidates, float32: times over its roofline",
        "500 candidates, click: with counters of a category too",
        "500 candidates: with 8 features of items and 4 of requests against ids alone",
        "2,000 events, bidirectional, float32: stored against recomputed",
    ],
    "serve": [
        "5,000 candidates, MessagePack: CPU time per request",
        "p99 at half load, random gaps, against the median",
    ],
    "store": [
        "K=128, d=256: reads of 256 users, checked, against raw LMDB's copies",
        "incremental refresh of 16 users of 10,000 events, 50 new each, over the roofline",
        "events: users",
        "private memory of a reader after 500 reads",
    ],
    "summarizer": ["separable, d=256, K=128, 3 layers, bfloat16: peak memory beyond the log"],
    "training_features": ["400 items, training step, d=64: with 8 features of items, 2 of events, and 4 of requests"],
}
"""Parts of names of cases that each benchmark must write."""


def write_histories(path: Path, lengths: list[int]) -> Path:
    """Write a packed events.npz."""
    rng = np.random.default_rng(0)
    total = sum(lengths)
    np.savez(
        path,
        user=np.repeat(np.arange(len(lengths)), lengths),
        item=rng.integers(0, 30, total),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
    )
    return path


def fake_environment(folder: Path, report: dict[str, Any]) -> Path:
    """A fake virtual environment whose interpreter records its arguments and always prints the same report."""
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\necho \"$*\" >> {folder}/calls\necho '{json.dumps(report)}'\n")
    python.chmod(0o755)
    return folder


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "subject", [subject if subject in SHORT else pytest.param(subject, marks=pytest.mark.nightly) for subject in CASES]
)
def test_a_benchmark_runs_and_writes_its_cases(subject: str, tmp_path: Path) -> None:
    if subject == "export":
        pytest.importorskip("onnxruntime")
        require_compiler()
    out = tmp_path / "out.jsonl"
    done = run_benchmark(subject, out)
    assert done.returncode == 0, done.stderr
    rows = read_cases(out)
    for part in CASES[subject]:
        assert any(part in row["case"] for row in rows), part
    assert all(row["case"].endswith(" (quick)") and row["bench"] == subject for row in rows)
    assert all(row["value"] >= 0 for row in rows if not row["unit"].endswith("beyond the roofline"))
    assert len({row["case"] for row in rows}) == len(rows)
    assert "bars: " in done.stdout and str(out) in done.stdout
    assert all(row["met"] for row in rows if "largest difference" in row["case"])
    memory = [row for row in rows if "peak memory" in row["case"]]
    assert all(row["met"] for row in memory) and bool(memory) == (subject == "summarizer")
    for whole in {row["case"].split(": share of ")[0] for row in rows if ": share of " in row["case"]}:
        shares = [row["value"] for row in rows if row["case"].startswith(f"{whole}: share of ")]
        assert sum(shares) == pytest.approx(100, abs=0.1)


def test_the_scorers_roofline_counts_what_the_model_multiplies(tmp_path: Path) -> None:
    log = lifelong_log(tmp_path / "log", [9, 40], num_items=49)
    model = untrained(log, dim=16, num_seeds=6, tail_len=5)
    items = torch.arange(1, 8).expand(2, -1)
    tail = pad_tail(model, np.arange(1, 11), np.arange(10), np.zeros(10), np.array([0, 5, 10]))
    stage, summary = model.target_attention, torch.randn(2, 6, 16)
    with torch.inference_mode():
        vectors = model.item_vectors(items)
        projections = stage.layers[0].project(vectors)
        item, action, gap = (torch.from_numpy(part) for part in (tail.item, tail.action, tail.gap))
        events = model.encoder(model.item_vectors(item), action, gap)
        attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}
        with FlopCounterMode(display=False, custom_mapping=attention) as counter:
            # In two passes: a request in one pass also multiplies the masked pairs of summary and tail.
            valid = torch.from_numpy(tail.valid)
            context = stage.encode_context(stage.encode_summary(summary), events, valid)
            stage.query(vectors, projections, None, torch.full((1,), 5), context)
    counted = 0.0
    for work in scorer_roofline(model.config, 2, 7, Precision.float32).products:
        batch, m, k, _, n = map(int, re.findall(r"\d+", work.form.removesuffix("float32")))
        counted += 2 * batch * m * k * n * work.times
    assert counted == pytest.approx(counter.get_total_flops())


def attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    """Operations of the two products of attention."""
    return 2 * math.prod(query[:-1]) * key[-2] * (key[-1] + value[-1])


def test_training_is_compared_with_the_baseline(tmp_path: Path) -> None:
    data = write_histories(tmp_path / "events.npz", [30, 12, 250, 5])
    report = {"seconds_per_epoch": [40.0], "positions": 235, "users": 4}
    environment = fake_environment(tmp_path / "baseline", report)
    out = tmp_path / "out.jsonl"
    done = run_benchmark("training", out, "--data", str(data), "--rectools-venv", str(environment), "--negatives", "16")
    assert done.returncode == 0, done.stderr
    rows = read_cases(out)
    for row, who in zip(rows, ("vista", "sasrec"), strict=True):
        assert row["case"] == f"ml-1m epoch of {who}, 16 negatives a label, dropout 0.2 (quick)"
        assert row["baseline"] == 40.0 and row["ratio"] == pytest.approx(40.0 / row["value"])
    (detail,) = json.loads((tmp_path / "out_settings.json").read_text())
    # 28, 10, 201 and 3 training events. The fake ignores that RecTools' first event per user is only an input.
    assert detail["our_labels"] == 28 + 10 + 201 + 3 and all(
        config["data"]["num_negatives"] == 16 for config in detail["our_config"].values()
    )
    calls = (tmp_path / "baseline" / "calls").read_text().splitlines()
    assert len(calls) == 1 + 3 + 1 and all("--n-negatives 16 " in call for call in calls[1:])
    assert "--max-batches 0" in calls[-1]


@pytest.mark.rectools
@pytest.mark.timeout(900)
def test_training_against_the_real_baseline(rectools: Path, tmp_path: Path) -> None:
    data = write_histories(tmp_path / "events.npz", [40] * 150)
    out = tmp_path / "out.jsonl"
    done = run_benchmark("training", out, "--data", str(data), "--rectools-venv", str(rectools))
    assert done.returncode == 0, done.stderr
    assert [row["baseline"] > 0 for row in read_cases(out)] == [True, True]


def test_both_sides_train_on_the_same_events(tmp_path: Path) -> None:
    data = write_histories(tmp_path / "events.npz", [30, 12, 250, 5])
    with np.load(data) as arrays:
        item, offsets = arrays["item"], arrays["offsets"]
    log, theirs, labels = bench_training.write_events(data, tmp_path, 0)
    seen = visible_counts(log, "leave-last-two-out")
    assert seen.tolist() == [28, 10, 201, 3] and labels == 242
    with np.load(theirs) as arrays:
        for user in range(4):
            mine = log.items.ids(log.slice(user, 0, int(seen[user])).item)
            their = arrays["item"][arrays["user"] == user]
            expected = item[offsets[user] : offsets[user + 1] - 2][-201:]
            assert mine.tolist() == their.tolist() == expected.tolist()
        assert (np.diff(arrays["timestamp"]) > 0).all()
