"""What `diversity` costs and gives in the lists of `Scorer.rank`, on Complete Journey.

    python -m scripts.experiments.list_diversity --out /tmp/diversity --seeds 1 2 3

The questions are those of the validation part, for users with at least 10 events before it: which items are in the next
50 events? Vectors and departments of items, which the model reads, too, tell how different the items of a list are.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from scripts.experiments.results import paired_cell
from scripts.experiments.sets import prepare_set, set_folder
from vista.arrays import Floats
from vista.config import RefreshOptions, TrainConfig
from vista.config.composition import compose_config
from vista.evaluation.cases import window_cases
from vista.examples.item_spaces import unit
from vista.log.event_log import EventLog
from vista.log.splits import part_counts, part_times
from vista.refresh import refresh
from vista.scorer import Scorer
from vista.training.trainer import train

DIVERSITY = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)
TOP_K, HORIZON_EVENTS, MIN_SEEN = 10, 50, 10
WORDS = (
    "experiment=complete-journey",
    "model.dim=32",
    "model.num_seeds=8",
    "optim.epochs=1",
    "num_threads=1",
    "verify_log=false",
)


def measure(log: EventLog, config: TrainConfig, store: Path) -> dict[float, dict[str, Floats]]:
    """By diversity and name: a metric of each user's list."""
    model = train(config, log)
    seen, first, end = part_counts(log, config.data, "validation")
    now = part_times(config.data, "validation")[0]
    assert now is not None
    refresh(model, log, store, until=now, options=RefreshOptions(verify_log=False))
    cases = window_cases(
        log, seen, end, first=first, now=now, horizon_events=HORIZON_EVENTS, min_seen=MIN_SEEN, min_after=1
    )
    gain = 1 / np.log2(2 + np.arange(TOP_K))
    departments = log.item_features["department"].with_one_value().data
    found: dict[float, dict[str, Floats]] = {}
    with Scorer.open(model, store) as scorer, scorer.in_service() as snapshot:
        vectors = unit(snapshot.retrieval_vectors().astype(np.float64))
        for diversity in DIVERSITY:
            rows = []
            for case, user in enumerate(log.users.ids(cases.user)):
                labels = log.items.ids(cases.item[cases.offsets[case] : cases.offsets[case + 1]])
                ranked = scorer.rank(user, top_k=TOP_K, now=now, diversity=diversity).items
                own = vectors[1 + model.items.rows(ranked.tolist())]
                cosine = (own @ own.T)[np.triu_indices(TOP_K, 1)].mean()
                ndcg = (np.isin(ranked, labels) * gain).sum() / gain[: len(labels)].sum()
                rows.append((ndcg, 1 - cosine, len(np.unique(departments[log.items.rows(ranked.tolist())]))))
            names = ("ndcg@10", "distance", "departments")
            found[diversity] = dict(zip(names, np.array(rows, np.float64).T, strict=True))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--data", type=Path, help="folder of complete-journey; else under VISTA_DATA_DIR")
    asked = parser.parse_args()
    if not (path := asked.out / "log").exists():
        prepare_set("complete-journey", set_folder("complete-journey", asked.data), path)
    log = EventLog.open(path)
    found: dict[float, list[dict[str, Floats]]] = {}
    for seed in asked.seeds:
        folder = asked.out / f"seed-{seed}"
        words = [*WORDS, f"data.path={path}", f"run_dir={folder}", f"seed={seed}"]
        for diversity, metrics in measure(log, compose_config(TrainConfig, words), folder / "store").items():
            found.setdefault(diversity, []).append(metrics)
            row = {name: round(float(values.mean()), 4) for name, values in metrics.items()}
            print(json.dumps({"seed": seed, "diversity": diversity, "users": len(metrics["distance"]), **row}))
    for diversity, seeds in found.items():
        cells = []
        for name in seeds[0]:
            values, plain = (np.mean([each[name] for each in rows], 0) for rows in (seeds, found[0.0]))
            cells.append(paired_cell(name, values, plain))
        print(f"diversity {diversity:4.2f}  " + "  ".join(cells))


if __name__ == "__main__":
    main()
