"""What users do in the next events, on real logs with long histories and returns: in all, returns, and new items.

Rows are chosen by their validation metrics; trials are not measured on test at all. A model is trained once for each
part of the split, with the same settings, on all events before the labels of the part: the same events that a counting
baseline is counted on. No epoch is chosen by validation, for which the events before the test leave no labels.
"""

from __future__ import annotations

from scripts.experiments.tables.table import Table
from scripts.experiments.tables.table_row import K0, TableRow

BASELINE_MINUTES = {
    "popularity": 0.1,
    "own frequency": 0.1,
    "own frequency, last 200 events": 0.1,
    "own frequency, decay 90 days": 0.1,
    "own frequency, decay 200 events": 0.1,
    "transitions": 0.1,
    "transitions and own frequency": 1,
    "item neighbors": 0.5,
    "EASE": 3,
    "TIFU-KNN": 6,
    "pooled factors": 6,
    "pooled vectors": 4,
    "new-item trees": 6,
    "counter trees": 6,
}

LOSS = ("optim.window_weight=1", "optim.next_weight=0.2")
COUNTERS = (
    "optim.window_weight=1",
    "optim.next_weight=0",
    "model.counters=true",
    "model.popularity=true",
    "data.anchor_spacing=16",
)
"""Counters, and the loss and the start from popularity that go with them."""
CHOSEN = ("model.temperature=0.4", "optim.table_rate=0", "model.item_start=user_factors")
"""By trials on the validation part of complete-journey (research log)."""
MEAN = "model.mean_token=true"
"""Chosen on the same part, by single runs that the research log lists. Without a summary, there is no such token."""
HSTU_CHOSEN: tuple[str, ...] = ()
"""The best settings of the trials of HSTU on validation. Rows of HSTU with counters are in the table once it is set."""
ITEM_STARTS = {
    "user factors, table rate 0": ("model.item_start=user_factors", "optim.table_rate=0"),
    "factors": ("model.item_start=factors", "optim.table_rate=1"),
    "random start": ("model.item_start=random", "optim.table_rate=1"),
}
STEPS = {"complete-journey": ("data.tokens_per_batch=2048", "data.num_negatives=2048", "optim.epochs=3")}
"""Batches and epochs of the same trials, for all rows with counters. On other data, they are planned from the log."""
TWICE_THE_EPOCHS = ("optim.epochs=6",)
WITHOUT = "vista, same settings without counters"
COUNTED = ("vista, counters", "tail-only, counters", *(["hstu, counters"] if HSTU_CHOSEN else []))
"""Rows that are compared with every baseline."""
LAST_MODEL = ("optim.validate_every=0",)
"""The last model is measured, in all rows."""


def _baselines(*names: str) -> dict[str, TableRow]:
    return {name: TableRow(BASELINE_MINUTES[name], untrained=name) for name in names}


def _returns(data: str) -> Table:
    """What can be reached without a network."""
    pairs = tuple(("counter trees", name) for name in BASELINE_MINUTES if name != "counter trees")
    return Table("", data, _baselines(*BASELINE_MINUTES), windows=True, pairs=pairs)


def _windows(data: str, minutes: float) -> Table:
    """`minutes` is the estimated time of one model of the row `vista`; a row trains two."""
    counters = (*COUNTERS, *STEPS.get(data, ()))
    counted_minutes = 0.5 * minutes if data in STEPS else minutes  # fewer epochs than planned from the log
    both, counted = 2 * minutes, 2 * counted_minutes
    hstu_counters = _hstu_counters(1.5 * counted, counters) if HSTU_CHOSEN else {}
    rows = {
        "vista": TableRow(both, LOSS),
        "tail-only": TableRow(0.5 * both, (*LOSS, *K0)),
        "sasrec": TableRow(both, (*LOSS, "model=sasrec")),
        "hstu": TableRow(1.5 * both, (*LOSS, "model=hstu")),
        "vista, counters": TableRow(counted, (*counters, *CHOSEN, MEAN)),
        "vista, counters, no mean": TableRow(counted, (*counters, *CHOSEN)),
        WITHOUT: TableRow(counted, (*counters, *CHOSEN, MEAN, "model.counters=false")),
        "tail-only, counters": TableRow(0.5 * counted, (*counters, *CHOSEN, *K0)),
        **hstu_counters,
        # Trained on next items only.
        "vista-next": TableRow(both),
        "tail-only-next": TableRow(0.5 * both, K0),
        "sasrec-next": TableRow(both, ("model=sasrec",)),
        "hstu-next": TableRow(1.5 * both, ("model=hstu",)),
        **_trials(0.5 * minutes, counters),
        **_hstu_trials(1.5 * counted_minutes, counters),
        **_baselines(*BASELINE_MINUTES),
    }
    compared = {
        "vista": ("tail-only", "sasrec", "hstu", "vista-next"),
        "tail-only": ("tail-only-next",),
        "vista, counters": ("vista", WITHOUT, "tail-only, counters", "vista, counters, no mean", *hstu_counters),
    }
    if hstu_counters:
        compared["hstu, counters"] = ("hstu", "hstu-2,000, counters")
    pairs = [(row, other) for row, others in compared.items() for other in others]
    pairs += [(row, name) for row in COUNTED for name in BASELINE_MINUTES]
    return Table("", data, rows, LAST_MODEL, costs=True, windows=True, pairs=tuple(pairs))


