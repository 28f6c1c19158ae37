"""Score latency, and that it does not grow with the user's history.

Two users are built for real: one of 10^3 events and one of 10^6 lie in an EventLog, a refresh writes their summaries
(int8) and tails into a store, and a Scorer is opened on it. Timed is what ranking code calls, `scorer.score([user],
ids)`: the store's look-up, checksum and dequantisation, the ids of the candidates, and target attention of all
candidates over summary and tail. The weights are random: they change no timing.

Both users are scored by the same scorer with the same candidates in alternation, so the ratio of the medians says
what the length of a history costs and nothing else. Nothing is cached between calls.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from recorder import Recorder, Timing, benchmark_parser, interleaved
from vista.data.event_log import EventLog
from vista.device import set_threads
from vista.model.recommender import Recommender
from vista.refresh import refresh
from vista.scorer import Scorer
from workloads import TASK, lifelong_log, untrained

SHORT, LONG = 1, 2
"""The two users' ids."""
NUM_CANDIDATES = 500
MODELS = ((64, 16), (256, 128))
"""(d, K) of the models."""


def candidates_of(log: EventLog, count: int) -> NDArray[np.int64]:
    """`count` distinct item ids, spread over the catalogue."""
    ids = log.items.ids(np.arange(log.num_items))
    return np.asarray(np.random.default_rng(7).choice(ids, count, replace=False))


def check(scorer: Scorer, ids: NDArray[np.int64]) -> None:
    """What was timed is right: probabilities that differ between users and do not depend on the list they come in."""
    both = scorer.score([SHORT, LONG], ids)
    alone = np.concatenate([scorer.score([user], ids) for user in (SHORT, LONG)])
    few = scorer.score([LONG], ids[:50])
    assert both.shape == (2, len(ids)) and np.isfinite(both).all() and ((both > 0) & (both < 1)).all()
    assert np.allclose(both, alone, atol=1e-4) and np.allclose(few[0], both[1, : len(few[0])], atol=1e-4)
    assert not np.allclose(both[0], both[1], atol=1e-4)


def measure(recorder: Recorder, model: Recommender, log: EventLog, lengths: tuple[int, int], store: Path) -> None:
    """All cases of one model."""
    name = f"d={model.config.dim}, K={model.config.num_seeds}"
    report = refresh(model, log, store)
    print(f"{name}: {report}", flush=True)
    rounds = 9 if recorder.quick else 41
    with Scorer.open(model, store, task=TASK) as scorer:
        ids = candidates_of(log, NUM_CANDIDATES)
        users = interleaved(
            {"short": partial(scorer.score, [SHORT], ids), "long": partial(scorer.score, [LONG], ids)},
            rounds=rounds,
            warmup=5,
            min_sample_s=0.02,
        )
        check(scorer, ids)
        short, long = users["short"], users["long"]
        recorder.add(
            f"{name}, {NUM_CANDIDATES} candidates: a user of {lengths[1]:,} events against one of {lengths[0]:,}",
            long.median_s * 1e3,
            "ms",
            baseline=short.median_s * 1e3,
            bar="value <= 1.05 * baseline",
            spread=long.spread_s * 1e3,
        )
        lists = {count: candidates_of(log, count) for count in (50, 500, 5000)}
        pool = scorer.encode(lists[500])
        contestants: dict[str, Callable[[], object]] = {
            f"{count} candidates": partial(scorer.score, [LONG], some) for count, some in lists.items()
        }
        contestants["500 candidates, encoded beforehand"] = partial(scorer.score, [LONG], pool)
        for case, timing in interleaved(contestants, rounds=rounds // 2 + 1, warmup=3).items():
            add_latency(recorder, f"{name}, {case}", timing)


def add_latency(recorder: Recorder, case: str, timing: Timing) -> None:
    """Median and p99 of one call."""
    recorder.add(f"{case}: median", timing.median_s * 1e3, "ms", spread=timing.spread_s * 1e3)
    recorder.add(f"{case}: p99", timing.p99_s * 1e3, "ms")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    options = benchmark_parser("scorer", __doc__).parse_args(arguments)
    set_threads(0)
    recorder = Recorder("scorer", out=options.out, quick=options.quick)
    lengths = (200, 20_000) if options.quick else (1_000, 1_000_000)
    with tempfile.TemporaryDirectory(prefix="vista-bench-") as folder:
        log = lifelong_log(Path(folder) / "log", lengths, num_items=10_000 if options.quick else 50_000)
        for dim, num_seeds in MODELS[:1] if options.quick else MODELS:
            store = Path(folder) / f"store-{dim}"
            measure(recorder, untrained(log, dim=dim, num_seeds=num_seeds), log, lengths, store)
    recorder.print_summary()
    return 0


if __name__ == "__main__":
    sys.exit(main())
