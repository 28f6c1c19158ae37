"""What users do in the next events, on real logs with long histories and returns: in all, returns, and new items.

Rows are chosen by their validation metrics; trials are not measured on test at all. A model is trained once for each
part of the split, with the same settings, on all events before the labels of the part: the same events that a counting
baseline is counted on. No epoch is chosen by validation, for which the events before the test leave no labels.
"""

from __future__ import annotations

from scripts.experiments.tables.table import K0, WITHOUT_COUNTERS, Table, TableRow

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
NEXT = ("optim.window_weight=0", "optim.next_weight=1")
COUNTERS = (
    *("optim.window_weight=1", "optim.next_weight=0"),
    *("model.counter_keys=[item]", "data.anchor_spacing=16"),
)
"""Counters, and the loss that goes with them."""
CHOSEN = {
    "complete-journey": (
        "model.temperature=0.4",
        *("data.tokens_per_batch=2048", "data.num_negatives=2048", "optim.epochs=3"),
        "model.counted_dropout=0",  # these rows were measured before this setting existed
    ),
    "dev-packages": (
        "model.temperature=0.2",
        *("data.tokens_per_batch=2048", "optim.epochs=6"),
        *("model.counter_days=[7,30]", "model.counter_events=[32,200]"),
    ),
}
"""By trials of vista on the validation part of each log (research log). HSTU has the same settings."""
COLD_BASELINES = ("popularity", "popularity afterwards", "content neighbors", "item neighbors")
"""Baselines of items without events, which only the second and the third can order."""
WITHOUT = "vista, same settings without counters"
HSTU = ("hstu, counters", "hstu-1,000, counters", "hstu-2,000, counters")
"""HSTU over the newest 200, 1,000, and 2,000 events."""
SASREC = ("sasrec, counters", "sasrec-1,000, counters", "sasrec-2,000, counters")
VARIED = {
    # Fewer and more tokens than 16.
    "vista, counters, K = 4": ("model.num_seeds=4",),
    "vista, counters, K = 64": ("model.num_seeds=64",),
    "vista, counters, one head": ("model.num_heads=1",),
    "vista, counters, next items alone": NEXT,
    # No event is in both the summary and the tail.
}
"""Each row changes one setting of vista."""
CATEGORIES = {
    "vista, counters, features": ("model.ignore=[user_features]",),
    "vista, counters, counted categories": (
        "model.ignore=[user_features]",
        "model.counter_keys=[item,product_category,product_type]",
    ),
}
"""What the counters of a product's categories add to those of the product, for a log whose items have some."""
COUNTED = ("vista, counters", "tail-only, counters", "hstu, counters")
"""Rows that are compared with every baseline."""
ALL_EVENTS = "vista, epoch 0 on all events"
LAST_MODEL = ("optim.validate_every=0",)
"""The last model is measured, in all rows."""


def _baselines(*names: str) -> dict[str, TableRow]:
    return {name: TableRow(BASELINE_MINUTES[name], untrained=name) for name in names}


def _returns(data: str) -> Table:
    """What can be reached without a network."""
    pairs = tuple(("counter trees", name) for name in BASELINE_MINUTES if name != "counter trees")
    return Table("", data, _baselines(*BASELINE_MINUTES), LAST_MODEL, windows=True, pairs=pairs)


