"""Next items of MovieLens, and settings that are measured on ml-100k."""

from __future__ import annotations

from scripts.experiments.tables.table import BOTH, COUNTING_BASELINES, K0, SOFTMAX, TAILS, Table, TableRow


def _movielens(data: str, minutes: float, more: dict[str, TableRow]) -> Table:
    """`minutes` is the estimated time of the row `vista`."""
    rows = {
        "vista": TableRow(minutes, codecs=BOTH, tails=TAILS),
        "tail-only": TableRow(0.4 * minutes, K0, tails=TAILS),
        "sasrec": TableRow(0.7 * minutes, ("model.kind=sasrec",)),
        "hstu": TableRow(0.9 * minutes, ("model.kind=hstu",)),
        **more,
        **COUNTING_BASELINES,
    }
    return Table(data, data, rows, costs=True)


def _timeless(minutes: float) -> dict[str, TableRow]:
    without = "model.ignore=[times,item_features,user_features]"
    return {
        "no-times": TableRow(minutes, (without,)),
        "sasrec-no-times": TableRow(0.7 * minutes, ("model.kind=sasrec", without)),
        "hstu-no-times": TableRow(0.9 * minutes, ("model.kind=hstu", without)),
    }


def _embeddings() -> dict[str, TableRow]:
    """Unified tables with as many parameters as one row per item and per gap, and with fractions of them."""
    rows = {"unified-1": 3445, "unified-1/2": 1722, "unified-1/4": 860, "unified-1/10": 343}
    return {"vista": TableRow(6)} | {
        name: TableRow(6, (f"model.embedding_rows={count}",)) for name, count in rows.items()
    }


def _logq_strengths(minutes: float) -> dict[str, TableRow]:
    strengths = (0.5, 0.0)
    return {"vista": TableRow(minutes)} | {
        f"logq-{strength:g}": TableRow(minutes, (f"optim.logq_strength={strength:g}",)) for strength in strengths
    }


TWO_SOFTMAX = (*SOFTMAX, "model.num_target_layers=2")
WIDE = ("model.dim=128", "model.dropout=0.25", "data.unknown_share=0.15")
ML_1M = {
    "2-layers": TableRow(20, ("model.num_target_layers=2",)),
    "hstu-8-layers": TableRow(35, ("model.kind=hstu", "model.num_layers=8")),
    # About as many parameters as vista's 617,000: 617,000 and 619,000. Of vista's, 55,000 belong to the decoder, which
    # is not used in serving, and 41,000 are never read: those of events after the last layer of stage 1, and of gaps
    # that this data set does not have.
    "sasrec-equal": TableRow(30, ("model.kind=sasrec", "model.dim=116")),
    "hstu-equal": TableRow(45, ("model.kind=hstu", "model.num_layers=8", "model.dim=84")),
    # The value of the summary's size, with two softmax layers instead of eight pointwise ones.
    "softmax": TableRow(28, TWO_SOFTMAX, codecs=BOTH, tails=TAILS),
    "softmax-tail-only": TableRow(19, (*K0, *TWO_SOFTMAX), tails=TAILS),
    "softmax-K=4": TableRow(26, ("model.num_seeds=4", *TWO_SOFTMAX)),
    "softmax-K=32": TableRow(35, ("model.num_seeds=32", *TWO_SOFTMAX)),
    # Spends the bytes of 16 int8 rows of 64 on 288 more item ids of 4 bytes. In training, positions see 161 to 320.
    "softmax-raw-ids": TableRow(50, (*K0, *TWO_SOFTMAX, "model.tail_len=320", "data.label_spacing=160")),
    # Twice as wide. Events of unknown items, so that three times the weights do not learn histories by heart; and tails
    # of 1 to 64 events in training, so that the 32 that it is also served with are no longer than most. Its answer is
    # "summary 32 events old, tail 32" (docs/research-log.md).
    "vista-wide": TableRow(
        85,
        (*WIDE, "model.tail_len=64", "data.label_spacing=64"),
        codecs=BOTH,
        tails=(2, 4, 8, 16, 32),
        apart=(16, 32),
    ),
    # Their baseline: the same width, passes and share of unknown items, over the last 200 events.
    "hstu-wide": TableRow(65, ("model.kind=hstu", "model.num_layers=8", *WIDE)),
    "softmax-wide": TableRow(55, (*TWO_SOFTMAX, "model.dim=128", "model.dropout=0.3"), codecs=BOTH, tails=TAILS),
}


def _twenty_minutes() -> Table:
    """Twice the default width on ml-1m after twenty minutes, with the defaults' two layers and item factors."""
    words = ("optim.minutes=20", "optim.validation_users=6040", *WIDE)
    rows = {
        "vista": TableRow(23, ("model.decay=position", "model.decay_horizons=[0,256,64,16]")),
        "tail-only": TableRow(23, K0),
    }
    return Table("", "ml-1m", rows | COUNTING_BASELINES, words, validation=True, curve=True)


TABLES = {
    "ml-1m": _movielens("ml-1m", 36, ML_1M),
    "ml-1m-20min": _twenty_minutes(),
    "ml-1m-half": _movielens("ml-1m-half", 17, _timeless(17)),
    "ml-100k": _movielens("ml-100k", 6, _timeless(6)),
    "ml-latest-small": _movielens("ml-latest-small", 7, _timeless(7)),
    "embeddings": Table("ml-100k", "ml-100k", _embeddings(), SOFTMAX),
    "popularity": Table("ml-100k", "ml-100k", _logq_strengths(6) | COUNTING_BASELINES, SOFTMAX, popularity=True),
}