def _hstu_counters(minutes: float, counters: tuple[str, ...]) -> dict[str, TableRow]:
    """HSTU with counters over 200, 1,000, and 2,000 events."""
    words = (*counters, *HSTU_CHOSEN, "model=hstu")
    return {
        "hstu, counters": TableRow(minutes, words),
        "hstu-1,000, counters": TableRow(2 * minutes, (*words, "model.history_limit=1000")),
        "hstu-2,000, counters": TableRow(2.7 * minutes, (*words, "model.history_limit=2000")),
    }


def _trials(minutes: float, counters: tuple[str, ...]) -> dict[str, TableRow]:
    """Weights of the losses, starts and learning rates of the item table, and counters, all without a summary."""
    chosen = (*counters, *CHOSEN)
    words = {
        # With one loss, its weight changes nothing.
        "window only": ("optim.window_weight=1", "optim.next_weight=0"),
        "as much next as window": ("optim.window_weight=1", "optim.next_weight=1"),
        "random start": (*LOSS, "model.item_start=random"),
        "table rate 0": (*LOSS, "optim.table_rate=0"),
        "table rate 0.1": (*LOSS, "optim.table_rate=0.1"),
        **{f"T = {t:g}": (*chosen, f"model.temperature={t:g}") for t in (0.1, 0.2, 0.8)},
        "no popularity": (*chosen, "model.popularity=false"),
        "counters, factors, table rate 0.1": (*chosen, "model.item_start=factors", "optim.table_rate=0.1"),
        "factors of co-occurrences": (*chosen, "model.item_start=factors"),
        "counters of 16 items": (*chosen, "model.counter_keys=16"),
        "counters of 256 items": (*chosen, "model.counter_keys=256"),
        "counters over days": (*chosen, "model.counter_days=[7,30,90]", "model.counter_events=[]"),
        "counters over events": (*chosen, "model.counter_days=[]", "model.counter_events=[32,200]"),
        "counters over four horizons": (*chosen, "model.counter_days=[7,30]", "model.counter_events=[32,200]"),
    }
    return {f"trial: {name}": TableRow(minutes, (*own, *K0), trial=True) for name, own in words.items()}


def _hstu_trials(minutes: float, counters: tuple[str, ...]) -> dict[str, TableRow]:
    """Temperatures and item starts for HSTU, and one trial of twice the epochs that are set."""
    words = {
        f"hstu, T = {t:g}, {name}": (f"model.temperature={t:g}", *start)
        for t in (0.1, 0.2, 0.4)
        for name, start in ITEM_STARTS.items()
    }
    trials = {
        f"trial: {name}": TableRow(minutes, (*counters, *own, "model=hstu"), trial=True) for name, own in words.items()
    }
    if any(word.startswith("optim.epochs=") for word in counters):
        longer = (*counters, *CHOSEN, *TWICE_THE_EPOCHS, "model=hstu")
        trials["trial: hstu, T = 0.4, user factors, twice the epochs"] = TableRow(2 * minutes, longer, trial=True)
    return trials


def _newcomer(data: str, *, windows: bool) -> Table:
    """What `vista train` reaches in ten minutes without settings, against counting.

    A row with `windows` trains two models, for ten minutes each, and measures the last epoch of each: no validation
    chooses an epoch, as it would by default.
    """
    names = list(BASELINE_MINUTES) if windows else ["popularity", "transitions", "item neighbors"]
    rows = {"vista": TableRow(22 if windows else 11, ("optim.minutes=10",)), **_baselines(*names)}
    pairs = tuple(("vista", name) for name in names) if windows else ()
    return Table("", data, rows, LAST_MODEL if windows else (), windows=windows, pairs=pairs)


TABLES = {
    "returns-cj": _returns("complete-journey"),
    "returns-dev": _returns("dev-packages"),
    "window-cj": _windows("complete-journey", 10),
    "window-dev": _windows("dev-packages", 6),
    "newcomer-cj": _newcomer("complete-journey", windows=True),
    "newcomer-dev": _newcomer("dev-packages", windows=True),
    "newcomer-ml-1m-half": _newcomer("ml-1m-half", windows=False),
    "newcomer-ml-latest-small": _newcomer("ml-latest-small", windows=False),
}
