"""Measuring the rows of a table of labels: answers to the impressions of validation and test, as served.

Answers lie in the folder of the row, so that the stack can read those of other rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from vista.arrays import Float32s
from vista.config import DataConfig
from vista.evaluation.answers import RawHistoryAnswers, ScorerAnswers
from vista.evaluation.cases import ImpressionCases, impression_cases, with_tasks
from vista.evaluation.label_baselines import LabelFeatures, grown_trees, label_baselines
from vista.evaluation.protocol import USERS_PER_BATCH
from vista.files import make_folders
from vista.log.event_log import EventLog
from vista.log.splits import Until, part_times, refresh_times
from vista.model.baselines.history_model import HistoryModel
from vista.model.ranking_model import RankingModel
from vista.model.vista_model import VistaModel
from vista.refresh import RefreshOptions, refresh
from vista.scorer import Scorer

PARTS = ("validation", "test")


def part_cases(log: EventLog, data: DataConfig, part: str, task: str) -> ImpressionCases:
    """The impressions of a part of a split by time."""
    begin, end = part_times(data, part)
    assert begin is not None
    return with_tasks(impression_cases(log, begin, end), [task])


def scheduled_answers(
    model: VistaModel, log: EventLog, store: Path, options: RefreshOptions, part: str, cases: ImpressionCases
) -> Float32s:
    """Probabilities of impressions of a part of the model's split by time, with a store refreshed on a schedule.

    `vista evaluate` measures one refresh, whose summaries grow old while the part goes on. Here, as in service
    (`data.refresh_days`), each impression is scored from the last refresh before it.

    Args:
        store: folder of a store, which is refreshed once per period.
    """
    begin, _ = part_times(model.data, part)
    assert begin is not None
    times = refresh_times(model.data, part, int(cases.timestamp.max(initial=begin)) + 1)
    period = np.searchsorted(times, cases.timestamp, side="right") - 1
    out = np.zeros(cases.label.shape, np.float32)
    for index, begin_ms in enumerate(times.tolist()):
        own = np.flatnonzero(period == index)
        refresh(model, log, store, until=Until(before=begin_ms), options=options)
        with Scorer.open(model, store) as scorer:
            answers = ScorerAnswers(scorer, log, requests_per_batch=USERS_PER_BATCH)
            out[own] = answers.probabilities(cases.part(own))
    return out


def trained_answers(
    model: RankingModel, log: EventLog, folder: Path, task: str
) -> Iterator[tuple[str, ImpressionCases, Float32s]]:
    """(part, cases, answers) of a model: of vista on both parts, of others, which read raw histories, on test alone."""
    for part in PARTS:
        cases = part_cases(log, model.data, part, task)
        if isinstance(model, VistaModel):
            yield part, cases, scheduled_answers(model, log, folder / "scheduled", RefreshOptions(), part, cases)
        elif part == "test":
            assert isinstance(model, HistoryModel)
            yield part, cases, RawHistoryAnswers(model, log, model.rows_of(log.items)).probabilities(cases)


_ANSWERED: dict[str, Mapping[str, Float32s]] = {}
"""Answers of all baselines by log, split, and task: the rows of a call share them."""


def baseline_answers(log: EventLog, data: DataConfig, task: str) -> Mapping[str, Float32s]:
    """Answers of all baselines to the impressions of the test, by name."""
    key = f"{log.path} {data} {task}"
    if key not in _ANSWERED:
        _ANSWERED[key] = label_baselines(log, data, part_cases(log, data, "test", task), trained=True)
    return _ANSWERED[key]


def stacked_answers(log: EventLog, data: DataConfig, task: str, files: Sequence[Mapping[str, Path]]) -> Float32s:
    """Answers to the test of trees over the answers of other rows, and over all that the trees of the baselines read.

    They are fitted to the validation part, whose labels no row was trained on.

    Args:
        files: {part: file of the answers}, for each of the other rows.
    """
    features, inputs, labels = LabelFeatures(log, data, task), {}, {}
    for part in PARTS:
        cases = part_cases(log, data, part, task)
        own = [features.counters(cases), features.products(cases)]
        inputs[part] = np.column_stack([*own, *(np.load(each[part])[:, 0] for each in files)])
        labels[part] = cases.label[:, 0]
    trees = grown_trees(inputs["validation"], labels["validation"])
    return trees(inputs["test"]).astype(np.float32)[:, None]


def answers_file(folder: Path, line: str, part: str) -> Path:
    """Where a row keeps its answers, float32 [N, 1]."""
    return folder / "answers" / f"{line}, {part}.npy"


def save_answers(folder: Path, line: str, part: str, answers: Float32s) -> None:
    """Write the answers of a row."""
    file = answers_file(folder, line, part)
    make_folders(file.parent)
    np.save(file, answers)
