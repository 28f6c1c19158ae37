"""Clicks of the simulation: history lengths, trials, a second task, one change per row, and its other worlds.

A mean of item vectors does not explain the clicks of the worlds, which have one table each.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from scripts.experiments.tables.table import (
    AGES,
    BOTH,
    K0,
    LABEL_BASELINES,
    ORACLE,
    SOFTMAX,
    WITHOUT_COUNTERS,
    Table,
    TableRow,
)
from vista.config.checks import Codec

SIM_HARD = ("model.kind=sim", "model.search_category=topic")
"""SIM that finds events by the simulation's true topics."""
LENGTHS = {"length-200": 200, "length-1k": 1_000, "simulation": 4_000, "length-16k": 16_000, "length-64k": 64_000}
"""The tables of one simulation -> mean events per history."""
WORLDS = ("returns", "sequence", "conjunction", "seasons", "drift")
TOPICS = ("model.ignore=[user_features]",)
KEYED = (
    *(*TOPICS, "model.counter_keys=[item,topic,topic*month,topic*weekday,previous*item]"),
    *("model.num_counters=2048", "model.counter_events=[32,250,1000,2500]"),
)
"""The true topic of each item as a feature, and counters of items, topics, and most of what the calendar and the item
before tell of them."""
REFERENCES = {
    "last 2,000 events": TableRow(1, untrained="last 2000"),
    "pooled": TableRow(1, untrained="pooled"),
}
"""What the last events and pooled vectors can reach at best (`vista.simulation.simulate`)."""
_SPLIT = ("data.validation_from=2024-10-19", "data.test_from=2025-05-26")