def _windows(data: str, minutes: float) -> Table:
    """`minutes` is the estimated time of one model of the row `vista, counters`; a row trains two."""
    words, both = (*COUNTERS, *CHOSEN[data]), 2 * minutes
    varied = VARIED | (CATEGORIES if data == "complete-journey" else {})
    hstu, sasrec = ((*words, f"model.kind={name}") for name in ("hstu", "sasrec"))
    rows = {
        "vista, counters": TableRow(both, words),
        "tail-only, counters": TableRow(0.5 * both, (*words, *K0)),
        "vista, counters, no pooled vectors": TableRow(both, (*words, "model.pooled_dim=0")),
        WITHOUT: TableRow(both, (*words, "model.counter_keys=[]")),
        "hstu, counters": TableRow(1.5 * both, hstu),
        "hstu-1,000, counters": TableRow(3 * both, (*hstu, "model.history_limit=1000")),
        "hstu-2,000, counters": TableRow(4 * both, (*hstu, "model.history_limit=2000")),
        "sasrec, counters": TableRow(1.5 * both, sasrec),
        "sasrec-1,000, counters": TableRow(3 * both, (*sasrec, "model.history_limit=1000")),
        "sasrec-2,000, counters": TableRow(4 * both, (*sasrec, "model.history_limit=2000")),
        **{name: TableRow(both, (*words, *changed)) for name, changed in varied.items()},
        # Without counters, and trained on windows, or on next items only.
        "vista": TableRow(2 * both, (*WITHOUT_COUNTERS, *LOSS)),
        "tail-only": TableRow(both, (*WITHOUT_COUNTERS, *LOSS, *K0)),
        "vista-next": TableRow(2 * both, (*WITHOUT_COUNTERS, *NEXT)),
        "tail-only-next": TableRow(both, (*WITHOUT_COUNTERS, *NEXT, *K0)),
        **{
            f"trial: hstu, T = {t:g}": TableRow(0.75 * both, (*hstu, f"model.temperature={t}"), trial=True)
            for t in (0.1, 0.2, 0.4)
            if f"model.temperature={t}" not in words  # which the rows of hstu have
        },
        **_baselines(*BASELINE_MINUTES),
    }
    compared = {
        "vista, counters": (
            *("vista", WITHOUT, "tail-only, counters", "vista, counters, no pooled vectors"),
            *(*HSTU, *SASREC, *varied),
        ),
        "hstu, counters": HSTU[1:],
        "vista": ("tail-only", "vista-next"),
        "tail-only": ("tail-only-next",),
    }
    pairs = [(row, other) for row, others in compared.items() for other in others]
    pairs += [(row, name) for row in COUNTED for name in BASELINE_MINUTES]
    return Table("", data, rows, LAST_MODEL, costs=True, windows=True, pairs=tuple(pairs))


def _newcomer(data: str, *, windows: bool) -> Table:
    """What `vista train` reaches in ten minutes without settings, against counting.

    As a newcomer would: the model is trained on the events before the validation part, which chooses its epoch.
    Baselines, the store, and counters have all events before the test. Tables with `windows` have
    one more row, whose model is fitted to all of these too, as before a deployment (docs/guides/train.md), but without
    attention.
    """
    names = list(BASELINE_MINUTES) if windows else ["popularity", "transitions", "item neighbors"]
    minutes, budget = 11, "optim.minutes=10"
    others = () if windows else ("sasrec", "hstu", "fuxi_linear", "paper")
    rows = {
        "vista": TableRow(minutes, (budget,)),
        **({ALL_EVENTS: TableRow(2, ("optim.epochs=0", *LAST_MODEL))} if windows else {}),
        **{name: TableRow(minutes, (budget, f"model.kind={name}")) for name in others},
        **_baselines(*names),
    }
    pairs = tuple((row, name) for row in ("vista", ALL_EVENTS) for name in names) if windows else ()
    return Table("", data, rows, windows=windows, pairs=pairs, curve=True)


def _cold() -> Table:
    """Items that appear in the last fifth of the time, ranked by their features: among themselves, and among others."""
    split = ("data.validation_from=2017-09-15", "data.test_from=2017-10-20")
    counted = {name: TableRow(0.5, untrained=name) for name in COLD_BASELINES}
    features = ("model.ignore=[user_features]",)
    with_texts = {f"vista, text {texts}": TableRow(14, features, texts=texts) for texts in ("vectors", "codes")}
    rows = {"vista": TableRow(12, features), "vista, ids alone": TableRow(12), **with_texts, **counted}
    pairs = [("vista", name) for name in rows if name != "vista" and name not in with_texts]
    pairs += [(name, "vista") for name in with_texts]
    return Table("", "complete-journey", rows, (*LAST_MODEL, *split), windows=True, cold=True, pairs=tuple(pairs))


TABLES = {
    "returns-cj": _returns("complete-journey"),
    "returns-dev": _returns("dev-packages"),
    "window-cj": _windows("complete-journey", 4),
    "window-dev": _windows("dev-packages", 3),
    "cold-cj": _cold(),
    "newcomer-cj": _newcomer("complete-journey", windows=True),
    "newcomer-dev": _newcomer("dev-packages", windows=True),
    "newcomer-ml-1m-half": _newcomer("ml-1m-half", windows=False),
    "newcomer-ml-latest-small": _newcomer("ml-latest-small", windows=False),
}
