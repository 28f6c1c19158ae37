"""A run, measured as in service."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from vista.config import EvaluateConfig, RefreshOptions
from vista.errors import ConfigError
from vista.evaluation.evaluate import EvaluationReport, evaluate_model, evaluate_scorer
from vista.log.event_log import EventLog
from vista.log.splits import split_until
from vista.model.baselines.history_model import HistoryModel
from vista.model.ranking_model import RankingModel
from vista.model.registry import load_model
from vista.model.vista_model import VistaModel
from vista.refresh import refresh
from vista.report.trained_run import TrainedRun
from vista.scorer import Scorer


@dataclass(frozen=True, slots=True)
class MeasuredRun:
    """A run and its evaluation."""

    name: str
    record: TrainedRun
    model: RankingModel
    evaluation: EvaluationReport
    scorer: Scorer | None
    """None for a model without summaries. It is open as long as the stack that it was measured with."""

    @classmethod
    def of(
        cls,
        name: str,
        record: TrainedRun,
        log: EventLog,
        config: EvaluateConfig,
        stack: ExitStack,
        *,
        store: str | None = None,
        key: bytes | None = None,
        scratch: Path,
    ) -> MeasuredRun:
        """Load a run's model and evaluate it, with summaries from a store if it has summaries.

        Args:
            name: how the report calls it.
            config: what to ask; what it says about files is not read.
            stack: closes the scorer, and removes the temporary store.
            store: a store of the model's summaries; None refreshes one.
            key: authenticates the records of `store`.
            scratch: folder in which a temporary store is made.

        Raises:
            CheckpointError, StoreError: the model or the store cannot be read, or the store is of another model.
            LeakageError, ConfigError: as `evaluate_scorer`.
        """
        model = load_model(record.model_folder)
        if isinstance(model, HistoryModel):
            if store is not None:
                raise ConfigError(f"store={store}: the model of {record.folder} has no summaries; leave store out")
            return cls(name, record, model, evaluate_model(model, log, config), None)
        assert isinstance(model, VistaModel)
        if store is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=".report-", dir=scratch))
            options = RefreshOptions(verify_log=False, progress=config.progress)
            store = str(Path(folder) / "store")
            refresh(model, log, store, until=split_until(model.data, config.split), options=options)
        scorer = stack.enter_context(Scorer.open(model, store, key=key))
        return cls(name, record, model, evaluate_scorer(scorer, log, config), scorer)
