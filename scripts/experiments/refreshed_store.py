"""Quality on impressions with a store that is refreshed on a schedule (`data.refresh_days`), as in service.

`vista evaluate` measures one refresh. In a split by time, its summaries grow old while the test part goes on: they lack
the events between the refresh and the tail. With a schedule, each impression is scored from the last refresh before it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vista.evaluation.answers import ScorerAnswers
from vista.evaluation.cases import impression_cases, with_tasks
from vista.evaluation.protocol import impression_metrics
from vista.log.event_log import EventLog
from vista.log.splits import Until, part_times, refresh_times
from vista.model.vista_model import VistaModel
from vista.refresh import RefreshOptions, refresh
from vista.scorer import Scorer


def scheduled_metrics(
    model: VistaModel, log: EventLog, store: Path, options: RefreshOptions, part: str, requests_per_batch: int
) -> dict[str, float]:
    """Metrics of the impressions of a part of the model's split by time.

    Args:
        store: folder of a store, which is refreshed once per period.
    """
    begin, end = part_times(model.data, part)
    assert begin is not None
    cases = with_tasks(impression_cases(log, begin, end), model.schema.tasks)
    times = refresh_times(model.data, part, int(cases.timestamp.max(initial=begin)) + 1)
    period = np.searchsorted(times, cases.timestamp, side="right") - 1
    out = np.zeros(cases.label.shape, np.float32)
    for index, time in enumerate(times.tolist()):
        own = np.flatnonzero(period == index)
        refresh(model, log, store, until=Until(before=time), options=options)
        with Scorer.open(model, store) as scorer:
            answers = ScorerAnswers(scorer, log, requests_per_batch=requests_per_batch)
            out[own] = answers.probabilities(cases.part(own))
    return impression_metrics(cases, out)