def _simulation(data: str, num_users: int, events_per_user: int) -> Table:
    """A log of about 4.8M events and 360,000 impressions, for any history length.

    The age of the summaries in training is proportional to the length, and so is the number of windows per history in
    which a model that reads the whole history has its labels. Such a model takes one step per history. So few long
    histories show the same windows in more passes of fewer windows: 75 steps per pass, at 64,000 events, are too few.
    SASRec and HSTU use every event of a chunk as a label.
    """
    lighter = {16_000: 4, 64_000: 8}.get(events_per_user, 1)
    windows = max(4, events_per_user * 64 // 4000) // lighter
    four_passes = ("optim.epochs=4", "optim.validate_every=1")
    all_labels = ("data.windows_per_chunk=0", "data.label_spacing=32", "model.tail_len=64", *four_passes)
    rows = {
        "vista": TableRow(12, codecs=BOTH),
        "tail-only": TableRow(7, K0),
        "epoch 0": TableRow(4, (*K0, "optim.epochs=0")),
        # Every event is a label, as in SASRec and HSTU, and the tail is twice as long.
        "vista-all-labels": TableRow(20, all_labels),
        "sasrec": TableRow(20, ("model.kind=sasrec", *four_passes)),
        "hstu": TableRow(25, ("model.kind=hstu", *four_passes)),
        "din": TableRow(10, ("model.kind=din",)),
        "sim": TableRow(10, ("model.kind=sim",)),
        # Uses the simulation's true topics, which no other model gets.
        "sim-hard": TableRow(10, SIM_HARD),
        "twin": TableRow(8, ("model.kind=twin",)),
        # With the learning rate that the table `tuning` chooses for all three, and about equal training times.
        "vista-tuned": TableRow(16, ("optim.learning_rate=0.004",)),
        "sim-tuned": TableRow(16, ("model.kind=sim", f"optim.epochs={7 * lighter}", "optim.learning_rate=0.004")),
        "twin-tuned": TableRow(18, ("model.kind=twin", f"optim.epochs={8 * lighter}", "optim.learning_rate=0.004")),
    }
    words = (
        f"data.windows_per_chunk={windows}",
        f"optim.epochs={4 * lighter}",
        f"optim.validate_every={lighter}",
        f"data.staleness_events={events_per_user * 300 // 4000}",
        f"data.chunk_len={max(16_384, 4 * events_per_user)}",  # whole histories, whose lengths spread around the mean
    )
    sizes = {"num_users": num_users, "events_per_user": events_per_user, "impressions_per_user": 360_000 // num_users}
    # Fitted to the clicks before the validation part, and given all events up to each impression.
    rows |= {name: TableRow(5, untrained=name) for name in LABEL_BASELINES}
    return Table("simulation", data, rows | ORACLE, words, sizes, costs=True)


# Three times the default number of users: with 400, NE stays far from the oracle's after any number of passes.
SIMULATION = _simulation("simulation", 1200, 4000)


def _ablations(minutes: float, staleness: tuple[int, ...] = ()) -> dict[str, TableRow]:
    """One change per row; `minutes` is the estimated time of the row `vista`.

    Bidirectional mixing has no convolution: compare it with `no-convolution`.
    """
    horizons = "model.decay_horizons"
    changes: dict[str, tuple[float, tuple[str, ...]]] = {
        "tail-only": (0.4, K0),
        "K=4": (0.9, ("model.num_seeds=4",)),
        "K=32": (1.3, ("model.num_seeds=32",)),
        "reconstruction-0.05": (1.25, ("optim.reconstruction_weight=0.05",)),
        "reconstruction-0.2": (1.25, ("optim.reconstruction_weight=0.2",)),
        "reconstruction-1": (1.25, ("optim.reconstruction_weight=1",)),
        "bidirectional": (1.5, ("model.kind=bidirectional",)),
        "1-window": (0.5, ("data.windows_per_chunk=1",)),
        "cuts-every-8": (1.8, ("data.label_spacing=8",)),
        "decay-position": (1, ("model.decay=position", f"{horizons}=[0,256,64,16]")),
        "decay-time": (1, ("model.decay=time", f"{horizons}=[0,365,90,30]")),
        "no-convolution": (0.95, ("model.conv_width=1",)),
        "convolution-5": (1.05, ("model.conv_width=5",)),
        "softmax": (1, SOFTMAX),
        "4-layers": (1.6, ("model.num_target_layers=4",)),
    }
    rows = {name: TableRow(share * minutes, words) for name, (share, words) in changes.items()}
    return {"vista": TableRow(minutes, codecs=tuple(Codec), staleness=staleness)} | rows


def _downstream() -> Table:
    """A second task on the frozen summaries of a model for clicks, against a model trained for both tasks.

    The log and split are those of the table `simulation`. The downstream row has slightly more than a quarter of the
    joint row's labels: those after its store.
    """
    tasks = "optim.tasks=[like,long_view]"
    # Likes are known for few impressions, so most windows have no label; training draws those that do.
    few = ("optim.next_weight=0", "data.windows_per_chunk=20", "optim.epochs=8")
    rows = {
        "base": TableRow(12, ("optim.tasks=[click]",)),
        "joint": TableRow(12, (tasks,)),
        # Also trained on clicks, as the base is.
        "joint-all": TableRow(12),
        "downstream": TableRow(4, (tasks, *few), base="base", until="2025-01-01"),
        # Without a summary of old events: the quality that the tail alone gives.
        "tail-only": TableRow(7, (tasks, *K0)),
    }
    return replace(SIMULATION, words=(*SIMULATION.words, *SOFTMAX), rows=rows | ORACLE)


def _five_minutes() -> Table:
    """What five minutes on two cores reach on the log of the table `simulation`."""
    budget = ("optim.epochs=null", "optim.minutes=5")
    rows = {
        "vista": TableRow(5, budget),
        "clicks alone": TableRow(5, (*budget, "optim.next_weight=0")),
        # The published choices and sizes: K = 128, d = 256, bidirectional, softmax layers in stage 2.
        "paper": TableRow(5, (*budget, "model.kind=paper", "optim.reconstruction_weight=0.1")),
    }
    return replace(SIMULATION, rows=rows | ORACLE, costs=False, validation=True)


def _trials() -> dict[str, TableRow]:
    """The same trials and about the same training time for every model, which determines the number of passes."""
    passes = {"vista": 5, "tail-only": 5, "sasrec": 6, "hstu": 4, "din": 6, "sim": 7, "twin": 8}
    return {
        f"{model}, rate {rate:g}": TableRow(
            4.5, (f"model.kind={model}", f"optim.epochs={count}", f"optim.learning_rate={rate}")
        )
        for rate in (0.002, 0.001, 0.004)
        for model, count in passes.items()
    }


def _features() -> dict[str, TableRow]:
    """Every model without and with the true topic of each item as a feature."""
    models = {
        "vista": (5, ("model.kind=vista",)),
        "tail-only": (5, K0),
        "sasrec": (6, ("model.kind=sasrec",)),
        "hstu": (4, ("model.kind=hstu",)),
        "din": (6, ("model.kind=din",)),
        "sim": (7, ("model.kind=sim",)),
        "sim-hard": (7, SIM_HARD),
        "twin": (8, ("model.kind=twin",)),
    }
    return {
        name + suffix: TableRow(4.5, (*words, f"optim.epochs={passes}", *reads))
        for name, (passes, words) in models.items()
        for suffix, reads in (("", ()), (", topics", TOPICS))
    }


TUNING = Table(
    "simulation",
    "simulation-2k-600",
    _trials() | ORACLE,
    ("data.windows_per_chunk=32", "data.staleness_events=150", "optim.validate_every=1"),
    {"num_users": 600, "events_per_user": 2000},
    validation=True,
)
"""A quarter of the events of the table `simulation`."""
TABLES = {
    "simulation": SIMULATION,
    # The same simulation with shorter and longer histories; the table `simulation` has 4,000 events.
    "length-200": _simulation("simulation-200", 24_000, 200),
    "length-1k": _simulation("simulation-1k", 4800, 1000),
    "length-16k": _simulation("simulation-16k", 300, 16_000),
    "length-64k": _simulation("simulation-64k", 75, 64_000),
    "downstream": _downstream(),
    "share-5min": _five_minutes(),
    # Half the events per history and three passes, so that a run takes about five minutes.
    "ablations-simulation": Table(
        "simulation",
        "simulation-2k",
        _ablations(4.5, AGES) | ORACLE,
        ("data.windows_per_chunk=32", "data.staleness_events=150", "optim.epochs=3"),
        {"num_users": 1200, "events_per_user": 2000},
    ),
    "tuning": TUNING,
    "features-simulation": replace(TUNING, rows=_features() | ORACLE),
}


def length_case(length: int, row: str) -> str:
    """Case of bench_lengths.py for a row's request."""
    return f"{length:,} events: {row}"


def _world(name: str, **size: Any) -> Table:
    """Half as many users as in the table `simulation`, and twenty minutes for each training."""
    rows = {
        "vista": TableRow(25, KEYED),
        "tail-only": TableRow(25, (*K0, *KEYED)),
        "epoch 0": TableRow(4, (*K0, *KEYED, "optim.epochs=0")),
        "vista, no counters": TableRow(25, WITHOUT_COUNTERS),
        "hstu": TableRow(25, ("model.kind=hstu",)),
        **REFERENCES,
        **ORACLE,
    }
    simulation = {"world": name, "num_users": 600, "events_per_user": 4000, **size}
    # A day has five or six events, so nothing lies between a summary and the tail for longer than a few days.
    refreshed = ("data.refresh_days=9", "data.staleness_events=32")
    return Table("simulation", f"world-{name}", rows, ("optim.minutes=20", *refreshed), simulation, validation=True)


TABLES |= {f"world-{name}": _world(name) for name in WORLDS}
# Twice as many years, so that training has labels with an earlier year at every time of the year. The split is at the
# same shares of the period.
_LONGER = _world("seasons", start="2022-01-01", days=1460)
TABLES["world-seasons-4-years"] = replace(_LONGER, words=(*_LONGER.words, *_SPLIT))
