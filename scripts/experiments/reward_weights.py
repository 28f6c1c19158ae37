"""Fine-tuning by rewards in the simulation, judged by the true click probabilities of the lists.

    python -m scripts.experiments.reward_weights --out /tmp/rewards --seeds 1 2 3

Each event of world `share` gets an outcome: it is a click with the world's probability of one, given the events before
it. A base model is trained on next items, and then fine-tuned by each method, with stage 1 frozen. The world then says
how likely a click is for each item of a list. Seeds have a world of their own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import vista.examples.batch_source
from scripts.experiments.results import paired_cell
from vista.arrays import Float32s, Floats, Int
from vista.config import OptimConfig, SimulateConfig, TrainConfig
from vista.config.composition import compose_config
from vista.evaluation.cases import NextItemCases
from vista.evaluation.reference import HOUR_MS
from vista.examples.rewards import EventRewards
from vista.log.event_log import EventLog
from vista.log.splits import parse_until, visible_counts
from vista.model.vista_model import VistaModel
from vista.simulation.simulate import generate
from vista.simulation.streams import Queries, SimulatedLog, split_times
from vista.simulation.worlds import WORLDS
from vista.training.trainer import train
from vista.training.validation import SummaryAnswers

NUM_USERS, EVENTS_PER_USER, NUM_ITEMS = 240, 600, 600
REQUESTS_PER_USER = 8
TOP_K = 10
PRIOR_EVENTS = 10
MODEL = (
    "experiment=simulation",
    "model.dim=32",
    "data.tokens_per_batch=1500",
    "optim.warmup_steps=10",
    "model.counter_keys=[]",
    "model.pooled_dim=0",
    "data.label_spacing=16",
    "data.windows_per_chunk=0",
    "data.staleness_events=75",
    "optim.task_weight=0",
    "optim.next_weight=1",
    "optim.patience=0",
    "optim.validate_every=0",
    "num_threads=1",
    "verify_log=false",
)


@dataclass(frozen=True)
class SimulatedTruth:
    """A world, its log of events with outcomes, and what decides clicks."""

    world: SimulatedLog
    log: EventLog
    row: Int
    """int64 [log.num_items] rows of the catalog."""

    @classmethod
    def make(cls, seed: int, folder: Path) -> SimulatedTruth:
        config = SimulateConfig(
            num_users=NUM_USERS, events_per_user=EVENTS_PER_USER, num_items=NUM_ITEMS, impressions_per_user=4, seed=seed
        )
        world = generate(config)
        user = np.repeat(np.arange(NUM_USERS), np.diff(world.offsets))
        place = np.arange(world.num_events)
        asked = Queries(world.item, world.timestamp, world.offsets[user], np.maximum(place, world.offsets[user] + 1))
        probability = WORLDS[config.world].probabilities(world.catalog, world, asked)[:, 0]  # type: ignore[arg-type]
        clicked = np.random.default_rng([seed, 1]).random(len(user)) < probability
        before = world.timestamp < split_times(config)[0]
        total = np.bincount(world.item[before], clicked[before], NUM_ITEMS)
        number = np.bincount(world.item[before], minlength=NUM_ITEMS)
        item_mean = (total + PRIOR_EVENTS * clicked[before].mean()) / (number + PRIOR_EVENTS)
        frame = {
            "user": user + 1,
            "item": world.item.astype(np.int64) + 1,
            "timestamp": world.timestamp,
            "clicked": clicked.astype(np.float32),
            "item_mean": item_mean[world.item].astype(np.float32),
        }
        numbers = ("clicked", "item_mean")
        path = folder / "log"
        log = (
            EventLog.open(path) if path.exists() else EventLog.from_frame(frame, path, time_unit="ms", numbers=numbers)
        )
        return cls(world, log, log.items.ids(np.arange(log.num_items)).astype(np.int64) - 1)

    def cases(self, begin: int, end: int | None) -> NextItemCases:
        """Events at random places of each user between two times (ms)."""
        rng = np.random.default_rng(7)
        first = self.log.counts_before(begin)
        last = self.log.lengths if end is None else self.log.counts_before(end)
        user = np.repeat(np.flatnonzero(last > first), REQUESTS_PER_USER)
        seen = first[user] + (rng.random(len(user)) * (last - first)[user]).astype(np.int64)
        events = [self.log.slice(int(u), int(s), int(s) + 1) for u, s in zip(user, seen, strict=True)]
        item, time = (
            np.array([int(part[0]) for part in parts])
            for parts in ([event.item for event in events], [event.timestamp for event in events])
        )
        return NextItemCases(user, seen, item, time)

    def measure(self, model: VistaModel, cases: NextItemCases, covered: Int) -> dict[str, Floats]:
        """By name: a metric of each case."""
        rows = model.rows_of(self.log.items)
        answers = SummaryAnswers(model, self.log, rows, np.unique(cases.user), covered, 1 << 15)
        scores = np.concatenate(
            [
                answers.catalog_scores(cases.part(slice(low, low + 500)))[:, : 1 + len(model.items)]
                for low in range(0, len(cases), 500)
            ]
        )
        scores = scores[:, rows] if scores.shape[1] > rows.max() else scores[:, rows - 1]
        top = np.argsort(-scores, 1, kind="stable")[:, :TOP_K]
        rank = top == cases.item[:, None]
        ndcg = np.where(rank.any(1), 1 / np.log2(2 + rank.argmax(1)), 0.0)
        user = self.log.users.ids(cases.user).astype(np.int64) - 1
        start = self.world.offsets[user]
        place = start + cases.seen
        asked = Queries(
            self.row[top].ravel().astype(np.int32),
            np.repeat(self.world.timestamp[place], TOP_K),
            np.repeat(start, TOP_K),
            np.repeat(place, TOP_K),
        )
        shown = WORLDS[self.world.config.world].probabilities(self.world.catalog, self.world, asked)  # type: ignore[arg-type]
        rewards = [
            self.log.slice(int(u), int(s), int(s) + 1).features.columns["clicked"][0]
            for u, s in zip(cases.user, cases.seen, strict=True)
        ]
        reward = np.array(rewards, np.float64)
        return {
            "click": shown[:, 0].reshape(-1, TOP_K).mean(1),
            "like": (shown[:, 0] * shown[:, 1]).reshape(-1, TOP_K).mean(1),
            "ndcg": ndcg,
            "reward ndcg": ndcg * reward / reward.mean(),
        }


def words(env: SimulatedTruth) -> list[str]:
    validation, test = split_times(env.world.config)
    return [
        *MODEL,
        f"data.path={env.log.path}",
        f"data.validation_from={validation}",
        f"data.test_from={test}",
        "model.ignore=[event_features]",
    ]


# Methods that the product lacks.


class FilteredRewards(EventRewards):
    """Labels without a click have no weight."""

    def weights(self, user: Int, events: Any) -> Float32s:
        clicked = events.features.columns["clicked"]
        weight: Float32s = (clicked / self.baseline.mean()).astype(np.float32)
        return weight


class ItemBaselines(EventRewards):
    """The baseline is the mean reward of the item, not of the user."""

    def _advantages(self, user: Int, events: Any) -> Floats:
        columns = events.features.columns
        advantage: Floats = (columns["clicked"] - columns["item_mean"]).astype(np.float64)
        return advantage


class LearnedValues(EventRewards):
    """The baseline is a ridge regression of clicks on what was known of the user before the event."""

    reads_items = False
    """Whether it also reads the item's mean and the user's earlier events of the item."""

    def __init__(self, log: EventLog, counts: Int, optim: OptimConfig) -> None:
        known = [self._known(log.slice(user, 0, int(stop))) for user, stop in enumerate(counts)]
        rows, clicked = (np.concatenate(parts) for parts in zip(*known, strict=True))
        self._user_starts = np.concatenate([[0], np.cumsum(counts)])
        self._times = [np.asarray(log.slice(user, 0, int(stop)).timestamp) for user, stop in enumerate(counts)]
        model = make_pipeline(StandardScaler(), Ridge(1.0)).fit(rows, clicked)
        self._value: Floats = model.predict(rows)
        print(json.dumps({"baseline": type(self).__name__, "variance explained": round(model.score(rows, clicked), 3)}))
        super().__init__(log, counts, optim)

    def _known(self, events: Any) -> tuple[Floats, Floats]:
        """Features float64 [T, F] of one user's events, and clicks [T]."""
        clicked, place = events.features.columns["clicked"].astype(np.float64), np.arange(len(events.item))
        before = np.concatenate([[0.0], np.cumsum(clicked)])[:-1]
        columns = [np.log1p(place), np.log1p(np.diff(events.timestamp, prepend=events.timestamp[:1]) / HOUR_MS)]
        for last in (10, 50, len(place)):
            start = np.maximum(place - last, 0)
            columns.append((before - before[start] + 1) / (place - start + 2))
        if self.reads_items:
            order = np.argsort(events.item, kind="stable")
            item, earlier = events.item[order], np.empty(len(order))
            earlier[order] = place - np.searchsorted(item, item)
            columns += [events.features.columns["item_mean"], np.log1p(earlier)]
        return np.stack(columns, 1).astype(np.float64), clicked

    def _advantages(self, user: Int, events: Any) -> Floats:
        place = np.empty(len(user), np.int64)
        for one in np.unique(user):
            own = user == one
            place[own] = self._user_starts[one] + np.searchsorted(self._times[one], events.timestamp[own])
        advantage: Floats = events.features.columns["clicked"] - self._value[place]
        return advantage


