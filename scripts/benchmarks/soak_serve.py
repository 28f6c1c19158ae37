"""Soak test of the service: HTTP requests while its store, its model, and its workers change.

`vista serve` runs with two workers. Eight clients ask for scores, rankings, predictions, and records at a steady rate,
each on a connection of its own. Meanwhile, a keeper appends events to the log, refreshes incrementally and in full,
erases users, compacts the store, and replaces the model, and workers are killed (SIGKILL) at random. This process is
the judge: it asks every question again of a scorer of frozen copies. An answer is right if it equals that of one
generation and one model that the worker had in service during the request. It is wrong if it contains a user whose
erasure ended before the request. Failed are all requests without an answer of status 200 (or 404 for the record of a
missing user), except for those with status 429, which are counted, and those whose connection broke, which are sent
once more on a new one.

    python -m scripts.benchmarks.soak_serve --minutes 10
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from scripts.benchmarks.benchmark_recorder import RESULTS, BenchmarkRecorder
from scripts.benchmarks.serve_load import Connection, ServiceProcess, get, serving
from scripts.benchmarks.service_clients import CLIENTS, send_questions
from scripts.benchmarks.service_questions import TASK, ServiceQuestion
from scripts.benchmarks.soak import HANGS_S, Soak, record, record_latencies, soak_parser
from scripts.benchmarks.soak_judge import SoakJudge
from scripts.benchmarks.soak_load import Arrays, SoakStage
from scripts.benchmarks.worker_killer import WorkerKiller
from vista.device import set_threads
from vista.scorer import Scorer

WORKERS = 2
SETTINGS = (f"workers={WORKERS}", "on_missing=nan", f"task={TASK}", "reload_s=0.2", "deadline_s=20")
"""All processes share a core or two, hence the long deadline."""
LOG_CHARACTERS = 20_000
"""Most characters of the service's log that are printed after a failure."""
LAG = 2
"""Generations that one worker may be behind another."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the soak test; return 1 if anything failed or was wrong."""
    parser = soak_parser(__doc__, RESULTS / "bench_soak_serve.jsonl")
    parser.add_argument("--rate", type=float, default=8.0, help="requests per second of all clients together")
    parser.add_argument("--kill", type=float, default=10.0, metavar="SECONDS", help="mean time between two kills")
    parser.set_defaults(pause=2.0)
    options = parser.parse_args(arguments)
    set_threads(1)
    seconds = 60 * options.minutes
    with tempfile.TemporaryDirectory(prefix="vista-soak-") as folder:
        stage = SoakStage(Path(folder), options.users, num_items=500)

        def ask(scorer: Scorer, question: int) -> Arrays:
            return ServiceQuestion(question, stage.num_users, stage.num_items).of_scorer(scorer)

        with serving(stage.model, stage.store, *SETTINGS) as service:
            clients = stage.context.Process(target=send_questions, args=(stage, service.port, options.rate))
            killer = WorkerKiller(service, WORKERS, options.kill)
            soak = Soak(stage, SoakJudge(stage, ask, LAG), [clients], CLIENTS, options.pause, service.workers)
            try:
                soak.run(seconds, min(60.0, seconds / 5), killer.start)
            finally:
                killer.stop()
            soak.failures += killer.failures
            scrape_ms = wait_until_current(service, stage, soak)
    status, log = service.process.returncode, "".join(service.lines)
    if status or "Traceback" in log or not log.endswith("stopped\n"):
        soak.failures.append(f"the service ended with {status}, or its log has a traceback")
    if soak.failures:
        print("".join(line for line in service.lines if " stays in service" not in line)[-LOG_CHARACTERS:])
    recorder = BenchmarkRecorder("soak_serve", out=options.out)
    case = f"{options.minutes:g} minutes, {WORKERS} workers, {CLIENTS} clients"
    record(soak, recorder, case)
    recorder.add(f"{case}: refused with 429", soak.num_refused, "requests")
    recorder.add(f"{case}: workers killed", len(killer.restarts_s), "workers", bar="value > 0")
    recorder.add(f"{case}: sent again after a broken connection", soak.num_retries, "requests")
    if killer.restarts_s:
        restart = median(killer.restarts_s)
        recorder.add(f"{case}: median time until another worker listens", restart, "s")
    recorder.add(f"{case}: time of /metrics in the end", scrape_ms, "ms")
    record_latencies(soak, recorder, case)
    recorder.print_summary()
    return int(any(row["met"] is False for row in recorder.rows))


def wait_until_current(service: ServiceProcess, stage: SoakStage, soak: Soak) -> float:
    """Require that all workers reach the published generation; returns the time of the last scrape in ms."""
    connection, deadline = Connection(service.port), time.monotonic() + HANGS_S
    while time.monotonic() < deadline:
        began = time.perf_counter()
        status, page = connection.send(get("/metrics"))
        took = time.perf_counter() - began
        if status == 200 and f'\nvista_generation{{model="default"}} {stage.served.value:.1f}\n' in page.decode():
            break
        time.sleep(0.2)
    else:
        soak.failures.append(f"gen-{stage.served.value} is not in service in all workers: {page.decode()[-2000:]}")
    connection.close()
    return 1e3 * took


if __name__ == "__main__":
    sys.exit(main())
