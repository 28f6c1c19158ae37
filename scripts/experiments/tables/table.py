"""A table: models over one log and one split."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from scripts.experiments.tables.table_row import TableRow


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
