"""The measured figures that `vista plan` uses."""

from __future__ import annotations

from dataclasses import dataclass

from vista.config.checks import check_types, require_finite


@dataclass(kw_only=True, slots=True)
class MeasuredConfig:
    """Measured speed of one core, in float32. `tests/planning/test_measured_figures.py` checks these against
    docs/results."""

    token_ns: float = 0.16
    """Time of one core per token, layer, and squared width, in ns. Stage 1 has a token per event and per row of the
    summary, stage 2 one per row of the summary, event of the tail, and candidate. From bench_store.jsonl (full refresh,
    d=64: 0.15 to 0.16), bench_summarizer.jsonl (d=256: 0.17), and bench_scorer.jsonl (d=256: 0.14)."""
    write_mb_per_s: float = 500.0
    """Rate at which one core durably writes records and states, in MB per s. From bench_store.jsonl (durable writes:
    470 with K=128 and d=256, 540 with K=32 and d=64)."""
    batch_ms: float = 15.0
    """Fixed time of an incremental refresh, however few users changed, in ms. From bench_store.jsonl (incremental
    refresh of 64 and of 1,000 users)."""
    request_ms: float = 1.7
    """Time of one core per request, without its tokens, in ms. From bench_scorer.jsonl (d=64, 50 candidates)."""
    candidate_us: float = 1.4
    """Time of one core per candidate, without its token, in µs. From bench_scorer.jsonl (d=64, 50 to 5,000
    candidates)."""

    def __post_init__(self) -> None:
        check_types(self, "measured.")
        require_finite(self, "measured.", ("token_ns", "write_mb_per_s"), positive=True, most=1e9)
        require_finite(self, "measured.", ("batch_ms", "request_ms", "candidate_us"), most=1e9)
