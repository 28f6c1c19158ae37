"""Quality tables: train, refresh, evaluate through the store and the scorer; one row a model and seed.

    python scripts/quality.py ml-1m --data path/to/ml-1m --seeds 1 2 3
    python scripts/quality.py simulation --seeds 1 2 3 --only vista

Rows go to docs/results/<table>.jsonl; a row that is there is not run again, and a run that was stopped goes on where it
stopped. `python -m vista.results docs/results/<table>.jsonl` prints the table.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vista.choices import Codec
from vista.composition import compose_config
from vista.config import PrepareConfig, SimulateConfig, TrainConfig
from vista.config_dict import to_dict
from vista.data.event_log import EventLog
from vista.data.ingest import prepare
from vista.data.simulate import simulate
from vista.data.splits import parse_time, split_until
from vista.errors import VistaError
from vista.evaluate import evaluate_scorer
from vista.refresh import refresh
from vista.results import append_result, commit, hardware, read_results
from vista.scorer import Scorer
from vista.training.protocol import impression_cases, impression_metrics
from vista.training.trainer import train

TOP_K = [10, 50, 200]
SIMULATED = "simulation"
SIMULATED_USERS = 1200
"""Thrice the default: with 400, NE stands still far from the truth's, however many passes."""
TRUTH = "truth"
"""Row of the simulation's own probabilities."""


@dataclass(frozen=True, slots=True)
class Row:
    """A model of a table: words of `vista train` beyond the table's experiment, and how it is served."""

    words: tuple[str, ...] = ()
    codecs: tuple[Codec, ...] = (Codec.int8,)
    tails: tuple[int, ...] = ()
    """Shorter tails that the same weights are also served with (`Recommender.with_tail`)."""

    def served(self, name: str) -> dict[str, tuple[Codec, int | None]]:
        """Names of the table's rows -> codec, and length of the tail if not the model's own."""
        rows: dict[str, tuple[Codec, int | None]] = {
            name if codec is Codec.int8 else f"{name}, {codec.value} store": (codec, None) for codec in self.codecs
        }
        return rows | {f"{name}, tail {length}": (Codec.int8, length) for length in self.tails}


BOTH = (Codec.int8, Codec.float32)
TAILS = (2, 4, 8, 16)
MOVIELENS = {"vista": Row(codecs=BOTH, tails=TAILS), "tail-only": Row(("model.num_seeds=0",), tails=TAILS)}
TABLES: dict[str, dict[str, Row]] = {
    "ml-1m": MOVIELENS,
    "ml-1m-half": MOVIELENS,
    "ml-100k": MOVIELENS,
    "ml-latest-small": MOVIELENS,
    SIMULATED: {
        "vista": Row(codecs=BOTH),
        "tail-only": Row(("model.num_seeds=0",)),
        # Stage 2 alone over the newest 200 events before each request, which it sees fresh and under full attention.
        # Half as many windows of twice the positions: the same labels in half the time, at 169 to 200 events seen.
        "last-200": Row(
            ("model.num_seeds=0", "model.tail_len=200", "data.label_spacing=32", "data.windows_per_chunk=32")
        ),
    },
}
"""Table (and experiment) -> model -> row."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=sorted(TABLES))
    parser.add_argument("--data", type=Path, help="folder of the MovieLens set (the simulation makes its own)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--only", nargs="+", help="models of the table to run; default: all")
    parser.add_argument("--work", type=Path, default=Path("runs/quality"), help="folder of logs, runs and stores")
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    settings = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        log = _log(settings.table, settings.data, settings.work / settings.table)
        for seed in settings.seeds:
            for name in [name for name in settings.only or TABLES[settings.table] if name != TRUTH]:
                _run(settings, log, name, TABLES[settings.table][name], seed)
        if log.impressions is not None and (settings.only is None or TRUTH in settings.only):
            _truth(settings, log)
    except VistaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _run(settings: argparse.Namespace, log: EventLog, name: str, row: Row, seed: int) -> None:
    results = settings.results / f"{settings.table}.jsonl"
    done = _done(results)
    missing = {served: how for served, how in row.served(name).items() if (served, seed) not in done}
    if not missing:
        return
    folder = settings.work / settings.table / f"{name}-{seed}"
    words = [f"experiment={settings.table}", f"data.path={log.path}", f"run_dir={folder / 'run'}", f"seed={seed}"]
    config = compose_config(TrainConfig, [*words, *row.words, f"num_threads={settings.threads}"])
    model = train(config, log)
    # Of all processes of a run that was stopped and resumed; a cut epoch counts from its resumption.
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    seconds = sum(json.loads(line).get("epoch_seconds", 0.0) for line in lines)
    for codec in {codec for codec, _ in missing.values()}:
        refresh(model, log, folder / codec.value, until=split_until(config.data, "test"), codec=codec, progress=True)
    for served, (codec, length) in missing.items():
        with Scorer.open(model if length is None else model.with_tail(length), folder / codec.value) as scorer:
            found = evaluate_scorer(scorer, log, "test", top_k=TOP_K, progress=True)
        print(f"{served}, seed {seed}: {found}")
        _append(settings, results, served, seed, found.metrics, to_dict(config), name, seconds)


def _truth(settings: argparse.Namespace, log: EventLog) -> None:
    """The best possible figures: the simulation's own probabilities."""
    results = settings.results / f"{settings.table}.jsonl"
    if ("truth", 0) in _done(results):
        return
    config = compose_config(TrainConfig, [f"experiment={settings.table}"])
    assert config.data.test_from is not None
    cases = impression_cases(log, parse_time(config.data.test_from), None)
    assert cases.probability is not None
    metrics = impression_metrics(cases, cases.probability)
    _append(settings, results, "truth", 0, metrics, {}, TRUTH, 0.0)


def _append(
    settings: argparse.Namespace,
    results: Path,
    name: str,
    seed: int,
    metrics: dict[str, float],
    config: dict[str, Any],
    only: str,
    seconds: float,
) -> None:
    data = "" if settings.data is None else f" --data {settings.data.name}"
    row = {
        "table": settings.table,
        "data": settings.table,
        "model": name,
        "seed": seed,
        "metrics": {key: value if math.isfinite(value) else None for key, value in metrics.items()},
        "command": f"python scripts/quality.py {settings.table}{data} --seeds {seed} --only {only}",
        # Paths are the machine's, not the experiment's.
        "config": {group: config[group] for group in ("model", "data", "optim") if group in config},
        "commit": commit(),
        "hardware": hardware(),
        "seconds": round(seconds, 1),
    }
    if row["config"]:
        row["config"]["data"] = {k: v for k, v in config["data"].items() if k != "path"}
    append_result(results, row)


def _done(results: Path) -> set[tuple[str, int]]:
    return {(row["model"], row["seed"]) for row in read_results(results)} if results.exists() else set()


def _log(table: str, data: Path | None, folder: Path) -> EventLog:
    path = folder / "log"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        source, kind = data, "auto"
        if table == SIMULATED:
            source, kind = folder / "source", "simulated"
            print(simulate(SimulateConfig(out=str(source), num_users=SIMULATED_USERS)))
        elif data is None:
            raise VistaError(f"{table}: give the folder of the data set with --data (the README says where to get it)")
        words = [f"out={path}", f"events.kind={kind}", f"events.paths=[{source}]"]
        print(prepare(compose_config(PrepareConfig, words)))
    return EventLog.open(path)


if __name__ == "__main__":
    sys.exit(main())
