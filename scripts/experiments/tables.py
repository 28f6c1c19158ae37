"""The definitions of the tables in docs/results; scripts/experiments/reproduce.py runs them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from vista.config.choices import Codec


@dataclass(frozen=True, slots=True)
class TableLine:
    """How one line of a row is served."""

    codec: Codec = Codec.int8
    tail_len: int | None = None
    """None for the model's own tail length."""
    staleness: int = 0


@dataclass(frozen=True, slots=True)
class TableRow:
    """A model of a table, and how it is served."""

    minutes: float
    """Estimated time of one seed on one thread, used until the row was run."""
    words: tuple[str, ...] = ()
    """Arguments of `vista train` in addition to the table's."""
    codecs: tuple[Codec, ...] = (Codec.int8,)
    """Codecs of the stores that serve it."""
    tails: tuple[int, ...] = ()
    """Shorter tails with which the same weights are also served (`VistaModel.with_tail`), from the int8 store."""
    staleness: tuple[int, ...] = ()
    """Also serve the same weights with summaries that lack this many events before each label, from an int8 store."""
    apart: tuple[int, ...] = ()
    """Tails with which the same weights are also served, with summaries that end this many events before the split's
    labels, from an int8 store. With leave-last-out the tail begins there, so that no event is in both."""
    untrained: Literal["", "popularity", "transitions", "oracle"] = ""
    """A counting baseline, or the true probabilities of the simulation ("oracle"): measured once, without training."""
    base: str = ""
    """Row of the same table and seed whose model stays frozen: this row is trained on it with stage=downstream."""
    until: str = ""
    """`until` of the base's summaries on which a downstream model is trained."""

    def served(self, name: str) -> dict[str, TableLine]:
        """Names of the row's lines in the table -> how each line is served."""
        lines = {
            name if codec is Codec.int8 else f"{name}, {codec.value} store": TableLine(codec) for codec in self.codecs
        }
        lines |= {f"{name}, tail {length}": TableLine(tail_len=length) for length in self.tails}
        lines |= {f"{name}, tail {n} not in the summary": TableLine(tail_len=n, staleness=n) for n in self.apart}
        return lines | {f"{name}, {events:,} events old": TableLine(staleness=events) for events in self.staleness}


@dataclass(frozen=True, slots=True)
class Table:
    """Models over one log and one split."""

    experiment: str
    """File of conf/experiment: the split and the settings that all rows share."""
    data: str
    """Name of the log: the folder of a MovieLens set or of a simulation."""
    rows: dict[str, TableRow]
    words: tuple[str, ...] = ()
    """Arguments of `vista train` for all rows, in addition to the experiment."""
    simulation: dict[str, Any] | None = None
    """Arguments of `vista simulate` that create the log; None for a MovieLens set."""
    popularity: bool = False
    """Whether to report popularity (`vista.evaluation.popularity`)."""
    costs: bool = False
    """Whether to report events per second of training, refresh time per user and time per request (serving_cost.py)."""
    recall: bool = False
    """Whether to report the recall of the summaries (`vista.evaluation.recall`)."""
    validation: bool = False
    """Whether to report the validation metrics of the exported pass, by which a row is chosen."""


BOTH = (Codec.int8, Codec.float32)
TAILS = (2, 4, 8, 16)
AGES = (10, 100, 1000)
K0 = ("model.num_seeds=0",)
# The default layers of stage 2 until November 2026. A table with this setting was not rerun with today's default, so
# its rows can only be compared with one another.
SOFTMAX = ("model.target_attention=softmax",)
COUNTING_BASELINES = {
    "popularity": TableRow(0.1, untrained="popularity"),
    "transitions": TableRow(0.1, untrained="transitions"),
}
ORACLE = {"oracle": TableRow(0.1, untrained="oracle")}


def _movielens(data: str, minutes: float, more: dict[str, TableRow]) -> Table:
    """`minutes` is the estimated time of the row `vista`."""
    rows = {
        "vista": TableRow(minutes, codecs=BOTH, tails=TAILS),
        "tail-only": TableRow(0.4 * minutes, K0, tails=TAILS),
        "sasrec": TableRow(0.7 * minutes, ("model=sasrec",)),
        "hstu": TableRow(0.9 * minutes, ("model=hstu",)),
        **more,
        **COUNTING_BASELINES,
    }
    return Table(data, data, rows, costs=True)


