"""The benchmarks run with --quick, measure what they claim, and write rows.

Only what does not depend on the load of the machine, such as memory and differences, is compared with its bar.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import replace
from mmap import PROT_READ, mmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from scripts.benchmarks import bench_training
from scripts.benchmarks import rectools_process as baseline
from scripts.benchmarks.benchmark_recorder import read_cases
from scripts.benchmarks.rectools_process import RecToolsPilot, RecToolsSetting
from scripts.benchmarks.scorer_workloads import scorer_roofline
from scripts.benchmarks.store_workloads import private_bytes
from scripts.benchmarks.workloads import lifelong_log, untrained
from tests.benchmark_process import run_benchmark
from tests.required_program import require_compiler
from vista.config.choices import Precision, TargetAttentionKind
from vista.log.splits import visible_counts
from vista.model.padded_tail import pad_tail
from vista.model.vista_model import VistaModel

pytestmark = pytest.mark.research
# Parts of names of cases that each benchmark must write.
CASES = {
    "attention": [
        "QLA forward, 1,024 events, d=64, float32",
        "QLA backward, 1,024 events, d=256, bfloat16",
        "QLA forward, 1,024 events, d=64, against SDPA",
        "training step, 2 x 256 events, d=256, against HSTU",
        "accumulate and read, 2,000 users of 0 to 50 events",
        "time per event at 10,000 over that at 1,000 events",
    ],
    "export": [
        "logits of the scorer, 500 candidates: standard deviation",
        "onnx: largest difference of logits over 1,000 requests",
        "onnx: largest difference of next over 1,000 requests",
        "onnx: CPU time of 1 user x 500 candidates, against the scorer",
        "aotinductor: largest difference of logits over 1,000 requests",
        "aotinductor: CPU time of 1 user x 500 candidates, against the scorer",
    ],
    "kafka": ["Kafka to the store, against watch folder= with csv", "against watch folder= with parquet"],
    "ranks": ["2 ranks, generated: against 2 independent processes"],
    "refresh": [
        "ingest of 20,000 events, ratings.dat",
        "ratings.csv: share of read",
        "Parquet: Polars reading the columns alone",
        "users",
        "share of summarize",
        "share of write",
    ],
    "checksums": [
        "ingest of 40,000 events, Parquet: share of the checksums",
        "share of the SHA-256 of the source",
        "verify a log of 0.6 MB, in the page cache",
    ],
    "index": [
        "20,000 items, ivfpq: recall@100",
        "20,000 items, hnsw: size, against the vectors",
        "20,000 items, ivfpq: CPU time of a query, against a scan of 1",
        "20,000 items, hnsw: CPU time of a query, against a scan of 32",
    ],
    "items_add": [
        "items add of 500 items to a catalog of 5,000 under load: time",
        "items add of 500 items to a catalog of 5,000 under load: wrong answers",
    ],
    "lengths": ["200 events: vista", "1,000 events: tail-only", "200 events: sim-hard", "1,000 events: twin"],
    "ray": ["in two actors of Ray against two processes: rate", "memory", "first batch"],
    "serve": [
        "500 candidates, JSON: requests per second over HTTP against in process",
        "5,000 candidates, MessagePack: CPU time per request",
        "500 candidates: p99 at half load, equal gaps, against the median",
        "4 requests of 10 candidates in one call against a call each",
    ],
    "scorer": [
        "a user of 20,000 events against one of 200",
        "50 candidates: median",
        "5000 candidates: p99",
        "encoded",
        "500 candidates, float32: over the roofline of its matrix products",
        "5,000 candidates, float32: times over its roofline, against those of 500 candidates",
        "32 users x 100 candidates, float32: times over its roofline",
        "500 candidates, next: with counters against without",
        "500 candidates, click: with counters of a category too",
        "2,000 events, bidirectional, float32: stored against recomputed",
        "2,000 events, separable, float32: stored against recomputed",
        "50 events: against sasrec over the raw history",
        "2,000 events: against hstu over the raw history",
        "two worker processes of one thread each against one",
        "10,000 items: private memory of a worker after 200 requests",
    ],
    "simulate": ["generation, 1 thread", "writing", "generation, 1 thread, and writing"],
    "store": [
        "K=32, d=64: durable writes in batches of 512, against raw LMDB",
        "K=128, d=256: reads of 256 users, checked, against raw LMDB's copies",
        "checked and as float32, against a copy of the bytes and a write of the numbers",
        "p99 of reads of 1 user(s) while another process writes",
        "file of the summaries of 2,560 users after 20 rewrites, against its live pages",
        "incremental refresh of 16 users of 10,000 events, 50 new each, over the roofline",
        "incremental refresh of 64 users of 1,000 events, 50 new each, against a full refresh",
        "incremental refresh of 16 users: 10,000 old events each, against 1,000",
        "users without new events",
        "full refresh of 200 users",
        "5,000 users not in the page cache: open to first read",
        "private memory of a reader after 500 reads",
    ],
    "summarizer": [
        "20,000 events, separable, d=64, K=16, 2 layers, float32: time over the roofline",
        "separable, d=256, K=128, 3 layers, bfloat16: peak memory beyond the log",
        "bidirectional, d=256, K=128, 3 layers, float32: rate",
    ],
    "training_features": ["400 items, training step, d=64: with 8 features of items, 2 of events, and 4 of requests"],
}


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
@pytest.mark.parametrize("subject", CASES)
def test_a_benchmark_runs_and_writes_its_cases(subject: str, tmp_path: Path) -> None:
    if subject == "ray":
        pytest.importorskip("ray")
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
    assert all(row["met"] for row in rows if "users without new events" in row["case"])
    assert all(row["value"] == 0 for row in rows if "wrong answers" in row["case"])
    assert all(row["met"] for row in rows if "largest difference" in row["case"])
    memory = [row for row in rows if "peak memory" in row["case"]]
    assert all(row["met"] for row in memory) and bool(memory) == (subject == "summarizer")
    for whole in {row["case"].split(": share of ")[0] for row in rows if ": share of " in row["case"]}:
        if subject == "refresh":
            shares = [row["value"] for row in rows if row["case"].startswith(f"{whole}: share of ")]
            assert sum(shares) == pytest.approx(100, abs=0.1)


@pytest.mark.parametrize("kind", TargetAttentionKind)
def test_the_scorers_roofline_counts_what_the_model_multiplies(tmp_path: Path, kind: TargetAttentionKind) -> None:
    log = lifelong_log(tmp_path / "log", [9, 40], num_items=49)
    usual = untrained(log, dim=16, num_seeds=6, tail_len=5)
    model = VistaModel(replace(usual.config, target_attention=kind), usual.schema, log.items, usual.data).eval()
    items = torch.arange(1, 8).expand(2, -1)
    tail = pad_tail(model, np.arange(1, 11), np.arange(10), np.zeros(10), np.array([0, 5, 10]))
    stage, summary = model.target_attention, torch.randn(2, 6 + model.config.num_state_rows, 16)
    with torch.inference_mode():
        vectors = model.item_vectors(items)
        projections = stage.layers[0].project(vectors)
        item, action, gap = (torch.from_numpy(part) for part in (tail.item, tail.action, tail.gap))
        events = model.encoder(model.item_vectors(item), action, gap)
        attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}
        with FlopCounterMode(display=False, custom_mapping=attention) as counter:
            # In two passes: a request in one pass also multiplies the masked pairs of summary and tail.
            valid, state = torch.from_numpy(tail.valid), stage.state(summary)
            context = stage.encode_context(stage.encode_summary(summary), events, valid, state)
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


def test_training_against_the_real_baseline(tmp_path: Path) -> None:
    environment = os.environ.get("VISTA_RECTOOLS_VENV")
    if not environment:
        pytest.skip("VISTA_RECTOOLS_VENV names no virtual environment with RecTools")
    data = write_histories(tmp_path / "events.npz", [40] * 150)
    out = tmp_path / "out.jsonl"
    done = run_benchmark("training", out, "--data", str(data), "--rectools-venv", environment)
    assert done.returncode == 0, done.stderr
    assert [row["baseline"] > 0 for row in read_cases(out)] == [True, True]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    done = run_benchmark("training", out)
    assert done.returncode == 0 and "skipped: ml-1m not found; set VISTA_DATA_DIR" in done.stdout
    done = run_benchmark("training", out, "--data", "absent.npz")
    assert done.returncode == 1 and done.stderr.startswith("error: --data absent.npz: no such file")
    np.savez(tmp_path / "events.npz", user=np.zeros(3))
    environment = fake_environment(tmp_path / "baseline", {})
    done = run_benchmark("training", out, "--data", str(tmp_path / "events.npz"), "--rectools-venv", str(environment))
    assert done.returncode == 1 and "missing item, offsets" in done.stderr
    assert not out.exists()


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


def test_private_memory_excludes_the_page_cache(tmp_path: Path) -> None:
    size = 32 << 20
    (tmp_path / "data.mdb").write_bytes(bytes(size))
    smaps = Path("/proc/self/smaps")
    before = private_bytes(smaps.read_text())
    with (tmp_path / "data.mdb").open("rb") as file, mmap(file.fileno(), 0, prot=PROT_READ) as mapped:
        assert not np.frombuffer(mapped, np.uint8).any()
        assert private_bytes(smaps.read_text()) - before < size // 4
    with mmap(-1, size) as own:  # not an array, which could reuse memory of the process
        own.write(b"\1" * size)
        assert private_bytes(smaps.read_text()) - before > size * 3 // 4


@pytest.mark.parametrize("negatives", [1, 64, 1024])
def test_the_pilot_finds_the_fastest_setting(negatives: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def cost(setting: RecToolsSetting) -> float:
        seconds = {"softmax": 9.0, "sampled_softmax": 7.0, "BCE": 8.0}[setting.loss]
        seconds *= {"32-true": 0.5, "bf16-mixed": 1.0}[setting.precision] * (0.9 if setting.workers else 1)
        return seconds * (1 + abs(math.log2(setting.batch_size) - 5)) * (0.8 if setting.threads == 1 else 1)

    tried: list[RecToolsSetting] = []

    def run_rectools(python: Path, data: Path, setting: RecToolsSetting, max_batches: int) -> dict[str, Any]:
        assert max_batches == baseline.PILOT_BATCHES
        tried.append(setting)
        return {"seconds_per_epoch": [cost(setting)]}

    monkeypatch.setattr(baseline, "run_rectools", run_rectools)
    pilot = RecToolsPilot(Path("python"), Path("data"), negatives, 0.2, quick=False)
    chosen = pilot.fastest()
    assert len(set(tried)) == len(tried) and chosen == min(tried, key=cost)
    assert (chosen.precision, chosen.workers, chosen.n_negatives, chosen.dropout) == ("32-true", 1, negatives, 0.2)
    gathered = [s.batch_size * 200 * negatives * 64 * 4 for s in tried if s.loss != "softmax"]
    assert max(gathered) <= 2 * baseline.GATHERED_BYTES
    if negatives < 1024:  # else batches of sampled losses are too small to be fast, and softmax wins
        assert (chosen.loss, chosen.batch_size) == ("sampled_softmax", 32)
