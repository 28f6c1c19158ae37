"""A table of results: models over one log and one split, its rows, and what several tables share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vista.config.checks import Codec


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
    untrained: str = ""
    """Name of a baseline (`vista.evaluation.baselines`), or of a predictor that knows the simulation
    (`vista.simulation.simulate`), such as "oracle". They are measured once, without training."""
    base: str = ""
    """Row of the same table and seed whose model stays frozen: this row is trained over it as a base."""
    texts: str = ""
    """What the features of items have of their texts, in addition to the set's: "vectors", or semantic ids of these
    ("codes"); "" for neither. Only for sets of which `vista items embed` knows the columns of text."""
    until: str = ""
    """`until` of the base's summaries on which a downstream model is trained."""
    trial: bool = False
    """In a table with `windows`: measure it on validation only. It is one of the trials that choose a setting."""

    def served(self, name: str) -> dict[str, TableLine]:
        """Names of the row's lines in the table -> how each line is served."""
        lines = {
            name if codec is Codec.int8 else f"{name}, {codec.value} store": TableLine(codec) for codec in self.codecs
        }
        lines |= {f"{name}, tail {length}": TableLine(tail_len=length) for length in self.tails}
        lines |= {f"{name}, summary {n} events old, tail {n}": TableLine(tail_len=n, staleness=n) for n in self.apart}
        return lines | {f"{name}, {events:,} events old": TableLine(staleness=events) for events in self.staleness}


BOTH = (Codec.int8, Codec.float32)
TAILS = (2, 4, 8, 16)
AGES = (10, 100, 1000)
K0 = ("model.num_seeds=0",)
WITHOUT_COUNTERS = ("model.counter_keys=[]", "model.temperature=0.05")
# The default layers of stage 2 until November 2026. A table with this setting was not rerun with today's default, so
# its rows can only be compared with one another.
SOFTMAX = ("model.target_attention=softmax",)
COUNTING_BASELINES = {
    "popularity": TableRow(0.1, untrained="popularity"),
    "transitions": TableRow(0.1, untrained="transitions"),
}
LABEL_BASELINES = (
    *("item rate", "item and user rates", "counters", "pooled vectors"),
    *("label trees", "pooled label vectors"),
)
"""Baselines of `vista.evaluation.label_baselines`."""
CLICK = "click"
"""Label of a simulation that they answer."""
ORACLE = {"oracle": TableRow(0.1, untrained="oracle")}


@dataclass(frozen=True, slots=True)
class Table:
    """Models over one log and one split."""

    experiment: str
    """File of conf/experiment with the settings that all rows share; "" for the defaults."""
    data: str
    """Name of the log: a data set of sets.py, whose split applies, or a simulation."""
    rows: dict[str, TableRow]
    words: tuple[str, ...] = ()
    """Arguments of `vista train` for all rows, in addition to the experiment."""
    simulation: dict[str, Any] | None = None
    """Arguments of `vista simulate` that create the log; None for a data set."""
    popularity: bool = False
    """Whether to report popularity (`vista.evaluation.popularity_report`)."""
    costs: bool = False
    """Whether to report events per second of training, refresh time per user and time per request (serving_cost.py)."""
    validation: bool = False
    """Whether to report the validation metrics of the exported pass, by which a row is chosen."""
    curve: bool = False
    """Whether a line lists the validations of its run."""
    windows: bool = False
    """Whether to measure the window after a question (`vista evaluate target=window`), on validation and test, instead
    of next items and impressions on test. With optim.validate_every=0, each part is answered by a model that is trained
    on all events before its labels (`scripts.experiments.table_run.part_configs`)."""
    cold: bool = False
    """With `windows`: whether to report items without events before the part, too."""
    asked: Mapping[str, Any] = field(default_factory=dict)
    """Keys of EvaluateConfig that differ from those of the other tables."""
    as_yambda: bool = False
    """Whether to measure the window after a question on test, and to report the metrics of Yambda's benchmark
    (`yambda_metrics` of row_measurement.py) alone."""
    task: str = ""
    """Label of impressions to measure, with errors over users: vista on validation and test, others on test."""
    pairs: tuple[tuple[str, str], ...] = ()
    """With `windows` or `task`: (row, reference): the difference row − reference is reported, user by user."""

    def answers_labels(self, row: TableRow) -> bool:
        """Whether the row is a baseline that answers a label of impressions, and does not rank items."""
        return bool(row.untrained) and (
            bool(self.task) or (self.simulation is not None and row.untrained in LABEL_BASELINES)
        )
