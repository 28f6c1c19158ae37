"""Labels of impressions on real logs: is the next answer correct, will the user rate the movie 4 or more, will the
household buy the product again within 14 days?

Trained rows and baselines are fitted to the labels before the validation part, which chooses the epoch. Then the test
is read once per row, as served: summaries are from a store that is refreshed every five days, and tails are fresh.
SASRec, HSTU, and DIN read the newest 200 events before each question.
"""

from __future__ import annotations

from scripts.experiments.tables.table import K0, LABEL_BASELINES, WITHOUT_COUNTERS, Table, TableRow

SERVED = ("vista", "tail-only")
"""Rows whose answers the stack reads: trees over these and all that the trees of LABEL_BASELINES read, fitted to the
validation part. It is the measured ceiling, not a model that can be served."""
STACK = "stack"


def _labels(data: str, task: str, minutes: int, more: dict[str, tuple[str, ...]] | None = None) -> Table:
    """Every training takes so many minutes; more: rows of this set, with their arguments of `vista train`."""
    trained = {
        "vista": (),
        "tail-only": K0,
        "epoch 0": (*K0, "optim.epochs=0"),
        **(more or {}),
        **{name: (f"model.kind={name}",) for name in ("din", "sasrec", "hstu")},
    }
    rows = {name: TableRow(1.5 * minutes, words) for name, words in trained.items()}
    rows |= {name: TableRow(2, untrained=name) for name in (*LABEL_BASELINES, STACK)}
    all_rows = ("model.ignore=[user_features]", "optim.validation_users=5000")
    pairs = [(row, name) for row in SERVED for name in (*LABEL_BASELINES, STACK)]
    pairs += [("vista", name) for name in trained if name != "vista"]
    return Table("", data, rows, (*all_rows, f"optim.minutes={minutes}"), task=task, pairs=tuple(pairs))


COUNTED = {
    "vista, skills counted": ("model.counter_keys=[item,skill]",),
    "vista, no counters": WITHOUT_COUNTERS,
    "tail-only, no counters": (*K0, *WITHOUT_COUNTERS),
}
TABLES = {
    "labels-assist17": _labels("assist17", "correct", 20, COUNTED),
    "labels-cj": _labels("bought-again", "again", 10),
    "labels-ml-1m-half": _labels("ml-1m-half-liked", "liked", 10),
    "labels-ml-latest-small": _labels("ml-latest-small-liked", "liked", 3),
}
