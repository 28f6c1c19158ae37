"""A table: models over one log and one split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from scripts.experiments.tables.table_row import TableRow


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
    recall: bool = False
    """Whether to report the recall of the summaries (`vista.evaluation.recall`)."""
    validation: bool = False
    """Whether to report the validation metrics of the exported pass, by which a row is chosen."""
    curve: bool = False
    """Whether a line lists the validations of its run, for `scripts.experiments.plot_minutes`."""
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
    (`scripts.experiments.yambda_metrics`) alone."""
    pairs: tuple[tuple[str, str], ...] = ()
    """With `windows`: (row, reference): the difference row − reference is reported, user by user."""