def _timeless(minutes: float) -> dict[str, TableRow]:
    without = "model.use_time=false"
    return {
        "no-times": TableRow(minutes, (without,)),
        "sasrec-no-times": TableRow(0.7 * minutes, ("model=sasrec", without)),
        "hstu-no-times": TableRow(0.9 * minutes, ("model=hstu", without)),
    }


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
        # Every event is a label, as in SASRec and HSTU, and the tail is twice as long.
        "vista-all-labels": TableRow(20, all_labels),
        "sasrec": TableRow(20, ("model=sasrec", *four_passes)),
        "hstu": TableRow(25, ("model=hstu", *four_passes)),
        "din": TableRow(10, ("model=din",)),
        "sim": TableRow(10, ("model=sim",)),
        # Uses the simulation's true topics, which no other model gets.
        "sim-hard": TableRow(
            10, ("model=sim", "model.search=hard", "data.item_categories=items.parquet", "data.category_column=topic")
        ),
        "twin": TableRow(8, ("model=twin",)),
        # With the learning rate that the table `tuning` chooses for all three, and about equal training times.
        "vista-tuned": TableRow(16, ("optim.learning_rate=0.004",)),
        "sim-tuned": TableRow(16, ("model=sim", f"optim.epochs={7 * lighter}", "optim.learning_rate=0.004")),
        "twin-tuned": TableRow(18, ("model=twin", f"optim.epochs={8 * lighter}", "optim.learning_rate=0.004")),
    }
    words = (
        f"data.windows_per_chunk={windows}",
        f"optim.epochs={4 * lighter}",
        f"optim.validate_every={lighter}",
        f"data.staleness_events={events_per_user * 300 // 4000}",
        f"data.chunk_len={max(16_384, 4 * events_per_user)}",  # whole histories, whose lengths spread around the mean
    )
    sizes = {"num_users": num_users, "events_per_user": events_per_user, "impressions_per_user": 360_000 // num_users}
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
        "no-reconstruction": (0.8, ("optim.reconstruction_weight=0",)),
        "reconstruction-0.2": (1, ("optim.reconstruction_weight=0.2",)),
        "reconstruction-1": (1, ("optim.reconstruction_weight=1",)),
        "bidirectional": (1.5, ("model=bidirectional",)),
        "bidirectional-1-cut": (1.2, ("model=bidirectional", "data.num_cuts=1")),
        "bidirectional-4-cuts": (2, ("model=bidirectional", "data.num_cuts=4")),
        "1-window": (0.5, ("data.windows_per_chunk=1",)),
        "cuts-every-8": (1.8, ("data.label_spacing=8",)),
        "decay-position": (1, ("model.decay=position", f"{horizons}=[0,256,64,16]")),
        "decay-time": (1, ("model.decay=time", f"{horizons}=[0,365,90,30]")),
        "no-convolution": (0.95, ("model.conv_width=1",)),
        "convolution-5": (1.05, ("model.conv_width=5",)),
        "phi-relu": (1, ("model.activation=relu",)),
        "phi-identity": (1, ("model.activation=identity",)),
        "no-normalization": (1, ("model.normalization=none",)),
        "normalization-0.5": (1, ("model.normalization_alpha=0.5",)),
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


def _frequencies(minutes: float) -> dict[str, TableRow]:
    """Negatives drawn by frequency, which is counted exactly or by a sketch."""
    drawn = ("data.negative_power=1", "data.num_negatives=512")
    return {
        "drawn-by-frequency": TableRow(minutes, drawn),
        "drawn-by-count-min": TableRow(minutes, (*drawn, "data.frequencies=count_min")),
    }


def _trials() -> dict[str, TableRow]:
    """The same trials and about the same training time for every model, which determines the number of passes."""
    passes = {"vista": 5, "tail-only": 5, "sasrec": 6, "hstu": 4, "din": 6, "sim": 7, "twin": 8}
    return {
        f"{model}, rate {rate:g}": TableRow(
            4.5, (f"model={model}", f"optim.epochs={count}", f"optim.learning_rate={rate}")
        )
        for rate in (0.002, 0.001, 0.004)
        for model, count in passes.items()
    }


TWO_SOFTMAX = (*SOFTMAX, "model.num_target_layers=2")
ML_1M = {
    "2-layers": TableRow(20, ("model.num_target_layers=2",)),
    "hstu-8-layers": TableRow(35, ("model=hstu", "model.num_layers=8")),
    # About as many parameters as vista's 617,000: 617,000 and 619,000. Of vista's, 55,000 belong to the decoder, which
    # is not used in serving, and 41,000 are never read: those of events after the last layer of stage 1, and of gaps
    # that this data set does not have.
    "sasrec-equal": TableRow(30, ("model=sasrec", "model.dim=116")),
    "hstu-equal": TableRow(45, ("model=hstu", "model.num_layers=8", "model.dim=84")),
    # The value of the summary's size, with two softmax layers instead of eight pointwise ones.
    "softmax": TableRow(28, TWO_SOFTMAX, codecs=BOTH, tails=TAILS),
    "softmax-tail-only": TableRow(19, (*K0, *TWO_SOFTMAX), tails=TAILS),
    "softmax-K=4": TableRow(26, ("model.num_seeds=4", *TWO_SOFTMAX)),
    "softmax-K=32": TableRow(35, ("model.num_seeds=32", *TWO_SOFTMAX)),
    # Spends the bytes of 16 int8 rows of 64 on 288 more item ids of 4 bytes. In training, positions see 161 to 320.
    "softmax-raw-ids": TableRow(50, (*K0, *TWO_SOFTMAX, "model.tail_len=320", "data.label_spacing=160")),
    # Twice as wide. Events of unknown items, so that three times the weights do not learn histories by heart; and tails
    # of 1 to 64 events in training, so that the 32 that it is also served with are no longer than most. Its answer is
    # "tail 32 not in the summary" (docs/research-log.md).
    "vista-wide": TableRow(
        85,
        (
            *("model.dim=128", "model.dropout=0.25", "data.unknown_share=0.15"),
            *("model.tail_len=64", "data.label_spacing=64"),
        ),
        codecs=BOTH,
        tails=(2, 4, 8, 16, 32),
        apart=(16, 32),
    ),
    # Its baseline: the same width, passes and share of unknown items, over the last 200 events.
    "hstu-wide": TableRow(
        65, ("model=hstu", "model.num_layers=8", "model.dim=128", "model.dropout=0.25", "data.unknown_share=0.15")
    ),
    "softmax-wide": TableRow(55, (*TWO_SOFTMAX, "model.dim=128", "model.dropout=0.3"), codecs=BOTH, tails=TAILS),
}
TABLES = {
    "ml-1m": _movielens("ml-1m", 36, ML_1M),
    "ml-1m-half": _movielens("ml-1m-half", 17, _timeless(17)),
    "ml-100k": _movielens("ml-100k", 6, _timeless(6)),
    "ml-latest-small": _movielens("ml-latest-small", 7, _timeless(7)),
    "simulation": SIMULATION,
    # The same simulation with shorter and longer histories; the table `simulation` has 4,000 events.
    "length-200": _simulation("simulation-200", 24_000, 200),
    "length-1k": _simulation("simulation-1k", 4800, 1000),
    "length-16k": _simulation("simulation-16k", 300, 16_000),
    "length-64k": _simulation("simulation-64k", 75, 64_000),
    "downstream": _downstream(),
    "embeddings": Table("ml-100k", "ml-100k", _embeddings(), SOFTMAX),
    "popularity": Table(
        "ml-100k", "ml-100k", _logq_strengths(6) | _frequencies(6) | COUNTING_BASELINES, SOFTMAX, popularity=True
    ),
    "ablations-ml-100k": Table("ml-100k", "ml-100k", _ablations(6, AGES), recall=True),
    # Half the passes of the table ml-1m-half.
    "ablations-ml-1m-half": Table("ml-1m-half", "ml-1m-half", _ablations(8.5, AGES), ("optim.epochs=10",), recall=True),
    # Half the events per history and three passes, so that a run takes about five minutes.
    "ablations-simulation": Table(
        "simulation",
        "simulation-2k",
        _ablations(4.5, AGES) | ORACLE,
        ("data.windows_per_chunk=32", "data.staleness_events=150", "optim.epochs=3"),
        {"num_users": 1200, "events_per_user": 2000},
        recall=True,
    ),
    # A quarter of the events of the table `simulation`.
    "tuning": Table(
        "simulation",
        "simulation-2k-600",
        _trials() | ORACLE,
        ("data.windows_per_chunk=32", "data.staleness_events=150", "optim.validate_every=1"),
        {"num_users": 600, "events_per_user": 2000},
        validation=True,
    ),
}
"""Name -> table; results are in docs/results/<name>.jsonl and <name>.md."""

LENGTHS = {"length-200": 200, "length-1k": 1_000, "simulation": 4_000, "length-16k": 16_000, "length-64k": 64_000}
"""The tables of one simulation -> mean events per history."""


def length_case(length: int, row: str) -> str:
    """Case of bench_lengths.py for a row's request; plot_lengths.py finds it by this name."""
    return f"{length:,} events: {row}"
