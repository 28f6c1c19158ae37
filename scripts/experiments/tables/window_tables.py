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
    "transitions and own frequency": 0.5,
    "item neighbors": 0.5,
    "EASE": 1,
    "TIFU-KNN": 3,
    "pooled factors": 3,
    "counter trees": 3,
}
STRONGEST = ("own frequency, decay 200 events", "item neighbors", "counter trees")
"""The best baselines for returns, for new items, and in all."""

COUNTERS = (
    "optim.window_weight=1",
    "optim.next_weight=0",
    "model.counters=true",
    "model.popularity=true",
    "model.temperature=0.4",
    "optim.table_rate=0",
    "data.anchor_spacing=16",
)
"""Counters, and what trials on the validation part of complete-journey found to go with them (research log)."""
COUNTED = ("hstu, counters", "hstu-1,000, counters", "hstu-2,000, counters")
LOSS = ("optim.window_weight=1", "optim.next_weight=0.2")


LAST_MODEL = ("optim.validate_every=0",)
"""The last model is measured, in all rows."""


def _baselines(*names: str) -> dict[str, TableRow]:
    return {name: TableRow(BASELINE_MINUTES[name], untrained=name) for name in names}


def _returns(data: str) -> Table:
    """What can be reached without a network."""
    pairs = tuple(("counter trees", name) for name in BASELINE_MINUTES if name != "counter trees")
    return Table("", data, _baselines(*BASELINE_MINUTES), windows=True, pairs=pairs)


def _windows(data: str, minutes: float) -> Table:
    """`minutes` is the estimated time of the row `vista`."""
    rows = {
        "vista": TableRow(minutes, LOSS),
        "tail-only": TableRow(0.5 * minutes, (*LOSS, *K0)),
        "sasrec": TableRow(minutes, (*LOSS, "model=sasrec")),
        "hstu": TableRow(1.5 * minutes, (*LOSS, "model=hstu")),
        "vista, counters": TableRow(minutes, COUNTERS),
        "tail-only, counters": TableRow(0.5 * minutes, (*COUNTERS, *K0)),
        "hstu, counters": TableRow(1.5 * minutes, (*COUNTERS, "model=hstu")),
        **{
            f"hstu-{limit:,}, counters": TableRow(
                factor * minutes, (*COUNTERS, "model=hstu", f"model.history_limit={limit}")
            )
            for limit, factor in ((1000, 3), (2000, 4))
        },
        # Trained on next items only.
        "vista-next": TableRow(minutes),
        "tail-only-next": TableRow(0.5 * minutes, K0),
        "sasrec-next": TableRow(minutes, ("model=sasrec",)),
        "hstu-next": TableRow(1.5 * minutes, ("model=hstu",)),
        **_trials(0.5 * minutes),
        **_baselines(*STRONGEST),
    }
    others = ("tail-only", "sasrec", "hstu", "vista-next", *STRONGEST)
    pairs = (
        *(("vista", other) for other in others),
        ("tail-only", "tail-only-next"),
        *(("hstu, counters", other) for other in ("hstu", "hstu-2,000, counters", *STRONGEST)),
        *(("vista, counters", other) for other in ("vista", "tail-only, counters", *COUNTED, *STRONGEST)),
    )
    return Table("", data, rows, LAST_MODEL, costs=True, windows=True, pairs=pairs)


def _trials(minutes: float) -> dict[str, TableRow]:
    """Weights of the losses, starts and learning rates of the item table, and counters, all without a summary."""
    words = {
        # With one loss, its weight changes nothing.
        "window only": ("optim.window_weight=1", "optim.next_weight=0"),
        "as much next as window": ("optim.window_weight=1", "optim.next_weight=1"),
        "random start": (*LOSS, "model.item_start=random"),
        "table rate 0": (*LOSS, "optim.table_rate=0"),
        "table rate 0.1": (*LOSS, "optim.table_rate=0.1"),
        **{f"T = {t:g}": (*COUNTERS, f"model.temperature={t:g}") for t in (0.1, 0.2, 0.8)},
        "no popularity": (*COUNTERS, "model.popularity=false"),
        "counters, table rate 0.1": (*COUNTERS, "optim.table_rate=0.1"),
        "counters of 16 items": (*COUNTERS, "model.counter_keys=16"),
        "counters of 256 items": (*COUNTERS, "model.counter_keys=256"),
        "counters over days": (*COUNTERS, "model.counter_days=[7,30,90]", "model.counter_events=[]"),
        "counters over events": (*COUNTERS, "model.counter_days=[]", "model.counter_events=[32,200]"),
        "counters over four horizons": (*COUNTERS, "model.counter_days=[7,30]", "model.counter_events=[32,200]"),
    }
    return {f"trial: {name}": TableRow(minutes, (*own, *K0), trial=True) for name, own in words.items()}


def _newcomer(data: str, *, windows: bool) -> Table:
    """What `vista train` reaches in ten minutes with its defaults, against counting.

    A row with `windows` trains two models, for ten minutes each.
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
