"""Benchmark the page of `vista explore`: from the request to its title and to its tabs, for few and for many users.

    python -m scripts.benchmarks.bench_explore
    python -m scripts.benchmarks.bench_explore --demo    # also on the data of `make demo`

Headless Chromium opens the page as a new visitor several times. The first visit, which loads the model and fills the
caches, has rows of its own. With many users, every tab is also opened once; its time includes about two seconds in
which the page must not change.

The log and the store are written directly: users have a few events, random summaries, and their newest events as tails.
Needs the extra `explore`, Playwright, and Chromium (`make test-browser` installs the first two). The server and the
browser share the machine. On a busy machine, compare the CPU time: the time of all their processes on one core.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from scripts.benchmarks.benchmark import BenchmarkRecorder, benchmark_parser, recording
from scripts.benchmarks.explore_visit import TABS, browser_program, exploring, visiting
from scripts.benchmarks.workloads import lifelong_log, untrained
from vista.config.checks import Codec
from vista.explore.workspace import UserSearch
from vista.log.event_log import EventLog
from vista.model.vista_model import VistaModel
from vista.store import Manifest, StoreWriter, Tail, UserSummaries, encode_records, user_keys

EVENTS_PER_USER = 3
NUM_ITEMS = 1_000
DIM, NUM_SEEDS, TAIL_LEN = 16, 2, 4
RECORDS_PER_WRITE = 1 << 14
VISITS = 5
TARGET_S = 3.0


def write_store(model: VistaModel, log: EventLog, path: Path) -> None:
    """Write and publish records with random summaries for all users of a log."""
    rng, now = np.random.default_rng(0), time.time_ns() // 1_000_000
    rows_of_items = model.item_rows(log.items.ids(np.arange(log.num_items)))
    manifest = Manifest(
        created_at=now,
        refreshed_at=now,
        summarizer_id=model.summarizer_id().hex(),
        num_tokens=NUM_SEEDS,
        dim=DIM,
        codec=Codec.int8.value,
        tail_len=TAIL_LEN,
        applied_segment=log.last_segment,
        total_users=log.num_users,
        run_digest="benchmark",
    )
    with StoreWriter.open(path, manifest) as writer:
        for first in range(0, log.num_users, RECORDS_PER_WRITE):
            users = np.arange(first, min(first + RECORDS_PER_WRITE, log.num_users))
            history, keys = log.gather(users), user_keys(log.users.ids(users))
            tail = Tail(
                rows_of_items[history.item].astype(np.int32),
                np.asarray(history.timestamp),
                np.asarray(history.action),
                history.offsets,
            )
            summaries = UserSummaries(
                keys=keys,
                summary=rng.standard_normal((len(users), NUM_SEEDS, DIM), dtype=np.float32),
                tail=tail,
                event_count=history.lengths,
                last_event_ts=np.asarray(history.timestamp)[history.offsets[1:] - 1],
                history_digest=users.astype(np.uint64),
            )
            writer.put_batch(keys, encode_records(summaries, writer.spec), int(users[-1]) + 1)
        writer.publish()


def measure_visits(recorder: BenchmarkRecorder, name: str, words: Sequence[str], num_visits: int) -> None:
    """Open the page several times; record the first visit, and the medians of the others."""
    titles, tabs, busy = [], [], []
    with exploring(*words) as url, visiting(url) as visit:
        for _ in range(num_visits + 1):
            visit.close()
            began, used = time.perf_counter(), cpu_of_descendants_s()
            titles.append(visit.open())
            busy.append(cpu_of_descendants_s() - used)
            visit.page.get_by_role("tab", name="User", exact=True).wait_for()
            tabs.append(time.perf_counter() - began)
    bar = f"value <= {TARGET_S:g}"
    recorder.add(f"{name}: request to title, first visit", titles[0], "s", bar=bar)
    recorder.add(f"{name}: request to tabs, first visit", tabs[0], "s")
    for what, values, own_bar in (("title", titles, bar), ("title, CPU time", busy, None), ("tabs", tabs, None)):
        spread = float(np.std(values[1:]))
        recorder.add(f"{name}: request to {what}", statistics.median(values[1:]), "s", bar=own_bar, spread=spread)


def measure_tabs(recorder: BenchmarkRecorder, name: str, words: Sequence[str]) -> None:
    """Open every tab once, and record how long each takes until the page no longer changes."""
    with exploring(*words) as url, visiting(url) as visit:
        visit.open()
        visit.wait_for_tabs()
        for tab in TABS:
            began = time.perf_counter()
            visit.open_tab(tab)
            recorder.add(f"{name}: tab {tab}", time.perf_counter() - began, "s")


def cpu_of_descendants_s() -> float:
    """CPU time of all running processes that this one has started: the server, the browser, and its driver."""
    ticks: dict[int, float] = {}
    parents: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):  # a process that has ended meanwhile
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                parents[int(folder.name)] = int(fields[1])
                ticks[int(folder.name)] = int(fields[11]) + int(fields[12])
    total = 0.0
    for process, used in ticks.items():
        ancestor = parents[process]
        while ancestor > 1 and ancestor != os.getpid():
            ancestor = parents.get(ancestor, 0)
        total += used * (ancestor == os.getpid())
    return total / os.sysconf("SC_CLK_TCK")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all cases; returns the exit status."""
    parser = benchmark_parser("explore", __doc__)
    parser.add_argument("--demo", action="store_true", help="also measure the data of `make demo`, in demo/")
    settings = parser.parse_args(arguments)
    if browser_program() is None:
        raise SystemExit("error: Chromium is missing; install it with: apt-get install chromium")
    num_users, num_visits = (2_000, 1) if settings.quick else (1_000_000, VISITS)
    with recording("explore", __doc__, settings) as recorder:
        if settings.demo:
            measure_visits(recorder, "demo", [], num_visits)
        folder = recorder.folder
        log = lifelong_log(folder / "log", [EVENTS_PER_USER] * num_users, num_items=NUM_ITEMS)
        model = untrained(log, dim=DIM, num_seeds=NUM_SEEDS, tail_len=TAIL_LEN)
        model.save_pretrained(folder / "run" / "best")
        write_store(model, log, folder / "store")
        words = [f"model={folder / 'run' / 'best'}", f"store={folder / 'store'}", f"data={folder / 'log'}"]
        measure_visits(recorder, f"{num_users:,} users", words, num_visits)
        measure_tabs(recorder, f"{num_users:,} users", words)
        search = UserSearch.of(EventLog.open(folder / "log"), None)
        search.matches("1")
        began = time.perf_counter()
        found = search.matches("12")
        seconds = time.perf_counter() - began
        assert found[0] == 12 and len(found) == 20
        recorder.add(f"{num_users:,} users: search of the beginning of an id", 1000 * seconds, "ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