class LearnedValuesOfItems(LearnedValues):
    """`LearnedValues` that reads items, too."""

    reads_items = True


def with_rewards(kind: type[EventRewards]) -> Callable[[], AbstractContextManager[object]]:
    return lambda: patch.object(vista.examples.batch_source, "EventRewards", kind)


METHODS: dict[str, tuple[tuple[str, ...], Callable[[], AbstractContextManager[object]]]] = {
    "plain": ((), nullcontext),
    "A-SFT T=0.5": (("optim.reward=clicked", "optim.reward_temperature=0.5"), nullcontext),
    "A-SFT T=1": (("optim.reward=clicked",), nullcontext),
    "item means": (("optim.reward=item_mean",), nullcontext),
    "filtering": (("optim.reward=clicked",), with_rewards(FilteredRewards)),
    "item baselines": (("optim.reward=clicked",), with_rewards(ItemBaselines)),
    "learned values": (("optim.reward=clicked",), with_rewards(LearnedValues)),
    "learned values of items": (("optim.reward=clicked",), with_rewards(LearnedValuesOfItems)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    parser.add_argument("--epochs", type=int, nargs=2, default=(3, 1), help="of the base, and of the fine-tuning")
    asked = parser.parse_args()
    found: dict[str, dict[str, list[Floats]]] = {}
    for seed in asked.seeds:
        folder = asked.out / f"seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        env = SimulatedTruth.make(seed, folder)
        given = [*words(env), f"seed={seed}"]
        base_words = [*given, f"run_dir={folder / 'base'}", f"optim.epochs={asked.epochs[0]}"]
        base = train(compose_config(TrainConfig, base_words), env.log)
        validation, test = split_times(env.world.config)
        begin, end = (validation, test) if asked.split == "validation" else (test, None)
        cases, covered = env.cases(begin, end), visible_counts(env.log, parse_until(str(begin)))
        for name in ("base", *asked.methods):
            model = base
            if name != "base":
                own, patches = METHODS[name]
                run = folder / "".join(c if c.isalnum() else "-" for c in name)
                extra = [f"run_dir={run}", f"optim.epochs={asked.epochs[1]}", f"init_from={folder / 'base' / 'best'}"]
                config = compose_config(TrainConfig, [*given, *extra, "init_freeze=summarizer", *own])
                with patches():
                    model = train(config, env.log)
            measured = env.measure(model, cases, covered)
            _, index = np.unique(cases.user, return_inverse=True)
            for metric, values in measured.items():
                means = np.bincount(index, values) / np.bincount(index)
                found.setdefault(name, {}).setdefault(metric, []).append(means)
            row = {metric: round(float(np.mean(values[-1])), 5) for metric, values in found[name].items()}
            print(json.dumps({"seed": seed, "method": name, **row}), flush=True)
        _print(found)


def _print(found: dict[str, dict[str, list[Floats]]]) -> None:
    """Print means over the users of all seeds so far, and paired differences from each method."""
    for reference, of_reference in found.items():
        print(f"compared with {reference}:")
        for name, metrics in found.items():
            cells = []
            for metric, parts in metrics.items():
                cells.append(paired_cell(metric, np.concatenate(parts), np.concatenate(of_reference[metric])))
            print(f"{name:24s} " + "  ".join(cells))


if __name__ == "__main__":
    main()
